"""Train a UNet or a detector in several precisions, one after the other, and compare them.

    python examples/unet_coco/train.py                                                   drawn shapes, bf16 and NVFP4
    python examples/unet_coco/train.py --task detection                                  boxes instead of classes
    python examples/unet_coco/train.py --data ROOT --classes person,car --epochs 20      COCO
    python examples/unet_coco/train.py --data ROOT --layout masks --image-size 96 128    images and label masks
    python examples/unet_coco/train.py --data ROOT --layout mvtec                        parts with defects
    python examples/unet_coco/train.py --config runs/unet_coco/config.yaml               what an earlier run ran with
    torchrun --standalone --nproc-per-node 2 examples/unet_coco/train.py                 several GPUs or processes

Every precision starts from the same seed and sees the same batches, flips and dropout. The table compares the loss, the
task's scores (in the precision of the training; the main score with the same weights in fp32 too), the median step
time, the bytes saved for backward and the share of FLOPs in NVFP4. Data with missing parts, unknown names and settings
that cannot train are refused before training.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

if __name__ == "__main__" and os.environ.get("RANK", "0") == "0" and not {"-h", "--help", "--version"} & {*sys.argv}:
    print("loading torch and torchvision ...", flush=True)  # some seconds, the first time many

_HERE = Path(__file__).resolve()
if str(_HERE.parents[1]) not in sys.path:
    sys.path.insert(0, str(_HERE.parents[1]))  # the package unet_coco and its neighbour _torchvision
sys.path.append(str(_HERE.parents[2]))  # te_nvfp4_cv of this checkout, if it is not installed

import numpy as np  # noqa: E402
import torch  # noqa: E402

import te_nvfp4_cv as nv  # noqa: E402
from te_nvfp4_cv.errors import value_error  # noqa: E402
from te_nvfp4_cv.files import remove_drafts, write_atomically  # noqa: E402
from unet_coco.backends import in_words  # noqa: E402
from unet_coco.data import SegmentationData, denormalize, load_data  # noqa: E402
from unet_coco.engine import Trainer  # noqa: E402
from unet_coco.folder import give_up, restarted_in, run_folder  # noqa: E402
from unet_coco.metrics import to_device  # noqa: E402
from unet_coco.options import Settings, as_yaml, parse_options  # noqa: E402
from unet_coco.precision import Precision, parse_precisions  # noqa: E402
from unet_coco.ranks import Ranks, joined, run  # noqa: E402
from unet_coco.report import markdown_table, write_history, write_pictures, write_summary  # noqa: E402
from unet_coco.shapes import ShapesSettings, ensure_shapes  # noqa: E402
from unet_coco.stopping import SharedStop, Stop, Stopped  # noqa: E402
from unet_coco.tracking import show_telemetry, start_telemetry  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float | int]]:
    """Run the comparison.

    Args:
        arguments: The command line. If None, sys.argv is used.
    Returns:
        The content of summary.json.
    Raises:
        ValueError: If an option or the data cannot be used.
        RuntimeError: If the machine lacks something, such as the GPU. Each message says what was given, what is
            needed and what to do.
    """
    settings = parse_options(arguments)
    if os.environ.get("RANK", "0") == "0":
        print(f"te_nvfp4_cv {nv.__version__}, torch {torch.__version__}: opening the data ...", flush=True)
    if settings.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
    with joined(settings) as (ranks, device):
        stop = SharedStop(timedelta(seconds=settings.timeout)) if ranks.parallel else Stop()
        with stop.listening():
            return _run(settings, device, ranks, stop, sys.argv[1:] if arguments is None else arguments)


def _run(
    settings: Settings, device: torch.device, ranks: Ranks, stop: Stop, arguments: Sequence[str]
) -> dict[str, dict[str, float | int]]:
    """Open the data, find the folder, and compare the precisions there; `arguments` is the command line."""
    began = time.time()
    group = ranks.group if settings.share_amax else None
    precisions = parse_precisions(list(settings.precisions), settings.recipe, group, settings.compute, settings.backend)
    data = open_data(settings, ranks)
    earlier = ranks.first(lambda: restarted_in(settings.out, arguments))
    if earlier is not None and not settings.resume:
        print(f"note: the job was started again; it goes on in {earlier}")
        settings = dataclasses.replace(settings, out=earlier, resume=True)
    out, claimed = ranks.first(lambda: run_folder(settings.out, settings.resume, arguments))
    if out != settings.out:
        print(
            f"note: {settings.out} contains another run, which stays as it is (--resume continues it); "
            f"this run writes to {out}"
        )
        settings = dataclasses.replace(settings, out=out)
    if ranks.rank == 0:
        for folder in (out, *(out / precision.name for precision in precisions)):
            remove_drafts(folder, "", began)
    many = f", {settings.parallel} on {ranks.world} ranks" if ranks.parallel else ""
    print(
        f"{len(data.train)} training and {len(data.val)} validation images, {len(data.class_names)} classes, "
        f"{settings.image_size[0]}x{settings.image_size[1]}, on {device}{many}: "
        f"{', '.join(p.name for p in precisions)}"
    )
    try:
        return compare(settings, precisions, data, device, ranks, stop)
    except BaseException as error:
        if claimed and ranks.rank == 0:
            give_up(out)
        if isinstance(error, KeyboardInterrupt):
            raise _how_to_go_on(error, out) from error
        raise


def _how_to_go_on(error: KeyboardInterrupt, out: Path) -> KeyboardInterrupt:
    """Return the interruption with a text that says what is saved, and how the run continues."""
    cause = error.cause if isinstance(error, Stopped) else "Ctrl-C"
    if any(out.glob("*/last.pt")):
        where = f"{error.done} is saved" if isinstance(error, Stopped) and error.done else "the last checkpoint stays"
        text = f"{cause}; {where}. To go on, give the same command with --out {out} --resume"
    else:
        text = f"{cause}, before the first checkpoint; {out} holds nothing to go on with"
    return Stopped(error.number, text) if isinstance(error, Stopped) else KeyboardInterrupt(text)


def open_data(settings: Settings, ranks: Ranks) -> SegmentationData:
    """Open the data of --data, or the drawn shapes, which are written next to --out the first time."""
    if settings.data is not None:
        return load_data(settings.data, settings.layout, settings.classes, settings.val_share)
    if settings.layout != "coco":
        raise value_error(
            f"--layout {settings.layout} needs data.",
            got="no --data",
            needs="a folder with this layout",
            fix=f"--data ROOT --layout {settings.layout}",
        )
    root = settings.out.resolve().parent / "shapes_coco"
    print(f"no --data: using the drawn shapes in {root}, which are drawn now if they are not there ...", flush=True)
    ranks.first(lambda: ensure_shapes(root, ShapesSettings()))
    return load_data(root, "coco", settings.classes)


def compare(
    settings: Settings,
    precisions: Sequence[Precision],
    data: SegmentationData,
    device: torch.device,
    ranks: Ranks,
    stop: Stop | None = None,
) -> dict[str, dict[str, float | int]]:
    """Train every precision, and write the report after each, so that an interruption loses no finished one."""
    rows: dict[str, dict[str, float | int]] = {}
    history: dict[str, dict[str, list[dict[str, float]]]] = {}
    predictions: dict[str, list[np.ndarray]] = {}
    titles: Mapping[str, str] = {}
    files: list[Path] = []
    out = settings.out
    if settings.resume:  # keep the rows of precisions that this call does not reach
        for name, held in (("summary.json", rows), ("history.json", history)):
            held.update(_earlier(out / name))
    print("building the models, and the first time on this machine the kernels ...", flush=True)
    for precision in precisions[1:]:  # errors must come now, not after the precisions before have trained
        trainer = Trainer(precision, settings, data, device, out / precision.name, ranks)
        if settings.resume:
            trainer.resume()
        del trainer
    for precision in precisions:
        folder = out / precision.name
        folder.mkdir(exist_ok=True)
        trainer = Trainer(precision, settings, data, device, folder, ranks, stop)
        titles = trainer.task.titles
        found = settings.resume and trainer.resume()
        if settings.resume:
            print(
                f"{precision.name}: "
                + (f"resumed at step {trainer.position.step}" if found else "no checkpoint, starting fresh")
            )
        if ranks.rank == 0:  # not before: a resume that is refused leaves the file of the run
            write_atomically(out / "config.yaml", as_yaml(settings).encode())
        backend = in_words(trainer.precision, device)
        if backend:
            print(f"{precision.name}: NVFP4 layers run on {backend}")
        at = trainer.position
        goes_on = (at.telemetry, at.step) if found else None
        place = folder, ranks.rank, trainer.total_steps
        if settings.wandb:
            print(f"{precision.name}: opening a W&B log ...", flush=True)
        watch, file = start_telemetry(trainer.model, settings, precision, backend, *place, goes_on)
        files.append(file)
        at.telemetry = file.name
        sheet = out / "predictions.png"
        if found:
            trainer.tell_again(watch)
            if sheet.is_file():
                watch.image("predictions", sheet, at.step)
        try:
            trainer.train(watch)
            print(f"{precision.name}: evaluating, also with the weights in fp32 ...", flush=True)
            history[precision.name] = trainer.history(watch)
            rows[precision.name] = trainer.summary()
            if ranks.rank == 0:
                write_summary(out, rows, titles)
                write_history(out, history, trainer.task.main, titles[trainer.task.main])
            if settings.pictures:
                shown = _write_sheet(sheet, trainer, settings.pictures, predictions)
                watch.image("predictions", sheet, trainer.position.step)
                watch.table("predictions_by_image", ["image", "truth", "predicted"], shown, trainer.position.step)
        finally:
            watch.close(rows.get(precision.name, {}))
    print(f"\n{markdown_table(rows, titles)}\n")
    print(f"table: {out / 'table.md'}, {out / 'table.csv'}, {out / 'summary.json'}")
    pictures = [out / name for name in ("predictions.png", "curves.png") if (out / name).is_file()]
    if ranks.rank == 0:
        pictures += show_telemetry(out, files, settings.wandb and len(rows) > 1, rows)
    print(f"pictures: {', '.join(map(str, pictures))}   checkpoints: {out}/<precision>/last.pt and best.pt")
    if any((out / "wandb").glob("offline-run-*")):
        print(f"W&B: offline runs are in {out / 'wandb'}; to upload them: wandb sync {out}/wandb/offline-run-*")
    return rows


def _earlier(path: Path) -> Any:
    """Read what a report's file contained before this run.

    Raises:
        ValueError: If the file is damaged.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
        why = f"a {type(found).__name__}"
    except (ValueError, OSError) as error:
        why = str(error)
    raise value_error(
        f"{path} is damaged.", got=why, needs="the file that a run wrote", fix="remove it: the other rows are lost then"
    )


def _write_sheet(
    path: Path, trainer: Trainer, count: int, predictions: dict[str, list[np.ndarray]]
) -> list[tuple[np.ndarray, ...]]:
    """Add this precision's predictions of the first validation images to the sheet; return each image's pictures."""
    task = trainer.task
    photos: list[np.ndarray] = []
    truth: list[np.ndarray] = []
    predicted: list[np.ndarray] = []
    for images, targets in trainer.eval_loaders["val"]:
        images, targets = to_device(images, targets, trainer.device)
        with trainer.averaged():
            predicted += task.draw_predicted(trainer.whole, images, targets, trainer.context)
        photos += list(denormalize(images).permute(0, 2, 3, 1).cpu().numpy())
        truth += task.draw_truth(images, targets)
        if len(photos) >= count:
            break
    predictions[trainer.precision.name] = predicted[:count]
    if trainer.ranks.rank == 0:
        columns = {"image": photos[:count], "truth": truth[:count], **predictions}
        write_pictures(path, columns, task.class_names, task.ignores)
    return list(zip(photos[:count], truth[:count], predicted[:count], strict=True))


if __name__ == "__main__":
    run(main)
