"""Train a suite of variants from several seeds and append one JSON line per run to a results file.

    python examples/accuracy/study.py camvid-unet CAMVID --suite ablations --seeds 0 1 2 --out runs/accuracy.jsonl
    python examples/accuracy/study.py cifar-resnet18 CIFAR --suite seeds --seeds 0 1 2 3 4 --size full --device cuda

Runs that the file already contains are not repeated, so a study that was stopped continues where it stopped. All
variants of a seed run before the next seed. table.py prints the tables.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve()
if str(_HERE.parents[1]) not in sys.path:
    sys.path.insert(0, str(_HERE.parents[1]))
sys.path.append(str(_HERE.parents[2]))

import torch  # noqa: E402
from unet_coco.backends import backend_of, processor  # noqa: E402
from unet_coco.options import choose_device, fast_dtype  # noqa: E402
from unet_coco.precision import Precision  # noqa: E402

from accuracy.fit import COMPUTE, fit  # noqa: E402
from accuracy.tasks import TASKS, open_task, preset_of  # noqa: E402
from accuracy.variants import SUITES, variants  # noqa: E402
from te_nvfp4_cv.errors import value_error  # noqa: E402

KEYS = ("task", "size", "variant", "seed", "compute", "epochs")


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run what is missing and return the path of the results file.

    Raises:
        ValueError: If a variant is unknown, or if a line of the results file is not one of this study.
    """
    parser = argparse.ArgumentParser(prog="study.py", description="Paired accuracy runs on real images.")
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("data", type=Path, help="folder of the images")
    parser.add_argument("--suite", choices=SUITES, default="seeds", help="default: seeds")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="run these variants instead of a suite")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N")
    parser.add_argument("--size", choices=("small", "full"), default="small", help="small for a CPU, full for a GPU")
    parser.add_argument("--epochs", type=int, metavar="N", help="number of epochs (default: that of --size)")
    parser.add_argument("--compute", choices=(*COMPUTE, "auto"), default="auto", help="dtype of activations")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy.jsonl"), metavar="FILE")
    options = parser.parse_args(arguments)
    known = variants(preset_of(options.task))
    names = list(options.variants or SUITES[options.suite])
    unknown = [name for name in names if name not in known]
    if unknown:
        raise value_error(
            "--variants: unknown.", got=", ".join(unknown), needs="; ".join(known), fix="quote names with spaces"
        )
    if options.task != "camvid-unet" and any(known[name].loss for name in names):
        raise value_error(
            "the losses are those of segmentation.", got=options.task, needs="camvid-unet", fix="another suite"
        )
    if options.epochs is not None and options.epochs < 1:
        raise value_error("--epochs is out of range.", got=str(options.epochs), needs="at least 1", fix="--epochs 20")
    device = choose_device(options.device)
    options.compute = fast_dtype(options.device) if options.compute == "auto" else options.compute
    done = {tuple(row[key] for key in KEYS) for row in read_results(options.out, repair=True)}
    epochs = options.epochs or TASKS[options.task][options.size].epochs
    todo = []
    for name in names:
        # Raises now, not after hours, if a variant needs more epochs.
        known[name].epochs_of(epochs)
    for seed in dict.fromkeys(options.seeds):
        for name in names:
            key = (options.task, options.size, name, seed, options.compute, epochs)
            if key not in done:
                todo.append(key)
    print(f"{len(todo)} runs to do, {len(options.seeds) * len(names) - len(todo)} done before", flush=True)
    if not todo:
        return Path(options.out)
    task = open_task(options.task, options.size, options.data)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for key in todo:
        row = dict(zip(KEYS, key, strict=True))
        row |= fit(task, known[row["variant"]], row["seed"], device, options.compute, epochs)
        backend = backend_of(Precision(row["variant"], None, known[row["variant"]].recipe), device)
        row |= {"torch": torch.__version__, "device": _device_name(device)}
        row |= {"backend": backend, "processor": processor()}
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        score = (
            "diverged" if row["diverged"] else f"{row['score']:.2f} (weights in high precision {row['score_hp']:.2f})"
        )
        print(f"{row['task']}  {row['variant']}  seed {row['seed']}: {score}  {row['seconds']:.0f} s", flush=True)
    return Path(options.out)


def read_results(path: Path, repair: bool = False) -> list[dict[str, Any]]:
    """Read the runs of a results file. A last line that was cut off counts as not run.

    Args:
        repair: If True, make the file end where another line can follow.

    Raises:
        ValueError: If any other line is not a run.
    """
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = []
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows.append({key: row[key] for key in KEYS} | row)
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) and not text.endswith("\n"):
                if repair:
                    path.write_text("".join(kept + "\n" for kept in lines[:-1]), encoding="utf-8")
                return rows
            raise value_error(
                f"{path}, line {number}: not a run of this study.",
                got=f"{line[:80]!r}: {error}",
                needs="a line that study.py wrote",
                fix="remove the line, or choose another --out",
            ) from error
    if repair and text and not text.endswith("\n"):
        path.write_text(text + "\n", encoding="utf-8")
    return rows


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}"


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError) as refusal:
        sys.exit(f"error: {refusal}")
