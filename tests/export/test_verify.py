"""The verifier: it names the precision that a layer really has, and what is wrong with one that claims NVFP4."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import te_nvfp4_cv as nv
from te_nvfp4_cv.export.verify import __main__ as verify
from tests.helpers import values
from tests.networks import Net

safetensors = pytest.importorskip("safetensors.torch", reason="the extra [export]")
RECIPE = nv.NVFP4BlockScaling(precision={"body.4": None})
FP8 = torch.float8_e4m3fn


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    net = Net()
    nv.set_precision(net, RECIPE)
    return nv.export.save(net.bfloat16(), tmp_path / "net", RECIPE).files[0]


def test_a_sound_file(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = verify.verify(saved)
    assert report.sound and report.origin == f"te_nvfp4_cv {nv.__version__}"
    found = {row.name: (row.kind, row.precision, round(row.bits, 1)) for row in report.rows}
    assert found == {
        "stem": ("conv2d", "bf16", 16.0),
        "body.4": ("conv2d", "bf16", 16.0),
        "body.1": ("conv2d", "nvfp4", 4.5),
        "up": ("conv_transpose2d", "nvfp4", 4.5),
        "head": ("linear", "nvfp4", 4.6),  # of 256 values, 32 bits more
    }
    assert verify.main([str(saved)]) == 0
    assert "3 of 5 layers are NVFP4" in capsys.readouterr().out
    assert verify.main([str(saved), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["sound"] and told["nvfp4"] == 3 and told["rows"][0]["bits"] > 4


def test_as_a_program(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:-5])
    command = [sys.executable, "-m", "te_nvfp4_cv.export.verify", str(saved)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1 and "is damaged" in run.stdout
    assert verify.main(["nowhere"]) == 2


def test_a_changed_byte_is_a_problem(saved: Path) -> None:
    changed = bytearray(saved.read_bytes())
    changed[-3] ^= 4
    saved.write_bytes(bytes(changed))
    report = verify.verify(saved)
    assert not report.sound and "wrong checksum" in report.problems[0]


def modelopt(rows: int = 32, columns: int = 64) -> dict[str, Tensor]:
    """A linear layer as ModelOpt exports it, and one in bf16."""
    quantizer = nv.NVFP4Quantizer(rowwise=True, columnwise=False)
    t = quantizer(values((rows, columns)))
    return {
        "a.weight": t.rowwise_data,
        "a.weight_scale": t.rowwise_scale_inv,
        "a.weight_scale_2": (t.amax_rowwise / 2688).reshape(()),
        "a.input_scale": torch.tensor(0.01),
        "lm_head.weight": torch.zeros(8, 64, dtype=torch.bfloat16),
    }


CONFIG = {"quantization_config": {"quant_algo": "NVFP4", "ignore": ["lm_head"]}}


@pytest.fixture
def foreign(tmp_path: Path) -> Callable[[dict[str, Tensor]], Path]:
    def write(tensors: dict[str, Tensor]) -> Path:
        path = tmp_path / "model.safetensors"
        safetensors.save_file({name: t.contiguous() for name, t in tensors.items()}, path)
        (tmp_path / "config.json").write_text(json.dumps(CONFIG))
        return path

    return write


def test_other_tools_files(foreign: Callable[[dict[str, Tensor]], Path]) -> None:
    report = verify.verify(foreign(modelopt()))
    assert report.sound and report.origin == "another tool"
    assert [(row.name, row.precision) for row in report.rows] == [("a", "nvfp4"), ("lm_head", "bf16")]
    tensors = modelopt()
    packed = {"a.weight_packed": tensors["a.weight"], "a.weight_scale": tensors["a.weight_scale"]}
    packed["a.weight_global_scale"] = (1 / tensors["a.weight_scale_2"]).reshape(1)
    report = verify.verify(foreign(packed))
    assert report.sound and report.rows[0].precision == "nvfp4"


def nan_scale(t: dict[str, Tensor]) -> None:
    t["a.weight_scale"].view(torch.uint8)[0, 0] = 0x7F


PRETENDERS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "bf16 in disguise": (lambda t: t.update({"a.weight": torch.zeros(32, 64, dtype=torch.bfloat16)}), "codes are bf16"),
    "fp8 in disguise": (lambda t: t.update({"a.weight": torch.zeros(32, 64).to(FP8)}), "codes are fp8"),
    "fp32 scales": (lambda t: t.update({"a.weight_scale": t["a.weight_scale"].float()}), "scales are fp32, not E4M3"),
    "blocks of 32": (
        lambda t: t.update({"a.weight_scale": t["a.weight_scale"][:, ::2].contiguous()}),
        "32 values share a block scale",
    ),
    "one scale per tensor": (lambda t: t.update({"a.weight_scale": torch.ones(1, 1).to(FP8)}), "2048 values share"),
    "blocks along the rows": (
        lambda t: t.update({"a.weight_scale": torch.ones(2, 64).to(FP8)}),
        "share a block scale along the last axis",
    ),
    "NaN scales": (nan_scale, "1 of its block scales are NaN"),
    "negative scales": (
        lambda t: t.update({"a.weight_scale": (-torch.ones(32, 4)).to(FP8)}),
        "128 of its block scales",
    ),
    "no weight": (lambda t: t.pop("a.weight"), "its weight is missing"),
    "codes in one row": (lambda t: t.update({"a.weight": t["a.weight"].flatten()}), "its codes have 1 axes"),
    "codes without axes": (
        lambda t: [t.pop("a.weight"), t.update({"a.weight_packed": torch.zeros((), dtype=torch.uint8)})],
        "its codes have 0 axes",
    ),
    "half a block without a scale": (
        lambda t: t.update({"a.weight": torch.cat([t["a.weight"], t["a.weight"][:, :4]], 1)}),
        "a row has 72 values, which is no whole number of blocks of 16",
    ),
    "rows below a block": (
        lambda t: t.update({"a.weight": t["a.weight"][:, :7], "a.weight_scale": torch.zeros(32, 0).to(FP8)}),
        "a row has 14 values",
    ),
    "no codes": (
        lambda t: t.update({"a.weight": t["a.weight"][:, :0], "a.weight_scale": torch.zeros(32, 0).to(FP8)}),
        "it has no codes",
    ),
    "no tensor scale": (lambda t: t.pop("a.weight_scale_2"), "it has no tensor scale"),
    "a tensor scale of zero": (lambda t: t.update({"a.weight_scale_2": torch.tensor(0.0)}), "scale is 0, its codes"),
    "no scales": (lambda t: t.pop("a.weight_scale"), "no block scales"),
    "an infinite tensor scale": (lambda t: t.update({"a.weight_scale_2": torch.tensor(math.inf)}), "scale is inf"),
    "a bf16 tensor scale": (lambda t: t.update({"a.weight_scale_2": t["a.weight_scale_2"].bfloat16()}), "bf16"),
    "a plain weight": (
        lambda t: (
            [t.pop(f"a.{key}") for key in ("weight_scale", "weight_scale_2", "input_scale")]
            and t.update({"a.weight": torch.zeros(32, 64)})
        ),
        "the config says NVFP4, the weight is fp32",
    ),
    "FP8 under an NVFP4 config": (
        lambda t: (
            [t.pop(f"a.{key}") for key in ("weight_scale", "weight_scale_2", "input_scale")]
            and t.update({"a.weight": torch.zeros(32, 64).to(FP8), "a.weight_scale": torch.tensor(1.0)})
        ),
        "the config says NVFP4, the weight is fp8",
    ),
}


BY_CONFIG = ("a plain weight", "FP8 under an NVFP4 config")


@pytest.mark.parametrize(
    ("case", "config"), [(c, b) for c in PRETENDERS for b in (True, False) if b or c not in BY_CONFIG]
)
def test_pretenders(
    case: str, config: bool, foreign: Callable[[dict[str, Tensor]], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = modelopt()
    change, told = PRETENDERS[case]
    change(tensors)
    path = foreign(tensors)
    if not config:
        (path.parent / "config.json").unlink()
    (row,) = [row for row in verify.verify(path).rows if row.name == "a"]
    assert row.claimed == "nvfp4" and row.precision != "nvfp4" and any(told in problem for problem in row.problems)
    assert verify.main([str(path)]) == 1
    assert "NOT what it claims to be" in capsys.readouterr().out


def test_a_matrix_in_another_order_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels outermost, as some exporters flatten a kernel: the blocks would run along the taps."""
    monkeypatch.setattr("te_nvfp4_cv.export.matrix.K_ORDER", "channels, taps")
    path = nv.export.save(nn.Conv2d(16, 16, 3), tmp_path / "net").files[0]
    monkeypatch.undo()
    (row,) = verify.verify(path).rows
    assert row.problems == ["the order of its contracted index is 'channels, taps', not 'taps, channels padded to 16'"]
    with pytest.raises(ValueError, match="channels, taps"):
        nv.export.load(path, nn.Conv2d(16, 16, 3))


