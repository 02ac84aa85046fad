"""Telemetry on several ranks: the first one writes, nothing changes, weights of FSDP2 are found by their names."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard

import te_nvfp4_cv as nv
from te_nvfp4_cv import telemetry
from tests.distributed.launch import Ranks, ranks_test
from tests.distributed.test_ddp import distributed, loss_of, net
from tests.helpers import same_bits


def on_ranks_the_first_one_writes_and_nothing_changes(ranks: Ranks) -> None:
    weights = []
    for watched in (False, True):
        model = distributed(net(ranks), ranks)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "run.jsonl"
            sinks = [telemetry.JSONL(path)] if watched and ranks.rank == 0 else []
            watch = telemetry.attach(model, every=2, sinks=sinks)
            optimizer = torch.optim.SGD(model.parameters(), 1e-2)
            torch.manual_seed(0)
            for step in range(3):
                optimizer.zero_grad()
                with watch.step(step):
                    loss_of(model, ranks, ranks.rank, step, nv.NVFP4BlockScaling()).backward()
                optimizer.step()
            watch.close()
            if sinks:
                run = telemetry.read(path)
                assert list(run.steps) == [0, 2] and run.layers == ["stem", "body.2", "head"] and run.model == "Net"
                assert all(layer["precision"] == "nvfp4" for layer in run.steps[2].values())
                assert all("weight_gradient" in layer["tensors"] for layer in run.steps[2].values())
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(same_bits(a, b) for a, b in zip(*weights, strict=True))


def on_ranks_sharded_weights_are_found(ranks: Ranks) -> None:
    model = net(ranks)
    nv.fsdp.quantize_gathers(model, nv.NVFP4BlockScaling())
    for module in (model.stem, model.body[2], model.head, model):
        fully_shard(module)
    seen: list[dict] = []

    class Sink:
        start = scalars = alarm = image = close = lambda *_, **__: None

        def step(self, record: dict) -> None:
            seen.append(record["layers"])

    watch = telemetry.attach(model, every=1, sinks=[Sink()])
    with watch.step(0):
        loss_of(model, ranks, ranks.rank, 0, nv.NVFP4BlockScaling()).backward()
    if ranks.rank == 0:
        (layers,) = seen
        assert list(layers) == ["stem", "body.2", "head"]
        for layer in layers.values():
            assert layer["precision"] == "nvfp4" and layer["tensors"]["weight"]["codes"]["usage"]
            shard = layer["tensors"]["weight_gradient"]["raw"]
            assert 0 < shard["count"] == layer["tensors"]["weight"]["raw"]["count"]  # this rank's rows
            assert "sqnr_db" not in layer["tensors"]["weight"]  # the codes are of the whole, gathered weight


test_on_two_ranks = ranks_test(globals(), worlds=(2,))
