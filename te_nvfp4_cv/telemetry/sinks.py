"""Send telemetry's records to JSON lines or TensorBoard; only a sink that is used needs its package.

JSONL never overwrites a file. A disk that fails turns its sink off, with one warning.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
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

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Take a table, whose cells may be pictures [H, W, 3] uint8."""
        return

    def page(self, name: str, path: Path, step: int) -> None:
        """Take a page of HTML."""
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


class Log(Sink):
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


class JSONL(Log):
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
    """List the figures that are worth a curve, by the names operand/layer/figure, so that charts go by operand."""
    for layer, held in layers.items():
        for key in ("flip_rate", "oscillation"):
            if held.get(key) is not None:
                yield f"weight/{layer}/{key}", held[key]
        ratio = held.get("gradient", {}).get("ratio")
        if ratio is not None:
            yield f"weight_gradient/{layer}/to_noise", ratio
        for tensor, values in held["tensors"].items():
            for key in ("sqnr_db", "correlation", "underflow", "saturation"):
                if key in values:
                    yield f"{tensor}/{layer}/{key}", values[key]
            for key in ("mean", "std", "kurtosis", "amax"):
                yield f"{tensor}/{layer}/{key}", values["raw"][key]


def histograms(layers: dict[str, Any]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """List the name, counts and edges of the histogram of each raw tensor that has values other than 0."""
    for layer, held in layers.items():
        for tensor, values in held["tensors"].items():
            counts, amax = np.asarray(values["raw"]["histogram"]), values["raw"]["amax"]
            if counts.sum() and amax:
                yield f"{tensor}/{layer}/values", counts, np.linspace(-amax, amax, len(counts) + 1)


# ---- TensorBoard ----------------------------------------------------------------------------------------------------


class TensorBoard(Log):
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
