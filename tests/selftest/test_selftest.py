"""te-nvfp4-cv selftest: passes on sound kernels, on the CPU and in Triton's interpreter; planted faults are found and
named; the report can be shared; only a whole pass on a GPU is remembered.
"""

from __future__ import annotations

import getpass
import json
import os
import platform
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from te_nvfp4_cv import cli, selftest
from te_nvfp4_cv.backend import cache, native
from te_nvfp4_cv.ops.block_scales import FORMATS
from te_nvfp4_cv.ops.conv import integer as conv_integer
from te_nvfp4_cv.ops.conv import vendor as conv_vendor
from te_nvfp4_cv.ops.quantize import cpu, operand, reference_matrix
from te_nvfp4_cv.ops.records import Operand
from te_nvfp4_cv.selftest import products, quantization, setting, training
from te_nvfp4_cv.selftest.setting import CheckFailed, Setting
from tests.backend import fake_gpu
from tests.helpers import seeds

CPU = torch.device("cpu")
HERE = Setting(CPU, "vendor", small=True)
pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_command_on_a_cpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cache, "remember_selftest", lambda *_: pytest.fail("a CPU's pass was remembered for a GPU"))
    path = tmp_path / "report.json"
    assert cli.main(["selftest", "--json", str(path)]) == 0
    text = capsys.readouterr().out
    assert "No CUDA device was tested" in text and "checks passed" in text and "FAILED" not in text
    report = json.loads(path.read_text())
    assert report["passed"] and not report["gpu_tested"]
    assert report["backends"] == ["vendor", "integer"] if native.load() is not None else ["vendor"]
    assert report["torch"] == torch.__version__ and all(row["detail"] for row in report["checks"])
    names = [row["check"] for row in report["checks"]]
    for name in ("activations", "delayed", "stochastic rounding", "block formats", "convolutions", "training"):
        assert name in names
    for private in (platform.node(), str(tmp_path), "/home/", "/tmp/"):
        assert private not in path.read_text()
    assert len(getpass.getuser()) < 3 or f"/{getpass.getuser()}" not in path.read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "tpu"], "unknown device"),
        (["--device", "cuda:99"], "is not there"),
        (["--device", "cpu", "--json", "/no/such/folder/x.json"], "No such file"),
    ],
    ids=str,
)
def test_what_cannot_run_exits_with_2(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr(selftest, "_plan", lambda *_: [])
    assert cli.main(["selftest", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_backend_that_cannot_run_exits_with_2(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert cli.main(["selftest", "--device", "cpu", "--backend", "triton"]) == 2
    assert "backend 'triton' cannot run here" in capsys.readouterr().err


# ---- planted faults -------------------------------------------------------------------------------------------------


def broken(change: Callable[[Operand], None]) -> Callable[..., Operand]:
    """Return cpu.quantize_operand with its results changed in place."""
    original = cpu.quantize_operand

    def quantize_operand(*args: Any, **kwargs: Any) -> Operand:
        made: Operand = original(*args, **kwargs)
        change(made)
        return made

    return quantize_operand


def flip_last_code(made: Operand) -> None:
    if made.col.data.dtype == torch.uint8 and made.col.data.numel():
        made.col.data.view(-1)[-1] ^= 1


def forget_saturation(made: Operand) -> None:
    if made.observed.numel():
        made.observed[2] = 0


@pytest.mark.parametrize(
    ("change", "check", "words"),
    [
        (flip_last_code, quantization.activations, "column data differs from the reference in 1 of"),
        (forget_saturation, quantization.delayed, "observed differs from the reference in 1 of 3"),
    ],
)
def test_a_wrong_quantization_kernel_is_found(monkeypatch, change, check, words):
    monkeypatch.setattr(cpu, "quantize_operand", broken(change))
    with pytest.raises(CheckFailed, match=words):
        check(HERE)


@pytest.mark.skipif(native.load() is None, reason="no C++ compiler")
@pytest.mark.parametrize("name", FORMATS)
def test_a_wrong_kernel_of_another_block_format_is_found(monkeypatch, name):
    """One code of dy: a fault in whatever quantizes it."""
    fast = operand._PLAIN[name + " integer"]
    original = fast.quantize_operand

    def quantize_operand(*args: Any) -> Operand:
        made: Operand = original(*args)
        flip_last_code(made)
        return made

    monkeypatch.setattr(fast, "quantize_operand", quantize_operand)
    with pytest.raises(CheckFailed, match=f"block_format.*{name}.*dw differs"):
        products.block_formats(Setting(CPU, "integer"))


def bytes_like(x: Tensor, seed: int, *, kind: str) -> Tensor:
    """Random bytes of a faulty generator."""
    generator = torch.Generator().manual_seed(seed)
    r = torch.randint(0, 256, x.shape, generator=generator, dtype=torch.uint8)
    if kind == "never up":
        return torch.zeros_like(r)
    if kind == "half":
        return torch.full_like(r, 128)
    if kind == "low bits zero":
        return r & 0xC0
    if kind == "one place stuck":
        r[:, 5::16] = 40
        return r
    if kind == "rows alike":
        return r[:1].expand_as(r).contiguous()
    if kind == "columns alike":
        return r[:, :1].expand_as(r).contiguous()
    if kind == "one seed":
        generator.manual_seed(3)
        return torch.randint(0, 256, x.shape, generator=generator, dtype=torch.uint8)
    return r


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("sound", ""),
        ("never up", "biased"),
        ("half", "to nearest|correlated|biased"),
        ("low bits zero", "biased"),
        ("one place stuck", "biased"),
        ("rows alike", "neighbouring rows are correlated|biased"),
        ("columns alike", "neighbouring columns are correlated"),
        ("one seed", "neighbouring draws are correlated"),
    ],
)
def test_faulty_random_numbers_are_found(monkeypatch, kind, words):
    def faces(x: Tensor, seed: int, _: Setting) -> tuple[Tensor, ...]:
        x_MC = x.movedim(0, -2).reshape(-1, x.shape[-1])
        random = {
            "random_rowwise": bytes_like(x_MC, 2 * seed, kind=kind),
            "random_columnwise": bytes_like(x_MC.t(), 2 * seed + 1, kind=kind),
        }
        found = reference_matrix.quantize_2d(x_MC, columnwise=True, rht=True, stochastic_rounding=True, **random)
        u8 = torch.uint8
        return found.row_data, found.row_scale.view(u8), found.col_data, found.col_scale.view(u8)

    monkeypatch.setattr(quantization, "_faces", faces)
    full = Setting(CPU, "vendor")
    if not words:
        assert "bias" in quantization.stochastic_rounding(full)
        return
    with pytest.raises(CheckFailed, match=words):
        quantization.stochastic_rounding(full)


def test_rounding_that_ignores_its_seed_or_depends_on_more_is_found(monkeypatch):
    count = iter(range(1000))
    sound = quantization._faces
    monkeypatch.setattr(quantization, "_faces", lambda x, seed, s: sound(x, next(count), s))
    with pytest.raises(CheckFailed, match="one seed gave two results"):
        quantization.stochastic_rounding(HERE)


@pytest.mark.parametrize("name", ["fprop", "dgrad", "wgrad"])
def test_a_wrong_product_is_found(monkeypatch, name):
    sound = getattr(conv_vendor, name)

    def wrong(*args: Any) -> Tensor:
        out = sound(*args)
        out[..., -1] *= 1.5
        return out

    monkeypatch.setattr(conv_vendor, name, wrong)
    result = {"fprop": "y", "dgrad": "dx", "wgrad": "dw"}[name]
    with pytest.raises(CheckFailed, match=rf"conv2d .*: {result}: relative error"):
        products.convolutions(HERE)


@pytest.mark.skipif(native.load() is None, reason="no compiled kernels")
@pytest.mark.parametrize("name", ["fprop", "dgrad", "wgrad"])
def test_a_product_on_integers_that_is_wrong_in_one_bit_is_found(monkeypatch, name):
    sound = getattr(conv_integer, name)

    def wrong(*args: Any) -> Tensor:
        out: Tensor = sound(*args)
        out.view(torch.int16).view(-1)[-2] ^= 1  # the last bit of the last number
        return out

    here = Setting(CPU, "integer")
    assert "equal in bits" in products.linear_layers(here)
    monkeypatch.setattr(conv_integer, name, wrong)
    result = {"fprop": "y", "dgrad": "dx", "wgrad": "dw"}[name]
    with pytest.raises(CheckFailed, match=rf"linear .*: {result} differs from the reference in 1 of"):
        products.linear_layers(here)


def test_a_failure_of_the_integer_backend_names_vendor(monkeypatch, capsys):
    for check, fix in (("convolutions", "vendor"), ("weights", "reference")):
        monkeypatch.setattr(selftest, "_plan", lambda *_, check=check: [(fail(check), "integer"), (passing, "vendor")])
        assert cli.main(["selftest", "--device", "cpu"]) == 1
        assert f'use backend="{fix}"' in capsys.readouterr().out


def test_a_product_that_swallows_nan_is_found(monkeypatch):
    sound = conv_vendor.fprop
    monkeypatch.setattr(conv_vendor, "fprop", lambda *args: sound(*args).nan_to_num(0.0))
    with pytest.raises(CheckFailed, match="must be non-finite everywhere"):
        products.non_finite_values(HERE)


def test_training_that_does_not_learn_is_found(monkeypatch):
    sound = conv_vendor.wgrad
    monkeypatch.setattr(conv_vendor, "wgrad", lambda *args: -sound(*args))
    with pytest.raises(CheckFailed, match="training, NVFP4 current: loss"):
        training.training(Setting(CPU, "vendor"))


def test_nan_and_other_shapes_never_pass():
    x = torch.ones(4)
    for bad in (torch.full((4,), float("nan")), torch.ones(3), torch.zeros(4)):
        with pytest.raises(CheckFailed):
            setting.close("x", bad, x, 0.5)
    with pytest.raises(CheckFailed, match=r"y is \(4,\) float32, the reference's \(4,\) bfloat16"):
        setting.same_fields("x", ("y",), (x,), (x.bfloat16(),))
    assert setting.differing(torch.tensor([float("nan"), -0.0]), torch.tensor([float("nan"), 0.0])) == 1


# ---- report and verdict ---------------------------------------------------------------------------------------------


def fail(name: str, text: str = "y differs") -> selftest.Check:
    def check(_: Setting) -> str:
        raise RuntimeError(text)

    check.__name__ = name
    return check


def passing(_: Setting) -> str:
    return "fine"


def test_a_failure_exits_with_1_and_says_what_to_do(monkeypatch, capsys, tmp_path):
    text = "out of resource in /home/someone/.triton/cache/kernel_x.ptx and C:\\Users\\me\\k.py line 3"
    monkeypatch.setattr(selftest, "_plan", lambda *_: [(passing, "vendor"), (fail("weights", text), "vendor")])
    path = tmp_path / "r.json"
    assert cli.main(["selftest", "--device", "cpu", "--json", str(path)]) == 1
    out = capsys.readouterr().out
    assert "1 of 2 checks FAILED" in out and 'backend="reference"' in out
    report = json.loads(path.read_text())
    assert not report["passed"]
    error = report["checks"][1]["error"]
    assert error == "RuntimeError: out of resource in kernel_x.ptx and k.py line 3"


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A fake H200 on which every check is `passing` or planted."""
    fake_gpu.install(monkeypatch, tmp_path)
    monkeypatch.setattr(torch.cuda, "set_device", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for module, names in (
        (
            quantization,
            ("activations", "unusual_activations", "delayed", "weights", "unpacking", "stochastic_rounding"),
        ),
        (products, ("convolutions", "linear_layers", "matrix_products", "non_finite_values")),
        (training, ("training", "norms", "graph")),
    ):
        for name in names:
            check = lambda s: "fine"  # noqa: E731
            check.__name__ = name
            monkeypatch.setattr(module, name, check)
    monkeypatch.setattr(selftest.os, "cpu_count", lambda: 1)  # no other processes: they would not see what is patched
    monkeypatch.setattr(selftest, "QUANTIZATION", (quantization.activations, quantization.weights))
    monkeypatch.setattr(selftest, "PRODUCTS", (products.convolutions, training.training))
    yield fake_gpu.DEVICE
    fake_gpu.new_process()


def test_a_whole_pass_on_a_gpu_is_remembered(gpu, capsys):
    assert cli.main(["selftest"]) == 0
    out = capsys.readouterr().out
    assert "Fake GPU (sm_90): driver 580.1" in out and "All 9 checks passed" in out and "No CUDA" not in out
    assert cache.selftest_passed(gpu)
    fake_gpu.new_process()
    assert cache.selftest_passed(gpu)


def test_a_pass_of_one_backend_is_not_remembered(gpu):
    assert cli.main(["selftest", "--backend", "vendor"]) == 0
    assert not cache.selftest_passed(gpu)


@pytest.mark.parametrize(
    ("where", "name", "fix"),
    [(products, "convolutions", "vendor"), (quantization, "weights", "reference"), (training, "norms", "reference")],
)
def test_a_failure_on_a_gpu_is_remembered_and_names_what_works(gpu, monkeypatch, capsys, where, name, fix):
    cache.remember_selftest(gpu, True)

    def check(s: Setting) -> str:
        if s.backend == "triton":
            raise CheckFailed("y differs")
        return "fine"

    check.__name__ = name
    monkeypatch.setattr(where, name, check)
    if where is products:
        monkeypatch.setattr(selftest, "PRODUCTS", (check,))
    elif where is quantization:
        monkeypatch.setattr(selftest, "QUANTIZATION", (check,))
    assert cli.main(["selftest"]) == 1
    assert f'use backend="{fix}"' in capsys.readouterr().out
    assert not cache.selftest_passed(gpu)
    fake_gpu.new_process()
    assert not cache.selftest_passed(gpu)


def dies(_: Setting) -> str:
    os._exit(3)


def counts(setting: Setting) -> str:
    return f"process {os.getpid()} on {setting.device}"


def test_checks_in_processes_of_their_own(monkeypatch):
    """A check that kills its process is a failure, in the report like any other."""
    monkeypatch.setattr(selftest, "_plan", lambda *_: [(counts, "vendor"), (passing, "vendor")])
    report = selftest.run(CPU, workers=2)
    assert report["passed"] and {row["check"] for row in report["checks"]} == {"counts", "passing"}
    assert str(os.getpid()) not in "".join(row["detail"] for row in report["checks"])
    monkeypatch.setattr(selftest, "_plan", lambda *_: [(dies, "vendor")])
    (row,) = selftest.run(CPU, workers=2)["checks"]
    assert not row["passed"] and "BrokenProcessPool" in row["error"]


# ---- the kernels ----------------------------------------------------------------------------------------------------

KERNEL_CHECKS = (*selftest.QUANTIZATION, *selftest.PRODUCTS, training.norms)
# Training in the interpreter takes 20 seconds; here it is checked on the CPU's kernels (test_the_command_on_a_cpu).
SHORT_CHECKS = [check for check in KERNEL_CHECKS if check.__name__ != "training"]


@pytest.mark.parametrize("check", seeds(SHORT_CHECKS, KERNEL_CHECKS), ids=lambda check: check.__name__)
def test_the_kernels_pass(check, kernel_device):
    """On a GPU in full size, elsewhere in the interpreter on tiny shapes."""
    assert check(Setting(kernel_device, "triton", small=kernel_device.type == "cpu"))
