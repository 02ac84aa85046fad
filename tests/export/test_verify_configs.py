"""The verifier and other tools' configs: which layers they say are NVFP4, and configs that are not to be trusted."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import te_nvfp4_cv as nv
from te_nvfp4_cv.export.verify import __main__ as verify
from tests.helpers import values

safetensors = pytest.importorskip("safetensors.torch", reason="the extra [export]")
FP8 = torch.float8_e4m3fn


def packed(name: str) -> dict[str, Tensor]:
    """A linear layer as ModelOpt packs it."""
    t = nv.NVFP4Quantizer(rowwise=True, columnwise=False)(values((32, 64)))
    scales = {"weight_scale": t.rowwise_scale_inv, "weight_scale_2": (t.amax_rowwise / 2688).reshape(())}
    return {f"{name}.{key}": value for key, value in ({"weight": t.rowwise_data} | scales).items()}


def compressed(name: str) -> dict[str, Tensor]:
    """A linear layer as compressed-tensors packs it."""
    t = packed(name)
    return {
        f"{name}.weight_packed": t[f"{name}.weight"],
        f"{name}.weight_scale": t[f"{name}.weight_scale"],
        f"{name}.weight_global_scale": (1 / t[f"{name}.weight_scale_2"]).reshape(1),
    }


def plain(name: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    return {f"{name}.weight": torch.zeros(shape).to(dtype)}


def fp8(name: str) -> dict[str, Tensor]:
    return {**plain(name, 32, 64, dtype=FP8), f"{name}.weight_scale": torch.tensor(1.0)}


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def file(tensors: dict[str, Tensor], config: Any, name: str = "hf_quant_config.json") -> Path:
        path = tmp_path / "model.safetensors"
        safetensors.save_file({key: t.contiguous() for key, t in tensors.items()}, path)
        key = {"hf_quant_config.json": "quantization", "config.json": "quantization_config"}[name]
        (tmp_path / name).write_text(config if isinstance(config, str) else json.dumps({key: config}))
        return path

    return file


def problems(path: Path) -> list[str]:
    report = verify.verify(path)
    assert report.sound == (verify.main([str(path)]) == 0)
    return report.problems + [f"{row.name}: {problem}" for row in report.rows for problem in row.problems]


LINEAR = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float", "group_size": 16}}}
NVFP4 = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": LINEAR}
MIXED = {"a": {"quant_algo": "FP8"}, "b": {"quant_algo": "NVFP4", "group_size": 16}}
GROUPS = {
    "group_0": {"targets": ["a"], "weights": {"num_bits": 8, "type": "float"}},
    "group_1": {"targets": ["re:b.*"], "weights": {"num_bits": 4, "type": "float", "group_size": 16}},
}
INT4 = {
    "a.weight_packed": torch.zeros(32, 8, dtype=torch.int32),
    "a.weight_scale": torch.ones(32, 1, dtype=torch.bfloat16),
}
MXFP4 = {
    "a.weight_packed": torch.zeros(32, 32, dtype=torch.uint8),
    "a.weight_scale": torch.ones(32, 2, dtype=torch.uint8),
}
AWQ = {
    "a.weight": torch.zeros(16, 64, dtype=torch.uint8),
    "a.weight_scale": torch.ones(32, 1),
    "a.weight_scale_2": torch.tensor(1.0),
}
HONEST: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {
    "other layers than linear ones": (compressed("fc") | plain("patch_embed.proj", 16, 3, 4, 4), NVFP4),
    "classes left out": (packed("a") | plain("conv", 16, 3, 4, 4), {"quant_algo": "NVFP4", "ignore": ["Conv2d"]}),
    "mixed precision by layer": (fp8("a") | packed("b"), {"quant_algo": "MIXED_PRECISION", "quantized_layers": MIXED}),
    "mixed precision by group": (fp8("a") | packed("b"), {"quant_algo": "MIXED_PRECISION", "config_groups": GROUPS}),
    "a cache in NVFP4": (fp8("a"), {"quant_algo": "FP8", "kv_cache_quant_algo": "NVFP4", "exclude_modules": None}),
    "INT4": (INT4, {"quant_method": "compressed-tensors", "format": "pack-quantized"}),
    "MXFP4": (MXFP4, {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"}),
    "INT4 with two scales": (AWQ, {"quant_algo": "W4A8_AWQ"}),
    "nothing quantized": (plain("a", 32, 64), {"quant_algo": None}),
}


@pytest.mark.parametrize("name", ["hf_quant_config.json", "config.json"])
@pytest.mark.parametrize("case", HONEST, ids=str)
def test_honest_files(case: str, name: str, write: Write) -> None:
    assert problems(write(*HONEST[case], name)) == []


def test_an_embedding_is_a_note(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = packed("layers.0.q_proj") | plain("model.embed_tokens", 100, 64) | plain("lm_head", 100, 64)
    config = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    path = write(tensors, config)
    assert problems(path) == []
    assert (
        "note: the config says NVFP4 and does not leave it out; by its name it is an embedding"
        in capsys.readouterr().out
    )
    rows = {row.name: row for row in verify.verify(path).rows}
    assert (
        rows["model.embed_tokens"].notes and rows["model.embed_tokens"].claimed == "bf16" and not rows["lm_head"].notes
    )


LIARS: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {
    "a layer of the table": (fp8("b"), {"quant_algo": "MIXED_PRECISION", "quantized_layers": MIXED}),
    "a layer of a group": (plain("b", 32, 64), {"quant_algo": "MIXED_PRECISION", "config_groups": GROUPS}),
    "a target": (plain("b", 32, 64), NVFP4),
    "a format alone": (plain("b", 32, 64), {"format": "nvfp4-pack-quantized"}),
    "a group without targets": (plain("b", 32, 64), {"config_groups": {"0": {"format": "nvfp4-pack-quantized"}}}),
    "a convolution": (plain("b", 16, 16, 3, 3), {"quant_algo": "NVFP4"}),
}


@pytest.mark.parametrize("case", LIARS, ids=str)
def test_liars(case: str, write: Write) -> None:
    precision = "fp8" if case == "a layer of the table" else "bf16"
    assert problems(write(*LIARS[case])) == [f"b: the config says NVFP4, the weight is {precision}"]


def test_packed_codes_of_nvfp4_need_their_scales(write: Write) -> None:
    path = write({"a.weight_packed": torch.zeros(32, 32, dtype=torch.uint8)}, {"format": "nvfp4-pack-quantized"})
    assert problems(path) == ["a: it has no block scales", "a: it has no tensor scale"]


# ---- configs that are not to be trusted -----------------------------------------------------------------------------


@pytest.mark.parametrize("value", [5, True, {"a": 1}, [["x"]], "lm_head"], ids=repr)
@pytest.mark.parametrize("key", ["ignore", "exclude_modules"])
def test_patterns_that_are_no_list_are_a_problem(value: Any, key: str, write: Write) -> None:
    path = write(packed("q"), {"quant_algo": "NVFP4", key: value})
    assert problems(path) == [f"its config: {key} is {value!r}, not a list of names"]


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"quant_algo": 5}, "5 is no algorithm"),
        ({"quantized_layers": [1]}, "quantized_layers is [1], not a table of tables"),
        ({"config_groups": {"a": 1}}, "config_groups is {'a': 1}, not a table of tables"),
        ({"config_groups": {"a": {"targets": "Linear"}}}, "config_groups.a.targets is 'Linear', not a list of names"),
        (5, "quantization of hf_quant_config.json is no table"),
        ("[", "hf_quant_config.json beside it cannot be read"),
        ("[" * 100_000, "hf_quant_config.json beside it cannot be read"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_config_that_cannot_be_read_is_a_problem(config: Any, told: str, write: Write) -> None:
    (problem,) = problems(write(packed("q"), config))
    assert told in problem


EXPENSIVE = [
    "(a+)+$",
    "(a|aa)+$",
    "(a*)*b",
    "a?" * 40 + "a" * 40,
    ".*" * 12 + "b",
    "((a{1000}){1000}){1000}",
    "(?:){99999999}",
]


@pytest.mark.parametrize("pattern", EXPENSIVE, ids=lambda pattern: pattern[:20])
def test_a_pattern_that_would_take_forever_is_a_problem(pattern: str, write: Write) -> None:
    path = write(plain("a" * 40 + "!", 4, 4), {"quant_algo": "NVFP4", "ignore": [f"re:{pattern}"]})
    start = time.monotonic()
    told = problems(path)
    assert time.monotonic() - start < 10
    assert told[0].endswith("of its config could take too long to match") and len(told) == 2


@pytest.mark.parametrize(
    "pattern",
    [
        r".*layers\.[0-9]+\..*experts\.[0-9]+\..*",
        r"[\w.]*layers\.\d+\.\w+\.experts\.\d+\.\w+",
        r".*\.layers\.\d+\.mlp\.experts\.\d+\.(gate|up|down)_proj.*$",
    ],
)
def test_usual_patterns_are_run(pattern: str, write: Write) -> None:
    name = "model.language_model.layers.13.mlp.experts.127.down_proj"
    assert not problems(write(plain(name, 32, 64), {"quant_algo": "NVFP4", "ignore": [f"re:{pattern}"]}))


def test_long_lists_of_names_are_looked_up(write: Write) -> None:
    layers = {f"model.layers.{n}.mlp": {"quant_algo": "NVFP4"} for n in range(40_000)}
    tensors = packed("model.layers.7.mlp") | {
        key: t for n in range(60) for key, t in plain(f"model.other.{n}", 4, 4).items()
    }
    path = write(tensors, {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers})
    start = time.monotonic()
    assert not problems(path)
    assert time.monotonic() - start < 10  # by trying each name as a wildcard: minutes


@pytest.mark.parametrize("pattern", ["[", "(" * 5000, "a{99999999999999999999}"], ids=len)
def test_a_pattern_that_cannot_be_read_is_a_problem(pattern: str, write: Write) -> None:
    told = problems(write(plain("a", 4, 4), {"quant_algo": "NVFP4", "ignore": [f"re:{pattern}"]}))
    assert "of its config cannot be read" in told[0] and len(told) == 2


PATTERNS = [r".*self_attn\.(q|k|v)_proj$", r"model\.layers\.\d+\..*", r"(?!.*mlp).*", r".*layers.*attn.*proj.*"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_as_tools_write_them(pattern: str, write: Write) -> None:
    tensors = plain("model.layers.10.self_attn.q_proj", 4, 4) | plain("model.norm.mlp", 4, 4)
    told = problems(write(tensors, {"quant_algo": "NVFP4", "ignore": [f"re:{pattern}"]}))
    assert told == ["model.norm.mlp: the config says NVFP4, the weight is bf16"]
