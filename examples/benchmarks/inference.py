"""Measure file size, load time, peak memory and latency of torchvision's ResNet-50 in NVFP4.

    python examples/benchmarks/inference.py --batch 1 8 [--device cuda] [--dtype fp32] [--channels-last] [--json FILE]

The forms are fp32, bf16, packed weights and cached weights. They are compared with the same network in bf16 (or in
--dtype fp32, on a CPU without bf16 units), in the same run. On a CPU, the peak memory of a form is that of a separate
process that loads it and runs one batch; on CUDA it is the allocator's peak.
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

import te_nvfp4_cv as nv  # noqa: E402
from te_nvfp4_cv.cli.bench import DTYPES, Bench, build_form, forms_of, measure  # noqa: E402


def network() -> torch.nn.Module:
    """Build a ResNet-50 with random weights; time and memory do not depend on the weights."""
    ensure_torchvision()
    from torchvision.models import resnet50

    torch.manual_seed(0)
    return resnet50().eval()  # type: ignore[no-any-return]


def peak_of(form: str, folder: str, batch: int, image: int, dtype: str, layout: torch.memory_format) -> int:
    """Run one pass of that form and return this process's peak resident bytes."""
    model, _ = build_form(form, network(), nv.load_recipe("resnet"), Path(folder), dtype)
    model.to(memory_format=layout)  # type: ignore[call-overload]
    x = torch.randn(batch, 3, image, image).contiguous(memory_format=layout)
    with torch.inference_mode():
        model(x if form == "fp32" else x.to(DTYPES[dtype]))
    status = Path("/proc/self/status").read_text()  # getrusage would give the parent's maximum, across fork and exec
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def main(arguments: Sequence[str] | None = None) -> Bench | None:
    """Measure and print. The script calls itself with `--peak-of` to measure peak memory."""
    parser = argparse.ArgumentParser(description="Size, memory and latency of deployed networks.")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], metavar="N")
    parser.add_argument("--image", type=int, default=224, metavar="N")
    parser.add_argument("--rounds", type=int, default=10, metavar="N")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the result as one line")
    parser.add_argument("--peak-of", nargs=2, metavar=("FORM", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.peak_of:
        layout = torch.channels_last if options.channels_last else torch.contiguous_format
        print(peak_of(*options.peak_of, options.batch[0], options.image, options.dtype, layout))
        return None
    inputs = [torch.randn(batch, 3, options.image, options.image) for batch in options.batch]
    recipe = nv.load_recipe("resnet")
    found = measure(network(), inputs, recipe, options.device, options.rounds, options.dtype, options.channels_last)
    print(found)
    peaks: dict[str, dict[int, int]] = {form.name: dict(form.peak_bytes) for form in found.forms}
    if not options.device.startswith("cuda"):
        peaks = {form: {} for form in forms_of(options.dtype)}
        with tempfile.TemporaryDirectory() as folder:
            for form in peaks:
                command = [sys.executable, str(_HERE), "--peak-of", form, folder, "--image", str(options.image)]
                command += ["--dtype", options.dtype, *(["--channels-last"] if options.channels_last else [])]
                for batch in options.batch:
                    run = subprocess.run([*command, "--batch", str(batch)], capture_output=True, text=True, check=True)
                    peaks[form][batch] = int(run.stdout)
    for form, by_batch in peaks.items():
        print(f"peak of {form:>12}: " + ", ".join(f"batch {b}: {n / 1e6:.0f} MB" for b, n in by_batch.items()))
    if options.json is not None:
        row: dict[str, Any] = {**found.to_dict(), "peak_bytes": peaks}
        with options.json.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    return found


if __name__ == "__main__":
    main()
