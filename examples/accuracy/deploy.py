"""Measure what deployment costs in accuracy, on real images.

One network is trained in high precision and quantized afterwards, another is trained in NVFP4. Both are scored as NVFP4
inference models, the second one as ONNX too.

    python examples/accuracy/deploy.py camvid-unet FOLDER --seeds 0 1 2 --compute fp32

FOLDER holds the data, as for study.py.

Each seed gives the baseline's score; the score of every rounding method, with activations in NVFP4 and in high
precision; and the score of the NVFP4-trained network before it is saved and after it is loaded again (they must be the
same). Its ONNX files are compared with PyTorch: by value with activations in high precision, and by their score on all
validation images with activations in NVFP4. If an ONNX file cannot be made, the result says why. The script refuses to
start without the packages of the extra `export`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve()
if str(_HERE.parents[1]) not in sys.path:
    sys.path.insert(0, str(_HERE.parents[1]))
sys.path.append(str(_HERE.parents[2]))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from unet_coco.options import choose_device, fast_dtype  # noqa: E402

import te_nvfp4_cv as nv  # noqa: E402
from accuracy.fit import COMPUTE, Run, Setting  # noqa: E402
from accuracy.tasks import TASKS, open_task, preset_of, variants_of  # noqa: E402
from accuracy.variants import Variant  # noqa: E402
from te_nvfp4_cv.export.onnx.convert import need_packages  # noqa: E402
from te_nvfp4_cv.export.ptq.rounding import METHODS  # noqa: E402

CALIBRATION = 64  # training images
SCORED = ("portable", "qdq")


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Train, quantize and score; print and return one row per seed."""
    parser = argparse.ArgumentParser(prog="deploy.py", description="Accuracy of deployed networks on real images.")
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("data", type=Path, help="holds cifar10 and camvid")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N")
    parser.add_argument("--size", choices=("cpu", "full"), default="cpu")
    parser.add_argument("--epochs", type=int, metavar="N", help="number of epochs (default: that of --size)")
    parser.add_argument("--compute", choices=(*COMPUTE, "auto"), default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="append one JSON line per seed to this file")
    options = parser.parse_args(arguments)
    need_packages("deploy.py", "onnxruntime")  # fail now, not after hours of training
    device = choose_device(options.device)
    compute = fast_dtype(options.device) if options.compute == "auto" else options.compute
    task = open_task(options.task, options.size, options.data, Path("runs/shapes"))
    rows = []
    for seed in options.seeds:
        row = {"task": options.task, "size": options.size, "seed": seed, "compute": compute}
        row |= one(task, options.task, seed, Setting(device, compute), options.epochs)
        rows.append(row)
        print(json.dumps(row, indent=1), flush=True)
        if options.out is not None:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    return rows


def one(task: Any, name: str, seed: int, setting: Setting, epochs: int | None) -> dict[str, Any]:
    """Measure one seed of the task of that name and return its row."""
    known, preset, device = variants_of(name), preset_of(name), setting.device

    def score(model: nn.Module, recipe: Any = None) -> float:
        model.eval()
        precision = setting.precision(Variant("", recipe))
        return float(task.score(model, device, lambda: precision.context(device))[0])

    high = Run(task, known["baseline"], seed, setting, epochs)
    high.train()
    row: dict[str, Any] = {"high precision": score(high.model)}
    batches = list(_calibration(task, seed, device))
    for method in METHODS:
        for activations in ("nvfp4", "high"):
            made = nv.export.quantize(high.model, batches, preset, method=method, activations=activations, batches=None)
            row[f"{method}, activations {activations}"] = score(made)
    trained = Run(task, known["preset"], seed, setting, epochs)
    trained.train()
    row["trained in NVFP4"] = score(trained.model, preset)
    with tempfile.TemporaryDirectory() as folder:
        saved = nv.export.save(trained.model, Path(folder) / "net", preset)
        loaded = nv.export.load(saved.files[0], task.model().to(device, memory_format=torch.channels_last))
        row["trained in NVFP4, saved and loaded"] = score(loaded)
        row["bytes of quantized weights, of fp32"] = saved.weight_bytes / saved.plain_bytes
        onnx = _Onnx(loaded.cpu(), [x.cpu() for x in batches], Path(folder))
        row["ONNX"] = _tried(onnx.by_value)
        for form in SCORED:

            def of_form(form: str = form) -> float:
                return score(onnx.session(form, "nvfp4"))

            row[f"ONNX {form}, activations nvfp4"] = _tried(of_form)
    return row


def _tried(function: Callable[[], Any]) -> Any:
    """Return the function's result, or its error as text.

    Any error is caught, because the scores before it took hours and must not be lost.
    """
    try:
        return function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _calibration(task: Any, seed: int, device: torch.device) -> Any:
    size = task.size.batch
    for start in range(0, min(CALIBRATION, task.count), size):
        keys = [(0, index) for index in range(start, min(start + size, task.count))]
        yield task.batch(keys, seed, device)[0]


class _Session(nn.Module):
    """Run an ONNX file as a model, "portable" with onnxruntime and the other forms with onnx.reference."""

    def __init__(self, path: str, form: str) -> None:
        super().__init__()
        import onnxruntime
        from onnx.reference import ReferenceEvaluator

        self.session: Any = onnxruntime.InferenceSession(path) if form == "portable" else ReferenceEvaluator(path)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the output on x's device."""
        return torch.from_numpy(self.session.run(None, {"input": x.cpu().contiguous().numpy()})[0]).to(x.device)


class _Onnx:
    """Make the ONNX files of one model and compare them with it on the calibration batches `images`."""

    def __init__(self, model: nn.Module, images: Sequence[Tensor], folder: Path) -> None:
        self.model, self.images, self.folder = model, images, folder

    def session(self, form: str, activations: str) -> _Session:
        """Export the model in that form and open the file."""
        for module in self.model.modules():
            if isinstance(module, nv.export.InferenceLayer):
                module.set_mode(activations=activations)
        path = self.folder / f"{form}_{activations}.onnx"
        return _Session(str(nv.export.to_onnx(self.model, self.images[0], path, form=form).files[0]), form)

    def by_value(self) -> dict[str, dict[str, float]]:
        """Compare each form with PyTorch: the largest difference and the share of equal arg-maxes.

        Activations are in high precision.
        """
        found = {}
        for form in ("qdq", "matmul", "portable"):
            session, same, pixels, largest, difference = self.session(form, "high"), 0, 0, 0.0, 0.0
            for x in self.images if form == "portable" else self.images[:1]:  # onnx.reference is slow
                with torch.no_grad():
                    expected, y = self.model(x).float(), session(x)
                same += int((y.argmax(1) == expected.argmax(1)).sum())
                pixels += y.argmax(1).numel()
                largest, difference = (
                    max(largest, float(expected.abs().max())),
                    max(difference, float((y - expected).abs().max())),
                )
            found[form] = {
                "images": sum(len(x) for x in (self.images if form == "portable" else self.images[:1])),
                "largest difference, of the largest output": difference / largest,
                "same arg-max": same / pixels,
            }
        return found


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError) as refusal:
        sys.exit(f"error: {refusal}")
