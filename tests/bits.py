"""Hash what this library computes, so that two commits can be compared bit for bit.

    python -m tests.bits --out before.json            on one commit
    python -m tests.bits --out after.json             on the other, in the same environment on the same machine
    python -m tests.bits --compare before.json after.json

It imports the public API and the examples alone, so it runs unchanged on commits whose internals differ. One result is
one line of text, "dtype shape strides hash": where the hash alone differs the numbers differ, where the strides alone
differ the memory layout does. Everything runs on the CPU and is seeded anew for each result, so that results do not
depend on their order. Takes about two minutes of one core; --quick leaves most recipes and dtypes out, and takes a
half.

    layers      y, dx, dw, db of one call each, through nv.functional and under nvfp4_autocast
    operands    codes, scales and amax of NVFP4Quantizer, nv.gemm, im2col
    training    losses of five steps and the final weights: ResNet-18, the example's UNet, Swin-T, eight recipes each
    special     the same of a small network with frozen_weights, convert_model, fuse, learn_scales, checkpointing
    deployment  inference layers, packed files without the library's version, post-training quantization, ONNX graphs
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
for _name in [name for name in os.environ if name.startswith("NVTE_")]:
    del os.environ[_name]  # they change the default recipe, and are read when the library is imported

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from _torchvision import ensure_torchvision  # noqa: E402
from torch import Tensor, nn  # noqa: E402

ensure_torchvision()

import torchvision  # noqa: E402

import te_nvfp4_cv as nv  # noqa: E402

RECIPES = ("default", "no_rht", "no_sr", "no_2d", "four_over_six", "forward_only", "delayed", "pad_thin")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BACKENDS = ("reference", "vendor")
BASE = nv.NVFP4BlockScaling()
MORE_RECIPES = {  # settings that no file of recipes/ reaches
    "4over6 256 of weights, MSE": replace(BASE, nvfp4_4over6="weights", nvfp4_4over6_err_mode="MSE"),
    "4over6 448": replace(BASE, nvfp4_4over6="all", nvfp4_4over6_e4m3_use_256="none", disable_rht=True),
    "dequantized": replace(BASE, backward_override="dequantized"),
    "high wgrad": replace(BASE, high_precision_gemms=("wgrad",)),
    "high fprop": replace(BASE, high_precision_gemms=("fprop",)),
    "high dgrad": replace(BASE, high_precision_gemms=("dgrad",)),
}
ROW_SCALED = replace(BASE, row_scaled_activation=True, disable_rht=True)


# ---- from values to text --------------------------------------------------------------------------------------------


def describe(t: Tensor | None) -> str:
    """Return dtype, shape, strides and a hash of the bytes, in logical order, of a tensor."""
    if t is None:
        return "None"
    t = t.detach()
    strides = tuple(stride if size > 1 else 0 for size, stride in zip(t.shape, t.stride(), strict=True))
    data = t.contiguous().reshape(-1).view(torch.uint8).numpy()
    shape = ",".join(map(str, t.shape))
    found = hashlib.sha256(data.tobytes()).hexdigest()[:32]
    return f"{str(t.dtype)[6:]} [{shape}] ({','.join(map(str, strides))}) {found}"


def digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """Return one hash of many named tensors, dtypes, shapes and strides included."""
    text = "\n".join(f"{name} {describe(t)}" for name, t in named)
    return f"{text.count(chr(10)) + 1 if text else 0} tensors {hashlib.sha256(text.encode()).hexdigest()[:32]}"


def values(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return random values whose 16-element blocks differ in size by orders of magnitude, as gradients' do."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp()).to(dtype)


# ---- layers ---------------------------------------------------------------------------------------------------------

CALLS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "conv1d": ("conv1d", (4, 16, 9), (24, 16, 3), {"padding": 1}),
    "conv2d": ("conv2d", (16, 32, 6, 5), (48, 32, 3, 3), {"padding": 1}),
    "conv2d odd batch, odd channels": ("conv2d", (5, 20, 7, 6), (36, 20, 3, 3), {"padding": 1}),
    "conv2d 1x1": ("conv2d", (3, 16, 4, 4), (32, 16, 1, 1), {}),
    "conv2d stride": ("conv2d", (17, 16, 8, 7), (32, 16, 3, 3), {"stride": 2, "padding": 1}),
    "conv2d dilation": ("conv2d", (2, 16, 9, 9), (16, 16, 3, 3), {"dilation": 2, "padding": 2}),
    "conv2d groups": ("conv2d", (4, 64, 5, 5), (32, 32, 3, 3), {"groups": 2, "padding": 1}),
    "conv2d same": ("conv2d", (2, 16, 6, 6), (16, 16, 2, 4), {"padding": "same"}),
    "conv2d unequal axes": ("conv2d", (2, 16, 9, 11), (16, 16, 3, 5), {"stride": (2, 1), "padding": (0, 2)}),
    "conv2d without batch": ("conv2d", (16, 6, 6), (16, 16, 3, 3), {}),
    "conv2d patches": ("conv2d", (4, 16, 8, 8), (32, 16, 4, 4), {"stride": 4}),
    "conv3d": ("conv3d", (2, 16, 4, 4, 3), (16, 16, 2, 3, 3), {"padding": 1}),
    "conv_transpose1d": ("conv_transpose1d", (3, 16, 6), (16, 32, 4), {"stride": 2, "padding": 1}),
    "conv_transpose2d": ("conv_transpose2d", (4, 32, 5, 4), (32, 16, 2, 2), {"stride": 2}),
    "conv_transpose2d groups": (
        "conv_transpose2d",
        (3, 32, 4, 4),
        (32, 16, 3, 3),
        {"stride": 2, "groups": 2, "output_padding": 1, "padding": 1},
    ),
    "conv_transpose3d": ("conv_transpose3d", (2, 16, 3, 3, 2), (16, 16, 2, 2, 2), {"stride": 2}),
    "linear": ("linear", (16, 48), (32, 48), {}),
    "linear odd": ("linear", (3, 7, 40), (20, 40), {}),
}
SOME = ("conv2d", "conv2d odd batch, odd channels", "conv2d groups", "conv_transpose2d", "linear odd")
THIN = {
    "conv2d thin": ("conv2d", (5, 3, 8, 8), (16, 3, 3, 3), {"stride": 2, "padding": 1}),
    "linear thin": ("linear", (6, 16), (10, 16), {}),
}


def layer(
    case: tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]],
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    steps: int = 1,
    context: Any = None,
    **options: Any,
) -> Iterator[tuple[str, Tensor | None]]:
    """Run a layer forward and backward, and yield y, dx, dw, db of the last step.

    Args:
        context: a context to make torch's own call in; if None, nv.functional is called with `options`.
        steps: with delayed scales, the second step's differ from the first's.
    """
    op, x_shape, w_shape, keywords = case
    x, w = values(x_shape, 1, dtype), values(w_shape, 2, dtype) * 0.1
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    channels = w_shape[1] * keywords.get("groups", 1) if "transpose" in op else w_shape[0]
    bias = values((channels,), 3, dtype)
    for t in (x, w, bias):
        t.requires_grad_(True)
    torch.manual_seed(7)
    for step in range(steps):
        x.grad = w.grad = bias.grad = None
        if context is None:
            y = getattr(nv.functional, op)(x, w, bias, **keywords, **options)
        else:
            with context:
                y = getattr(F, op)(x, w, bias, **keywords)
        y.backward(values(tuple(y.shape), 4 + step, y.dtype) * 1e-3)
    yield from (("y", y), ("dx", x.grad), ("dw", w.grad), ("db", bias.grad))


def layers(quick: bool) -> Iterator[tuple[str, str]]:
    """Yield the results of single layers."""

    def described(name: str, *arguments: Any, **options: Any) -> Iterator[tuple[str, str]]:
        for part, t in layer(*arguments, **options):
            yield f"layer/{name}/{part}", describe(t)

    for name, case in CALLS.items():
        for dtype in DTYPES if not quick else ("fp32",):
            for backend in (*BACKENDS, "auto"):
                yield from described(f"{name}/{dtype}/{backend}", case, DTYPES[dtype], backend=backend)
    recipes: dict[str, Any] = {name: nv.load_recipe(name) for name in RECIPES} | MORE_RECIPES
    for recipe_name, recipe in recipes.items():
        thin = THIN if recipe.thin_layers == "pad" else {}
        for name, case in {**{name: CALLS[name] for name in SOME}, **thin}.items():
            for backend in BACKENDS:
                key = f"{name}/{recipe_name}/{backend}"
                yield from described(key, case, steps=2, recipe=recipe, backend=backend)
            if not quick:
                yield from described(f"{name}/{recipe_name}/bf16", case, torch.bfloat16, steps=2, recipe=recipe)
    for name in ("linear odd", "conv2d 1x1"):
        for backend in BACKENDS:
            yield from described(f"{name}/row scaled/{backend}", CALLS[name], recipe=ROW_SCALED, backend=backend)
    for name in ("conv2d", "conv2d stride", "conv2d groups", "conv_transpose2d"):
        for backend in BACKENDS:
            options = {"channels_last": True, "backend": backend}
            yield from described(f"{name}/channels_last/{backend}", CALLS[name], **options)
    for name, case in CALLS.items():
        yield from described(f"{name}/context", case, context=nv.nvfp4_autocast())
    for name in SOME:
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                yield from described(f"{name}/context, autocast {dtype}", CALLS[name], context=nv.nvfp4_autocast())
                yield from described(f"{name}/autocast {dtype}", CALLS[name])


# ---- operands -------------------------------------------------------------------------------------------------------

QUANTIZERS: dict[str, dict[str, Any]] = {
    "default": {},
    "rht": {"with_rht": True},
    "rht without signs": {"with_rht": True, "with_random_sign_mask": False},
    "2d": {"with_2d_quantization": True},
    "stochastic": {"stochastic_rounding": True},
    "stochastic rht": {"stochastic_rounding": True, "with_rht": True},
    "4over6": {"nvfp4_use_4over6": True},
    "4over6 256 MSE 2d": {
        "nvfp4_use_4over6": True,
        "nvfp4_e4m3_max": 256,
        "nvfp4_4over6_err_mode": "MSE",
        "with_2d_quantization": True,
    },
    "row scaled": {"row_scaled_nvfp4": True},
    "rowwise": {"columnwise": False},
    "columnwise": {"rowwise": False},
}
FACES = (
    "rowwise_data",
    "rowwise_scale_inv",
    "amax_rowwise",
    "columnwise_data",
    "columnwise_scale_inv",
    "amax_columnwise",
)


def faces(t: nv.NVFP4Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield codes, scales and amax of a quantized tensor, and its dequantized values."""
    for face in FACES:
        if (part := getattr(t, face)) is not None:
            yield face, part
    yield "dequantized", t.dequantize()


