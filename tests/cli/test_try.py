"""te-nvfp4-cv try: the row of a sound model, each check on a model that it must catch, the control, bad input."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import te_nvfp4_cv as nv
from te_nvfp4_cv import cli
from te_nvfp4_cv.cli.trial import exported, files, programs, training
from te_nvfp4_cv.cli.trial.cells import Trial, answer
from te_nvfp4_cv.cli.trial.control import control
from te_nvfp4_cv.cli.trial.run import CHECKS, try_model
from te_nvfp4_cv.cli.trial.subject import Step, Subject, distance, floats, normal, relative, settled, step
from te_nvfp4_cv.context.state import state
from te_nvfp4_cv.tensor.quantizer import NVFP4Quantizer

pytestmark = pytest.mark.usefixtures("one_thread")
OPEN: set[str] = set()  # checks that do not hold yet
FILE = """
import torch
from torch import nn
from tests.cli.test_try import Net

def build():
    return Net()

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Net()
    def forward(self, image, gain=None):
        return {"out": self.net(image) * gain, "count": torch.tensor(3)}

def named():
    return Two(), {"image": torch.randn(2, 3, 8, 8), "gain": torch.ones(2, 1, 1, 1)}, lambda y: y["out"].mean()

def number():
    return 3

def triple():
    return Two(), (torch.randn(2, 3, 8, 8),), "loss"
