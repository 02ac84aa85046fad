"""Send telemetry's records to Weights & Biases, as charts, pictures and tables.

A run is offline unless WANDB_MODE says otherwise, and no trouble with W&B (no package, no login, no network) ends the
training: it continues, offline if possible, with one warning.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from te_nvfp4_cv.errors import value_error, warn_once
from te_nvfp4_cv.telemetry import drawing
from te_nvfp4_cv.telemetry.drawing import Panel
from te_nvfp4_cv.telemetry.heatmaps import SCALES, STATISTICS
from te_nvfp4_cv.telemetry.sinks import Log, figures, histograms

OPERANDS = ("weight", "input", "grad_output", "weight_gradient")
QUANTIZED = {"sqnr_db": "SQNR (dB)", "underflow": "underflow", "saturation": "saturation"}
MOST_STEPS = 64  # columns of a picture; of more sampled steps every second one is forgotten


class Seen:
    """Remember what the pictures at the end of a run need of its sampled steps, and draw them."""

    def __init__(self) -> None:
        self.steps: dict[int, dict[tuple[str, str], dict[str, Any]]] = {}  # step: {(operand, layer): figures}

    def add(self, record: dict[str, Any]) -> None:
        """Take the record of a sampled step."""
        held = self.steps[record["step"]] = {}
        for layer, values in record["layers"].items():
            for operand in OPERANDS:
                found = values["tensors"].get(operand)
                if found is None:
                    continue
                kept = {key: found[key] for key in QUANTIZED if key in found}
                kept |= {key: found["raw"][key] for key in (*STATISTICS, "amax")}
                held[operand, layer] = kept | {"histogram": np.asarray(found["raw"]["histogram"], np.int32)}
        if len(self.steps) > MOST_STEPS:
            for step in list(self.steps)[1:-1:2]:
                del self.steps[step]

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """Return columns and rows of the last step: a row for each operand of each layer, in this order."""
        keys = [*STATISTICS, "amax", *QUANTIZED]
        held = self.steps[max(self.steps)]
        rows = [[*name, *(values.get(key) for key in keys)] for name, values in held.items()]
        return ["operand", "layer", *keys], sorted(rows, key=lambda row: OPERANDS.index(row[0]))

    def pictures(self) -> Iterator[tuple[str, tuple[Any, str]]]:
        """Yield a name, a picture of PIL and its text, by operand and then by layer."""
        drawing.need("matplotlib")
        steps = sorted(self.steps)
        for operand in OPERANDS:
            layers = list(dict.fromkeys(name for step in steps for of, name in self.steps[step] if of == operand))
            for key, label in ({**STATISTICS, "sqnr_db": QUANTIZED["sqnr_db"]} if layers else {}).items():
                values = self._values(operand, layers, steps, key)
                some = np.isfinite(values).any(axis=1)
                if not some.any():
                    continue
                rows = [layer for layer, known in zip(layers, some, strict=True) if known]
                panel = Panel(f"{operand}: {label}", steps, values[some])
                bounds = drawing.limits([panel.values], **SCALES.get(key, {"diverging": False}))
                name = key.removesuffix("_db")
                yield f"layers/{operand}/{name}", (drawing.image(drawing.heatmap(panel, rows, bounds, label)), label)
                if key == "sqnr_db":
                    yield f"curves/{operand}/{name}", (drawing.image(drawing.curves(panel, rows, label)), label)
            for layer in layers:
                yield f"heatmap/{operand}/{layer}", self._distribution(operand, layer, steps)

    def _values(self, operand: str, layers: Sequence[str], steps: Sequence[int], key: str) -> np.ndarray:
        found = [[self.steps[step].get((operand, layer), {}).get(key) for step in steps] for layer in layers]
        return np.array([[np.nan if value is None else value for value in row] for row in found], float)

    def _distribution(self, operand: str, layer: str, steps: Sequence[int]) -> tuple[Any, str]:
        """Return the histograms of one layer's values, a column for each step, with its text.

        A model has several of these for each layer, so they are not drawn by matplotlib, which takes 0.1 s for one.
        """
        import matplotlib
        from PIL import Image, ImageDraw

        shown = [step for step in steps if (operand, layer) in self.steps[step]]
        counts = np.stack([self.steps[step][operand, layer]["histogram"] for step in shown], axis=1)[::-1]
        # The brightest colour is for the second of the counts: half of what comes out of a ReLU is 0, and would leave
        # all other values dark.
        most = np.maximum(np.sort(counts, axis=0)[-2], 1)
        colours = matplotlib.colormaps[drawing.SEQUENTIAL](np.sqrt(np.minimum(counts / most, 1)))
        picture = Image.fromarray((255 * colours[..., :3]).astype(np.uint8))
        wide, high = max(320, 10 * len(shown)), 4 * len(counts)
        sheet = Image.new("RGB", (wide + 60, high + 22), "white")
        sheet.paste(picture.resize((wide, high), Image.Resampling.NEAREST), (52, 4))
        pen = ImageDraw.Draw(sheet)
        for y, label in ((10, "largest"), (4 + high // 2, "0"), (high - 2, "-largest")):
            pen.text((48, y), label, fill="black", anchor="rm")
        pen.text((52, high + 13), f"step {shown[0]}", fill="black", anchor="lm")
        pen.text((52 + wide, high + 13), f"{shown[-1]}", fill="black", anchor="rm")
        text = f"{operand} of {layer}: how often each value occurs, in units of each step's largest; "
        return sheet, text + f"steps {shown[0]} to {shown[-1]}"


class WandB(Log):
    """Send records to a run of Weights & Biases, with the records' steps as the axis.

    Charts, pictures and tables are grouped by operand (weight, input, grad_output, weight_gradient), then by layer.
    At the end come heatmaps of all layers (`layers/OPERAND/std`), one of each layer's values (`heatmap/OPERAND/LAYER`),
    curves (`curves/OPERAND/sqnr`), and a table of the last sampled step (`operands`).

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
        self._seen = Seen()  # for the pictures at the end

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

    def _show(self, name: str, step: int, make: Callable[[], Any]) -> None:
        """Log an object of W&B's; if W&B refuses to make it, say so, and go on with all else."""
        if self._target is None:
            return
        try:
            made = make()
        except Exception as error:  # no such file, cells of several types in one column, ...
            warn_once(f"wandb {name}", f"W&B does not get {name!r}: {error}")
            return
        self._log(step, {name: made}, [name])

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
        held = record["layers"].items()
        self._log(record["step"], values, [f"{tensor}/{name}/*" for name, layer in held for tensor in layer["tensors"]])
        self._seen.add(record)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._log(step, values, values)

    def alarm(self, record: dict[str, Any]) -> None:
        name = f"alarm/{record['layer']}"
        self._log(record["step"], {name: 1}, [name])

    def image(self, name: str, path: Path, step: int) -> None:
        self._show(name, step, lambda: self._wandb.Image(str(path)))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        def make() -> Any:
            data = [[self._wandb.Image(v) if isinstance(v, np.ndarray) else v for v in row] for row in rows]
            return self._wandb.Table(columns=list(columns), data=data)

        self._show(name, step, make)

    def page(self, name: str, path: Path, step: int) -> None:
        self._show(name, step, lambda: self._wandb.Html(str(path), inject=False))

    def _pictures(self) -> None:
        """Log what is shown of the whole run: pictures, and a table of the last step."""
        if self._target is None or not self._seen.steps:
            return
        last = max(self._seen.steps)
        self.table("operands", *self._seen.table(), last)
        try:
            found = dict(self._seen.pictures())
        except Exception as error:  # no matplotlib, or a fault in it
            warn_once("wandb pictures", f"W&B gets no heatmaps: {error}")
            return
        drawn = {name: self._wandb.Image(picture, caption=text) for name, (picture, text) in found.items()}
        self._log(last, drawn, drawn)

    def close(self, summary: dict[str, Any] | None = None) -> None:
        self._pictures()
        self._try(lambda run: run.summary.update(summary or {}))
        if self._run is None:
            self._try(lambda run: run.finish())
        self._target = None
