"""Entries of set_precision act on what FSDP2 shards: the Parameters that a forward reads are others each time."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import te_nvfp4_cv as nv
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