"""


class Net(nn.Module):
    """A stem in high precision, two layers in NVFP4, and one of three things that only a context brings about."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.kind, self.seen = kind, 0
        self.kept: Tensor | None = None
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.head = nn.Conv2d(32, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        inside = self.kind != "" and state() is not None
        x = self.body(self.stem(x))
        if inside and self.kind == "lost":
            x = x.detach()
        if inside and self.kind == "nan":
            x = x / 0
        if inside and self.kind == "layout" and not self.body[0].weight.is_contiguous():
            x = -x
        if self.kind == "old" and inside and not self.training:
            self.kept = x = x if self.kept is None else self.kept
        if self.kind == "uncounted" and self.training:
            self.seen += 1
        return self.head(x) + 10 * self.seen


class Repeats(nn.Module):
    """A block that gives something else when it runs again."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.calls = nn.Conv2d(16, 16, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.conv(x) * (-1 if self.calls == 2 else 1)


def subject(kind: str = "", build: Any = None, channels: int = 3) -> Subject:
    return Subject("net", build or (lambda: Net(kind)), (normal((4, channels, 8, 8)),))


def found(name: str, tried: Subject) -> tuple[bool | None, str]:
    cell = answer(CHECKS[name], Trial(tried, nv.NVFP4BlockScaling()))
    return cell.ok, cell.text


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / f"tried_{tmp_path.name}.py"  # each of its own name: Python keeps what it has imported
    path.write_text(FILE)
    return path


# ---- the command ----------------------------------------------------------------------------------------------------


def test_a_sound_model(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [name for name in CHECKS if name not in OPEN]
    assert cli.main(["try", f"{file}:build", "--input", "3", "8", "8", "--json", "--checks", *names]) == 0
    row = json.loads(capsys.readouterr().out)
    assert list(row["cells"]) == names
    assert {name for name, cell in row["cells"].items() if cell["ok"]} == set(names)
    texts = {name: cell["text"] for name, cell in row["cells"].items()}
    exact = {"compile", "checkpoint", "both", "save", "ema"} - OPEN
    assert {texts[name] for name in exact} == {"equal bits"}
    assert texts["fuse"] == "2/2" and texts["lists"] == "2 layers" and texts["share"].endswith("%")


def test_inputs_and_a_loss_of_the_users_own(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checks = ["--checks", "step", "share", "save", "onnx"]
    assert cli.main(["try", f"{file}:named", *checks]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in told[1:-1]] == [[n, "ok"] for n in ("step", "share", "save", "onnx")]
    assert told[-1].startswith("no check failed")


def test_a_finding_is_status_1(file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(training, "control", lambda *_: nullcontext())
    assert cli.main(["try", f"{file}:build", "--input", "3", "8", "8", "--checks", "gradient"]) == 1
    told = capsys.readouterr().out
    assert "gradient  NO  " in told and "1 of 1 checks failed" in told


@pytest.mark.parametrize(("name", "told"), [("number", "no model"), ("triple", "(model, inputs, loss)")])
def test_what_is_no_model(file: Path, name: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["try", f"{file}:{name}"]) == 2
    assert told in capsys.readouterr().err


def test_checks_of_other_names_are_refused() -> None:
    with pytest.raises(ValueError, match="no such check"):
        try_model(subject(), checks=["stop"])


# ---- each check finds what it is for --------------------------------------------------------------------------------


def test_step_finds_lost_and_broken_gradients() -> None:
    ok, told = found("step", subject("lost"))
    assert ok is False and told.endswith("parameters without a gradient: stem.0.weight")
    ok, told = found("step", subject("nan"))
    assert ok is False and "loss nan" in told
    tried = Trial(subject(), nv.NVFP4BlockScaling())
    tried.nvfp4.gradients["head.weight"].zero_()
    assert answer(training.runs, tried).text == "1 gradients are zero: head.weight"


@pytest.mark.parametrize(("factor", "draws", "ok"), [(1.0, 1, True), (0.06, 3, True), (0.0, 5, False)])
def test_gradient_takes_the_largest_draw_of_the_control(factor: float, draws: int, ok: bool, monkeypatch: Any) -> None:
    tried = Trial(subject(), nv.NVFP4BlockScaling())
    assert 0.2 < tried.nvfp4.error(tried.high) < 0.31
    seeds: list[int] = []

    def noisy(*_: Any) -> Step:  # each draw is farther from high precision than the one before
        return Step(tried.high.loss, {n: g * (1 + factor * len(seeds)) for n, g in tried.high.gradients.items()})

    monkeypatch.setattr(training, "control", lambda recipe, backend, seed: seeds.append(seed))
    monkeypatch.setattr(tried, "step", noisy)
    assert answer(training.gradient, tried).ok is ok
    assert len(set(seeds)) == len(seeds) == draws


def test_share_finds_a_model_without_nvfp4() -> None:
    assert found("share", subject(build=lambda: nn.Conv2d(3, 8, 3))) == (False, "0%")


def test_share_finds_a_coverage_that_counts_otherwise(monkeypatch: Any) -> None:
    real = training.coverage

    def other(*args: Any, **kwargs: Any) -> Any:
        report = real(*args, **kwargs)
        report.rows.pop()
        return report

    monkeypatch.setattr(training, "coverage", other)
    assert found("share", subject()) == (False, "coverage counts 1 calls in NVFP4, the step made 2")


class HighWhenCompiled(Net):
    """A model that leaves NVFP4 inside of a graph."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            with nv.nvfp4_autocast(enabled=False):
                return super().forward(x)
        return super().forward(x)


@pytest.mark.parametrize("name", ["compile", "both"])
def test_compile_counts_the_layers_of_the_graph(name: str) -> None:
    assert found(name, subject(build=HighWhenCompiled)) == (False, "0 of 2 layers in NVFP4")


class Twice(Net):
    """A model that calls a layer twice on the same input, which a compiler may do once."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.stem(x))
        return self.head(x) + self.head(x)


def test_compile_counts_equal_calls() -> None:
    assert found("compile", subject(build=Twice)) == (True, "equal bits")


def test_compile_finds_more_graphs_than_plain_torch_needs(monkeypatch: Any) -> None:
    real = programs._compile

    def broken(trial: Trial, model: nn.Module, full: bool, nvfp4: bool) -> Any:
        if full:
            raise RuntimeError("a graph break")
        step, layers, graphs = real(trial, model, full, nvfp4)
        return step, layers, graphs + nvfp4

    monkeypatch.setattr(programs, "_compile", broken)
    assert found("compile", subject()) == (False, "2 graphs, 1 of plain torch: RuntimeError: a graph break")


def test_what_plain_torch_cannot_compile_is_no_finding(monkeypatch: Any) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no")

    monkeypatch.setattr(programs, "_compile", broken)
    assert found("compile", subject()) == (None, "torch: RuntimeError: no")


def test_checkpoint_finds_a_repetition_that_differs() -> None:
    model = lambda: nn.Sequential(nn.Sequential(Repeats(), nn.ReLU()), nn.Sequential(nn.Conv2d(16, 16, 3)))  # noqa: E731
    ok, told = found("checkpoint", subject(build=model, channels=16))
    assert ok is False and told.startswith("gradient error ")


def test_save_finds_what_no_file_holds() -> None:
    ok, told = found("save", subject("uncounted"))
    assert ok is False and told.startswith("loaded differs by ") and told.endswith("2 layers saved in NVFP4, 1 not")


class Many(nn.Module):
    """A model that a loader cannot call: it takes arguments by name."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))

    def forward(self, x: Tensor, *, scale: float) -> Tensor:
        return self.body(x * scale)


def test_lists_asks_quantize_whatever_a_model_is_called_with() -> None:
    assert found("lists", Subject("many", Many, (normal((3, 32)),), {"scale": 2.0})) == (True, "2 layers")


def test_lists_finds_layers_that_one_of_them_lacks(monkeypatch: Any) -> None:
    def high(model: nn.Module, *_: Any, **__: Any) -> nn.Module:
        nv.set_precision(model, {"body.0": None})
        return model

    monkeypatch.setattr(files, "quantize", high)
    assert found("lists", subject()) == (False, "1 layers not in NVFP4 by quantize: body.0")
    many = Subject("many", Many, (normal((3, 32)),), {"scale": 2.0})
    assert found("lists", many) == (False, "1 layers not in NVFP4 by quantize: body.0")
    with pytest.raises(Exception, match="1 layers in NVFP4 by save alone: b"):
        files._agree("save", {"a"}, {"a", "b", "c"}, {"a", "b"})


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("model.head.weight_scale_2", "model.head differs by 1"),
        ("model.body.1.weight", "the input of model.head differs by "),
        ("y", "the output differs by "),
    ],
)
def test_onnx_finds_what_is_wrong_and_where(name: str, told: str, monkeypatch: Any) -> None:
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    real = exported.to_onnx

    def wrong(*args: Any, **kwargs: Any) -> Any:
        made = real(*args, **kwargs)
        proto = onnx.load(made.files[0])
        if name == "y":  # everything behind the last layer
            node = next(node for node in proto.graph.node if "y0" in node.output)
            node.output[:] = ["before"]
            proto.graph.node.append(onnx.helper.make_node("Relu", ["before"], ["y0"]))
        for tensor in proto.graph.initializer:
            if tensor.name == name:
                values = onnx.numpy_helper.to_array(tensor)
                tensor.CopyFrom(onnx.numpy_helper.from_array(values * 2, name))
        onnx.save(proto, made.files[0])
        return made

    monkeypatch.setattr(exported, "to_onnx", wrong)
    ok, text = found("onnx", subject())
    assert ok is False and text.startswith(f"onnxruntime: {told}")


