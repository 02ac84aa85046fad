"""Run te-nvfp4-cv warm: compile the kernels of a training step before there is a GPU, and move them to another machine.

A step of the model runs on the CPU up to each kernel's launch; products are not computed, so that the loss is noise.
Compiled are the specializations that such a step asks for: a batch of another size may want a few more, which then
compile at their first use as always. An archive holds Triton's cache entries, without intermediate code. It serves a
machine with the same build of Triton (the same version for the same minor version of Python), or with the build whose
wheel is given.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import sys
import tarfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from te_nvfp4_cv.backend import dispatch, tuning
from te_nvfp4_cv.backend.cache import source_digest, version
from te_nvfp4_cv.cli.loading import example, model_of, model_options, new_file, recipe_of
from te_nvfp4_cv.cli.shape import show
from te_nvfp4_cv.context.context_manager import nvfp4_autocast
from te_nvfp4_cv.errors import need_package, value_error
from te_nvfp4_cv.ops.conv import vendor
from te_nvfp4_cv.ops.geometry import ConvGeometry
from te_nvfp4_cv.ops.layouts import CHANNELS_LAST

NEEDED = (".cubin", ".json")  # of an entry; the other files are the compiler's intermediate code
MANIFEST = "versions.json"
PROCESSORS = 132  # of the GPU that is imagined; they decide grids, not kernels


def warm_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    model_options(parser, nargs="?")
    parser.add_argument("--capability", default="9.0", metavar="X.Y", help="of the GPU: 9.0 is Hopper (default: 9.0)")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="images in the step (default: 16)")
    parser.add_argument(
        "--backend", default="vendor", choices=("vendor", "triton"), help="default: vendor"
    )
    parser.add_argument("--fuse", action="store_true", help="with nv.fuse(model)")
    parser.add_argument("--save", type=Path, metavar="FILE.tar.xz", help="then pack all of Triton's cache into it")
    parser.add_argument("--load", type=Path, metavar="FILE.tar.xz", help="first unpack such a file into Triton's cache")
    parser.add_argument(
        "--wheel", type=Path, metavar="FILE.whl", help="save for the Python of this wheel of the same Triton"
    )
    parser.add_argument("--force", action="store_true", help="replace the file of --save")


def warm(options: argparse.Namespace) -> int:
    """Run the command. Returns the exit status: 1 if the file of --load was made by another build of Triton.

    Raises:
        ValueError: nothing to do, or a capability that is none.
    """
    need_package("triton", "warm: no Triton here.", needs="the package that compiles kernels", fix="pip install triton")
    if options.model is None and options.save is None and options.load is None:
        raise value_error(
            "warm: nothing to do.", got="no MODEL, --load or --save", needs="one of them", fix="name a model"
        )
    arch = architecture(options.capability)
    save = None if options.save is None else new_file(options.save, ".tar.xz", options.force)
    from te_nvfp4_cv.ops.triton import ahead

    folder = Path(ahead.cache_folder())
    report: dict[str, Any] = {}
    python = None if options.wheel is None else ahead.take_key_of(options.wheel)
    if options.load is not None:
        report |= load(options.load, folder)
    if options.model is not None:
        launches = stand_in(arch, True, lambda name, count: print(f"{count}: {name}", file=sys.stderr, flush=True))
        model = model_of(options)
        if options.fuse:
            from te_nvfp4_cv.fusion.fuse import fuse

            fuse(model)
        images = example(options, options.batch)
        if images.dim() == 4:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            images = images.to(memory_format=torch.channels_last)
        for _ in range(3):  # the second step also moves delayed scales, and the third as the second has foreseen
            train(model, images, nvfp4_autocast(recipe_of(options), backend=options.backend))
        report |= {"compiled": len(launches.kernels), "launches": sum(launches.counts.values())}
    if save is not None:
        report |= {"saved": pack(folder, save, python)}
    show(report, ", ".join(f"{name} {value}" for name, value in report.items()), options.json)
    return int(report.get("fits") is False)


def architecture(capability: str) -> int:
    """Return 90 for "9.0".

    Raises:
        ValueError: it is no capability of a GPU that the kernels run on.
    """
    parts = capability.split(".")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts) or int(parts[0]) < dispatch.MINIMUM_CAPABILITY[0]:
        raise value_error(
            "--capability: not one that kernels are compiled for.", got=repr(capability),
            needs="MAJOR.MINOR, 8.0 or newer", fix="--capability 9.0",
        )
    return 10 * int(parts[0]) + int(parts[1])


# ---- a step without a GPU -------------------------------------------------------------------------------------------


def stand_in(arch: int, compiles: bool, say: Any = None) -> Any:
    """Let tensors on the CPU take the way of tensors on a GPU of this architecture, for the rest of the process.

    Returns the ops.triton.ahead.Launches that follow. Products are not computed, and have the right shapes.
    """
    from te_nvfp4_cv.ops.conv.triton import grouped
    from te_nvfp4_cv.ops.conv.triton import launch as conv
    from te_nvfp4_cv.ops.gemm.triton import launch as gemm
    from te_nvfp4_cv.ops.triton import ahead

    launches = ahead.Launches(arch, compiles, say)
    native = divmod(arch, 10) in dispatch.FP4_CAPABILITIES
    gpu = gemm.Gpu(gemm.arch_of(divmod(arch, 10), native), native, PROCESSORS)
    conv.gpu_of = grouped.gpu_of = gemm.gpu_of = lambda device: gpu
    tuning.arch_of = lambda device: arch
    dispatch.KERNELS_ON_CPU = True
    dispatch.interpreted = lambda: True  # lets the backend "triton" serve tensors on a CPU
    vendor.convolution, vendor.convolution_backward = _convolution, _convolution_backward
    vendor.linear, vendor.product = _linear, _product
    return launches


def _linear(x: Tensor, w: Tensor, bias: Tensor | None, scaled: bool, out: Tensor | None = None) -> Tensor:
    return _product(x, w.t(), scaled and bias is None)


def _product(a: Tensor, b: Tensor, scaled: bool, out: Tensor | None = None) -> Tensor:
    # In fp32 where vendor.product is that on CUDA: the kernel of the scales that follow is one for this dtype.
    dtype = torch.float32 if scaled and a.dtype == torch.bfloat16 else a.dtype
    return a.new_empty(a.shape[0], b.shape[1], dtype=dtype)


def _convolution(x: Tensor, w: Tensor, bias: Tensor | None, g: ConvGeometry) -> Tensor:
    return _image(x, g.y_shape)


def _convolution_backward(
    dy: Tensor, x: Tensor, w: Tensor, g: ConvGeometry, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    empty = dy.new_empty(0)  # what the mask leaves out is not read
    dx = _image(dy, g.x_shape) if mask[0] else empty
    dw = _image(dy, (g.channels_b, *g.kernel, g.channels_a // g.groups)) if mask[1] else empty
    return dx, dw, empty


def _image(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return what a convolution returns: [B, C, *image], in memory [B, *image, C], and no view."""
    first = (shape[0], shape[-1], *shape[1:-1])
    return torch.empty(
        first, dtype=like.dtype, device=like.device, memory_format=CHANNELS_LAST[len(shape) - 2]
    )


