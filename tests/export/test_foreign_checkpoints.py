"""Linear layers that other tools have packed: the values that their own formulas give, and clear refusals.

The files are made by those formulas (docs/EXPORT.md says against which releases they were compared).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import te_nvfp4_cv as nv
from tests.helpers import same_bits, values

safetensors = pytest.importorskip("safetensors.torch", reason="the extra [export]")


class Model(nn.Module):
    def __init__(self, features: int = 64) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(features, 32), nn.LayerNorm(32), nn.Linear(32, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x)))


def packed(tool: str, w: Tensor, prefix: str, input_amax: float | None) -> tuple[dict[str, Tensor], Tensor]:
    """(tensors, the weight's value by the tool's own formula)."""
    t = nv.NVFP4Quantizer(rowwise=True, columnwise=False)(w)
    codes = nv.formats.decode_e2m1(nv.formats.unpack_nibbles(t.rowwise_data))
    scales = t.rowwise_scale_inv.float().repeat_interleave(16, 1)
    if tool == "ModelOpt":
        own = (t.amax_rowwise / 2688).reshape(())
        tensors = {"weight": t.rowwise_data, "weight_scale": t.rowwise_scale_inv, "weight_scale_2": own}
        real = codes * scales * own
        tensors |= {} if input_amax is None else {"input_scale": torch.tensor(input_amax / 2688)}
    else:
        own = (2688 / t.amax_rowwise).reshape(1)
        names = ("weight_packed", "weight_scale", "weight_global_scale")
        tensors = dict(zip(names, (t.rowwise_data, t.rowwise_scale_inv, own), strict=True))
        real = codes * (scales / own)
        tensors |= {} if input_amax is None else {"input_global_scale": torch.tensor([2688 / input_amax])}
    return {f"{prefix}.{key}": value.contiguous() for key, value in tensors.items()}, real[:, : w.shape[1]]


@pytest.mark.parametrize("tool", ["ModelOpt", "compressed-tensors"])
@pytest.mark.parametrize("input_amax", [None, 4.0])
def test_values_are_those_of_the_tool(tool: str, input_amax: float | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Model()
    tensors = {name: t for name, t in model.state_dict().items() if name not in ("a.weight", "b.weight")}
    real = {}
    for name in ("a", "b"):
        made, real[name] = packed(tool, model.get_parameter(f"{name}.weight").detach(), name, input_amax)
        tensors |= made
    tensors["a.k_scale"] = torch.tensor(1.0)  # of a cache, which is left out
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    loaded = nv.export.load(tmp_path / "model.safetensors", Model(), activations="high")
    for name, value in real.items():
        layer = loaded.get_submodule(name)
        torch.testing.assert_close(layer.weight, value, rtol=3e-7, atol=0)
        assert (layer.input_amax is None) == (input_amax is None)
        if input_amax is not None:
            assert float(layer.input_amax) == pytest.approx(input_amax, rel=1e-6)
    x = values((5, 64))
    plain = Model()
    plain.load_state_dict(model.state_dict() | {f"{name}.weight": value for name, value in real.items()})
    torch.testing.assert_close(loaded(x), plain(x), rtol=1e-5, atol=1e-6)
    nv.export.save(loaded, tmp_path / "ours")  # and on, as one of ours
    again = nv.export.load(tmp_path / "ours", Model(), activations="high")
    assert same_bits(again(x), loaded(x))


def spoiled(change: Callable[[dict[str, Tensor]], object], path: Path) -> Path:
    model = Model()
    tensors = {name: t for name, t in model.state_dict().items() if name != "a.weight"}
    tensors |= packed("ModelOpt", model.a.weight.detach(), "a", None)[0]
    change(tensors)
    safetensors.save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop("a.weight_scale"), "is missing"),
        (lambda t: t.pop("a.weight"), "is missing"),
        (lambda t: t.update({"a.weight_scale": t["a.weight_scale"].float()}), "scales torch.float32"),
        (lambda t: t.update({"a.weight": t["a.weight"][:, :16].contiguous()}), "codes (32, 16)"),
        (lambda t: t.update({"a.weight_scale_2": torch.tensor(float("nan"))}), "a tensor scale of"),
        (lambda t: t.update({"a.weight_scale_2": torch.tensor(0.0)}), "a positive one"),
        (lambda t: t.update({"a.weight_scale_2": torch.ones(2)}), "one finite fp32 number"),
        (lambda t: t.update({"norm.weight_scale_2": torch.tensor(1.0)}), "it is LayerNorm"),
        (lambda t: t.update({"c.weight_scale_2": torch.tensor(1.0)}), "it is NoneType"),
        (lambda t: t.update({"a.weight_scale_2": torch.tensor(1e38)}), "whose amax is an fp32 number"),
        (lambda t: t.pop("norm.bias"), "not in the file: norm.bias"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    change: Callable[[dict[str, Tensor]], object], told: str, tmp_path: Path
) -> None:
    model = Model()
    path = spoiled(change, tmp_path / "m.safetensors")
    with pytest.raises(ValueError) as error:
        nv.export.load(path, model)
    assert told in str(error.value) and type(model.a) is nn.Linear


def test_a_layer_with_a_forward_of_its_own_is_refused(tmp_path: Path) -> None:
    class Tenfold(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 10 * super().forward(input)

    model = Model()
    model.a = Tenfold(model.a.in_features, model.a.out_features)
    with pytest.raises(ValueError, match="it is Tenfold"):
        nv.export.load(spoiled(lambda t: None, tmp_path / "m.safetensors"), model)


CONFIGS = {
    ("ModelOpt", "W4A16_NVFP4"): {"quantization_config": {"quant_algo": "W4A16_NVFP4"}},
    ("ModelOpt", "NVFP4"): {"quantization_config": {"quant_algo": "NVFP4"}},
    ("compressed-tensors", "NVFP4A16"): {
        "quantization_config": {
            "format": "nvfp4-pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "input_activations": None}},
        }
    },
    ("compressed-tensors", "NVFP4"): {
        "quantization_config": {
            "format": "nvfp4-pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "input_activations": {"num_bits": 4}}},
        }
    },
}


@pytest.mark.parametrize(("tool", "algorithm"), CONFIGS)
def test_the_config_decides_how_activations_run(tool: str, algorithm: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Model()
    tensors = {name: t for name, t in model.state_dict().items() if name not in ("a.weight", "b.weight")}
    for name in ("a", "b"):
        tensors |= packed(tool, model.get_parameter(f"{name}.weight").detach(), name, None)[0]
    path = tmp_path / "model.safetensors"
    safetensors.save_file(tensors, path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[tool, algorithm]))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        loaded = nv.export.load(path, Model())
    weights_only = "A16" in algorithm
    assert [layer.quantize_x for layer in (loaded.a, loaded.b)] == [not weights_only] * 2
    assert any("quantizes weights only (2 of 2 layers)" in str(one.message) for one in told) == weights_only
    assert nv.export.load(path, Model(), activations="nvfp4").a.quantize_x
    assert not nv.export.load(path, Model(), activations="high").a.quantize_x