def test_onnx_lets_codes_at_ties_differ(monkeypatch: Any) -> None:
    pytest.importorskip("onnxruntime")
    real = exported.runtime.run
    monkeypatch.setattr(exported.runtime, "run", lambda *args: [1.5 * y for y in real(*args)])
    assert found("onnx", subject()) == (True, "layers equal, 0.5 in all")


class Reads(nn.Module):
    """Layers in odd places: one of a table, one called twice, one whose output nobody reads, and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor
        self.register_buffer("table", normal((5, 32)))
        self.embed, self.twice, self.unread = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.mix = nn.MultiheadAttention(32, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(x).relu() + self.embed(self.table))
        if not self.training:
            self.unread(x)
        return self.mix(x, x, x)[0] + self.unread(x) if self.training else self.mix(x, x, x)[0]


def test_onnx_follows_layers_in_odd_places(monkeypatch: Any) -> None:
    pytest.importorskip("onnxruntime")
    traced: dict[str, Any] = {}
    real = exported.runtime.trace

    def noted(*args: Any) -> Any:
        outputs, calls = real(*args)
        traced.update({name: len(values) for name, values in calls.items()})
        return outputs, calls

    monkeypatch.setattr(exported.runtime, "trace", noted)
    tried = Subject("reads", Reads, (normal((3, 5, 32)),))
    assert found("onnx", tried)[0] is True
    assert traced == {
        "model.embed": 1, "model.twice": 2, "model.mix.out_proj.packed_weight": 1, "model.mix.packed_in_proj_weight": 1,
    }


def test_fuse_finds_other_values(monkeypatch: Any) -> None:
    def damage(model: nn.Module, report: bool) -> Any:
        found = nv.fuse(model, report=True)
        model.stem[0].weight.data.neg_()  # type: ignore[union-attr,index]
        return found

    monkeypatch.setattr(programs, "fuse", damage)
    ok, told = found("fuse", subject())
    assert ok is False and told.startswith("2/2: gradient error ")


def test_fuse_does_not_apply_without_norms() -> None:
    assert found("fuse", subject(build=lambda: nn.Conv2d(16, 16, 3), channels=16)) == (None, "no norms")


def test_ema_finds_an_average_that_evaluates_with_old_weights() -> None:
    assert found("ema", subject("old")) == (False, "the average evaluates with old weights")


def test_channels_last_finds_a_layout_that_changes_values() -> None:
    ok, told = found("channels_last", subject("layout"))
    assert ok is False and told.startswith("gradient error ")
    assert found("channels_last", subject(build=lambda: nn.Linear(16, 16), channels=16))[0] is None


class LaidOut(Net):
    """Has another gradient in channels_last, with and without NVFP4."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.body[0].weight.is_contiguous() else -x)  # type: ignore[operator]


def test_what_plain_torch_gets_wrong_in_channels_last_is_no_finding() -> None:
    ok, told = found("channels_last", subject(build=LaidOut))
    assert ok is None and told.startswith("torch: its own gradient is ")


