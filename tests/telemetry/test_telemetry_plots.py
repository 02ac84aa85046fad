"""Heatmaps, curves and the report: the files of the hierarchy, what they hold, runs that lack things, the commands."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import nn

import te_nvfp4_cv as nv
from te_nvfp4_cv import cli
from te_nvfp4_cv.telemetry import JSONL, Sink, attach, drawing, read, render_heatmaps, write_report
from te_nvfp4_cv.telemetry.heatmaps import CODE_NAMES, CODES, PLOTLY_MARKERS, SCALES
from te_nvfp4_cv.telemetry.report import ABOUT
from tests.telemetry.synthetic_runs import NAMES, header, write_run

for package in ("matplotlib", "plotly"):
    pytest.importorskip(package, reason="needs the extra [telemetry]")

FAMILIES = {
    "weights/prequantize": ("weight", "raw"),
    "weights/quantized": ("weight", "codes"),
    "weights/dequantized": ("weight", "dequantized"),
    "gradients": ("weight_gradient", "raw"),
}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(folder of the pictures, telemetry file) of a run of five layers."""
    folder = tmp_path_factory.mktemp("plots")
    run = write_run(folder / "run.jsonl")
    render_heatmaps(run, folder)
    return folder / "heatmaps" / "UNet-nvfp4", run


@pytest.mark.parametrize("statistic", ["mean", "std", "kurtosis"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_heatmap_is_there_as_png_html_and_json(drawn, family, statistic):
    folder, file = drawn
    path = folder / family / statistic
    held, run = json.loads(path.with_suffix(".json").read_text()), read(file)
    assert held["layers"] == NAMES[5] and held["steps"] == [0, 100, 200, 300, 400, 500]
    tensor, stage = FAMILIES[family]
    assert held["values"] == [run.series(name, "tensors", tensor, stage, statistic) for name in NAMES[5]]
    picture = Image.open(path.with_suffix(".png")).convert("RGB")
    assert min(picture.size) > 200 and len(picture.getcolors(1 << 20)) > 20
    page = path.with_suffix(".html").read_text()
    shown = [name for name, row in zip(NAMES[5], held["values"], strict=True) if any(v is not None for v in row)]
    assert shown and all(name in page for name in shown)
    (script,) = re.findall(r'<script[^>]*src="([^"]+)"', page)
    assert (path.parent / script).is_file() and "://" not in script


def test_the_use_of_the_codes(drawn):
    folder, file = drawn
    held = json.loads((folder / "weights" / "quantized" / "usage.json").read_text())
    assert held["steps"] == [500] and held["codes"] == CODE_NAMES == ["-6", *CODE_NAMES[1:-1], "6"]
    counts = read(file).steps[500]["head"]["tensors"]["weight"]["codes"]["usage"]
    shares = held["values"][NAMES[5].index("head")]
    assert shares == pytest.approx([100 * counts[code] / sum(counts) for code in CODES]) or shares == pytest.approx(
        [counts[code] / sum(counts) for code in CODES]
    )
    assert held["values"][0] == [None] * 16  # the stem ran in high precision


def test_ends_of_the_colours_of_kurtosis():
    """Noise about the Gaussian's 0 stays pale, and one layer with heavy tails does not make all others look alike."""
    scale = SCALES["kurtosis"]
    for values, high, extend in (([-0.2, 0.1], 2, "neither"), ([0.1, 7.0], 7, "neither"), ([0.1, 3000.0], 20, "max")):
        bounds = drawing.limits([np.array(values)], **scale)
        assert (bounds.low, bounds.high, bounds.linear, bounds.extend) == (-high, high, 0, extend)


def test_colours_of_curves_differ_for_the_colour_blind():
    """In the simulation of Viénot, Brettel and Mollon (1999), as distances in linear RGB."""
    linear = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in drawing.COLOURS]) ** 2.2
    to_lms = np.array([[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]])
    protan = np.array([[0, 2.02344, -2.52581], [0, 1, 0], [0, 0, 1]])
    deutan = np.array([[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]])
    for blind in (protan, deutan):
        seen = linear @ (np.linalg.inv(to_lms) @ blind @ to_lms).T
        apart = np.linalg.norm(seen[:, None] - seen[None], axis=-1) + np.eye(len(seen))
        assert apart[:6, :6].min() > 0.1, apart.round(2)
    assert len(set(drawing.MARKERS)) == len(drawing.COLOURS) == len(PLOTLY_MARKERS)