def operands(quick: bool) -> Iterator[tuple[str, str]]:
    """Yield the results of quantizers, of GEMMs on their tensors, and of im2col."""
    special = values((32, 48), 5)
    special[0, 0], special[1, :16], special[2, 5] = float("inf"), 0.0, float("nan")
    inputs = {"even": values((4, 8, 64), 6), "odd": values((13, 37), 7), "special": special}
    for name, options in QUANTIZERS.items():
        for kind, x in inputs.items():
            for dtype in DTYPES if not quick else ("bf16",):
                for backend in BACKENDS:
                    torch.manual_seed(3)
                    t = nv.NVFP4Quantizer(backend=backend, **options)(x.to(DTYPES[dtype]))
                    for face, part in faces(t):
                        yield f"operand/{name}/{kind}/{dtype}/{backend}/{face}", describe(part)
    for backend in BACKENDS:
        rht = nv.NVFP4Quantizer(with_rht=True, backend=backend)
        two_d = nv.NVFP4Quantizer(with_2d_quantization=True, backend=backend)
        x, dy, w = rht(values((48, 64), 1)), rht(values((48, 32), 2)), two_d(values((32, 64), 3))
        for layout, a, b in (("TN", x, w), ("NN", dy, w), ("NT", dy, x)):
            for dtype in DTYPES.values():
                y = nv.gemm(a, b, layout, dtype, backend=backend)
                yield f"gemm/{layout}/{dtype}/{backend}", describe(y)
        image = nv.NVFP4Quantizer(backend=backend)(values((6, 5, 16, 32), 4))
        for face, part in faces(nv.functional.im2col(image, 3, stride=2, padding=1)):
            yield f"im2col/{backend}/{face}", describe(part)


