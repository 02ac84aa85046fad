"""What FSDP2 shards and what it gathers, in one process: entries of set_precision, and memory that crosses streams."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import te_nvfp4_cv as nv
from te_nvfp4_cv.distributed.fsdp_weight import Form, ShardedWeight
from te_nvfp4_cv.layer import observe


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("sharded_first", [False, True])
def test_the_projection_of_a_sharded_attention(mesh, sharded_first):
    model, x = nn.ModuleDict({"mha": nn.MultiheadAttention(32, 4), "fc": nn.Linear(32, 32)}), torch.randn(4, 4, 32)
    table = {"mha.out_proj": None, "fc": nv.NVFP4BlockScaling(name="a")}
    if not sharded_first:
        nv.set_precision(model, table)
    for part in model.values():
        fully_shard(part, mesh=mesh)
    if sharded_first:
        nv.set_precision(model, table)
    ran: list[str] = []
    for _ in range(2):
        ran.clear()
        with observe.observe(lambda call: ran.append("high" if call.recipe is None else call.recipe.name)):
            with nv.nvfp4_autocast():
                y = model["fc"](model["mha"](x, x, x)[0])
        y.sum().backward()
        assert ran == ["", "high", "a"]


def test_what_the_copy_in_stream_made_waits_for_the_stream_that_reads_it(monkeypatch):
    """Stand-ins for tensors of a GPU: not executed on one."""

    class Made:
        is_cuda, device = True, torch.device("cuda", 1)

        def __init__(self) -> None:
            self.readers: list[str] = []

        def record_stream(self, stream: str) -> None:
            self.readers.append(stream)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"compute of {device}")
    form = Form("a.weight", 1, False, torch.empty(()).expand(32, 32))
    shard, codes = ShardedWeight(torch.zeros(32, 32), form), torch.zeros(32, 1, 16, dtype=torch.uint8)
    scales, amax = Made(), Made()
    weight, _ = shard.fsdp_post_all_gather((codes,), (scales, amax, (32, 32)), torch.float32)
    assert scales.readers == amax.readers == ["compute of cuda:1"]
    again = Made(), Made()
    shard.fsdp_post_all_gather((codes,), (*again, (32, 32)), torch.float32, out=weight)
    assert again[0].readers == again[1].readers == ["compute of cuda:1"]
