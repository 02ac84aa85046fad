"""Images cut into rows over ranks, against the whole image on one process: operators, layers, models."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import te_nvfp4_cv as nv
from tests.distributed.launch import Ranks, ranks_test
from tests.helpers import relative_error, values

# Rounding without random bits: with them every rank draws its own, and no two runs can be compared.
PLAIN = nv.NVFP4BlockScaling(disable_stochastic_rounding=True)
SP = nv.spatial_parallel


def mesh_of(ranks: Ranks) -> Any:
    return init_device_mesh(ranks.device.type, (ranks.world,))


def compare(
    ranks: Ranks, module: nn.Module, x: Tensor, recipe: Any = None, dim: int = 2, tolerance: float = 1e-5
) -> None:
    """Compare y, dx and parameters' gradients of a module on rows and on the whole image."""
    single, cut = copy.deepcopy(module), module
    # Deep random networks sum up more rounding where there is nothing else.
    nothing = without_gradient(module, x) if tolerance > 1e-3 else set()
    mesh = mesh_of(ranks)
    results = []
    for kind, model in (("single", single), ("cut", cut)):
        leaf = x.clone().requires_grad_()
        context = nv.nvfp4_autocast(recipe, enabled=recipe is not None)
        with context:
            given = leaf if kind == "single" else SP.shard(leaf, mesh, dim)
            y = model(given)
        assert (type(y) is not Tensor) == (kind == "cut")
        if kind == "cut":
            assert y.piece.shape[y.placed.dim] == y.placed.mine.size
        value = y if kind == "single" else SP.whole(y)
        assert y.shape == value.shape
        (value * values(tuple(value.shape), seed=7)).sum().backward()
        results.append([value, leaf.grad, *(p.grad for p in model.parameters())])
    largest = max((float(g.abs().max()) for g in results[0][2:]), default=0.0)
    for name, one, other in zip(["y", "dx", *dict(module.named_parameters())], *results, strict=True):
        # A bias before a norm has no gradient but rounding.
        share = tolerance if name in nothing else 1e-3
        least = share * largest if name in dict(module.named_parameters()) else 0.0
        one, other = one.detach(), other.detach()
        error = float((other - one).abs().max() / max(one.abs().max(), least, 1e-30)) if one.numel() else 0.0
        assert error <= tolerance, f"{name}: {error} in {module} of {tuple(x.shape)}"


def without_gradient(module: nn.Module, x: Tensor) -> set[str]:
    """Return the names of the parameters whose gradient is nothing but rounding, found in float64."""
    exact = copy.deepcopy(module).double()
    y = exact(x.double())
    (y * values(tuple(y.shape), seed=7)).sum().backward()
    sizes = {name: float(p.grad.abs().max()) for name, p in exact.named_parameters() if p.grad is not None}
    return {name for name, size in sizes.items() if size <= 1e-9 * max(sizes.values())}


# ---- operators in high precision ------------------------------------------------------------------------------------


def on_ranks_convolutions(ranks: Ranks) -> None:
    for height, (kernel, stride, dilation) in itertools.product(
        (7, 16), ((1, 1, 1), (3, 1, 1), (3, 2, 1), (7, 2, 1), (3, 1, 4), (2, 3, 2))
    ):
        pad = dilation * (kernel // 2)
        compare(ranks, nn.Conv2d(3, 4, kernel, stride, pad, dilation), values((2, 3, height, 5), seed=1))
        compare(
            ranks,
            nn.ConvTranspose2d(3, 4, kernel, stride, pad, min(stride - 1, 1), dilation=dilation),
            values((2, 3, height, 9), seed=1),
        )
    compare(ranks, nn.Conv3d(2, 4, 3, padding=1), values((1, 2, 6, 4, 4), seed=1))
    compare(ranks, nn.Conv1d(2, 4, 3, padding="same", dilation=2), values((1, 2, 11), seed=1))
    compare(ranks, nn.Conv2d(2, 4, 2, padding="same"), values((1, 2, 7, 6), seed=1))
    for mode in ("reflect", "replicate", "circular"):
        compare(ranks, nn.Conv2d(2, 4, 3, padding=1, padding_mode=mode), values((1, 2, 9, 6), seed=1))
    # Pieces smaller than the halo, and ranks without rows.
    for height in (1, 3, 5):
        compare(
            ranks,
            nn.Sequential(nn.Conv2d(2, 4, 7, padding=3), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1)),
            values((1, 2, height, 8), seed=1),
        )


