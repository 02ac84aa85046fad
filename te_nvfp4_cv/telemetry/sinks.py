"""Send telemetry's records to JSON lines, Weights & Biases or TensorBoard; only a sink that is used needs its package.

JSONL never overwrites a file. W&B is offline unless WANDB_MODE says otherwise, and no trouble with it (no package, no
login, no network) ends a run: the run continues, offline if possible, with one warning. A disk that fails turns its
sink off, with one warning.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from te_nvfp4_cv.errors import value_error, warn_once
from te_nvfp4_cv.telemetry.records import FORMAT, cannot_write, dumps, numbered


# Each method returns at once, and is not just empty: type checkers would take empty ones for abstract.
class Sink(Protocol):
    """The methods that a sink needs; records are those of records.py. Derive from it to ignore what you do not want.

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> class Losses(nv.telemetry.Sink):
        ...     def scalars(self, step, values):
        ...         print(step, values["train/loss"])
        >>> nv.telemetry.attach(torch.nn.Linear(32, 16), sinks=[Losses()]).scalars(3, {"train/loss": 0.5})
        3 0.5
    """

    def start(self, header: dict[str, Any]) -> None:
        """Take the run's header, which comes first."""
        return

    def step(self, record: dict[str, Any]) -> None:
        """Take the record of a sampled step."""
        return

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Take figures of the run itself."""
        return

    def alarm(self, record: dict[str, Any]) -> None:
        """Take an alarm of the step that came last."""
        return

    def image(self, name: str, path: Path, step: int) -> None:
        """Take a picture."""
        return

    def close(self, summary: dict[str, Any] | None = None) -> None:
        """Finish; nothing comes afterwards."""
        return


def fresh_path(path: str | os.PathLike[str]) -> Path:
    """Return `path`, or the first of path_2, path_3, ... that does not exist yet.

    Example:
        >>> import tempfile, te_nvfp4_cv as nv
        >>> folder = tempfile.mkdtemp()
        >>> open(f"{folder}/telemetry.jsonl", "w").close()
        >>> nv.telemetry.fresh_path(f"{folder}/telemetry.jsonl").name
        'telemetry_2.jsonl'
    """
    first = Path(path)
    paths = (first.with_name(stem + first.suffix) for stem in numbered(first.stem))
    return next(path for path in paths if not path.exists())


class _Log(Sink):
    """A sink that its first fault turns off, with one warning, because a log must never cost a training run."""

    _faults: type[Exception] = OSError

    def __init__(self, lost: str) -> None:
        self._target: Any = None  # what records are written to: None until `start`, and after a fault
        self._lost = lost

    def _try(self, act: Callable[[Any], Any]) -> None:
        """Call act(target) if there is a target. A fault in it ends the log and nothing else."""
        if self._target is None:
            return
        try:
            act(self._target)
        except self._faults as error:
            self._target = None
            warn_once(self._lost, f"{self._lost}: {error}")


class JSONL(_Log):
    """Write each record at once as a line of a file. Only the first rank opens it, when telemetry is attached.

    Args:
        path: a file that does not exist yet; its folder is made.
        resume: continue the file that is there; a last line that was cut off is removed.
    Raises:
        ValueError: (when attached) the file is there and resume is False, it is no telemetry file, or it cannot be
            written.

    Example:
        >>> import tempfile, torch, te_nvfp4_cv as nv
        >>> path = tempfile.mkdtemp() + "/telemetry.jsonl"
        >>> watch = nv.telemetry.attach(torch.nn.Linear(32, 16), sinks=[nv.telemetry.JSONL(path)])
        >>> watch.scalars(0, {"train/loss": 0.5})
        >>> open(path).read().count("\\n")  # the header, and one record
        2
    """

    def __init__(self, path: str | os.PathLike[str], resume: bool = False) -> None:
        super().__init__(f"nvfp4 telemetry: {path} is written no further")
        self.path, self.resume = Path(path), resume

    def start(self, header: dict[str, Any]) -> None:
        if self.path.exists() and not self.resume:
            raise value_error(
                f"telemetry: {self.path} is there already.",
                got="a file of another run",
                needs="a new file, because runs never overwrite each other",
                fix="telemetry.fresh_path(path) gives another path; resume=True continues the file",
            )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                self._repair(self.path.read_bytes())
            # Opened once now: a folder without rights should fail at the start, not in the first sampled step.
            self.path.open("a", encoding="utf-8").close()
        except OSError as error:
            raise cannot_write(self.path, error) from error
        self._target = self.path
        self.step(header)

    def _repair(self, content: bytes) -> None:
        """Cut off a last line that is not whole, if the file is one of telemetry's."""
        first, newline, _ = content.partition(b"\n")
        # Even the header may have been cut off; then only its first bytes can tell.
        ours = FORMAT.encode() in first if newline else b'{"kind":"run"'.startswith(first[:13])
        if content and not ours:
            raise value_error(
                f"telemetry: {self.path} is no telemetry file.",
                got=repr(first[:60]), needs="a file that telemetry wrote, to continue it", fix="choose another path"
            )
        # Without this the next record would be appended to the half line, and both would be lost.
        if content and not content.endswith(b"\n"):
            os.truncate(self.path, content.rfind(b"\n") + 1)

    def step(self, record: dict[str, Any]) -> None:
        def append(path: Path) -> None:
            # Opened again for each line, so that a run that is killed loses no record.
            with path.open("a", encoding="utf-8") as file:
                file.write(dumps(record) + "\n")

        self._try(append)

    alarm = step  # both records are written as they are

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.step({"kind": "scalars", "step": step, "values": values})