# ---- training -------------------------------------------------------------------------------------------------------


def _unet() -> nn.Module:
    from unet_coco.unet import UNet

    return UNet(5, scale=0.25)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "unet": (_unet, (4, 3, 40, 48)),
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), (16, 3, 32, 32)),
    "swin_t": (lambda: torchvision.models.swin_t(num_classes=10), (3, 3, 32, 32)),
}


class Small(nn.Module):
    """A network with a layer of every kind, for what does not need a real one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.Sequential(
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(inplace=True),
            nn.Conv2d(32, 40, 3, stride=2, padding=1),
            nn.GroupNorm(4, 40),
            nn.SiLU(),
            nn.Conv2d(40, 64, 1),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1, groups=2),
        )
        self.up = nn.ConvTranspose2d(64, 32, 2, stride=2)
        self.head = nn.Linear(32, 20)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.up(self.body(self.stem(x)))).mean((2, 3)))


def small() -> tuple[Small, Tensor]:
    """Return the small network and a batch of images for it."""
    torch.manual_seed(0)
    return Small(), values((6, 3, 8, 8), 1)


def train(
    name: str,
    model: nn.Module,
    x: Tensor,
    recipe: Any,
    steps: int = 5,
    context: Any = None,
    prepare: Callable[[nn.Module], Any] | None = None,
    frozen: int = 0,
) -> Iterator[tuple[str, str]]:
    """Train for some steps; yield the losses, the last gradients, the final weights and extra_state.

    Args:
        context: entered around nvfp4_autocast.
        prepare: called with the model before the optimizer is made.
        frozen: how many batches to accumulate per step inside nv.frozen_weights; 0: one batch without it.
    """
    if prepare is not None:
        prepare(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    outer = context if context is not None else contextlib.nullcontext()
    torch.manual_seed(11)
    for step in range(steps):
        optimizer.zero_grad()
        with nv.frozen_weights(model) if frozen else contextlib.nullcontext():
            for part in range(max(frozen, 1)):
                with outer, nv.nvfp4_autocast(recipe):
                    y = model(x + 0.01 * (step + part))
                    flat = y.flatten(2).mean(2) if y.dim() > 2 else y
                    loss = F.cross_entropy(flat.float(), torch.arange(len(x)) % flat.shape[1])
                loss.backward()
        optimizer.step()
        yield f"train/{name}/loss {step}", f"{loss.item():.6g} {describe(loss)}"
    gradients = ((n, p.grad) for n, p in model.named_parameters() if p.grad is not None)
    yield f"train/{name}/gradients", digest(gradients)
    yield f"train/{name}/weights", digest(model.state_dict().items())
    state = nv.extra_state(model)
    numbers = {key: state[key] for key in ("sr_seed", "sr_drawn")}
    scales = _tensors_of(state["scales"])
    yield f"train/{name}/extra_state", f"{numbers} {digest(scales)}"


def _tensors_of(tree: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the leaves of nested tables and lists as tensors, texts and numbers included."""
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, dict):
        for key, value in sorted(tree.items()):
            yield from _tensors_of(value, f"{path}/{key}")
    elif isinstance(tree, (list, tuple)):
        for number, value in enumerate(tree):
            yield from _tensors_of(value, f"{path}/{number}")
    else:
        yield f"{path}={tree!r}", torch.zeros(0)