def test_curves(drawn):
    folder, file = drawn
    for name, key in (("correlation", "correlation"), ("sqnr", "sqnr_db")):
        held = json.loads((folder / "weights" / f"{name}.json").read_text())
        assert held["values"][-1] == read(file).series("head", "tensors", "weight", key)
        assert (folder / "weights" / f"{name}.png").stat().st_size > 5000
        assert "head" in (folder / "weights" / f"{name}.html").read_text()


def test_a_single_step_has_no_fractions():
    """A run of fewer steps than lie between two lines of its log has one point."""
    for figure in (
        drawing.overlay("train/loss", {"bf16": ([10], [2.1]), "nvfp4": ([10], [2.2])}),
        drawing.curves(drawing.Panel("SQNR", [10], np.array([[19.0], [20.0]])), ["a", "b"], "dB"),
    ):
        assert figure.axes[0].get_xticks().tolist() == [10]


def test_many_layers_make_a_larger_picture_and_runs_never_overwrite_each_other(tmp_path):
    few = write_run(tmp_path / "few.jsonl", steps=1, name="few")
    first, second = (render_heatmaps(few, tmp_path) for _ in range(2))
    assert not set(first) & set(second)
    assert {path.relative_to(tmp_path).parts[1] for path in second} == {"UNet-few_2"}
    render_heatmaps(write_run(tmp_path / "many.jsonl", layers=23, steps=1), tmp_path)
    heights = [
        Image.open(tmp_path / "heatmaps" / name / "gradients" / "std.png").height for name in ("UNet-nvfp4", "UNet-few")
    ]
    assert heights[0] > 1.5 * heights[1]
    assert len(list((tmp_path / "heatmaps").glob("plotly*.js"))) == 1


def test_names_are_made_fit_for_the_file_system_and_the_page(tmp_path):
    name = "../../evil <b>\x00a/b [ 1,  2 ]"
    run = write_run(tmp_path / "run.jsonl", steps=1, name=name)
    written = render_heatmaps(run, tmp_path / "out")
    assert {json.loads(path.read_text())["run"] for path in written if path.suffix == ".json"} == {name}
    assert all(path.resolve().is_relative_to((tmp_path / "out").resolve()) for path in written)
    assert "<b>" not in write_report([run], tmp_path / "report.html").read_text().replace("<body>", "")


def test_one_layer_one_step_and_no_values(tmp_path):
    run = write_run(tmp_path / "one.jsonl", steps=1, names=["conv"], high=True)
    assert render_heatmaps(run, tmp_path) == render_heatmaps(run, tmp_path, force=True)
    shutil.rmtree(tmp_path / "heatmaps")
    place = tmp_path / "heatmaps" / "UNet-nvfp4"
    written = {path.relative_to(place).as_posix() for path in render_heatmaps(run, tmp_path)}
    assert "weights/prequantize/std.png" in written
    assert not any("quantized" in name for name in written), "a picture of nothing is not drawn"


def test_a_run_of_a_model_without_layers_is_refused(tmp_path, capsys):
    file = tmp_path / "none.jsonl"
    with attach(nn.ReLU(), every=1, sinks=[JSONL(file)]) as watch, watch.step(0):
        pass
    assert cli.main(["heatmaps", str(file), "--out", str(tmp_path)]) == 2
    assert "has nothing to draw" in capsys.readouterr().err
    assert [path.suffix for path in (tmp_path / "heatmaps").iterdir()] == [".js"]


def test_a_run_without_samples_is_refused(tmp_path):
    sink = JSONL(tmp_path / "none.jsonl")
    sink.start(header("x", ["conv"]))
    sink.scalars(1, {"train/loss": 1.0})
    with pytest.raises(ValueError, match="no sampled step"):
        render_heatmaps(tmp_path / "none.jsonl", tmp_path)
    text = write_report([tmp_path / "none.jsonl"], tmp_path / "report.html").read_text()
    assert "train/loss" in text


# ---- the report -----------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Pictures, scripts and words of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.pictures, self.sources, self.words = 0, [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.pictures += tag == "img" and found["src"].startswith("data:image/")
        self.sources += [found[key] for key in ("src", "href") if key in found]
        assert tag != "script"

    def handle_data(self, data):
        self.words.append(data)


class Shown(Sink):
    """A sink that remembers pictures and pages."""

    def __init__(self) -> None:
        self.headers, self.pages, self.sizes, self.open = [], {}, {}, True

    def start(self, header):
        self.headers.append(header)

    def page(self, name, path, step):
        self.pages[name, step] = path.read_text()

    def image(self, name, path, step):
        self.sizes[name] = Image.open(path).size

    def close(self, summary=None):
        self.open = False