def test_a_step_in_high_precision_is_found_everywhere() -> None:
    tried = Trial(subject(), nv.NVFP4BlockScaling())
    with pytest.raises(Exception, match="all layers in high precision"):
        tried.compared(tried.high)


# ---- the control ----------------------------------------------------------------------------------------------------


def test_the_noise_is_the_error_of_quantizing_with_random_signs() -> None:
    from te_nvfp4_cv.cli.trial.control import _Noise

    x = torch.randn(2, 32, 5, 3)
    noise = _Noise(nv.NVFP4BlockScaling())._drawn(x, 1, "input")
    rows = x.movedim(1, -1).reshape(-1, 32).contiguous()
    error = NVFP4Quantizer(columnwise=False).quantize(rows).dequantize() - rows
    drawn = noise.movedim(1, -1).reshape(-1, 32)
    assert torch.equal(drawn.abs(), error.abs())
    assert 0.4 < float((drawn == error).float().mean()) < 0.6


def test_the_control_disturbs_the_layers_that_nvfp4_would_run_and_no_others() -> None:
    thin = subject(build=lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)))
    model = thin.made()
    assert step(model, thin, control(nv.NVFP4BlockScaling())).equals(step(model, thin))
    wide = subject()
    model = wide.made()
    high, noisy = step(model, wide), step(model, wide, control(nv.NVFP4BlockScaling()))
    assert 0.02 < noisy.error(high) < 1
    attention = nn.MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(2, 5, 32)
    with control(nv.NVFP4BlockScaling()):
        y, _ = attention(x, x, x)
        y = y.detach()
    expected = attention(x, x, x)[0].detach()
    assert 0.01 < relative([expected], [y]) < 0.5


def test_the_control_lets_activations_write_in_place() -> None:
    net = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Hardswish(inplace=True))
    with control(nv.NVFP4BlockScaling()):
        net(torch.randn(2, 16, 8, 8)).sum().backward()
    assert net[0].weight.grad is not None


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_control_disturbs_what_is_recomputed_alike(reentrant: bool) -> None:
    class Checkpointed(Net):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x.requires_grad_(), use_reentrant=reentrant)

    recipe, model = nv.NVFP4BlockScaling(), settled(Checkpointed())
    plain = Net()
    plain.load_state_dict(model.state_dict())
    expected = step(plain, subject(), control(recipe))
    assert step(model, subject(), control(recipe)).equals(expected)
    assert not step(model, subject(), nv.nvfp4_autocast(recipe)).equals(expected)


def test_the_control_takes_arguments_by_name_and_by_place() -> None:
    x, w = torch.randn(2, 32, 6, 6), torch.randn(32, 16, 3, 3)
    recipe = nv.NVFP4BlockScaling()
    parameter = nn.Parameter(w)
    with control(recipe):
        one = F.conv2d(x, parameter, None, 1, 1, 1, 2)
    with control(recipe):
        two = F.conv2d(input=x, weight=parameter, padding=1, groups=2)
    assert torch.equal(one, two) and not torch.equal(one, F.conv2d(x, w, None, 1, 1, 1, 2))


# ---- helpers --------------------------------------------------------------------------------------------------------


def test_tensors_of_any_output() -> None:
    class Out:
        def __init__(self) -> None:
            self.y, self.me = torch.ones(2), self

    a, b = torch.zeros(1), torch.ones(1)
    assert floats({"a": a, "n": torch.tensor(1), "more": [b, (a,)]}) == [a, b]
    assert len(floats(Out())) == 1
    with pytest.raises(ValueError, match="no gradient"):
        distance({"a": a})


def test_what_begins_at_zero_gets_values() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm, self.conv = nn.Linear(16, 4), nn.BatchNorm1d(4), nn.Conv2d(3, 4, 1)
            for parameter in (self.linear.weight, self.norm.weight, self.linear.bias):
                nn.init.zeros_(parameter)

    before = Head()
    after = settled(before)
    assert after.linear.weight.std() > 0.1 and after.norm.weight.min() > 0.1 and not after.linear.bias.any()
    kept = after.conv.weight.clone()
    assert torch.equal(settled(after).conv.weight, kept) and after.norm.momentum == 1.0


def test_errors_of_outputs() -> None:
    a = [torch.tensor([3.0, 4.0])]
    assert relative(a, [torch.tensor([3.0, 3.0])]) == pytest.approx(0.2)
    assert relative(a, [torch.tensor([float("nan"), 4.0])]) == float("inf")  # as wrong as can be, not as right
    assert relative(a, [torch.ones(3)]) == float("inf") and relative([torch.zeros(1)], [torch.zeros(1)]) == 0