def training(quick: bool) -> Iterator[tuple[str, str]]:
    """Yield the results of training runs of real networks."""
    for model_name, (make, shape) in MODELS.items():
        for recipe in RECIPES if not quick else ("default",):
            torch.manual_seed(0)
            model = make()
            yield from train(f"{model_name}/{recipe}", model, values(shape, 1), nv.load_recipe(recipe))
    make, shape = MODELS["unet"]
    torch.manual_seed(0)
    x = values(shape, 1).to(memory_format=torch.channels_last)
    model, mixed = make().to(memory_format=torch.channels_last), torch.autocast("cpu", torch.bfloat16)
    recipe_file = nv.load_recipe("unet")
    yield from train("unet/recipe unet, bf16, channels_last", model, x, recipe_file, 2, mixed, _table(recipe_file))


def _table(recipe: Any) -> Callable[[nn.Module], None]:
    return lambda model: nv.set_precision(model, recipe)


def special_training(quick: bool) -> Iterator[tuple[str, str]]:
    """Yield the results of short training runs with each of the library's helpers."""
    for name in ("default", "delayed", "no_2d"):
        model, x = small()
        yield from train(f"small/frozen_weights/{name}", model, x, nv.load_recipe(name), 2, frozen=3)
    converted, x = small()
    nv.convert_model(converted, nv.load_recipe("default"))
    yield from train("small/convert_model", converted, x, nv.load_recipe("no_rht"), 2)
    for kind in ("scale", "clip"):
        model, x = small()
        yield from train(f"small/learn_scales {kind}", model, x, None, 3, prepare=_learn(kind))
    for context_name, context in (("fp32", None), ("bf16", torch.autocast("cpu", torch.bfloat16))):
        model, x = small()
        fused = nv.fuse(model, report=True)
        yield f"train/small/fuse/{context_name}/count", str(fused.fused)
        yield from train(f"small/fuse/{context_name}", model, x, None, 3, context)
    torch.manual_seed(0)
    resnet = torchvision.models.resnet18(num_classes=10)
    yield "train/resnet18/fuse/count", str(nv.fuse(resnet, report=True).fused)
    yield from train("resnet18/fuse", resnet, values((5, 3, 32, 32), 1), None, 2)
    model, x = small()
    table = {"body.2": None, "body.5": nv.load_recipe("no_rht"), "up": nv.load_recipe("no_sr")}
    yield from train("small/set_precision", model, x, None, 2, prepare=lambda m: nv.set_precision(m, table))
    for reentrant in (False, True):
        model, x = small()
        yield from train(f"small/checkpoint reentrant={reentrant}", Recomputed(model, reentrant), x, None, 2)


