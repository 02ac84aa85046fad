"""nv.sensitivity.kurtosis: figures against plain formulas, planted outliers, planted NaN, every kind of layer."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

import te_nvfp4_cv as nv
from te_nvfp4_cv import formats
from te_nvfp4_cv.sensitivity import kurtosis
from tests.networks import Net


def model(**plant: float) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.ModuleDict({name: nn.Conv2d(32, 32, 3) for name in ("a", "b", "c")})
    with torch.no_grad():
        for layer in layers.values():
            layer.weight.normal_()
        for name, value in plant.items():
            layers[name].weight[0, 0, 0, 0] = value
    return layers


def test_planted_outliers_rank_first():
    study = kurtosis(model(b=200.0))
    assert study.rows[0].name == "b" and study.rows[0].kurtosis > 1000
    assert all(abs(row.kurtosis) < 0.2 for row in study.rows[1:])  # normal
    lost = study.rows[0].blocks_2d.underflow - study.rows[1].blocks_2d.underflow
    assert lost == pytest.approx(256 * 0.9 / 9216, rel=0.2)  # the rest of one tile, of which a tenth was lost before
    assert str(study).splitlines()[1].startswith("b ")


def test_figures_against_formulas():
    w = nn.Parameter(torch.randn(32, 48, generator=torch.Generator().manual_seed(1)) ** 3)
    layer = nn.Linear(48, 32)
    layer.weight = w
    (row,) = kurtosis(layer).rows
    v = w.detach().double()
    centred = v - v.mean()
    assert (row.name, row.shape) == ("Linear", (32, 48))
    assert row.mean == pytest.approx(float(v.mean())) and row.std == pytest.approx(float(v.std(correction=0)))
    assert row.kurtosis == pytest.approx(float(centred.pow(4).mean() / centred.square().mean() ** 2 - 3))
    assert row.amax_over_std == pytest.approx(float(v.abs().max() / v.std(correction=0)))
    for cost, two_d in ((row.blocks_1d, False), (row.blocks_2d, True)):
        quantized = nv.NVFP4Quantizer(with_2d_quantization=two_d)(w.detach()).dequantize().double()
        sqnr = 10 * math.log10(float(v.square().sum() / (v - quantized).square().sum()))
        assert cost.sqnr_db == pytest.approx(sqnr, abs=1e-3)
        assert cost.underflow == pytest.approx(float(((quantized == 0) & (v != 0)).double().mean()))


def test_saturation_counts_blocks_beyond_the_largest_scale():
    """With a tensor scale from the amax every block fits, but for the rounding of its own scale: amax 6 s exactly."""
    layer = nn.Linear(16, 16, bias=False)
    with torch.no_grad():
        layer.weight.fill_(6.0)  # codes 6, scale exact
    (row,) = kurtosis(layer).rows
    assert row.blocks_1d.saturated == row.blocks_2d.saturated == 0 and row.kurtosis == 0
    with torch.no_grad():
        layer.weight[0, 0] = 6.0 * 1.06  # row 0: scale 448; other rows' 448 / 1.06 = 422.6 rounds to 416
    (row,) = kurtosis(layer).rows
    s_enc = formats.encode_scale(layer.weight.detach().abs().max())
    assert float(formats.block_scale(torch.tensor(6.0), s_enc)) < 448 / 1.06
    assert row.blocks_1d.saturated == pytest.approx(15 * 16 / 256) and row.blocks_2d.saturated == 0


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(3, 20, 5), (20, 3, 5)),
        (nn.Conv3d(16, 32, (1, 2, 3), groups=2), (32, 8, 1, 2, 3)),
        (nn.ConvTranspose2d(48, 16, 2, groups=1), (48, 16, 2, 2)),
        (nn.ConvTranspose2d(32, 40, 3, groups=2), (32, 20, 3, 3)),
        (nn.Conv2d(16, 16, 3, groups=16), (16, 1, 3, 3)),
        (nv.NVFP4Conv2d(16, 16, 3), (16, 16, 3, 3)),
        (nn.Conv2d(16, 16, 3).to(memory_format=torch.channels_last).half(), (16, 16, 3, 3)),
        (nn.Conv2d(16, 16, 3).double(), (16, 16, 3, 3)),
    ],
    ids=str,
)
def test_every_kind_of_layer_has_the_rounding_error_of_4_bits(layer, shape):
    (row,) = kurtosis(layer).rows
    assert row.shape == shape
    for cost in (row.blocks_1d, row.blocks_2d):
        assert 17 < cost.sqnr_db < 60 and 0 <= cost.underflow < 0.1 and 0 <= cost.saturated < 1


def test_blocks_of_a_transposed_convolution_lie_along_its_input_channels():
    layer = nn.ConvTranspose2d(32, 16, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.exp2(torch.arange(16.0)).view(1, 16, 1, 1).expand(32, 16, 1, 1))
    (row,) = kurtosis(layer).rows
    assert row.blocks_1d.sqnr_db > 40 and row.blocks_1d.underflow == 0  # one power of two a block
    assert row.blocks_2d.underflow > 0.6


def test_weights_that_are_not_finite_are_named():
    study = kurtosis(model(c=math.nan, a=math.inf))
    assert {row.name: row.trouble for row in study.rows[:2]} == {
        "c": "1 NaN of 9216 weights",
        "a": "1 inf of 9216 weights",
    }
    assert study.rows[2].name == "b" and study.rows[2].trouble == "" and study.rows[2].blocks_2d is not None
    assert "not finite: " in str(study)
    found = json.loads(json.dumps(study.to_dict(), allow_nan=False))
    assert found["weights"][0]["kurtosis"] is None and found["weights"][2]["kurtosis"] is not None


def test_nothing_changes_and_every_layer_has_a_row():
    torch.manual_seed(0)
    net = Net()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    generator = torch.get_rng_state()
    names = {row.name for row in kurtosis(net).rows}
    assert names == {"stem", "body.1", "body.4", "up", "head"}
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)


def test_attention_and_shared_weights():
    attention = nn.MultiheadAttention(32, 4)
    assert {row.name for row in kurtosis(attention).rows} == {"MultiheadAttention.in_proj_weight", "out_proj"}
    twice = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    twice[1].weight = twice[0].weight
    assert [row.name for row in kurtosis(twice).rows] == ["0"]


def test_parametrized_weights_are_read_as_they_are_used():
    torch.manual_seed(0)
    net = nn.Sequential(*(torch.nn.utils.parametrizations.spectral_norm(nn.Linear(32, 32)) for _ in range(4)))
    before = [buffer.clone() for buffer in net.buffers()]
    assert {row.name for row in kurtosis(net).rows} == {"0", "1", "2", "3"}
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), before, strict=True))


def test_all_zero_weights():
    layer = nn.Linear(16, 16)
    nn.init.zeros_(layer.weight)
    (row,) = kurtosis(layer).rows
    assert row.kurtosis == row.amax_over_std == row.blocks_1d.underflow == 0 and row.blocks_1d.sqnr_db == math.inf
    assert json.loads(json.dumps(kurtosis(layer).to_dict(), allow_nan=False))


def test_refused():
    with pytest.raises(ValueError, match="no convolution and no linear layer"):
        kurtosis(nn.LSTM(16, 16))
    with pytest.raises(TypeError, match="not a module"):
        kurtosis(torch.ones(3))
    with pytest.raises(ValueError, match="'0' has no values"):
        kurtosis(nn.Sequential(nn.LazyConv2d(16, 3)))
    with pytest.raises(ValueError, match="meta device"):
        kurtosis(nn.Linear(16, 16, device="meta"))
