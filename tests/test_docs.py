"""What the pages say can be done: their Python runs, their commands run or say which test runs them, names are listed.

Pages are README.md, CONTRIBUTING.md and docs/*.md. A command in a ```bash block that starts with te-nvfp4-cv runs here,
with a small network in the place of the one that the page names. Every other command is in ELSEWHERE.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import te_nvfp4_cv as nv
from te_nvfp4_cv import cli
from te_nvfp4_cv.cli import build_parser
from tests.networks import Net

ROOT = Path(__file__).resolve().parent.parent
TUTORIAL = ROOT / "docs" / "tutorial.md"  # written here by make docs of earlier versions, and no page
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted({*(ROOT / "docs").glob("*.md")} - {TUTORIAL})]
TEXT = {path.stem if path.parent.name == "docs" else path.name: path.read_text(encoding="utf-8") for path in PAGES}
PYTHON = {"TRAINING": (), "WATCH": ("TRAINING",), "HOWTO": ()}  # a page with Python: the pages that it continues
NOT_RUN = {
    "TRY": "a sketch of a function that the user writes; tests/cli/test_try.py runs such a function",
    "FRAMEWORKS": "a line of a script; tests/integrations/test_adapters_transformers.py",
    "RECIPES": "a step of a training loop; tests/layer/test_block_format_layers.py has what it prevents",
    "SPATIAL": "on ranks; tests/distributed/test_spatial_calls.py",
}
ELSEWHERE = {  # a command that is not run here: why, or where
    "pip install .": "tests/test_packaging.py installs the wheel; here it would change the environment",
    "make ": "the targets are shown to exist below; tests/examples trains as make demo does",
    "bash examples/benchmarks/gpu_suite.sh": "tests/examples/test_gpu_suite.py",
    "torchrun ": "tests/distributed/test_trainer.py, test_spatial_calls.py",
    "docker ": "no docker here: tests/examples/test_frameworks.py lints the Dockerfile",
    "te-nvfp4-cv selftest": "tests/selftest",
    "python=$PWD/.venv/bin/python": "needs a git checkout with its environment and two runs of all cases: by hand",
    "git worktree ": "the same lines of CONTRIBUTING.md",
    "$python -m tests.bits": "the same lines of CONTRIBUTING.md",
    "(cd ../before": "the same lines of CONTRIBUTING.md",
    ".venv/bin/pre-commit install": "tests/test_packaging.py reads its configuration; it is not installed here",
}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT[page], re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[str]:
    """Return the commands of a page's bash blocks, without comments and with continued lines joined."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [command for line in lines if (command := re.sub(r"\s+# .*|^#.*", "", line).strip())]


def run_python(page: str, names: dict[str, Any]) -> None:
    for text in blocks(page, "python"):
        # A page saves a step whose loss is not finite; here every one is such a step.
        exec(compile(text.replace("not loss.isfinite()", "True"), f"{page}.md", "exec"), names)


# ---- Python -------------------------------------------------------------------------------------------------------


def test_no_page_with_python_is_forgotten():
    assert {page for page in TEXT if blocks(page, "python")} - {"README.md"} == PYTHON.keys() | NOT_RUN.keys()


def test_training_and_watching(capsys, tmp_path, monkeypatch):
    for package in ("torchvision", "matplotlib", "jinja2"):
        pytest.importorskip(package)
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    run_python("TRAINING", names)
    assert names["loss"].isfinite() and "fc" in capsys.readouterr().out  # the printed coverage lists the classifier
    assert nv.extra_state(names["model"]) == names["last"]["nvfp4"]
    (tmp_path / "runs").mkdir()
    with nv.telemetry.attach(names["model"], sinks=[nv.telemetry.JSONL("runs/bf16.jsonl")], name="bf16") as other:
        other.scalars(0, {"train/loss": 1.0})
    monkeypatch.setattr("te_nvfp4_cv.telemetry.drawing.image", lambda *_: Image.new("RGB", (8, 8)))  # it takes seconds
    run_python("WATCH", names)
    assert "data:image/png" in Path("beside.html").read_text()
    run = nv.telemetry.read("runs/mine.jsonl")
    assert list(run.steps) == [0] and run.steps[0]["fc"]["precision"] == "high" and names["loss"].isfinite()
    bundle = nv.sensitivity.load_bundle("bad.pt")
    model, loss_of = names["rebuild"](bundle.builder["arguments"])
    model.load_state_dict(bundle.model_state)
    torch.manual_seed(bundle.seeds["torch"])
    with nv.prepare(model, names["recipe"]):
        assert torch.equal(loss_of(model, bundle.batch), names["loss"])