def on_ranks_pooling_and_resampling(ranks: Ranks) -> None:
    modules = [
        nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.AvgPool2d(2),
        nn.AvgPool2d(3, 2, 1),
        nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.AvgPool2d(2, ceil_mode=True), nn.Upsample(scale_factor=2),
        nn.AvgPool2d(3, 2, 1, ceil_mode=True), nn.AvgPool2d(2, divisor_override=3),
        nn.Upsample(scale_factor=2, mode="bilinear"), nn.Upsample(size=(13, 3), mode="bilinear", align_corners=True),
        nn.Upsample(size=(3, 5)), nn.Upsample(size=(20, 4), mode="nearest-exact"), nn.ZeroPad2d((1, 0, 2, 3)),
        nn.Upsample(scale_factor=1.5, mode="bilinear"), nn.PixelShuffle(2), nn.ReflectionPad2d(2), nn.Softmax2d(),
        nn.AdaptiveAvgPool2d((None, 2)),
    ]  # fmt: skip
    for height in (6, 9):
        for module in modules:
            compare(ranks, module, values((2, 4, height, 6), seed=1))
    compare(ranks, nn.PixelUnshuffle(2), values((2, 4, 8, 6), seed=1))
    compare(ranks, nn.AdaptiveAvgPool2d((4, 2)), values((2, 4, 8, 6), seed=1))
    compare(ranks, nn.MaxPool3d(2), values((2, 4, 6, 4, 4), seed=1))
    compare(ranks, nn.Upsample(scale_factor=2, mode="trilinear"), values((2, 4, 5, 4, 4), seed=1))


def on_ranks_norms(ranks: Ranks) -> None:
    for height in (3, 8):
        x = values((3, 8, height, 5), seed=1) + 2
        for norm in (
            nn.BatchNorm2d(8),
            nn.GroupNorm(2, 8),
            nn.InstanceNorm2d(8, affine=True),
            nn.BatchNorm2d(8, affine=False),
        ):
            for parameter in norm.parameters():
                nn.init.normal_(parameter)
            compare(ranks, norm, x)
    one, cut, mesh = nn.BatchNorm2d(4), nn.BatchNorm2d(4), mesh_of(ranks)
    x = values((2, 4, 7, 3), seed=1)
    for momentum in (0.1, None):
        one.momentum = cut.momentum = momentum
        one(x), cut(SP.shard(x, mesh))
    torch.testing.assert_close(dict(cut.named_buffers()), dict(one.named_buffers()))
    torch.testing.assert_close(SP.whole(cut.eval()(SP.shard(x, mesh))), one.eval()(x))