def test_patterns_of_layers_left_out(foreign: Callable[[dict[str, Tensor]], Path], tmp_path: Path) -> None:
    path = foreign({"blocks.0.mlp.weight": torch.zeros(16, 16), "norm.weight": torch.ones(16)})
    for pattern, sound in (("blocks.0", True), ("blocks.*", True), ("re:.*mlp", True), ("re:[", False), ("mlp", False)):
        config = {"quantization_config": {"quant_algo": "NVFP4", "ignore": [pattern]}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert verify.verify(path).sound == sound, pattern


# ---- nothing, or not all, is recognized -----------------------------------------------------------------------------


def write(path: Path, tensors: dict[str, Tensor]) -> Path:
    safetensors.save_file({name: t.contiguous() for name, t in tensors.items()}, path)
    return path


def test_a_file_in_which_nothing_is_recognized_is_not_sound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gptq = {"a.qweight": torch.zeros(8, 32, dtype=torch.int32), "a.scales": torch.zeros(4, 32, dtype=torch.half)}
    path = write(tmp_path / "gptq.safetensors", gptq)
    assert verify.main([str(path)]) == 3
    told = capsys.readouterr().out
    assert "Nothing recognized" in told and "a.qweight (int32 [8, 32])" in told and "Every claim holds" not in told
    assert verify.main([str(path), "--json"]) == 3 and json.loads(capsys.readouterr().out)["recognized"] is False


def test_a_config_of_nvfp4_over_unknown_names_is_a_problem(foreign: Callable[[dict[str, Tensor]], Path]) -> None:
    report = verify.verify(foreign({"a.codes": torch.zeros(8, 32, dtype=torch.uint8)}))
    assert not report.sound and "no layer has the names of a known NVFP4 format" in report.problems[0]


def test_tensors_that_no_row_is_about_are_named(tmp_path: Path) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(16, 16, 1)
            self.queries = nn.Parameter(torch.zeros(4, 8))

    report = verify.verify(nv.export.save(Own(), tmp_path / "net").files[0])
    assert report.sound and report.unexplained == ["queries (float32 [4, 8])"]


def test_the_static_scale_of_activations_is_checked(foreign: Callable[[dict[str, Tensor]], Path]) -> None:
    for bad in (float("nan"), 0.0, -1.0):
        report = verify.verify(foreign({**modelopt(), "a.input_scale": torch.tensor(bad)}))
        assert "input_scale is" in report.rows[0].problems[0]


def test_blocks_of_32_where_the_config_says_so(tmp_path: Path) -> None:
    tensors = modelopt()
    tensors["a.weight_scale"] = tensors["a.weight_scale"][:, ::2]
    path = write(tmp_path / "model.safetensors", tensors)
    assert "32 values share a block scale" in verify.verify(path).rows[0].problems[0]
    config = {"quantization_config": {"quant_algo": "W4A8_NVFP4_FP8", "group_size": 32, "ignore": ["lm_head"]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    report = verify.verify(path)
    assert report.sound and report.rows[0].precision == "fp4, blocks of 32"


@pytest.mark.parametrize("tiles", [False, True])
def test_files_of_torchao(tiles: bool, tmp_path: Path) -> None:
    own = modelopt(rows=40, columns=96)
    scale = own["a.weight_scale"]
    if tiles:  # as tensor cores take them: [40, 6] padded to [128, 8], in tiles of 128 x 4
        padded = torch.zeros(128, 8, dtype=torch.uint8)
        padded[:40, :6] = scale.view(torch.uint8)
        order = torch.empty(2, 32, 4, 4, dtype=torch.uint8)
        for row in range(128):
            for column in range(8):
                order[column // 4, row % 32, row // 32, column % 4] = padded[row, column]
        scale = order.view(torch.float8_e4m3fn)
    tensors = {"a._weight_qdata": own["a.weight"], "a._weight_scale": scale}
    report = verify.verify(write(tmp_path / "m.safetensors", tensors))
    (row,) = report.rows
    assert report.sound and row.precision == "nvfp4" and row.scales is not None and row.scales[0] > 0
    tensors["a._weight_scale"] = tensors["a._weight_scale"].float()
    assert not verify.verify(write(tmp_path / "m.safetensors", tensors)).sound
