"""Images cut into rows, call by call: what travels when, scales of every kind, evaluation, weights' codes, export."""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import te_nvfp4_cv as nv
from te_nvfp4_cv.distributed.spatial import exchange, halo
from te_nvfp4_cv.layer import gemms, observe
from te_nvfp4_cv.ops.quantize import operand
from tests.distributed.launch import ROOT, Ranks, ranks_test, two_ranks
from tests.distributed.test_spatial import PLAIN, SP, compare_nvfp4, mesh_of
from tests.distributed.test_spatial_models import Net
from tests.helpers import relative_error, same_bits, values


def events_of(run: Any) -> list[str]:
    """Return what happens in run(), in order: messages are posted and waited for, operands quantized and multiplied."""
    seen: list[str] = []
    with pytest.MonkeyPatch.context() as patch:

        def watch(where: Any, name: str, says: Any) -> None:
            real = getattr(where, name)

            def spied(*args: Any, **kwargs: Any) -> Any:
                seen.append(says(*args))
                return real(*args, **kwargs)

            patch.setattr(where, name, spied)

        def rows(x: Tensor, *_: Any) -> str:
            return f"quantize {x.shape[1]}"

        watch(operand, "quantize_operand", rows)
        watch(exchange, "quantize_operand", rows)
        watch(operand, "quantize_weight", lambda *_: "quantize w")
        watch(dist, "batch_isend_irecv", lambda *_: "post")
        watch(halo.Pending, "wait", lambda *_: "wait")
        for name in ("fprop", "dgrad", "wgrad"):
            watch(gemms, f"conv_{name}", lambda *_, name=name: name)
        run()
    return seen


@two_ranks
def on_ranks_halos_travel_while_a_rank_computes(ranks: Ranks) -> None:
    layer, mesh = nn.Conv2d(16, 16, 3, padding=1), mesh_of(ranks)
    leaf = values((16, 16, 16, 4), seed=1).requires_grad_()
    x, made = SP.shard(leaf, mesh), []
    for recipe in (PLAIN, nv.NVFP4BlockScaling()):

        def forward(recipe: Any = recipe) -> None:
            with nv.nvfp4_autocast(recipe, backend="reference"):
                made.append(layer(x))

        # One row of eight is sent before the other rows and the weight are quantized.
        assert events_of(forward) == ["quantize 1", "post", "quantize 8", "quantize w", "wait", "fprop"]
        dy = SP.whole(made.pop()).square().sum()
        early = ["quantize 1", "post", "quantize 8"] if recipe is PLAIN else ["quantize 8", "post"]
        # x's columns before dy is quantized; dy's rows before wgrad, which does not read those of others.
        expected = ["post", *early, "wait", "wgrad", "wait", "dgrad"]
        assert [e for e in events_of(dy.backward) if e != "quantize w"] == expected
    thin = SP.shard(values((16, 16, 2, 4), seed=1), mesh)
    with nv.nvfp4_autocast(PLAIN, backend="reference"):  # its only row would be quantized twice
        assert events_of(lambda: layer(thin))[:2] == ["quantize 1", "post"]


@two_ranks
def on_ranks_scales_of_every_kind(ranks: Ranks) -> None:
    for scale in ("current_pow2", "delayed"):
        recipe = dataclasses.replace(PLAIN, tensor_scale=scale)
        for batch, bound in ((16, 1e-5), (2, 0.25)):
            for layer in (nn.Conv2d(16, 32, 3, padding=1), nn.ConvTranspose2d(16, 32, 3, 2), nn.Conv2d(16, 16, 1)):
                x = values((batch, 16, 9, 6), seed=1)
                for backend in ("reference", "vendor"):
                    compare_nvfp4(ranks, layer, x, backend, bound if layer.kernel_size != (1, 1) else 0.25, recipe, 3)


@two_ranks
def on_ranks_evaluation_shares_amaxes(ranks: Ranks) -> None:
    mesh, x = mesh_of(ranks), values((2, 16, 8, 6), seed=1)
    x[:, :, 5] *= 8  # the amax is on one rank alone
    for scale in ("current", "delayed"):
        recipe = dataclasses.replace(PLAIN, tensor_scale=scale)
        for layer in (nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(16, 32, 1), nn.Linear(6, 32)):
            thin = recipe if not isinstance(layer, nn.Linear) else dataclasses.replace(recipe, thin_layers="pad")
            with torch.no_grad(), nv.nvfp4_autocast(thin, backend="reference"):
                found, expected = SP.whole(layer(SP.shard(x, mesh))), layer(x)
            assert relative_error(found, expected) <= 1e-6, layer