class Block(nn.Module):
    """Shapes, crops, joins and gates that models write between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.scale, self.norm = nn.Linear(4, 4), nn.Parameter(torch.ones(4, 1, 1)), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        gate = torch.sigmoid(self.gate(x.mean((2, 3))))
        x = x * gate[:, :, None, None] + self.scale * x
        x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        left, right = x.chunk(2, 1)
        x = torch.cat([right, left, F.interpolate(x.mean((2, 3), keepdim=True), size=(h, w))], 1)
        x = x.view(b, 2, c, h, w).transpose(1, 2).reshape(b, 2 * c, h, w)
        x = F.pad(x, (0, 0, 1, 2))[:, :, 2 : h + 1, 1:]
        return F.gelu(x) + torch.arange(h - 1.0)[:, None] if h > 1 else F.gelu(x)


def on_ranks_what_models_write(ranks: Ranks) -> None:
    for height in (2, 7, 8):
        compare(ranks, Block(), values((2, 4, height, 5), seed=1))


def on_ranks_extremes(ranks: Ranks) -> None:
    for row in (None, 0, 7):  # NaN on no rank, on the first, on the last
        x = values((1, 3, 8, 2), seed=1)
        if row is not None:
            x[0, 1, row, 1] = torch.nan
        cut = SP.shard(x, mesh_of(ranks))
        for extreme in (torch.amax, torch.amin, torch.max, torch.min):
            torch.testing.assert_close(extreme(cut), extreme(x), equal_nan=True)
        for whole, sharded in ((x > 0, cut > 0), (x < 99, cut < 99), (x > 99, cut > 99)):
            assert bool(sharded.any() == whole.any()) and bool(sharded.all() == whole.all())


def on_ranks_losses(ranks: Ranks) -> None:
    mesh = mesh_of(ranks)
    scores, labels = (
        values((2, 5, 7, 6), seed=1),
        torch.randint(0, 5, (2, 7, 6), generator=torch.Generator().manual_seed(1)),
    )
    labels[:, :3, 2] = 255
    weight = torch.rand(5, generator=torch.Generator().manual_seed(2))
    target = values((2, 5, 7, 6), seed=3)
    functions = [
        lambda s, y, t: F.cross_entropy(s, y, ignore_index=255),
        lambda s, y, t: F.cross_entropy(s, y, weight, ignore_index=255),
        lambda s, y, t: F.cross_entropy(s, y, ignore_index=255, label_smoothing=0.1),
        lambda s, y, t: F.cross_entropy(s, y, ignore_index=255, reduction="none").mean(),
        lambda s, y, t: F.cross_entropy(s, t.softmax(1)),
        lambda s, y, t: F.mse_loss(s, t),
        lambda s, y, t: F.binary_cross_entropy_with_logits(s, t.sigmoid(), pos_weight=weight[:, None, None]),
        lambda s, y, t: ((s - t) ** 2).mean() + s.abs().sum() + s.sum((0, 2, 3)).square().sum(),
        lambda s, y, t: 1 - (2 * (s.sigmoid() * t).sum((2, 3)) / (s.sigmoid() + t.abs()).sum((2, 3))).mean(),
    ]
    for function in functions:
        one, cut = scores.clone().requires_grad_(), scores.clone().requires_grad_()
        expected = function(one, labels, target)
        found = function(SP.shard(cut, mesh), SP.shard(labels, mesh, dim=1), SP.shard(target, mesh))
        assert type(found) is Tensor
        expected.backward()
        found.backward()
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(cut.grad, one.grad)


# ---- NVFP4 ----------------------------------------------------------------------------------------------------------


def codes_of(run: Any) -> list[tuple[str, Any]]:
    """Return what quantization of x and dy made while run() ran: role, rowwise codes, scales."""
    from te_nvfp4_cv.layer import operands

    seen: list[tuple[str, Any]] = []
    original = operands._quantize

    def watched(role: Any, x: Tensor, *rest: Any) -> Any:
        made = original(role, x, *rest)
        seen.append((role.value, made))
        return made

    operands._quantize = watched
    try:
        run()
    finally:
        operands._quantize = original
    return seen


def compare_nvfp4(
    ranks: Ranks, layer: nn.Module, x: Tensor, backend: str, wgrad: float, recipe: Any = PLAIN, steps: int = 1
) -> None:
    """Compare an NVFP4 layer on rows with the same on the whole image; wgrad: error that dw may have."""
    models = copy.deepcopy(layer), copy.deepcopy(layer)
    for step in range(steps):  # more than one for scales with a state
        for model in models:
            model.zero_grad()
        _compare_step(ranks, models, x * (1 + step), backend, wgrad, recipe)


def _compare_step(
    ranks: Ranks, models: tuple[nn.Module, nn.Module], x: Tensor, backend: str, wgrad: float, recipe: Any
) -> None:
    mesh, (one, cut) = mesh_of(ranks), models
    layer = cut
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    loss = values
    found: dict[str, list[tuple[str, Any]]] = {}

    def run(model: nn.Module, given: Tensor) -> Tensor:
        with nv.nvfp4_autocast(recipe, backend=backend):
            y = model(given)
        y = SP.whole(y) if isinstance(y, SP.SpatialTensor) else y
        (y * loss(tuple(y.shape), seed=7)).sum().backward()
        results.append(y)
        return y

    results: list[Tensor] = []
    found["one"] = codes_of(lambda: run(one, leaf))
    found["cut"] = codes_of(lambda: run(cut, SP.shard(other, mesh)))
    assert [role for role, _ in found["cut"]] == [role for role, _ in found["one"]]
    for (role, whole), (_, mine) in zip(found["one"], found["cut"], strict=True):
        assert torch.equal(whole.row_amax, mine.row_amax), role
        if backend == "reference":  # it multiplies what the ranks exchange, packed codes
            height = whole.row.data.shape[1]
            each = -(-height // ranks.world)
            here = slice(ranks.rank * each, (ranks.rank + 1) * each)
            for one_face, my_face in zip(whole.row, mine.row, strict=True):
                assert torch.equal(one_face[:, here], my_face), role
    names = ["y", "dx", *dict(layer.named_parameters())]
    pairs = zip(
        (results[0], leaf.grad, *(p.grad for p in one.parameters())),
        (results[1], other.grad, *(p.grad for p in cut.parameters())),
        strict=True,
    )
    for name, (a, b) in zip(names, pairs, strict=True):
        error = relative_error(b, a)
        assert error <= (wgrad if name == "weight" else 1e-5), f"{name}: {error}, {layer}, {tuple(x.shape)}, {backend}"


def on_ranks_nvfp4_layers(ranks: Ranks) -> None:
    # On four ranks, nine rows leave one without any.
    for backend in ("reference", "vendor", "integer") if ranks.world == 2 else ("reference", "integer"):
        for batch, height in ((16, 9), (2, 16)):
            # A batch of 16 fills the blocks of wgrad; a smaller one is cut into strips, on each rank its own.
            bound = 1e-5 if batch == 16 else 0.2
            for kernel, stride, dilation in (
                (3, 1, 1),
                (3, 2, 1),
                (1, 1, 1),
                (1, 2, 1),
                (7, 2, 1),
                (3, 1, 4),
                (2, 3, 3),
            ):
                pad = dilation * (kernel // 2)
                x = values((batch, 16, height, 6), seed=1)
                compare_nvfp4(ranks, nn.Conv2d(16, 32, kernel, stride, pad, dilation), x, backend, bound)
                more = min(stride - 1, 1)
                compare_nvfp4(
                    ranks,
                    nn.ConvTranspose2d(16, 32, kernel, stride, min(pad, 1), more, dilation=dilation),
                    x,
                    backend,
                    bound,
                )
    compare_nvfp4(ranks, nn.Conv3d(16, 32, 3, padding=1), values((2, 16, 8, 4, 4), seed=1), "reference", 0.2)
    compare_nvfp4(ranks, nn.Conv2d(32, 32, 3, padding=1, groups=2), values((16, 32, 8, 4), seed=1), "reference", 1e-5)
    compare_nvfp4(ranks, nn.Conv2d(16, 16, 2, padding="same"), values((16, 16, 9, 4), seed=1), "reference", 1e-5)


test_on_ranks = ranks_test(globals(), four=("convolutions", "norms", "nvfp4_layers"))