def _learn(kind: str) -> Callable[[nn.Module], Any]:
    return lambda model: nv.learn_scales(model, kind)


class Recomputed(nn.Module):
    """The small network with its body recomputed in backward."""

    def __init__(self, model: Small, reentrant: bool) -> None:
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, x: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        m = self.model
        body = checkpoint(m.body, m.stem(x), use_reentrant=self.reentrant)
        return m.head(F.relu(m.up(body)).mean((2, 3)))


# ---- deployment -----------------------------------------------------------------------------------------------------


def file_parts(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the parts of a packed file, an index of shards included: tensors, and metadata without the version."""
    from safetensors import safe_open

    if path.name.endswith(".json"):
        content = json.loads(path.read_text())
        metadata = content["metadata"]
        yield "weight_map", json.dumps(content["weight_map"], sort_keys=True)
    else:
        with safe_open(path, "pt") as opened:
            metadata = opened.metadata()
            yield "tensors", digest((name, opened.get_tensor(name)) for name in sorted(opened.keys()))
    yield "metadata", hashlib.sha256(json.dumps(_without_version(metadata), sort_keys=True).encode()).hexdigest()


def _without_version(value: Any) -> Any:
    """Return metadata with its JSON texts parsed, without the library's version, digests that depend on it, and the
    reasons why layers stay in high precision, which are text for people.
    """
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except ValueError:
            return value
        return _without_version(parsed) if isinstance(parsed, dict) else value
    if isinstance(value, dict):
        left_out = ("library", "producer", "digest")
        kept = {key: v for key, v in value.items() if key not in left_out}
        return {key: sorted(v) if key == "high" else _without_version(v) for key, v in kept.items()}
    return [_without_version(v) for v in value] if isinstance(value, list) else value


def graph_parts(path: Path) -> Iterator[tuple[str, str]]:
    """Yield what an ONNX file computes: constants and nodes, values numbered in order in place of their names."""
    import onnx

    proto = onnx.load(str(path))
    numbers: dict[str, int] = {}

    def number(name: str) -> int:
        return numbers.setdefault(name, len(numbers)) if name else -1

    def attribute(a: Any) -> tuple[str, str]:
        if a.type == onnx.AttributeProto.GRAPH:
            return a.name, repr(nodes(a.g.node))
        copy = onnx.AttributeProto()
        copy.CopyFrom(a)
        copy.ClearField("doc_string")
        if a.type == onnx.AttributeProto.TENSOR:
            copy.t.ClearField("name")
        return a.name, hashlib.sha256(copy.SerializeToString(deterministic=True)).hexdigest()

    def nodes(found: Any) -> list[Any]:
        rows = []
        for node in found:
            ends = [number(n) for n in node.input], [number(n) for n in node.output]
            rows.append((node.domain, node.op_type, *ends, sorted(attribute(a) for a in node.attribute)))
        return rows

    graph = proto.graph
    inputs = [(number(value.name), value.type.SerializeToString(deterministic=True)) for value in graph.input]
    rows = nodes(graph.node)
    constants = []
    for tensor in graph.initializer:
        data = onnx.numpy_helper.to_array(tensor)
        constants.append((number(tensor.name), tensor.data_type, list(tensor.dims), data.tobytes()))
    functions = [(f.domain, f.name, nodes(f.node)) for f in proto.functions]
    kinds = [f"{node.domain}:{node.op_type}" for node in graph.node]
    for name, part in (("inputs", inputs), ("nodes", rows), ("constants", sorted(constants)), ("functions", functions)):
        yield name, f"{len(part)} {hashlib.sha256(repr(part).encode()).hexdigest()[:32]}"
    yield "node kinds", hashlib.sha256(repr(kinds).encode()).hexdigest()[:32]


def deployment(quick: bool) -> Iterator[tuple[str, str]]:
    """Yield the results of inference layers, packed files and ONNX files."""
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder = Path(name)
        for recipe in RECIPES if not quick else ("default", "four_over_six"):
            for model_name in ("small", "unet") if recipe in ("default", "pad_thin") else ("small",):
                yield from _deploy(f"{model_name}/{recipe}", model_name, nv.load_recipe(recipe), folder)


def _made(model_name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return small() if model_name == "small" else (_unet(), values((2, 3, 32, 32), 1))


def _deploy(name: str, model_name: str, recipe: Any, folder: Path) -> Iterator[tuple[str, str]]:
    model, x = _made(model_name)
    model.eval()
    with nv.nvfp4_autocast(recipe):
        yield f"deploy/{name}/eval", describe(model(x))
    path = folder / name.replace("/", "-")
    for kind, options in (("file", {}), ("shards", {"shard_bytes": 12_000 if model_name == "small" else 500_000})):
        saved = nv.export.save(model, path.with_name(f"{path.name}-{kind}"), recipe, **options)
        for number, file in enumerate(saved.files):
            for part, text in file_parts(file):
                yield f"deploy/{name}/{kind} {number}/{part}", text
        yield f"deploy/{name}/{kind}/layers", f"{saved.quantized} {sorted(saved.high)} {saved.weight_bytes}"
        for backend in BACKENDS if kind == "file" else ("auto",):
            for weights, activations in (("packed", "nvfp4"), ("cached", "nvfp4"), ("packed", "high")):
                loaded = nv.export.load(saved.files[0], _made(model_name)[0], weights, activations, backend=backend)
                key = f"deploy/{name}/{kind}/{backend}/{weights}/{activations}"
                yield f"{key}/y", describe(loaded(x))
                yield f"{key}/state", digest(loaded.state_dict().items())
    activations = "high" if recipe.nvfp4_4over6 == "all" else "nvfp4"  # ONNX has no form for 4over6 of activations
    packed_file = path.with_name(f"{path.name}-file.safetensors")
    loaded = nv.export.load(packed_file, _made(model_name)[0], activations=activations)
    for form in ("qdq", "matmul", "portable") if name == "small/default" else ("qdq",):
        if model_name == "small":
            nv.export.to_onnx(loaded, x, path.with_name(f"{path.name}-{form}.onnx"), form)
            for part, text in graph_parts(path.with_name(f"{path.name}-{form}.onnx")):
                yield f"onnx/{name}/{form}/{part}", text
    if model_name == "small" and name.endswith(("default", "four_over_six")):
        with torch.enable_grad():
            quantized = nv.export.quantize(_made(model_name)[0], [x, x + 0.1], recipe=recipe)
        yield f"deploy/{name}/quantize/y", describe(quantized(x))
        yield f"deploy/{name}/quantize/state", digest(quantized.state_dict().items())


# ---- the command ----------------------------------------------------------------------------------------------------

SECTIONS = (layers, operands, training, special_training, deployment)


def run(out: Path, quick: bool, threads: int) -> None:
    """Compute everything and write it as JSON."""
    torch.set_num_threads(threads)
    results: dict[str, str] = {}
    for section in SECTIONS:
        start = time.perf_counter()
        for key, text in section(quick):
            if key in results:
                raise RuntimeError(f"two results are called {key}")
            results[key] = text
        print(f"{section.__name__}: {len(results)} results, {time.perf_counter() - start:.0f} s", flush=True)
    made_with = {
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "quick": quick,
    }
    out.write_text(json.dumps({"made with": made_with, "results": results}, indent=0) + "\n")


def compare(a: Path, b: Path) -> int:
    """Print what differs between two files; return how many results do, a missing one included."""
    first, second = (json.loads(path.read_text()) for path in (a, b))
    if first["made with"] != second["made with"]:
        print(f"not comparable: {first['made with']} against {second['made with']}")
        return 1
    old, new = first["results"], second["results"]
    differing = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    for key in differing:
        print(f"{key}\n  {old.get(key, 'missing')}\n  {new.get(key, 'missing')}")
    print(f"{len(differing)} of {len({**old, **new})} results differ")
    return len(differing)


def main() -> int:
    """Read the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write the results")
    parser.add_argument("--compare", type=Path, nargs=2, metavar="FILE", help="two files of results")
    parser.add_argument("--quick", action="store_true", help="one recipe per network and one dtype per layer")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of torch (default: 1)")
    options = parser.parse_args()
    if (options.out is None) == (options.compare is None):
        parser.error("give either --out FILE or --compare FILE FILE")
    if options.compare:
        return min(compare(*options.compare), 1)
    run(options.out, options.quick, options.threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