@two_ranks
def on_ranks_row_scaled_layers_and_other_formats_stay_in_high_precision(ranks: Ranks) -> None:
    mesh, x = mesh_of(ranks), values((2, 16, 8, 6), seed=1)
    rows = dataclasses.replace(PLAIN, row_scaled_activation=True, disable_rht=True)
    other = nv.NVFP4BlockScaling(block_format="mxfp4")
    for layer in (nn.Conv2d(16, 16, 3, padding=1), nn.Linear(6, 16)):
        reasons: list[str] = []
        with nv.nvfp4_autocast(other), observe.observe(lambda call, told=reasons: told.append(call.reason)):
            found = SP.whole(layer(SP.shard(x, mesh)))
        assert all(reasons) and (layer.weight.dim() == 2 or "block_format='mxfp4'" in reasons[0]), reasons
        assert relative_error(found, layer(x)) <= 1e-6
    for layer in (nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1, 2)):
        told: list[str] = []
        with nv.nvfp4_autocast(rows), observe.observe(lambda call, told=told: told.append(call.reason)):
            found = SP.whole(layer(SP.shard(x, mesh)))
        assert told == ["its activations have a scale for each row"], layer
        assert relative_error(found, layer(x)) <= 1e-6
    layer = nn.Conv2d(16, 16, 3, padding=1)  # one scale, as everywhere
    with nv.nvfp4_autocast(rows, backend="vendor"):
        found, expected = SP.whole(layer(SP.shard(x, mesh))), layer(x)
    assert relative_error(found, expected) <= 1e-5


@two_ranks
def on_ranks_weights_that_are_frozen_or_learned(ranks: Ranks) -> None:
    mesh, x = mesh_of(ranks), values((16, 16, 8, 6), seed=1)
    one = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1))
    many = copy.deepcopy(one)
    results = []
    for model, given in ((one, x), (many, SP.shard(x, mesh))):
        nv.learn_scales(model)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.fill_(0.5) if "scale" in name else None
        with nv.nvfp4_autocast(PLAIN, backend="reference"):
            y = model(given)
        y.square().mean().backward()
        results.append((y, [p.grad for p in model.parameters()]))
    assert relative_error(SP.whole(results[1][0]), results[0][0]) <= 1e-2
    for (name, _), expected, found in zip(one.named_parameters(), results[0][1], results[1][1], strict=True):
        assert relative_error(found, expected) <= 0.05, name
    frozen = nn.Conv2d(16, 16, 3, padding=1)
    with nv.frozen_weights(frozen), nv.nvfp4_autocast(PLAIN, backend="reference"):
        assert "quantize w" in events_of(lambda: frozen(SP.shard(x, mesh)))
        assert "quantize w" not in events_of(lambda: frozen(SP.shard(x, mesh)))


@two_ranks
def on_ranks_exports_are_the_plain_models(ranks: Ranks) -> None:
    torch.manual_seed(0)
    net = Net().eval()
    plain, x = copy.deepcopy(net), values((1, 3, 16, 12), seed=1)
    SP.parallelize(net, mesh_of(ranks), outputs="whole")
    assert list(net.state_dict()) == list(plain.state_dict())
    assert relative_error(net(x), plain(x)) <= 1e-5
    for name, model in (("cut", net), ("plain", plain)):
        nv.export.save(model, ranks.folder / f"{name}{ranks.rank}")
    saved = [(ranks.folder / f"{name}{ranks.rank}.safetensors").read_bytes() for name in ("cut", "plain")]
    assert saved[0] == saved[1]
    quantized, expected = (nv.export.quantize(model, [x]) for model in (net, plain))
    assert same_bits(quantized(x), expected(x))
    assert type(net(x)) is Tensor and len(net._forward_pre_hooks) == 1  # the caller's model still cuts


@two_ranks
def on_ranks_the_page_and_the_example(ranks: Ranks) -> None:
    import spatial_unet

    (text,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "SPATIAL.md").read_text(encoding="utf-8"), re.DOTALL)
    model = spatial_unet.UNet(3, 0.125)
    names = {"torch": torch, "nv": nv, "F": F, "model": model, "images": values((1, 3, 32, 32), seed=1)}
    names |= {"labels": torch.ones(1, 32, 32).long(), "optimizer": torch.optim.SGD(model.parameters(), 0.1)}
    exec(text.replace('"cuda", (4,)', f'"{ranks.device.type}", ({ranks.world},)'), names)
    assert names["scores"].shape == (1, 3, 32, 32) and names["loss"].isfinite()
    size = ["--height", "96", "--width", "32", "--scale", "0.125", "--steps", "4"]
    losses, saved = spatial_unet.main(size)
    assert losses[-1] < losses[0]
    # More than a rank of two saves, and less than one rank alone would have to.
    limit = saved * 1.2 / 2**20
    assert spatial_unet.main([*size, "--limit-mb", f"{limit:.3f}"])[0] == losses
    alone, (image, labels) = spatial_unet.Saved(int(limit * 2**20)), spatial_unet.rows_of(0, 0, 96, 96, 32)
    with pytest.raises(MemoryError, match="take more ranks"), nv.nvfp4_autocast("unet"):
        with torch.autograd.graph.saved_tensors_hooks(alone.pack, lambda tensor: tensor):
            F.cross_entropy(spatial_unet.UNet(3, 0.125)(image), labels)


