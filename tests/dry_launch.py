"""Launches of the kernels as on a GPU, up to the launch itself: argument types, constants, compilation.

    python -m tests.dry_launch 90              every launch of a few layers compiled for sm_90, one line a kernel
    python -m tests.dry_launch 90 all          of every layer of tests/ops/kernels/gemm_helpers.py
    python -m tests.dry_launch 90 few          of a few layers, to be named beside other words
    python -m tests.dry_launch 90 quantize     of quantization, of operands and weights with axes of one element
    python -m tests.dry_launch 90 steps        of training steps: backends, tensor scales, fused norms
    python -m tests.dry_launch 90 few quantize steps --front
                                               by Triton's front end only, which is where types and constants clash;
                                               takes an eighth of the time
    python -m tests.dry_launch 90 count [NAME] nothing compiled: launches, specializations and torch's operators of a
                                               ResNet-50 step (NAME: delayed, current or fused),
                                               against their bounds; status 1 above one
    python -m tests.dry_launch 90 host         nothing compiled: Python calls and CPU time that a layer adds to a step,
                                               without the driver's own launches, against bounds on the calls

A driver that only names the architecture stands in for CUDA's (te_nvfp4_cv/ops/triton/ahead.py); tensors are on the
CPU, and no kernel runs. It finds what ahead-of-time signatures written by hand cannot: an argument that is 1 and
becomes a constexpr, one that is no multiple of 16, a tile that a real layer gets. Run it in a process of its own,
without TRITON_INTERPRET.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections import Counter
from typing import Any

import torch


def launch_gemms(names: list[str]) -> None:
    """The three GEMMs of some layers, with a bias, with and without alpha; and products of small matrices."""
    from te_nvfp4_cv.ops.conv.triton import launch as conv
    from te_nvfp4_cv.ops.gemm.triton import launch as gemm
    from tests.ops.kernels.gemm_helpers import GEOMETRIES, faces_of, packed

    alpha = torch.ones(1)
    for name in GEOMETRIES if names == ["all"] else names:
        g = GEOMETRIES[name]
        q = packed(g, torch.device("cpu"), two_d=g.groups == 1)
        operands = {gemm: [q[face] for face in faces] for gemm, faces in faces_of(g).items()}
        conv.fprop(*operands["fprop"], alpha, torch.ones(g.y_shape[-1]), g, torch.bfloat16)
        conv.dgrad(*operands["dgrad"], None, g, torch.float32)
        conv.wgrad(*operands["wgrad"], torch.ones(g.x_shape[-1]), g, torch.bfloat16)
    for rows, columns, blocks in ((64, 64, 8), (1, 1, 1), (33, 17, 3)):
        data, scale = torch.zeros(64, blocks * 8, dtype=torch.uint8), torch.zeros(64, blocks, dtype=torch.uint8)
        gemm.multiply(data[:rows], scale[:rows], data[:columns], scale[:columns])


def launch_quantization() -> None:
    """Operands and weights whose axes have one element, each form: arguments that are 1 become constexprs."""
    from te_nvfp4_cv.ops.geometry import Fold
    from te_nvfp4_cv.ops.quantize.triton import launch
    from te_nvfp4_cv.ops.records import OperandSpec, WeightLayout, WeightSpec

    bf16, seed, amax = torch.bfloat16, torch.zeros(1, dtype=torch.int64), torch.ones(2)
    shapes = [
        (torch.zeros(32, 1), Fold(1, 0, 1, 0, 32)),  # a linear layer of one feature
        (torch.zeros(1, 64), Fold(1, 0, 1, 0, 16)),
        (torch.zeros(1, 1, 1, 1), Fold(16, 1, 1, 0, 16)),  # folded
        (torch.zeros(3, 5, 2, 17), Fold(5, 1, 2, 0, 16)),
    ]
    ways = ((1, 1, True, None, None), (2, 2, False, seed, amax), (0, 1, True, None, amax))
    for x, fold in shapes:
        for row, col, rht, rounding, given in ways:
            for mode in (None, "MAE") if rounding is None and given is None else (None,):
                spec = OperandSpec(1, fold, row, col, rht, rounding is not None, mode)
                launch.quantize_operand(x.to(bf16), spec, bf16, rounding, given)
        packed = launch.quantize_operand(x.to(bf16), OperandSpec(1, fold, 1, 1, True), bf16, None, amax)
        launch.unpack_rows(*packed.row, x.shape[-1], 1, bf16)
        launch.unpack_columns(*packed.col, bf16)
    for shape in ((1, 1), (17, 1, 1, 1), (1, 16, 3, 3), (32, 17)):
        for two_d in (True, False):
            for form in (1, 2):
                weight_spec = WeightSpec(1, form, 0 if two_d else form, two_d, pow2=True)
                w = launch.quantize_weight(torch.zeros(shape), weight_spec, bf16)
                for name in ("row",) if two_d else ("row", "col"):
                    if form == 1:
                        layout = WeightLayout(shape[0], shape[1], 1, name == "col")
                        launch.unpack_weight(*w.face(name), layout, amax[:1], bf16)


STEPS = [  # backend, tensor scale, fused, batch (5: folded columns): every kernel occurs
    ("vendor", "current", False, 5),
    ("vendor", "delayed", True, 16),
    ("triton", "current", True, 16),
    ("triton", "delayed", False, 5),
]


def launch_steps() -> None:
    """Forward and backward of a small network on backends vendor (as on CUDA) and triton. What is computed is noise:
    no kernel runs.
    """
    import te_nvfp4_cv as nv
    from tests.networks import everything

    for backend, tensor_scale, fused, batch in STEPS:
        net, x = everything(batch)
        net = nv.fuse(net) if fused else net
        recipe = nv.NVFP4BlockScaling(tensor_scale=tensor_scale)
        # In the third of vendor's steps with delayed scales these move as an earlier one has foreseen.
        for _ in range(3 if (backend, tensor_scale) == ("vendor", "delayed") else 2):
            with torch.autocast("cpu", torch.bfloat16), nv.nvfp4_autocast(recipe, backend=backend):
                y = net(x)
            y.backward(torch.ones_like(y))
    offsets = torch.tensor([0, 37, 50])
    for experts, channels in ((3, 64), (1, 16)):
        x, w = torch.ones(50, channels, requires_grad=True), torch.ones(experts, 48, channels, requires_grad=True)
        bias = torch.ones(experts, 48, requires_grad=True)
        y = nv.functional.grouped_linear(x, w, offsets[-experts:], bias, backend="triton")
        y.backward(torch.ones_like(y))


BOUNDS = {  # of a ResNet-50 step: backend, tensor scale, fused -> launches, specializations, torch's operators
    "delayed": ("vendor", "delayed", False, (314, 23, 431)),
    "current": ("vendor", "current", False, (628, 17, 379)),
    "fused": ("vendor", "delayed", True, (510, 30, 170)),
}
FREE = frozenset(  # torch's operators that compute nothing on a GPU, or call one that is counted itself
    """_reshape_alias alias as_strided as_strided_ batch_norm _batch_norm_impl_index chunk clone contiguous conv2d
    _convolution convolution detach detach_ empty empty_like empty_permuted empty_strided expand flatten lift_fresh
    linear max_pool2d movedim narrow new_empty new_zeros permute promote_types _has_compatible_shallow_copy_type reshape
    resize_ result_type select set_ slice split split_with_sizes squeeze t to _to_copy transpose unbind
    unflatten unsqueeze view view_as zeros zeros_like""".split()
)


def count(launches: Any, name: str) -> int:
    """Count the third of three training steps of a ResNet-50: calls are prepared in the second."""
    import te_nvfp4_cv as nv
    from te_nvfp4_cv.cli.torchvision_ops import ensure_torchvision
    from te_nvfp4_cv.cli.warm import train

    ensure_torchvision()
    import torchvision

    backend, tensor_scale, fused, bounds = BOUNDS[name]
    torch.manual_seed(0)
    model = torchvision.models.resnet50()
    model = nv.fuse(model) if fused else model
    recipe = nv.NVFP4BlockScaling(tensor_scale=tensor_scale)
    images = torch.randn(16, 3, SIDE, SIDE).to(memory_format=torch.channels_last)
    model = model.to(memory_format=torch.channels_last)
    for _ in range(2):
        train(model, images, nv.nvfp4_autocast(recipe, backend=backend))
    launches.counts.clear()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(model, images, nv.nvfp4_autocast(recipe, backend=backend))
    events = {event.key.removeprefix("aten::"): event for event in profile.key_averages() if event.key[:6] == "aten::"}
    operators = Counter({name: event.count for name, event in events.items() if name not in FREE})
    found = (sum(launches.counts.values()), len(launches.kernels), sum(operators.values()))
    for kernel, number in launches.counts.most_common():
        kinds = sum(kernel == other for other, _ in launches.kernels)
        print(f"  {kernel:28s} {number:5d} launches a step, {kinds:3d} specializations")
    print("  torch's operators: " + ", ".join(f"{name} {number}" for name, number in operators.most_common(20)))
    words = ("launches", "specializations", "operators of torch")
    for word, have, most in zip(words, found, bounds, strict=True):
        print(f"{name}: {have} {word}, at most {most}")
    return int(any(have > most for have, most in zip(found, bounds, strict=True)))


def front_end(src: Any, target: Any, options: dict[str, Any]) -> str:
    """Take the place of triton.compile, and return what its front end makes of a kernel."""
    from triton._C.libtriton import ir
    from triton.compiler.compiler import make_backend

    backend, context = make_backend(target), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    chosen = backend.parse_options({**options, **src.parse_options()})
    implementation = backend.get_codegen_implementation(chosen)
    return str(src.make_ir(target, chosen, implementation, backend.get_module_map(), context))


class Silent:
    """Stands for a compiled kernel, and does nothing."""

    function, packed_metadata = 0, ()

    def launch_metadata(self, *arguments: Any) -> None:
        return None

    def run(self, *arguments: Any) -> None:
        return None

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.run


# By layer and tensor scale: Python calls of one layer more, forward and backward, at most; the first is prepared.
CALLS = {
    ("3x3", "delayed"): 295,
    ("3x3", "current"): 320,
    ("linear", "delayed"): 340,  # with the allocation of what comes in fp32
    ("linear", "current"): 350,
    ("NVFP4Conv2d", "delayed"): 320,
    ("NVFP4Conv2d", "current"): 345,
    ("3x3, the long way", "delayed"): 760,
    ("3x3, the long way", "current"): 820,
}
CHAIN = 9  # layers; what the ninth costs less than the first is the context's and autograd's, once a step


def host(run: Any) -> int:
    """Count the calls, and measure the CPU time, of layers of 64 channels. The products are not computed."""
    from triton.runtime import jit

    import te_nvfp4_cv as nv
    from te_nvfp4_cv.layer import prepared
    from te_nvfp4_cv.ops.triton import launching

    def compile_nothing(self: Any, key: str, signature: Any, device: int, *rest: Any) -> Silent:
        return self.device_caches[device][0].setdefault(key, Silent())

    jit.JITFunction.run, jit.JITFunction._do_compile, launching.KEEPS = run, compile_nothing, True
    torch.set_num_threads(1)
    images = torch.randn(16, 64, 4, 4).to(torch.bfloat16, memory_format=torch.channels_last).requires_grad_()
    tokens = torch.randn(2, 13, 64, dtype=torch.bfloat16, requires_grad=True)  # which fill no whole blocks
    wrong, fits = 0, prepared.fits

    def step(net: torch.nn.Module, x: torch.Tensor, context: Any) -> None:
        with torch.autocast("cpu", torch.bfloat16), context:
            y = net(x)
        torch.autograd.backward(y, torch.ones_like(y))
        net.zero_grad(set_to_none=True)
        x.grad = None

    def net_of(layers: int, layer: str, recipe: Any) -> torch.nn.Module:
        if layer == "linear":
            return torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(layers)])
        make = torch.nn.Conv2d
        if layer == "NVFP4Conv2d":
            make = functools.partial(nv.NVFP4Conv2d, recipe=recipe, backend="vendor")
        convs = [make(64, 64, 3, padding=1, bias=False) for _ in range(layers)]
        return torch.nn.Sequential(*convs).to(memory_format=torch.channels_last)

    def calls_of(*how: Any) -> int:
        calls = Counter[str]()
        sys.setprofile(lambda frame, event, _: calls.update([event]) if "call" in event else None)
        step(*how)
        sys.setprofile(None)
        return calls["call"] + calls["c_call"]

    for (layer, tensor_scale), bound in CALLS.items():
        prepared.fits = (lambda *_: False) if "long" in layer else fits
        recipe = nv.NVFP4BlockScaling(tensor_scale=tensor_scale)
        context = contextlib.nullcontext() if "NVFP4" in layer else nv.nvfp4_autocast(recipe, backend="vendor")
        x = tokens if layer == "linear" else images
        nets = {layers: net_of(layers, layer, recipe) for layers in (1, CHAIN)}
        times: dict[int, list[float]] = {1: [], CHAIN: []}
        for _ in range(30):  # interleaved, since the load of the machine changes
            for layers, net in nets.items():
                start = time.process_time()
                step(net, x, context)
                times[layers].append((time.process_time() - start) * 1e6)
        one, more = (sorted(taken)[len(taken) // 4] for taken in times.values())
        first, all_of_them = (calls_of(net, x, context) for net in nets.values())
        found = (all_of_them - first) // (CHAIN - 1)
        wrong += found > bound
        print(
            f"{layer}, {tensor_scale}: {found} calls a layer, at most {bound}; {(more - one) / (CHAIN - 1):.0f} "
            f"microseconds of CPU time, and {one:.0f} of a step of one layer with its contexts and autograd's start"
        )
    prepared.fits = fits
    return int(wrong > 0)


def main(arch: int, names: list[str]) -> int:
    """Compile and list; exit status 1 where a kernel uses FP4 products and may not, or the reverse."""
    import triton
    from triton.runtime import jit

    from te_nvfp4_cv.cli.warm import stand_in

    front = "--front" in names
    names = [name for name in names if name != "--front"]
    if front:  # before the first launch of any kernel, which remembers it
        triton.compiler.compile = front_end
    run = jit.JITFunction.run  # as it is before it stops at launches
    launches = stand_in(arch, names[:1] not in (["count"], ["host"]))
    if names == ["host"]:
        return host(run)
    if names[:1] == ["count"]:
        return count(launches, (names + ["delayed"])[1])
    if "steps" in names:
        launch_steps()
    if "quantize" in names:
        launch_quantization()
    layers = [name for name in names if name not in ("few", "quantize", "steps")]
    layers += FEW if "few" in names or not names else []
    if layers:
        launch_gemms(layers)
    wrong = 0
    for name, kernel in launches.kernels:
        native = ("tt.dot_scaled" in kernel) if front else ("mxf4nvf4" in kernel.asm["ptx"])
        wrong += native != (arch in (100, 103, 120)) and "product" in name
        shared = "" if front else f"shared {kernel.metadata.shared:7d}"
        print(f"{name:20s} sm_{arch} {shared} {'FP4' if native else ''}")
    return int(wrong > 0)


SIDE = 64  # of the counted step's images
FEW = ["1x1 stride 2", "3x3 stride 2 groups", "transposed 3-d", "linear"]

if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