def test_how_do_i(capsys, tmp_path, monkeypatch):
    for package in ("onnx", "onnxscript", "onnxruntime", "safetensors", "ml_dtypes"):
        pytest.importorskip(package, reason="the extra [export]")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    run_python("HOWTO", names)
    out = capsys.readouterr().out
    assert "set_precision" in out or "high" in out  # the printed coverage says why layer 3 is not in NVFP4
    assert isinstance(nv.load_recipe("mine.toml"), nv.NVFP4BlockScaling) and Path("net.onnx").is_file()
    assert nv.extra_state(names["model"]) == names["last"]["nvfp4"]
    names["model"].eval()
    with torch.no_grad(), nv.nvfp4_autocast(names["recipe"]):
        assert torch.equal(names["served"](names["images"]), names["model"](names["images"]))


def test_the_recipe_of_the_page_loads(tmp_path):
    (text,) = blocks("RECIPES", "toml")
    (tmp_path / "mine.toml").write_text(text)
    recipe = nv.load_recipe(tmp_path / "mine.toml")
    assert recipe.disable_rht and [pattern for pattern, _ in recipe.precision] == ["head.*", "backbone.layer4.*"]


# ---- commands -----------------------------------------------------------------------------------------------------


@pytest.fixture
def field(tmp_path, monkeypatch) -> Path:
    """A folder with what the pages' commands read: a network, its weights, photos, two runs with telemetry."""
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    file = tmp_path / f"network_{tmp_path.name}.py"  # Python keeps modules by their name
    file.write_text("from tests.networks import Net\n\n\ndef build():\n    return Net()\n")
    torch.save(Net().state_dict(), "net.pt")
    (tmp_path / "photos").mkdir()
    for number in range(4):
        noise = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "photos" / f"{number}.png")
    model, images = Net(), torch.randn(16, 3, 8, 8)
    for name, enabled in (("bf16", False), ("mine", True)):
        watch = nv.telemetry.attach(model, every=1, sinks=[nv.telemetry.JSONL(f"runs/{name}.jsonl")], name=name)
        with watch.step(0):
            with nv.nvfp4_autocast(enabled=enabled):
                loss = model(images).square().mean()
            loss.backward()
        watch.close()
    return file


def in_small(command: str, file: Path) -> list[str]:
    """Return a command's words, with a small network of small images in the place of those that it names."""
    words = shlex.split(re.sub(r"\b(resnet50|w)\.pt\b", "net.pt", command))[1:]
    models = [at for at, word in enumerate(words) if ":" in word]
    for at in models:
        words[at] = f"{file}:build"
    if "--input" in words:
        at = words.index("--input")
        del words[at : at + 4]
    # torchvision says how pictures are prepared for its networks, nobody for the small one.
    if words[0] in ("quantize", "scan") and "--range" not in words:
        words += ["--mean", "0.5", "0.5", "0.5", "--std", "0.25", "0.25", "0.25"]
    return [*words, *(["--input", "3", "8", "8"] if models else [])]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in TEXT if any("te-nvfp4-cv" in line for line in commands(page))])
def test_the_commands_of_a_page_run(page, field, capsys):
    for package in ("onnx", "onnxscript", "onnxruntime", "safetensors", "matplotlib", "plotly"):
        pytest.importorskip(package, reason="the extras [export] and [telemetry]")
    for command in commands(page):
        if command.startswith("te-nvfp4-cv") and not command.startswith(tuple(ELSEWHERE)):
            assert cli.main(in_small(command, field)) == 0, (command, capsys.readouterr().err)
    if page == "WATCH":
        assert list(Path("plots").rglob("*.png")) and Path("report.html").is_file()
    if page == "DEPLOY":
        assert Path("resnet50.onnx").is_file()


def test_every_command_is_run_or_marked():
    unknown = [
        (page, command)
        for page in TEXT
        for command in commands(page)
        if not command.startswith(("te-nvfp4-cv ", *ELSEWHERE))
    ]
    assert not unknown, "run it in a test, or say in ELSEWHERE which test runs it"
    used = [mark for mark in ELSEWHERE if any(line.startswith(mark) for page in TEXT for line in commands(page))]
    assert used == list(ELSEWHERE)