@two_ranks
def on_ranks_metrics(ranks: Ranks) -> None:
    mesh = mesh_of(ranks)
    scores = values((2, 5, 7, 6), seed=1)
    labels = torch.randint(0, 5, (2, 7, 6), generator=torch.Generator().manual_seed(1))
    results = []
    for s, y in ((scores, labels), (SP.shard(scores, mesh), SP.shard(labels, mesh, dim=1))):
        found, kept = s.argmax(1), y != 4
        hits = ((found == y) & kept).sum()
        one_hot, truth = (F.one_hot(t, 5).movedim(-1, 1).float() for t in (found, y))
        both, either = (one_hot * truth).sum((0, 2, 3)), torch.maximum(one_hot, truth).sum((0, 2, 3))
        counts = torch.stack([((found == a) & (y == b)).sum() for a in range(5) for b in range(5)])
        results.append([hits / kept.sum(), both / either, counts, s.softmax(1).amax(1).mean(), s.max(), s.amin()])
    for one, other in zip(*results, strict=True):
        assert type(other) is Tensor
        torch.testing.assert_close(other, one)


class Attends(nn.Module):
    """A layer that reads all of an image at once."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x[:, :, :, 0].transpose(1, 2)  # [B, rows, C], of which rows are cut
        return self.attention(tokens, tokens, tokens)[0]


def on_ranks_bad_input_raises_on_every_rank(ranks: Ranks) -> None:
    mesh, first = mesh_of(ranks), ranks.rank == 0
    x = values((2, 8, 8, 6), seed=1)
    for mine, dim in ((x[:, :, :7], 2), (x[:1], 2), (x[0], 2), (x[0, 0], 2), (x, 3)):
        with pytest.raises(ValueError, match=r"not have the same image[\s\S]*rank 1: \(2, 8, 8, 6\), dim=2"):
            SP.shard(mine if first else x, mesh, dim if first else 2)
        piece = SP.shard(x, mesh).piece
        wrong = piece[..., :5] if first else piece
        with pytest.raises(ValueError, match="the ranks' rows are not one image"):
            SP.from_piece(wrong, mesh, 8)
        with pytest.raises(ValueError, match="the ranks' rows are not one image"):
            SP.from_piece(piece[0, 0] if first else piece, mesh, 8)
    with pytest.raises(ValueError, match="an image without rows"):
        SP.shard(x[:, :, :0], mesh)
    for model, layer in (
        (nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Sequential(nn.ReLU(), nn.Flatten())), "1.1 (Flatten)"),
        (nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), Attends()), "1.attention (MultiheadAttention)"),
        (nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Linear(6, 4), nn.LayerNorm((8, 4))), "2 (LayerNorm)"),
        (nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.AdaptiveAvgPool2d(3)), "1 (AdaptiveAvgPool2d)"),
        (nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Upsample(scale_factor=2, mode="bicubic")), "1 (Upsample)"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"in {layer} has no form for an image that is cut into rows")):
            model(SP.shard(x, mesh))
    dist.barrier()  # nobody waits for a message of a layer


@two_ranks
def on_ranks_torch_compile_says_what_it_cannot(ranks: Ranks) -> None:
    mesh, x = mesh_of(ranks), values((2, 16, 8, 6), seed=1)
    net = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
    compiled = torch.compile(SP.parallelize(copy.deepcopy(net), mesh), backend="eager")
    with nv.nvfp4_autocast(PLAIN, backend="reference"):
        expected, found = SP.whole(net(SP.shard(x, mesh))), SP.whole(compiled(x))
        assert same_bits(found, expected)
    whole = torch.compile(SP.parallelize(copy.deepcopy(net), mesh), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="cut into rows .nv.spatial_parallel. runs eagerly"):
        whole(x)


test_on_ranks = ranks_test(globals(), four=("bad_input_raises_on_every_rank",))
