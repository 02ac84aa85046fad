"""MONAI's UNet of volumes that are cut along their depth; runs where MONAI is (make zoo)."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import te_nvfp4_cv as nv
from tests.distributed.launch import Ranks, ranks_test
from tests.distributed.test_spatial import PLAIN, SP, mesh_of
from tests.helpers import relative_error, values

pytest.importorskip("monai", reason="MONAI is not installed here; make zoo installs it and runs this")


def on_ranks_a_unet_of_volumes(ranks: Ranks) -> None:
    from monai.networks.nets import UNet

    torch.manual_seed(0)
    net = UNet(3, 1, 3, channels=(16, 32, 64), strides=(2, 2), num_res_units=2)
    x, labels = values((1, 1, 20, 16, 16), seed=1), (values((1, 20, 16, 16), seed=2) > 0).long()
    cut = SP.parallelize(copy.deepcopy(net), mesh_of(ranks))
    for recipe, bounds in ((None, (1e-5, 1e-4, 1e-3)), (PLAIN, (1e-5, 1e-2, 0.5))):
        found = []
        for model, target in ((net, labels), (cut, SP.shard(labels, mesh_of(ranks), dim=1))):
            model.zero_grad()
            with nv.nvfp4_autocast(recipe, enabled=recipe is not None):
                scores = model(x)
                loss = F.cross_entropy(scores, target)
            loss.backward()
            grad = torch.cat([p.grad.flatten() for p in model.parameters()])
            found.append((SP.whole(scores), loss, grad))
        errors = [relative_error(other.detach(), one.detach()) for one, other in zip(*found, strict=True)]
        print(ranks.world, recipe is not None, errors)
        assert errors[1] <= bounds[0] and errors[0] <= bounds[1] and errors[2] <= bounds[2], errors


test_on_ranks = ranks_test(globals())