def train(model: nn.Module, images: Tensor, context: AbstractContextManager[Any]) -> None:
    """Run one training step in bf16, of a gradient that is zero."""
    model.train().zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16), context:
        y = model(images)
    torch.autograd.backward(y, torch.zeros_like(y))


# ---- archives -------------------------------------------------------------------------------------------------------


def versions(python: str | None = None) -> dict[str, str]:
    """Return what an archive's entries depend on. Triton's own keys hold more: its library's bytes and each source."""
    return {
        "triton": version("triton"),
        "python": python or ".".join(platform.python_version_tuple()[:2]),
        "machine": platform.machine(),
        "source": source_digest(),
    }


def pack(folder: Path, file: Path, python: str | None = None) -> int:
    """Write Triton's cache to a .tar.xz file, for a version of Python. Returns the number of entries."""
    entries = 0
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w:xz") as archive:
        _add(archive, MANIFEST, json.dumps(versions(python)).encode())
        for entry in sorted(path for path in folder.iterdir() if path.is_dir()):
            files = sorted(path for path in entry.iterdir() if path.suffix in NEEDED)
            if any(path.suffix == ".cubin" for path in files):  # the driver's own C modules lie there, too
                entries += 1
                for path in files:
                    _add(archive, f"{entry.name}/{path.name}", path.read_bytes())
    return entries


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    # Neither the owner nor the time: archives of equal kernels are equal, and name nobody.
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def load(file: Path, folder: Path) -> dict[str, Any]:
    """Unpack an archive into Triton's cache; entries that are there stay.

    Returns:
        The number of entries, and whether they were made by this build of Triton and these sources.
    Raises:
        ValueError: the file is no archive of `pack`.
    """
    found, entries = {}, set()
    try:
        with tarfile.open(file, "r:xz") as archive:
            for member in archive:
                content = archive.extractfile(member)
                parts = Path(member.name).parts
                if content is None or len(parts) > 2 or ".." in parts or Path(member.name).is_absolute():
                    raise tarfile.TarError(f"{member.name} is no file of an entry")
                if len(parts) == 1:
                    found = json.loads(content.read())
                    continue
                place = folder / parts[0] / parts[1]
                entries.add(parts[0])
                if not place.exists():
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.write_bytes(_with_paths(parts[1], content.read(), place.parent))
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise value_error(
            f"--load {file}: not an archive of te-nvfp4-cv warm.", got=str(error), needs="a file of warm --save",
            fix="make it with te-nvfp4-cv warm MODEL --save FILE",
        ) from error
    return {"loaded": len(entries), "fits": found == versions(), "made by": found}


def _with_paths(name: str, content: bytes, folder: Path) -> bytes:
    """Let an entry's list of files, the one place that holds paths, point to where they are now."""
    if not name.startswith("__grp__"):
        return content
    # Without those that are not packed: where one of a list is missing, triton 3.9 compiles anew.
    files = [file for file in json.loads(content)["child_paths"] if file.endswith(NEEDED)]
    return json.dumps({"child_paths": {file: str(folder / file) for file in files}}).encode()
