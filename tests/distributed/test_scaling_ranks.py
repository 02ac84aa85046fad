"""nvfp4_autocast(amax_reduction_group=...): two gloo processes quantize with one tensor scale."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import te_nvfp4_cv as nv
from te_nvfp4_cv.distributed.collectives import wire_bytes
from te_nvfp4_cv.ops.quantize import reference_matrix
from tests.distributed.launch import forkserver
from tests.helpers import same_bits, values

CURRENT = nv.NVFP4BlockScaling()
DELAYED = nv.NVFP4BlockScaling(tensor_scale="delayed")
TOPS = (1.0, 10.0)  # rank 1's inputs are ten times larger


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 16, 1, stride=2))


def image(rank: int, step: int = 0) -> torch.Tensor:
    return values((4, 16, 6, 6), seed=10 * step + rank) * TOPS[rank] * 3.0**step


def amaxes_kept(y: torch.Tensor) -> list[float]:
    """The fp32 numbers that the last layer's node keeps: amaxes of x (columnwise), then of w."""
    return [float(t) for t in y.grad_fn.saved_tensors if t.dtype == torch.float32 and t.numel() == 1]  # type: ignore


def scenario(rank: int, group: Any) -> dict[str, Any]:
    out: dict[str, Any] = {}
    # current: the amax of all ranks, or each one's own
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 16, 3, padding=1)
    x = image(rank).requires_grad_()
    for name, shared in (("shared", group), ("own", None)):
        with nv.nvfp4_autocast(CURRENT, amax_reduction_group=shared):
            y = conv(x)
        out[f"current {name}"] = amaxes_kept(y)
        y.backward(torch.full_like(y, float(rank + 1)))
    # explicit modules take the context's group
    module = nv.NVFP4Conv2d(16, 16, 3, padding=1, recipe=CURRENT)
    module.load_state_dict(conv.state_dict())
    with nv.nvfp4_autocast(CURRENT, amax_reduction_group=group):
        out["module shared"] = amaxes_kept(module(x))
    # a NaN anywhere makes every rank's result non-finite
    broken = image(rank)
    broken[0, 0, 0, 0] = float("nan") if rank else 0.0
    with nv.nvfp4_autocast(CURRENT, amax_reduction_group=group):
        out["nan"] = bool(conv(broken.requires_grad_()).isfinite().any())
    # the same for a quantizer, with its sign bit set as some of torch's vectorized reductions give it
    signed = torch.full((1,), -1, dtype=torch.int32).view(torch.float32)
    measured = (signed, signed) if rank else (torch.ones(1), torch.ones(1))
    quantizer = nv.NVFP4Quantizer(with_amax_reduction=True, amax_reduction_group=group)
    with patch.object(reference_matrix, "amax_2d", lambda *_, **__: measured), wire_bytes() as wire:
        quantized = quantizer(image(0).flatten(1))
    out["quantizer nan"] = [float(amax) for amax in (quantized.amax_rowwise, quantized.amax_columnwise)]
    out["quantizer wire"] = wire.received
    out["quantizer"] = [float(t) for t in quantizer(image(rank).flatten(1)).amax_rowwise]
    # delayed, under DDP: equal scales, equal weights
    model = DistributedDataParallel(net())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    out["scales"] = []
    for step in range(3):
        with nv.nvfp4_autocast(DELAYED, amax_reduction_group=group):
            loss = model(image(rank, step)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        saved = nv.extra_state(model)["scales"]
        out["scales"].append({name: entry["entries"][0]["used"] for name, entry in saved.items()})
    out["weights"] = [p.detach() for p in model.parameters()]
    if rank == 0:  # evaluation asks nobody
        with torch.no_grad(), nv.nvfp4_autocast(DELAYED, amax_reduction_group=group):
            out["evaluated"] = bool(model.module(image(0)).isfinite().all())
        with torch.inference_mode(), nv.nvfp4_autocast(CURRENT, amax_reduction_group=group):
            out["evaluated"] &= bool(conv(image(0)).isfinite().all())
    # checkpointing, both variants, asks the ranks again
    for name, recipe in (("current", CURRENT), ("delayed", DELAYED)):
        for reentrant in (False, True):
            block = net()
            with nv.nvfp4_autocast(recipe, amax_reduction_group=group):
                y = checkpoint(block, image(rank).requires_grad_(), use_reentrant=reentrant)
            y.square().mean().backward()
            out[f"checkpoint {name} {reentrant}"] = bool(block[0].weight.grad.isfinite().all())
    # refused, on every rank
    rows = nv.NVFP4BlockScaling(row_scaled_activation=True, disable_rht=True)
    try:
        with nv.nvfp4_autocast(rows, amax_reduction_group=group):
            conv(image(rank))
    except ValueError as error:
        out["rows"] = str(error)
    return out


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=2)
    torch.save(scenario(rank, dist.group.WORLD), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch is built without gloo")
    folder = tmp_path_factory.mktemp("ranks")
    forkserver()
    mp.start_processes(worker, args=(str(folder),), nprocs=2, start_method="forkserver")  # type: ignore[attr-defined]
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_current_scales_are_those_of_the_largest_amax(results):
    a, b = results
    assert a["current shared"] == b["current shared"] == a["module shared"] == b["module shared"]
    assert a["current own"] != b["current own"]
    assert a["current shared"][0] == max(a["current own"][0], b["current own"][0])


def test_a_nan_reaches_all_ranks(results):
    assert [r["nan"] for r in results] == [False, False]


def test_a_nan_with_a_sign_reaches_all_ranks_of_a_quantizer(results):
    assert all(math.isnan(amax) for r in results for amax in r["quantizer nan"])


def test_a_quantizers_amaxes_are_those_of_all_ranks_and_their_bytes_are_counted(results):
    top = max(float(image(rank).abs().max()) for rank in (0, 1))
    assert [r["quantizer"] for r in results] == [[top], [top]]
    assert [r["quantizer wire"] for r in results] == [8, 8]  # two fp32 amaxes, twice around a ring of two


def test_delayed_scales_and_weights_agree(results):
    a, b = results
    for mine, theirs in zip(a["scales"], b["scales"], strict=True):
        assert mine.keys() == theirs.keys() == {"0.weight", "2.weight"}
        assert all(same_bits(mine[name], theirs[name]) for name in mine)
    assert all(same_bits(p, q) for p, q in zip(a["weights"], b["weights"], strict=True))
    first = [float(scales["0.weight"][0, 0]) for scales in a["scales"]]
    for used, step in zip(first, (0, 0, 1), strict=True):
        top = max(float(image(rank, step).abs().max()) for rank in (0, 1))
        assert 8 * top <= used < 16 * top


def test_evaluation_asks_nobody_and_checkpoints_run(results):
    assert results[0]["evaluated"]
    assert all(r[name] for r in results for name in r if name.startswith("checkpoint"))


def test_what_cannot_be_shared_is_refused(results):
    for r in results:
        assert "row_scaled_activation=False" in r["rows"]


@pytest.mark.parametrize("group", ["world", 0, True])
def test_what_is_no_group_is_a_type_error(group):
    with pytest.raises(TypeError, match="no process group") as error:
        nv.nvfp4_autocast(amax_reduction_group=group)
    assert "group.WORLD" in str(error.value)
