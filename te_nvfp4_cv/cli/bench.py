"""Measure what deployment costs: size of the file, load time, memory and latency, for each form of a model.

    fp32, bf16            the plain model
    packed, cached        weights in NVFP4, activations in `dtype`
    nvfp4 packed, cached  weights in NVFP4, activations quantized, too

Each form is compared with the plain model in `dtype`: bf16, or fp32 if a CPU has no bf16 units. All forms are timed in
turn, `rounds` times, after one pass that is not counted; times are medians. Memory is that of parameters and buffers;
on CUDA the peak of a pass is measured, too.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from te_nvfp4_cv.backend import devices, dispatch
from te_nvfp4_cv.errors import check_choice, value_error
from te_nvfp4_cv.export.checkpoints import load, save
from te_nvfp4_cv.export.modules import InferenceLayer
from te_nvfp4_cv.ops.layouts import CHANNELS_LAST
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling
from te_nvfp4_cv.report.text import aligned

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
QUANTIZED = ("packed", "cached", "nvfp4 packed", "nvfp4 cached")


def forms_of(dtype: str) -> tuple[str, ...]:
    """Return the names of the forms: the plain model in fp32 and in `dtype`, then the quantized forms."""
    return (*dict.fromkeys(("fp32", dtype)), *QUANTIZED)  # fp32 once, if `dtype` is fp32


@dataclass
class Form:
    """One form: bytes on disk and in memory, seconds to load, and by batch size ms per image and peak bytes on CUDA."""

    name: str
    file_bytes: int
    load_s: float
    held_bytes: int
    ms_per_image: dict[int, float] = field(default_factory=dict)
    peak_bytes: dict[int, int] = field(default_factory=dict)


@dataclass
class Bench:
    """The result of `measure`; print it for a table."""

    device: str
    torch_version: str
    rounds: int
    dtype: str
    channels_last: bool
    forms: list[Form]
    emulated: bool = False  # the dtype is bf16 and the device has no units for it: slower than fp32, and no fair peer

    @property
    def peer(self) -> str:
        """Return the name of the plain model that times are compared with."""
        return "fp32" if self.emulated else self.dtype

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        batches = list(self.forms[0].ms_per_image)
        head = ["form", "file, MB", "load, s", "held, MB"]
        for batch in batches:
            head += [f"ms an image, batch {batch}", f"/ {self.peer}"]
        peer = next(form for form in self.forms if form.name == self.peer)
        cells = [head]
        for form in self.forms:
            line = [form.name, f"{form.file_bytes / 1e6:.2f}", f"{form.load_s:.2f}", f"{form.held_bytes / 1e6:.2f}"]
            for batch in batches:
                ratio = form.ms_per_image[batch] / peer.ms_per_image[batch]
                line += [f"{form.ms_per_image[batch]:.2f}", f"{ratio:.2f}"]
            cells.append(line)
        layout = ", channels_last" if self.channels_last else ""
        lines = [f"{self.device}, torch {self.torch_version}{layout}, medians of {self.rounds} passes in turn"]
        if self.emulated:
            lines.append("no bf16 units here: bf16 is emulated and slow, so times are compared with fp32")
        return "\n".join(lines + aligned([[*line, ""] for line in cells], left=0))  # "": the last column is not aligned


def measure(
    model: nn.Module,
    inputs: Sequence[Tensor],
    recipe: NVFP4BlockScaling,
    device: str = "cpu",
    rounds: int = 10,
    dtype: str = "auto",
    channels_last: bool = False,
) -> Bench:
    """Time every form of a model.

    Args:
        inputs: one per batch size, on the CPU, fp32.
        device: where the forms run.
        rounds: timed passes of each form.
        dtype: the dtype of activations, and of the plain model that the forms are compared with: "bf16", "fp32",
            or "auto" for bf16 where the device has units for it, else fp32. Nothing is compared with an emulated bf16.
        channels_last: give images to every form, and store plain weights, in torch.channels_last (_3d).
    Raises:
        ValueError: There are no inputs or no rounds, or the dtype is another one.
    """
    check_choice("bench", "dtype", dtype, ("auto", *DTYPES))
    if not inputs or rounds < 1:
        raise value_error(
            "bench: nothing to measure.",
            got=f"{len(inputs)} inputs, {rounds} rounds", needs="one or more", fix="--batch 1"
        )
    where = devices.usable(device, "bench")
    has_units = dispatch.bf16_is_native(where)
    if dtype == "auto":
        dtype = "bf16" if has_units else "fp32"
    layout = CHANNELS_LAST.get(inputs[0].dim() - 2, torch.preserve_format) if channels_last else torch.preserve_format
    models: dict[str, nn.Module] = {}
    forms: list[Form] = []
    # All forms are built before any is timed, because they are timed in turn.
    with tempfile.TemporaryDirectory() as folder:
        for name in forms_of(dtype):
            built, form = build_form(name, model, recipe, Path(folder), dtype)
            models[name] = built.to(where, memory_format=layout)  # type: ignore[call-overload]
            form.held_bytes = _held(built)
            forms.append(form)
    for x in inputs:
        _time(models, forms, x.to(where, memory_format=layout), DTYPES[dtype], rounds)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    return Bench(name, torch.__version__, rounds, dtype, channels_last, forms, dtype == "bf16" and not has_units)


def build_form(
    name: str, model: nn.Module, recipe: NVFP4BlockScaling, folder: Path, dtype: str = "bf16"
) -> tuple[nn.Module, Form]:
    """Build one form of the model by loading its file in `folder`. The file is written first if it is missing."""
    fresh = copy.deepcopy(model).eval()  # load changes a model in place
    if name in DTYPES:
        path = folder / f"{name}.pt"
        fresh = fresh.bfloat16() if name == "bf16" else fresh
        torch.save(fresh.state_dict(), path)
        begun = time.perf_counter()
        fresh.load_state_dict(torch.load(path, weights_only=True, mmap=True))  # mapped, as nv.export.load does it
    else:
        path = folder / "packed.safetensors"
        # One file for the four quantized forms, which differ only in how it is loaded.
        if not path.exists():
            save(model, path, recipe)
        begun = time.perf_counter()
        activations = "nvfp4" if name.startswith("nvfp4") else "high"
        weights = name.rpartition(" ")[2]
        load(path, fresh, weights=weights, activations=activations, dtype=DTYPES[dtype]).to(DTYPES[dtype])
    return fresh, Form(name, path.stat().st_size, time.perf_counter() - begun, 0)


def _held(model: nn.Module) -> int:
    """Return the bytes of parameters, buffers and cached weights, each tensor once."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [m.unpacked for m in model.modules() if isinstance(m, InferenceLayer) and m.unpacked is not None]
    # By id, since a tied weight is held once.
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def _time(models: dict[str, nn.Module], forms: list[Form], x: Tensor, dtype: torch.dtype, rounds: int) -> None:
    """Time all forms on one input, in turn: a machine that slows down in the meantime slows all forms alike."""
    batch = x.shape[0]
    times: dict[str, list[float]] = {form.name: [] for form in forms}
    for number in range(rounds + 1):
        for form in forms:
            # Before the clock starts: a service would get its images in that dtype.
            own = x if form.name == "fp32" else x.to(dtype)
            if x.is_cuda:
                torch.cuda.reset_peak_memory_stats(x.device)
                torch.cuda.synchronize(x.device)
            begun = time.perf_counter()
            with torch.inference_mode():
                models[form.name](own)
            if x.is_cuda:
                torch.cuda.synchronize(x.device)
                # Of everything on the device, all other forms included: only differences between forms mean something.
                form.peak_bytes[batch] = torch.cuda.max_memory_allocated(x.device)
            if number:  # the first pass compiles kernels and fills caches
                times[form.name].append(time.perf_counter() - begun)
    for form in forms:
        form.ms_per_image[batch] = 1e3 * statistics.median(times[form.name]) / batch