def test_targets_and_options_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {name for text in TEXT.values() for name in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)}
    assert {"demo", "test", "lint", "docs"} <= named <= targets
    parser, _ = build_parser()
    for page in TEXT:
        for command in commands(page):
            if command.startswith("te-nvfp4-cv "):
                parser.parse_args(shlex.split(command)[1:])


def test_the_examples_commands_take_their_options():
    """The trainer's tests run it; here every option that examples/README.md names is shown to exist."""
    pytest.importorskip("torchvision")
    from unet_coco.options import parse_options

    text = (ROOT / "examples" / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.findall(r"^(?:torchrun .*?)?(?:python )?examples/unet_coco/train\.py(.*)$", text, re.MULTILINE)
    assert len(found) >= 8
    for line in found:
        parse_options(shlex.split(line))


# ---- links and names ----------------------------------------------------------------------------------------------


def site() -> Any:
    spec = importlib.util.spec_from_file_location("docs_conf", ROOT / "docs" / "conf.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(path):
    for label, target in re.findall(r"\[([^\]]*)\]\((?!\w+:)([^)\s]+)\)", path.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        page = path if not name else (path.parent / name)
        assert page.exists() or "made/" in name, (label, target)
        if anchor:
            headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, (label, target)


def test_links_of_other_files_lead_to_pages_of_the_site():
    conf = site()
    given = "[a](docs/NUMERICS.md#x) [b](LICENSE) [c](https://example.org/y) [d](CONTRIBUTING.md) ![e](docs/demo.png)"
    want = "[a](NUMERICS.md#x) b [c](https://example.org/y) [d](made/contributing.md) ![e](demo.png)"
    assert conf.site_links(given, "README.md", "index.md") == want
    assert conf.site_links("[a](../README.md#b)", "docs/HOWTO.md", "HOWTO.md") == "[a](index.md#b)"
    assert conf.site_links("[a](../docs/TRY.md)", "examples/README.md", "made/examples.md") == "[a](../TRY.md)"


def test_the_site_lists_every_page():
    listed = set(re.findall(r"^([\w/]+)$", TEXT["index"], re.MULTILINE))
    assert set(TEXT) - {"README.md", "CONTRIBUTING.md", "index"} <= listed


def test_the_reference_lists_every_public_name():
    from tests.test_docstrings import NAMES

    text = (ROOT / "docs" / "api.rst").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\.\. auto\w+:: te_nvfp4_cv\.(\S+)$", text, re.MULTILINE))
    names = {name.removeprefix("nv.") for name in NAMES} | {"lightning.NVFP4Precision"}
    assert names <= listed, f"docs/api.rst lacks {sorted(names - listed)}"


def test_the_page_of_the_command_line_has_every_command():
    text = site().command_line()
    assert all(f"\n## {command.name}\n" in text for command in cli.COMMANDS) and "--recipe" in text


def test_the_picture_of_a_run_can_be_drawn(tmp_path):
    """The README's picture is made by examples/pictures.py from a run of the trainer; here from a small made-up one."""
    pytest.importorskip("matplotlib")
    import pictures
    from PIL import Image

    with pytest.raises(SystemExit, match="finished run"):
        pictures.main([str(tmp_path)])
    model, images = Net(), torch.randn(16, 3, 8, 8)
    for name in ("fp32", "nvfp4"):
        sinks = [nv.telemetry.JSONL(tmp_path / name / "telemetry.jsonl")]
        watch = nv.telemetry.attach(model, every=1, sinks=sinks, name=name)
        for step in range(2):
            with watch.step(step):
                with nv.nvfp4_autocast(enabled=name == "nvfp4"):
                    loss = model(images).square().mean()
                loss.backward()
        watch.close()
    (tmp_path / "summary.json").write_text('{"fp32": {"miou": 0.5}, "nvfp4": {"miou": 0.4}}')
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "predictions.png")
    pictures.main([str(tmp_path), "--out", str(tmp_path / "out.png")])
    for name in ("out", "gradients", "signal"):
        assert np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")).std() > 10
    shutil.rmtree(tmp_path / "nvfp4")
    with pytest.raises(SystemExit, match="telemetry"):
        pictures.main([str(tmp_path), "--out", str(tmp_path / "out.png")])