# ---- what charts show of a record -----------------------------------------------------------------------------------


def figures(layers: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """List the figures that are worth a curve, by the names layer/figure and layer/tensor/figure."""
    for layer, held in layers.items():
        for key in ("flip_rate", "oscillation"):
            if held.get(key) is not None:
                yield f"{layer}/{key}", held[key]
        ratio = held.get("gradient", {}).get("ratio")
        if ratio is not None:
            yield f"{layer}/gradient_to_noise", ratio
        for tensor, values in held["tensors"].items():
            for key in ("sqnr_db", "correlation", "underflow", "saturation"):
                if key in values:
                    yield f"{layer}/{tensor}/{key}", values[key]
            for key in ("mean", "std", "kurtosis", "amax"):
                yield f"{layer}/{tensor}/{key}", values["raw"][key]


def histograms(layers: dict[str, Any]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """List the name, counts and edges of the histogram of each raw tensor that has values other than 0."""
    for layer, held in layers.items():
        for tensor, values in held["tensors"].items():
            counts, amax = np.asarray(values["raw"]["histogram"]), values["raw"]["amax"]
            if counts.sum() and amax:
                yield f"{layer}/{tensor}/values", counts, np.linspace(-amax, amax, len(counts) + 1)


# ---- Weights & Biases -----------------------------------------------------------------------------------------------


class WandB(_Log):
    """Send records to a run of Weights & Biases, with the records' steps as the axis.

    Only the first rank sends, beginning when telemetry is attached. Without `run` it begins a run of its own, offline
    unless `mode` or WANDB_MODE says otherwise, and a run that you have open is left alone. With `run` it joins yours:
    your figures keep their axis, those of telemetry have the axis "nvfp4/step", and the run stays open at the end.

    Args:
        run: the open run to join, from wandb.init. A text is taken as the project.
        project: the project of a new run, as for wandb.init.
        folder: where W&B writes its files; wandb.init calls it `dir`, which is accepted, too.
        **init: what else wandb.init takes for a new run: group, name, config, tags, mode, ...
    Raises:
        ValueError: `run` comes together with arguments for a new run.

    Example:
        >>> import te_nvfp4_cv as nv
        >>> sink = nv.telemetry.WandB(project="shapes", group="unet", name="nvfp4", folder="runs")
        >>> watch = nv.telemetry.attach(model, every=100, sinks=[sink])  # doctest: +SKIP
        >>> joined = nv.telemetry.WandB(wandb.run)  # doctest: +SKIP
    """

    _faults = Exception  # W&B's errors are of many classes

    def __init__(
        self,
        run: Any = None,
        project: str | None = None,
        *,
        folder: str | os.PathLike[str] | None = None,
        **init: Any,
    ) -> None:
        super().__init__("W&B takes no more records, the run continues without it")
        if isinstance(run, str) and project is None:
            run, project = None, run
        if folder is not None:
            init["dir"] = str(folder)
        self._options = ({} if project is None else {"project": project}) | init
        if run is not None and self._options:
            raise value_error(
                "telemetry: WandB joins a run or begins one.",
                got=f"run={run!r:.60} and {', '.join(self._options)}",
                needs="either an open run or what wandb.init takes for a new one",
                fix="WandB(run) alone; give the rest to wandb.init",
            )
        self._run, self._axis = run, "step" if run is None else "nvfp4/step"
        self._charts: set[str] = set()  # of a run that was joined: what has the axis of telemetry
        self._wandb: Any = None  # the module, imported when the run begins

    def _begin(self) -> None:
        try:
            import wandb
        except Exception as error:  # a broken installation may raise anything
            missing = isinstance(error, ImportError)
            reason = "wandb is not installed" if missing else f"wandb cannot be imported ({error})"
            warn_once("wandb absent", f"{reason}: no W&B log (pip install wandb); all else is written")
            return
        self._wandb = wandb
        if self._run is not None:
            self._target = self._run
            self._try(lambda run: run.define_metric(self._axis))
            return
        modes: list[Any] = [self._options.get("mode") or os.environ.get("WANDB_MODE") or "offline", "offline"]
        for mode in dict.fromkeys(modes):  # without repetition: offline is tried once
            try:
                if "dir" in self._options:
                    Path(self._options["dir"]).mkdir(parents=True, exist_ok=True)
                # create_new leaves a run that the user may have open as it is.
                settings = wandb.Settings(silent=True, console="off", init_timeout=30, reinit="create_new")
                run = wandb.init(**({"settings": settings} | self._options | {"mode": mode}))
                run.define_metric(self._axis)
                # W&B numbers its log calls by itself. The records' own steps are the axis here.
                run.define_metric("*", step_metric=self._axis)
                self._target = run
                return
            except Exception as error:
                then = "the run continues without W&B" if mode == "offline" else "the run continues offline"
                warn_once(f"wandb {mode}", f"W&B ({mode}) could not start, {then}: {error}")

    def _log(self, step: int, values: dict[str, Any], charts: Iterable[str]) -> None:
        """Log the values of a step; `charts` are their names, or patterns of them."""

        def log(run: Any) -> None:
            if self._run is not None:
                # Not "*", as in a run of our own: the user's figures have an axis already.
                for chart in set(charts) - self._charts:
                    run.define_metric(chart, step_metric=self._axis)
                self._charts.update(charts)
            run.log({self._axis: step, **values})

        self._try(log)

    def start(self, header: dict[str, Any]) -> None:
        self._begin()
        shown = {key: header[key] for key in ("model", "recipe", "backend", "every", "started")}
        # allow_val_change: a run that is resumed in W&B has this entry already.
        self._try(lambda run: run.config.update({"telemetry": shown}, allow_val_change=True))

    def step(self, record: dict[str, Any]) -> None:
        if self._target is None:
            return
        values: dict[str, Any] = dict(figures(record["layers"]))
        for name, counts, edges in histograms(record["layers"]):
            values[name] = self._wandb.Histogram(np_histogram=(counts, edges))
        self._log(record["step"], values, [f"{layer}/*" for layer in record["layers"]])

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._log(step, values, values)

    def alarm(self, record: dict[str, Any]) -> None:
        name = f"alarm/{record['layer']}"
        self._log(record["step"], {name: 1}, [name])

    def image(self, name: str, path: Path, step: int) -> None:
        if self._target is not None:
            self._log(step, {name: self._wandb.Image(str(path))}, [name])

    def close(self, summary: dict[str, Any] | None = None) -> None:
        self._try(lambda run: run.summary.update(summary or {}))
        if self._run is None:
            self._try(lambda run: run.finish())
        self._target = None


# ---- TensorBoard ----------------------------------------------------------------------------------------------------


class TensorBoard(_Log):
    """Write scalars and histograms for TensorBoard into a new event file of a folder.

    Only the first rank begins the file, when telemetry is attached. A disk that fails later turns the sink off.

    Args:
        log_dir: the folder where the event file goes, as for torch's SummaryWriter.
        purge_step: the step from which a resumed run starts; what the folder shows from there on is hidden, because it
            is about to come again.
    Raises:
        ValueError: (when attached) tensorboard is not installed, or the folder cannot be written.

    Example:
        >>> import te_nvfp4_cv as nv
        >>> sink = nv.telemetry.TensorBoard("runs/nvfp4")
        >>> watch = nv.telemetry.attach(model, every=100, sinks=[sink])  # doctest: +SKIP
    """

    def __init__(self, log_dir: str | os.PathLike[str], purge_step: int | None = None) -> None:
        super().__init__(f"nvfp4 telemetry: {log_dir} is written no further")
        self.log_dir, self.purge_step = log_dir, purge_step

    def start(self, header: dict[str, Any]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise value_error(
                "telemetry: tensorboard is not installed.", got=str(error), needs="the package tensorboard",
                fix="pip install tensorboard, or leave the sink out",
            ) from error
        try:
            self._target = SummaryWriter(str(self.log_dir), purge_step=self.purge_step)
        except OSError as error:
            raise cannot_write(self.log_dir, error) from error
        text = json.dumps({key: value for key, value in header.items() if key != "layers"}, indent=1)
        self._try(lambda writer: writer.add_text("run", f"```\n{text}\n```"))

    def step(self, record: dict[str, Any]) -> None:
        def write(writer: Any) -> None:
            for name, value in figures(record["layers"]):
                writer.add_scalar(name, value, record["step"])
            for name, counts, edges in histograms(record["layers"]):
                centres = (edges[1:] + edges[:-1]) / 2
                # Raw, because the values are gone: TensorBoard gets the counts, and sums as from the bins' centres.
                writer.add_histogram_raw(
                    name, min=float(edges[0]), max=float(edges[-1]), num=int(counts.sum()),
                    sum=float((counts * centres).sum()), sum_squares=float((counts * centres**2).sum()),
                    bucket_limits=edges[1:].tolist(), bucket_counts=counts.tolist(), global_step=record["step"],
                )

        self._try(write)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        def write(writer: Any) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        self._try(write)

    def alarm(self, record: dict[str, Any]) -> None:
        self._try(lambda writer: writer.add_text(f"alarm/{record['layer']}", record["text"], record["step"]))

    def image(self, name: str, path: Path, step: int) -> None:
        def write(writer: Any) -> None:
            from PIL import Image

            writer.add_image(name, np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")

        self._try(write)

    def close(self, summary: dict[str, Any] | None = None) -> None:
        self._try(lambda writer: writer.close())
