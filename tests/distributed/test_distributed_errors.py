"""nv.distributed in one process: what its arguments must be, and a group of one rank."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import te_nvfp4_cv as nv
from te_nvfp4_cv.layer import shared_amax

X = torch.randn(4, 5, 32)


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_shared_amaxes_of_a_model_with_a_script_module(group):
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.jit.script(torch.nn.BatchNorm1d(5)))
    with nv.nvfp4_autocast(amax_reduction_group=group):
        model(X).sum().backward()
    assert model[0].weight.grad is not None


def test_the_group_of_shared_amaxes_ends_with_the_others(tmp_path):
    layer, alive = torch.nn.Linear(32, 32), []
    for name in "ab":
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/{name}", rank=0, world_size=1)
        with nv.nvfp4_autocast(amax_reduction_group=torch.distributed.group.WORLD):
            layer(X).sum().backward()
        made = shared_amax.own_group(torch.distributed.group.WORLD, X.device)
        assert made is shared_amax.own_group(torch.distributed.group.WORLD, X.device)
        alive.append(weakref.ref(made))
        del made
        torch.distributed.destroy_process_group()
        gc.collect()
    assert [group() for group in alive] == [None, None]


def test_without_torch_distributed():
    with pytest.raises(RuntimeError, match="(?s)no process group.*fix:   torch.distributed.init_process_group"):
        nv.distributed.all_gather(X, quantizer=nv.NVFP4Quantizer())
    with pytest.raises(RuntimeError, match="all_gather_coalesced: there is no process group"):
        nv.distributed.all_gather_coalesced([X], quantizer=nv.NVFP4Quantizer())


@pytest.mark.parametrize(
    ("t", "options", "error", "told"),
    [
        (X, {"dim": "columns"}, ValueError, "got:   dim='columns'\n  needs: one of rows, height, batch, channel"),
        (X, {"dim": 0}, ValueError, "unknown dim"),
        (X, {"quantizer": None}, TypeError, "a plain tensor and no quantizer"),
        (X, {"quantizer": nv.NVFP4BlockScaling()}, TypeError, "quantizer NVFP4BlockScaling"),
        ([X], {}, TypeError, "got:   list"),
        (X[0, 0], {"dim": "rows"}, ValueError, "needs: 2 to 8 dimensions"),
        (X[0], {"dim": "height"}, ValueError, "needs: 3 to 8 dimensions"),
        (X[0, 0], {"dim": "batch"}, ValueError, r"got:   \(32,\) float32"),
        (X[0, 0, 0], {"dim": "channel"}, ValueError, "needs: 1 to 8 dimensions"),
        (X.reshape(1, 1, 1, 1, 1, 1, 4, 5, 32), {}, ValueError, "2 to 8 dimensions"),
        (X.double(), {}, ValueError, "bfloat16, float16 or float32"),
        (X.int(), {}, ValueError, "bfloat16, float16 or float32"),
        (X, {"quantizer": nv.NVFP4Quantizer(rowwise=False, columnwise=False)}, ValueError, "writes no face"),
        (X, {"group": "world"}, TypeError, "group is no process group"),
        (X, {"group": torch.distributed.GroupMember.NON_GROUP_MEMBER}, ValueError, "not in the group"),
    ],
)
def test_arguments(group, t, options, error, told):
    arguments = {"quantizer": nv.NVFP4Quantizer(), "group": group, **options}
    with pytest.raises(error, match=f"(?s)^all_gather: .*{told}|^all_gather: {told}") as raised:
        nv.distributed.all_gather(t, **arguments)
    assert "fix:" in str(raised.value)


@pytest.mark.parametrize("dim", ["rows", "height", "batch", "channel"])
def test_one_rank(group, dim):
    q = nv.NVFP4Quantizer(with_rht=True, with_amax_reduction=True)
    for t in (nv.distributed.all_gather(X, dim=dim, quantizer=q), nv.distributed.all_gather(q(X), dim=dim)):
        assert torch.equal(t.dequantize(), q(X).dequantize()) and t.quantizer == q
    (handle,) = nv.distributed.all_gather_coalesced([X], group, dim, async_op=True, quantizer=q)
    assert handle.wait() is handle.wait()


def test_torch_compile_steps_aside(group):
    """The calls are eager: compiled code breaks its graph there."""
    q = nv.NVFP4Quantizer(backend="reference")

    def gathered(x):
        whole = nv.distributed.all_gather(x + 1, group, quantizer=q).dequantize() * 2
        (handle,) = nv.distributed.all_gather_coalesced([x - 1], group, async_op=True, quantizer=q)
        return whole + handle.wait().dequantize()

    with torch.no_grad():
        assert torch.equal(torch.compile(gathered, backend="eager")(X), gathered(X))
