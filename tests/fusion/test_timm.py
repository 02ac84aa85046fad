"""nv.fuse on timm's own models, where timm is installed: every norm with an activation that an operator serves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from te_nvfp4_cv.fusion.fuse import fuse
from tests.fusion.steps import nodes, same, step
from tests.helpers import values

timm = pytest.importorskip("timm", reason="timm is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")
# What is left: ends of blocks before an addition, projections, and residuals of sums whose other norm is fused.
MODELS: dict[str, tuple[int, int]] = {
    "resnet18": (17, 20),
    "efficientnet_b0": (33, 49),
    "mobilenetv3_small_050": (23, 34),
    "regnety_002": (40, 44),
    "densenet121": (121, 121),
    "repvgg_a0": (22, 61),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_norm_with_an_activation_is_fused(name: str) -> None:
    torch.manual_seed(0)
    model: Any = timm.create_model(name, num_classes=4)
    plain, x = copy.deepcopy(model), values((2, 3, 64, 64))
    report = fuse(model, report=True)
    assert (report.fused, len(report.rows)) == MODELS[name], str(report)
    known = ("no activation follows in this forward", "which is fused with the sum")
    assert all(reason.endswith(known) for reason in report.left), str(report)
    assert nodes(copy.deepcopy(model)(x), "NormAct") == report.fused
    assert list(model.state_dict()) == list(plain.state_dict())
    assert same(step(plain, x), step(model, x))
    model.eval(), plain.eval()
    assert torch.equal(model(x), plain(x))