def test_the_report_puts_runs_side_by_side(tmp_path):
    sink = Shown()
    paths = [
        write_run(tmp_path / "bf16.jsonl", name="bf16", high=True),
        write_run(tmp_path / "nvfp4.jsonl", name="nvfp4", steps=4),
        write_run(tmp_path / "other.jsonl", name="other", layers=23, steps=3),
    ]
    text = write_report(paths, tmp_path / "report.html", sinks=[sink]).read_text()
    page = Page(text)
    words = " ".join(page.words)
    assert page.pictures > 12 and all(source.startswith(("data:", "#")) for source in page.sources)
    assert all(name in words for name in (*NAMES[5], *NAMES[23], "bf16", "nvfp4", "other"))
    assert "norm / noise = 1.5" in words and len(text) < 10_000_000
    sqnr = read(paths[1]).steps[300]["head"]["tensors"]["weight"]["sqnr_db"]
    assert f"{sqnr:.1f}" in words
    # A sink gets the page, and each figure as one picture: two runs of three quantize, all have weights.
    assert [h["name"] for h in sink.headers] == ["comparison"] and sink.headers[0]["model"] == "UNet" and sink.open
    assert list(sink.pages) == [("report", max(read(paths[0]).steps))] and text in sink.pages.values()
    titles = ("Dequantized weights", "Weights before quantization")
    two, three = (sink.sizes[f"Heatmaps/{title}: mean"] for title in titles)
    assert two[0] * 3 == three[0] * 2 and min(two) > 300
    assert {name.split("/")[0] for name in sink.sizes} == {
        "Signal to noise", "Weight codes", "Gradient to noise", "Heatmaps"
    }  # fmt: skip


def test_what_a_report_says_of_recipe_and_layers(tmp_path):
    run = read(write_run(tmp_path / "run.jsonl", steps=2))
    plain = read(write_run(tmp_path / "plain.jsonl", steps=2, high=True))
    assert ABOUT["recipe"](run).more == run.recipe and ABOUT["recipe"](plain).text == "none: high precision"
    default, forgotten = (dataclasses.replace(run, recipe=text) for text in (nv.NVFP4BlockScaling().to_toml(), ""))
    assert ABOUT["recipe"](default).text == "the default" and ABOUT["recipe"](forgotten).text == "not recorded"
    assert ABOUT["layers"](run).summary == "in high precision"
    run.steps[max(run.steps)]["head"] |= {"precision": "unseen", "reason": "inside a compiled graph"}
    about = ABOUT["layers"](run)
    assert about.summary == "in high precision, or not seen" and "head: inside a compiled graph" in about.more


def test_a_report_of_a_run_that_was_cut_off_says_so(tmp_path):
    path = write_run(tmp_path / "run.jsonl", steps=2)
    path.write_bytes(path.read_bytes()[:-20])
    assert "cut off" in write_report([path], tmp_path / "report.html").read_text()


def test_a_report_is_not_overwritten_unasked(tmp_path):
    path, out = write_run(tmp_path / "run.jsonl", steps=1), tmp_path / "report.html"
    out.write_text("mine")
    with pytest.raises(ValueError, match="is there already"):
        write_report([path], out)
    assert out.read_text() == "mine"
    write_report([path], out, force=True)
    assert "<html" in out.read_text()
    with pytest.raises(ValueError, match="no run"):
        write_report([], out)


# ---- the commands ---------------------------------------------------------------------------------------------------


def test_the_commands(tmp_path, capsys):
    run = str(write_run(tmp_path / "run.jsonl", steps=2))
    assert cli.main(["heatmaps", run, "--out", str(tmp_path / "plots")]) == 0
    assert "UNet-nvfp4" in capsys.readouterr().out
    report = ["report", run, run, "--out", str(tmp_path / "r.html")]
    (tmp_path / "r.html").write_text("mine")
    assert cli.main(report) == 2 and "is there already" in capsys.readouterr().err
    assert cli.main([*report, "--force"]) == 0 and "<html" in (tmp_path / "r.html").read_text()
    capsys.readouterr()
    assert cli.main(["heatmaps", str(tmp_path / "absent.jsonl")]) == 2
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["heatmaps", "report"])
def test_without_matplotlib_a_command_says_what_to_install(command, tmp_path):
    run = write_run(tmp_path / "run.jsonl", steps=1)
    code = (
        "import sys; sys.modules['matplotlib'] = None\nfrom te_nvfp4_cv import cli\n"
        f"sys.exit(cli.main([{command!r}, {str(run)!r}, '--out', {str(tmp_path / 'out')!r}]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and "matplotlib" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
