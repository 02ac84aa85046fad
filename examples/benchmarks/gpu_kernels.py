"""Compile the kernels that gpu_suite.sh launches, on a machine without a GPU, and pack them for one that has one.

    python examples/benchmarks/gpu_kernels.py --out runs/kernels.tar.xz [--wheel triton-3.6.0-cp312-....whl]

A borrowed GPU is there for minutes, and compiling takes more: about 500 kernels at 2 seconds of one core each. So the
parts of the suite run here up to each launch (te_nvfp4_cv.cli.warm): the self-test with its comparisons left out, the
quantization kernels, convolutions, the steps of ResNet-50 and of the UNet, and the CUDA graphs of the tests. --wheel
names the compiled kernels as the Triton of that wheel would, for another version of Python; the Triton that runs here
must be of the same release (pip install --target FOLDER triton==3.6.0, then PYTHONPATH=FOLDER). `gpu_suite.sh` unpacks
runs/kernels.tar.xz if it is there. What is not in it compiles at its first use.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_conv
import gpu_quantize
import gpu_step
import torch
from gpu import LAYERS

import te_nvfp4_cv as nv
from te_nvfp4_cv import selftest
from te_nvfp4_cv.cli import warm
from te_nvfp4_cv.selftest import products, quantization, training
from te_nvfp4_cv.selftest.setting import CheckFailed, Setting

CPU = torch.device("cpu")
QUICK = ("unet 64->64 k3 @256", "unet 512->512 k3 @32", "r50 256->64 k1 @56", "r50 256->256 k3 @14")  # of gpu_suite.sh
Job = tuple[str, Callable[[], object]]


def compiled_only() -> None:
    """Let the self-test's comparisons pass: no kernel runs here, so there is nothing to compare."""
    for module in (products, quantization):
        module.same_fields = lambda *_: 0  # type: ignore[attr-defined]
    for module in (products, training):
        module.close = lambda *_: 0.0  # type: ignore[attr-defined]


def checks() -> Iterator[Job]:
    """Yield each check of the self-test with its backend."""
    compiled_only()
    for check, backend in selftest._plan(["vendor", "triton"], CPU):
        yield f"{check.__name__} {backend}", lambda check=check, backend=backend: check(Setting(CPU, backend))


def layers() -> Iterator[Job]:
    """Yield the quantization kernels and convolutions of the suite's layers, at their sizes."""
    for layer in (layer for layer in LAYERS if layer.name in QUICK):
        few = replace(layer, batch=16)  # the tiles of a step's kernels do not depend on the number of images

        def quantize(layer: Any = few) -> None:
            x = torch.zeros(layer.batch, layer.size, layer.size, layer.c_in, dtype=torch.bfloat16)
            amax = torch.full((2,), gpu_conv.SCALE)
            for run in (gpu_quantize.jobs(x, amax) | gpu_quantize.weight_jobs(layer, CPU)).values():
                run[1]() if isinstance(run, tuple) else run()

        def convolve(layer: Any = layer) -> None:
            shape = (layer.batch, layer.size, layer.size)
            x, dy = (torch.zeros(*shape, c, dtype=torch.bfloat16) for c in (layer.c_in, layer.c_out))
            w = torch.zeros(layer.c_out, layer.c_in, layer.kernel, layer.kernel).to(memory_format=torch.channels_last)
            for backend in ("vendor", "triton"):
                for run in gpu_conv.Path(layer, backend, x, w, dy).parts().values():
                    run()

        yield f"quantize {layer.name}", quantize
        yield f"convolve {layer.name}", convolve


def steps() -> Iterator[Job]:
    """Yield a training step of each variant of the benchmark's networks."""
    for name, size in (("resnet50", 224), ("unet", 64)):  # the UNet's sizes stay powers of two
        model, images, _ = gpu_step.build(name, CPU, 16, size)
        for variant in gpu_step.variants(graphs=False, triton=False):
            if variant.recipe is not None:
                yield f"{name} {variant.name}", lambda m=model, i=images, v=variant: train(m, i, v)


def graphs() -> Iterator[Job]:
    """Yield a training step of each network of the tests of CUDA graphs."""
    images = training.batches(1, 32, 16)[0][0].to(memory_format=torch.channels_last)
    for backend in ("vendor", "triton"):
        for scale in ("current", "delayed"):
            for fused in (False, True):
                small = gpu_step.Variant("", nv.NVFP4BlockScaling(tensor_scale=scale), backend, fused)
                model = training.small_network(32).to(memory_format=torch.channels_last)
                yield f"graphs {backend} {scale}", lambda m=model, v=small: train(m, images, v)


def train(model: torch.nn.Module, images: torch.Tensor, variant: gpu_step.Variant) -> None:
    """Run three training steps: the second moves delayed scales, the third by what the second has foreseen."""
    step = gpu_step.Step(variant, model, images, images)
    assert variant.recipe is not None
    for _ in range(3):
        warm.train(step.model, images, nv.nvfp4_autocast(variant.recipe, backend=variant.backend))


PARTS = {"checks": checks, "layers": layers, "steps": steps, "graphs": graphs}


def main(arguments: list[str] | None = None) -> int:
    """Compile and pack; return 1 if a part could not run to its end."""
    options_of = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options_of.add_argument("--out", type=Path, help="the archive; without it nothing is compiled, but counted")
    options_of.add_argument("--wheel", type=Path, help="of the Triton, for another Python, that will load the archive")
    options_of.add_argument("--capability", default="9.0", help="of the GPU (default: 9.0)")
    options_of.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    options = options_of.parse_args(arguments)
    from te_nvfp4_cv.ops.triton import ahead

    python = None if options.wheel is None else ahead.take_key_of(options.wheel)
    launches = warm.stand_in(warm.architecture(options.capability), options.out is not None)
    status = 0
    for part in options.parts:
        for name, run in PARTS[part]():
            begin, before = time.perf_counter(), len(launches.kernels)
            try:
                run()
            except CheckFailed:  # of what was computed, which is nothing
                pass
            except Exception as failure:  # what one part would launch must not cost the others theirs
                print(f"{name}: {type(failure).__name__}: {str(failure)[:300]}", flush=True)
                status = 1
            seconds = time.perf_counter() - begin
            print(f"{name}: {len(launches.kernels) - before} more kernels, {seconds:.0f} s", flush=True)
    print(f"{len(launches.kernels)} kernels, {sum(launches.counts.values())} launches")
    if options.out is not None:
        print(f"{warm.pack(Path(ahead.cache_folder()), options.out, python)} entries in {options.out}")
    return status


if __name__ == "__main__":
    sys.exit(main())
