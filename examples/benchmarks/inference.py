"""Measure file size, load time, peak memory and latency of networks in NVFP4.

    python examples/benchmarks/inference.py --batch 1 8 [--device cuda] [--dtype fp32] [--channels-last] [--json FILE]
    python examples/benchmarks/inference.py --case big small resnet50_96 resnet50_1 --dtype fp32 --channels-last

    case         network                                   images
    resnet50     torchvision's ResNet-50 (the default)     224x224, batch 1 and 8
    resnet50_1   the same                                  224x224, batch 1
    resnet50_96  the same                                  96x96, batch 16
    big, small   UNet, scale 1.0 and 0.25                  64x64 and 128x128, batch 16

The forms are fp32, bf16, packed weights and cached weights, with activations in high precision and in NVFP4. They are
compared with the same network in bf16 (or in --dtype fp32, on a CPU without bf16 units), in the same run. On a CPU with
the integer backend "nvfp4 cached" holds weights as the kernels' bytes. On a CPU, the peak memory of a form is that of a
separate process that loads it and runs one batch (--no-peak leaves that out); on CUDA it is the allocator's peak.

Before any time is printed, cached and packed weights must give the same bits, and so must, in fp32, the trained network
under nvfp4_autocast.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve()
sys.path[:0] = [str(_HERE.parents[2]), str(_HERE.parents[1])]

import torch  # noqa: E402
from _torchvision import ensure_torchvision  # noqa: E402
from benchmarks import measured  # noqa: E402

import te_nvfp4_cv as nv  # noqa: E402
from te_nvfp4_cv.cli.bench import DTYPES, Bench, build_form, forms_of, measure  # noqa: E402

CASES = {"resnet50": (224, [1, 8]), "resnet50_1": (224, [1]), "resnet50_96": (96, [16])}
CASES |= {"big": (64, [16]), "small": (128, [16])}
UNETS = {"big": 1.0, "small": 0.25}


def network(case: str) -> torch.nn.Module:
    """Build a case's network with random weights; time and memory do not depend on the weights."""
    ensure_torchvision()
    torch.manual_seed(0)
    if case in UNETS:
        from unet_coco.unet import UNet

        return UNet(21, scale=UNETS[case], dropout=0.0).eval()
    from torchvision.models import resnet50

    return resnet50().eval()  # type: ignore[no-any-return]


def recipe_of(case: str) -> nv.NVFP4BlockScaling:
    """Return the preset for a case's network."""
    return nv.load_recipe("unet" if case in UNETS else "resnet")


def wrong_form(case: str, x: torch.Tensor, dtype: str, layout: torch.memory_format) -> str:
    """Return which form gives other bits than it must, or "" if none does."""
    x, recipe = x.contiguous(memory_format=layout), recipe_of(case)
    results: dict[str, torch.Tensor] = {}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for form in forms_of(dtype):
            model, _ = build_form(form, network(case), recipe, Path(folder), dtype)
            model.to(memory_format=layout)  # type: ignore[call-overload]
            results[form] = model(x if form == "fp32" else x.to(DTYPES[dtype]))
    pairs = [("cached", results["packed"]), ("nvfp4 cached", results["nvfp4 packed"])]
    if dtype == "fp32":
        trained = network(case).to(memory_format=layout)  # type: ignore[call-overload]
        nv.set_precision(trained, recipe)
        with torch.no_grad(), nv.nvfp4_autocast(recipe):
            pairs.append(("nvfp4 packed", trained(x)))
    return next((form for form, expected in pairs if not torch.equal(results[form], expected)), "")


def peak_of(case: str, form: str, folder: str, batch: int, image: int, dtype: str, layout: torch.memory_format) -> int:
    """Run one pass of that form and return this process's peak resident bytes."""
    model, _ = build_form(form, network(case), recipe_of(case), Path(folder), dtype)
    model.to(memory_format=layout)  # type: ignore[call-overload]
    x = torch.randn(batch, 3, image, image).contiguous(memory_format=layout)
    with torch.inference_mode():
        model(x if form == "fp32" else x.to(DTYPES[dtype]))
    status = Path("/proc/self/status").read_text()  # getrusage would give the parent's maximum, across fork and exec
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def main(arguments: Sequence[str] | None = None) -> Bench | None:
    """Measure and print; return the last case's result. The script calls itself with `--peak-of` for peak memory."""
    parser = argparse.ArgumentParser(description="Size, memory and latency of deployed networks.")
    parser.add_argument("--case", nargs="+", default=["resnet50"], choices=CASES)
    parser.add_argument("--batch", type=int, nargs="+", metavar="N", help="batch sizes in place of the cases' own")
    parser.add_argument("--image", type=int, metavar="N", help="size of images in place of the cases' own")
    parser.add_argument("--rounds", type=int, default=10, metavar="N")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the result as one line")
    measured.add_option(parser)
    parser.add_argument("--no-peak", action="store_true", help="do not measure peak memory on a CPU")
    parser.add_argument("--threads", type=int, metavar="N", help="default: torch's")
    parser.add_argument("--peak-of", nargs=2, metavar=("FORM", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    found = None
    for case in options.case:
        image, batches = options.image or CASES[case][0], options.batch or CASES[case][1]
        if options.peak_of:
            print(peak_of(case, *options.peak_of, batches[0], image, options.dtype, layout))
            return None
        found = _measure_case(case, image, batches, layout, options)
    return found


def _measure_case(
    case: str, image: int, batches: list[int], layout: torch.memory_format, options: argparse.Namespace
) -> Bench:
    inputs = [torch.randn(batch, 3, image, image) for batch in batches]
    on_cpu = not options.device.startswith("cuda")
    if on_cpu and (form := wrong_form(case, inputs[0], options.dtype, layout)):
        sys.exit(f"{case}: {form!r} gives wrong bits: no times printed")
    recipe = recipe_of(case)
    found = measure(network(case), inputs, recipe, options.device, options.rounds, options.dtype, options.channels_last)
    print(f"{case}, {image}x{image}\n{found}", flush=True)
    peaks: dict[str, dict[int, int]] = {form.name: dict(form.peak_bytes) for form in found.forms}
    if on_cpu and not options.no_peak:
        peaks = {form: {} for form in forms_of(options.dtype)}
        with tempfile.TemporaryDirectory() as folder:
            for form in peaks:
                command = [sys.executable, str(_HERE), "--case", case, "--peak-of", form, folder, "--image", str(image)]
                command += ["--dtype", options.dtype, *(["--channels-last"] if options.channels_last else [])]
                for batch in batches:
                    run = subprocess.run([*command, "--batch", str(batch)], capture_output=True, text=True, check=True)
                    peaks[form][batch] = int(run.stdout)
    for form, by_batch in peaks.items():
        if by_batch:
            print(f"peak of {form:>12}: " + ", ".join(f"batch {b}: {n / 1e6:.0f} MB" for b, n in by_batch.items()))
    for batch in batches:
        by_form = {form.name: round(form.ms_per_image[batch], 3) for form in found.forms}
        measured.keep(options.keep, "inference", f"{case}, batch {batch}", by_form)
    if options.json is not None:
        row: dict[str, Any] = {"case": case, "image": image, **found.to_dict(), "peak_bytes": peaks}
        with options.json.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    return found


if __name__ == "__main__":
    main()
