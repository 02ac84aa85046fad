"""examples/benchmarks for GPUs, where there is none.

They say so and exit with 2. Their logic runs on tiny shapes, with the kernels in the interpreter and a timer that is
told the times; wrong results print no time. gpu_suite.sh runs its stages with a fake Python.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from te_nvfp4_cv import cli
from te_nvfp4_cv.backend import dispatch
from tests.helpers import run_script

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "benchmarks"
SUITE = FOLDER / "gpu_suite.sh"
BENCHMARKS = ("gpu_quantize", "gpu_conv", "gpu_step")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
pytestmark = pytest.mark.usefixtures("one_thread")


# ---- without a GPU --------------------------------------------------------------------------------------------------


@no_gpu
@pytest.mark.parametrize("name", BENCHMARKS)
def test_without_a_gpu_a_benchmark_says_so(name, tmp_path, capsys):
    assert run_script(FOLDER / f"{name}.py", "--out", tmp_path / "results.jsonl") == 2
    told = capsys.readouterr()
    assert "needs a CUDA device" in told.err and not told.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--nonsense"]], ids=str)
def test_wrong_options_are_refused(name, arguments, bench, capsys):
    with pytest.raises(SystemExit) as caught:
        bench(name).main(arguments)
    assert caught.value.code == 2 and "usage" in capsys.readouterr().err


# ---- their logic ----------------------------------------------------------------------------------------------------


@pytest.fixture
def bench(monkeypatch):
    """name -> the benchmark's module."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


class Timer:
    """Runs each call once and says 2 ms."""

    def __init__(self, device: torch.device, rounds: int) -> None:
        self.calls = 0

    def ms(self, run: Any) -> float:
        run()
        self.calls += 1
        return 2.0


def on_cpu(module: ModuleType, monkeypatch: pytest.MonkeyPatch, layer: Any = None) -> None:
    """The benchmark takes the CPU for a GPU: kernels in the interpreter, no ceilings, one tiny layer."""
    monkeypatch.setattr(dispatch, "KERNELS_ON_CPU", True)
    for name, value in (
        ("need_cuda", lambda: torch.device("cpu")),
        ("Timer", Timer),
        ("copy_bandwidth", lambda *_: 4000.0),
        ("gemm_rate", lambda *_: 800.0),
        ("LAYERS", (layer,)),
    ):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, value)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def tiny_layer(bench: Any, kernel: int = 3) -> Any:
    return bench("gpu").Layer("tiny", 16, 16, 32, kernel, 6)


@no_gpu
def test_quantization_benchmark(bench, monkeypatch, kernel_device, tmp_path, capsys):
    module = bench("gpu_quantize")
    on_cpu(module, monkeypatch, tiny_layer(bench))
    monkeypatch.setattr(module.selftest, "QUANTIZATION", ())
    assert module.main(["--out", str(tmp_path / "r.jsonl")]) == 0
    rows = [row for row in lines(tmp_path / "r.jsonl") if "us" in row]
    assert len(rows) == 10 and all(row["us"] == 2000 for row in rows)
    row = next(row for row in rows if row["kernel"] == "x: row dq + column packed, RHT, delayed")
    elements = 16 * 6 * 6 * 16
    assert row["elements"] == elements and row["gb_s"] == pytest.approx(4.5625 * elements / 2e6)
    assert row["of_copy"] == pytest.approx(row["gb_s"] / 4000)
    assert "0.65" in capsys.readouterr().out


@no_gpu
@pytest.mark.parametrize("index", [0, 3, 4], ids=["row data", "column data", "column scale"])
def test_wrong_quantization_prints_no_time(bench, monkeypatch, kernel_device, tmp_path, capsys, index):
    module = bench("gpu_quantize")
    on_cpu(module, monkeypatch, tiny_layer(bench))
    monkeypatch.setattr(module.selftest, "QUANTIZATION", ())
    sound = module.quantize

    def quantize(x, *args):
        made = sound(x, *args)
        part = made.flat()[index]
        if args[-1] == "vendor" and part.numel():
            part.view(torch.uint8).view(-1)[-1] ^= 1
        return made

    monkeypatch.setattr(module, "quantize", quantize)
    assert module.main(["--out", str(tmp_path / "r.jsonl")]) == 1
    assert "WRONG, no times printed" in capsys.readouterr().out
    assert not any("us" in row for row in lines(tmp_path / "r.jsonl"))


@no_gpu
@pytest.mark.parametrize("kernel", [1, 3])
def test_convolution_benchmark(bench, monkeypatch, kernel_device, tmp_path, kernel, capsys):
    module = bench("gpu_conv")
    on_cpu(module, monkeypatch, tiny_layer(bench, kernel))
    assert module.main(["--out", str(tmp_path / "r.jsonl")]) == 0, capsys.readouterr().out
    rows = lines(tmp_path / "r.jsonl")
    parts = {(row["path"], row["part"]) for row in rows if "part" in row}
    assert {path for path, _ in parts} == {"cudnn bf16", "vendor", "triton"}
    assert {part for path, part in parts if path == "triton"} == {
        *("quantize x", "quantize w", "quantize dy", "fprop", "dgrad", "wgrad")
    }
    ratios = {row["path"]: row["step_ratio"] for row in rows if "step_ratio" in row}
    assert ratios == {"vendor": pytest.approx(9 / 3), "triton": pytest.approx(6 / 3)}
    row = next(row for row in rows if row.get("part") == "fprop")
    assert row["tflop_s"] == pytest.approx(2 * 16 * 36 * 16 * 32 * kernel**2 / 2e9)


@no_gpu
@pytest.mark.parametrize("part", ["fprop", "dgrad", "wgrad"])
def test_a_wrong_convolution_prints_no_time(bench, monkeypatch, kernel_device, tmp_path, capsys, part):
    module = bench("gpu_conv")
    on_cpu(module, monkeypatch, tiny_layer(bench))
    sound = getattr(module.Path, part)
    monkeypatch.setattr(module.Path, part, lambda self: sound(self) * 1.01)
    assert module.main(["--out", str(tmp_path / "r.jsonl"), "--backends", "vendor"]) == 1
    assert f"vendor is WRONG, no times printed: {part}" in capsys.readouterr().out
    assert not any(row.get("path") == "vendor" and "us" in row for row in lines(tmp_path / "r.jsonl"))


@pytest.fixture
def no_cuda_calls(monkeypatch):
    """torch.cuda's memory statistics and synchronisation, as if there were a GPU."""
    for name, value in (("synchronize", None), ("empty_cache", None), ("reset_peak_memory_stats", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 10**9)


STEP = ["--models", "unet", "--batch", "16", "--size", "32", "--rounds", "1", "--repeats", "1"]


def small_unet(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    full = module.UNet
    monkeypatch.setattr(module, "UNet", lambda classes, scale, **more: full(classes, scale=0.25, **more))


@no_gpu
def test_step_benchmark(bench, monkeypatch, no_cuda_calls, tmp_path, capsys):
    """By the CPU's own kernels: the interpreter would take minutes for a UNet."""
    module = bench("gpu_step")
    on_cpu(module, monkeypatch)
    monkeypatch.setattr(dispatch, "KERNELS_ON_CPU", False)
    small_unet(module, monkeypatch)
    out = tmp_path / "r.jsonl"
    assert module.main([*STEP, "--no-graphs", "--no-triton", "--out", str(out)]) == 0, capsys.readouterr().out
    rows = {row["variant"]: row for row in lines(out) if "ms" in row}
    vendor = [f"vendor {name}" for name in ("current", "current_pow2", "delayed", "delayed fused")]
    assert list(rows) == ["bf16", "bf16 fused", *vendor]
    assert all(row["ms"] > 0 and row["peak_ratio"] > 0 for row in rows.values()) and rows["bf16"]["ratio"] == 1
    text = capsys.readouterr().out
    assert re.search(r"unet +vendor delayed fused +[\d.]+ ms  / bf16 [\d.]+", text) and "cosine" in text


@no_gpu
def test_a_variant_that_cannot_run_leaves_the_others_their_times(bench, monkeypatch, no_cuda_calls, tmp_path, capsys):
    module = bench("gpu_step")
    on_cpu(module, monkeypatch)
    monkeypatch.setattr(dispatch, "KERNELS_ON_CPU", False)
    small_unet(module, monkeypatch)
    chosen = [v for v in module.variants(True, False) if v.name in ("bf16", "bf16 graph", "vendor current")]
    monkeypatch.setattr(module, "variants", lambda *_: chosen)
    sound = module.Step.gradients
    wrong = lambda self: -sound(self) if self.variant.recipe else sound(self)  # noqa: E731
    monkeypatch.setattr(module.Step, "gradients", wrong)
    monkeypatch.setattr(module, "capture", lambda run: (_ for _ in ()).throw(RuntimeError("capture failed")))
    assert module.main([*STEP, "--out", str(tmp_path / "r.jsonl")]) == 1
    found = lines(tmp_path / "r.jsonl")
    assert [row["variant"] for row in found if "ms" in row] == ["bf16"]
    errors = {row["variant"]: row["error"] for row in found if "error" in row}
    assert errors["bf16 graph"] == "RuntimeError: capture failed" and "cosine" in errors["vendor current"]
    assert "gradients are WRONG" in capsys.readouterr().out


def test_variants_have_distinct_names(bench):
    names = [variant.name for variant in bench("gpu_step").variants(True, True)]
    assert len(set(names)) == len(names) == 13 and names[0] == "bf16" and "triton delayed graph" in names


def test_relative_error_of_large_tensors(bench):
    error = bench("gpu").relative_error
    x = torch.randn(3, 5)
    assert error(x * 1.25, x) == pytest.approx(0.25) and error(x, torch.zeros(3, 5)) != error(x, torch.zeros(3, 5))


def test_the_kernels_of_the_suite_are_found_without_a_gpu():
    """In a process of its own, which does not interpret: one part of the script, counted and not compiled."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(FOLDER / "gpu_kernels.py"), "--parts", "graphs"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    assert len(re.findall(r"^graphs \w+ \w+: \d+ more kernels", result.stdout, re.MULTILINE)) == 8
    found = re.search(r"^(\d+) kernels, (\d+) launches", result.stdout, re.MULTILINE)
    assert found is not None and 30 < int(found[1]) < int(found[2])


# ---- gpu_suite.sh ---------------------------------------------------------------------------------------------------

FAKE = """#!/bin/bash
# A python: the check for a GPU passes, other commands note themselves, write what they would, and fail if told to.
if [[ $1 == - ]]; then
    if [[ $# -gt 1 ]]; then exec REAL "$@"; fi
    cat > /dev/null; exit 0
fi
echo "ran $*"
echo "$*" >> "$NOTES"
line=$*
while [[ $# -gt 0 ]]; do
    case $1 in
        --json) echo '{}' > "$2" ;;
        --out)
            if [[ $2 == *.jsonl ]]; then echo '{}' >> "$2"
            else mkdir -p "$2"; echo '{"a": 1}' > "$2/summary.json"; fi ;;
        --profile) echo table >> "$2" ;;
        --save) echo kernels > "$2" ;;
    esac
    [[ -n ${HANG:-} && $1 == *$HANG* ]] && exec sleep 60
    shift
done
[[ -n ${FAIL:-} && $line == *"$FAIL"* ]] && exit 5
exit 0
"""


def suite(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SUITE), *arguments]
    settings = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=settings)


@pytest.fixture
def fake(tmp_path) -> dict[str, str]:
    python = tmp_path / "python"
    python.write_text(FAKE.replace("REAL", sys.executable))
    python.chmod(0o755)
    # The tools of CUDA: what they watch runs, without them.
    for tool in ("ncu", "compute-sanitizer"):
        text = f'#!/bin/bash\necho "{tool}" >> "$NOTES"\nwhile [[ $1 != {python} ]]; do shift; done; exec "$@"'
        (tmp_path / tool).write_text(text)
        (tmp_path / tool).chmod(0o755)
    kernels = tmp_path / "kernels.tar.xz"
    kernels.write_text("kernels")
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    here = {"OUT": str(tmp_path / "out"), "NOTES": str(tmp_path / "notes"), "KERNELS": str(kernels), "PATH": path}
    return {"PYTHON": str(python), **here}


def test_the_suite_is_valid_bash():
    assert subprocess.run(["bash", "-n", str(SUITE)], capture_output=True).returncode == 0


@pytest.mark.parametrize("arguments", [[], ["0"], ["6"], ["1", "x", "y"], ["al"], ["1/"], ["-h"]], ids=str)
def test_the_suite_refuses_other_arguments(arguments):
    result = suite(*arguments)
    assert result.returncode == 2 and "STAGE" in result.stderr and "pytest -m gpu" in result.stderr


def test_the_suite_refuses_a_folder_without_data(tmp_path):
    result = suite("4", str(tmp_path))
    assert result.returncode == 2 and "no folder" in result.stderr
    for folder in ("train/images", "train/labels", "val/images"):
        (tmp_path / folder).mkdir(parents=True)
    assert f"no folder {tmp_path}/val/labels" in suite("4", str(tmp_path)).stderr


@no_gpu
@pytest.mark.parametrize("stage", ["1", "all"])
def test_without_a_gpu_the_suite_says_so(stage, tmp_path):
    result = suite(stage, OUT=str(tmp_path / "out"))
    assert result.returncode == 2 and "needs a CUDA device" in result.stderr
    assert not (tmp_path / "out").exists()


def test_without_python_or_torch_the_suite_says_so(tmp_path):
    assert "no interpreter" in suite("1", PYTHON="no-such-python").stderr
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/bash\nexec {sys.executable} -S -I "$@"\n')
    bare.chmod(0o755)
    result = suite("1", PYTHON=str(bare))
    assert result.returncode == 2 and "no torch" in result.stderr


def test_the_whole_suite(fake, tmp_path):
    result = suite("all", **fake)
    assert result.returncode == 0, result.stdout + result.stderr
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    expected = [
        "accuracy.json",
        *(f"gpu_{n}.log" for n in (1, 2, 3, 4)),
        "profile.txt",
        "results.jsonl",
        "selftest.json",
    ]
    assert files == expected and len(files) <= 8
    notes = (tmp_path / "notes").read_text()
    for command in (
        "te_nvfp4_cv.cli selftest",
        "pytest -q -m gpu",
        "gpu_quantize.py",
        "gpu_conv.py",
        "--models resnet50",
        "inference.py --device cuda",
    ):
        assert command in notes
    assert json.loads((tmp_path / "out" / "accuracy.json").read_text()) == {f"seed{n}": {"a": 1} for n in range(5)}
    assert "ran" in (tmp_path / "out" / "gpu_2.log").read_text()
    for script in re.findall(r"examples/\S+\.py", notes):
        assert (ROOT / script).is_file()


SHORT = {  # the short stages: for each step of the log what its command holds, and what names it for FAIL
    "quick": {
        "unpack kernels": ("cli warm --load", "--load"),
        "versions": ("cache.identity", "identity"),
        "self-test": ("te_nvfp4_cv.cli selftest --json", "selftest"),
        "CUDA graphs and devices": ("tests/gpu/test_graphs.py tests/gpu/test_gpu_devices.py", "test_graphs"),
        "quantization kernels": ("gpu_quantize.py --layers", "gpu_quantize"),
        "ResNet-50 step": ("gpu_step.py --models resnet50 --no-triton", "resnet50"),
        "UNet step": ("gpu_step.py --models unet --no-triton", "models unet"),
        "pack kernels": ("cli warm --force --save", "--save"),
    },
    "rest": {
        "unpack kernels": ("cli warm --load", "--load"),
        "convolutions": ("gpu_conv.py --layers", "gpu_conv"),
        "ncu": ("gpu_step.py --models unet --batch 16", "gpu_step"),
        "compute-sanitizer": ("tests/gpu/test_sanitizer.py -k", "test_sanitizer"),
        "pack kernels": ("cli warm --force --save", "--save"),
    },
}
FILES = {"quick": ["gpu_quick.log", "kernels.tar.xz", "results.jsonl", "selftest.json"]}
FILES["rest"] = ["gpu_rest.log", "kernels.tar.xz", "results.jsonl"]  # and ncu's own
LIMITS = {"quick": 330, "rest": 200}
ALL_SHORT = [(stage, name) for stage, steps in SHORT.items() for name in steps]


@pytest.mark.parametrize("stage", SHORT)
def test_the_short_stages(fake, tmp_path, stage):
    result = suite(stage, **fake)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.findall(r"^=== (.*)", result.stdout, re.MULTILINE) == list(SHORT[stage])
    notes = (tmp_path / "notes").read_text()
    assert all(command in notes for command, _ in SHORT[stage].values())
    assert ("ncu\n" in notes) == ("compute-sanitizer\n" in notes) == (stage == "rest")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES[stage]
    assert (tmp_path / "out" / f"gpu_{stage}.log").read_text() in result.stdout
    for path in re.findall(r"(?:examples|tests)/\S+\.py", notes):
        assert (ROOT / path).is_file()


@no_gpu
@pytest.mark.parametrize("stage", SHORT)
def test_the_commands_of_the_short_stages_are_understood(bench, fake, tmp_path, stage, capsys):
    """Each command as it is, by the script's own parser: it stops where it wants a GPU, and not before."""
    python = tmp_path / "python"
    # An argument a line, and an empty line after the last one: names of layers hold blanks.
    python.write_text(python.read_text().replace('echo "$*" >> "$NOTES"', 'printf "%s\\n" "$@" "" >> "$NOTES"'))
    assert suite(stage, **fake).returncode == 0
    understood = 0
    notes = (tmp_path / "notes").read_text().replace("ncu\n", "").replace("compute-sanitizer\n", "")
    for command in notes.split("\n\n"):
        script, *arguments = command.split("\n")
        if script.endswith(".py"):
            with pytest.raises(SystemExit) as stopped:
                bench(Path(script).stem).main(arguments)
            assert stopped.value.code == 2 and "needs a CUDA device" in capsys.readouterr().err
        elif arguments[:1] == ["te_nvfp4_cv.cli"]:
            assert cli.build_parser()[0].parse_args(arguments[1:]).command
        elif arguments[:1] == ["pytest"]:
            chosen = [sys.executable, "-m", *arguments, "--collect-only", "-n", "0"]
            found = subprocess.run(chosen, capture_output=True, text=True, cwd=ROOT, timeout=120)
            assert found.returncode == 0, found.stdout + found.stderr
        else:
            continue
        understood += 1
    assert understood == len(SHORT[stage]) - (stage == "quick")  # "versions" is a text of Python


@pytest.mark.parametrize(("stage", "name"), ALL_SHORT)
def test_a_failing_step_of_a_short_stage_does_not_stop_the_rest(fake, stage, name):
    result = suite(stage, FAIL=SHORT[stage][name][1], **fake)
    assert result.returncode == 1
    assert re.findall(r"gpu_suite: (.*) FAILED \(", result.stdout) == [name]
    assert re.findall(r"^--- (.*): \d+ s", result.stdout, re.MULTILINE) == list(SHORT[stage])


def test_without_kernels_and_tools_the_short_stages_say_so(fake, tmp_path):
    for file in ("kernels.tar.xz", "ncu", "compute-sanitizer"):
        (tmp_path / file).unlink()
    result = suite("rest", **fake)
    assert result.returncode == 0, result.stdout + result.stderr
    for said in ("every kernel compiles at its first use", "no ncu here", "no compute-sanitizer here"):
        assert said in result.stdout
    assert re.findall(r"^=== (.*)", result.stdout, re.MULTILINE) == ["convolutions", "pack kernels"]


@pytest.mark.parametrize("stage", SHORT)
def test_all_limits_of_a_short_stage_sum_to_what_it_may_take(stage):
    text = SUITE.read_text()
    body = re.search(rf"stage_{stage}\(\) \{{(.*?)\n\}}", text, re.DOTALL)[1]
    functions = "".join(re.search(rf"\n{name}\(\) \{{(.*?)\n\}}", text, re.DOTALL)[1] for name in ("unpack", "pack"))
    steps = [int(n) for n in re.findall(r"^ *step (\d+) ", body + functions, re.MULTILINE)]
    assert len(steps) == len(SHORT[stage])
    grace = int(re.search(r"GRACE=(\d+)", body)[1])
    before = text.split("stage_quick() {")[0]
    others = re.findall(r"^ *timeout (?:--verbose )?--kill-after=(\d+) (\d+) ", before + body, re.MULTILINE)
    assert len(others) == 1 + (stage == "quick")  # is there a GPU; is there xdist
    assert sum(steps) + grace * len(steps) + sum(int(n) for pair in others for n in pair) <= LIMITS[stage]


def test_parts_of_the_tests_are_all_tests(fake, tmp_path):
    for part in ("1/2", "2/2"):
        assert suite(part, **fake).returncode == 0
    notes = (tmp_path / "notes").read_text()
    files = re.findall(r"tests/\S+\.py", notes)
    marked = {"tests/gpu/test_graphs.py", "tests/ops/kernels/test_quantize_kernels.py", "tests/gpu/test_gpu_tuning.py"}
    assert len(files) == len(set(files)) and marked <= set(files)
    assert (tmp_path / "out" / "gpu_1of2.log").is_file()


def test_the_study_goes_on_where_it_was(fake, tmp_path):
    data = tmp_path / "data"
    for folder in ("camvid/train", "cifar10"):
        (data / folder).mkdir(parents=True)
    before = tmp_path / "before.jsonl"
    before.write_text('{"first": 1}\n')
    result = suite("5", str(data), RESULTS=str(before), **fake)
    assert result.returncode == 0, result.stdout + result.stderr
    notes = (tmp_path / "notes").read_text()
    assert f"study.py --size full --device cuda --data {data} --minutes 8" in notes
    assert f"--out {tmp_path}/out/study --results {before}" in notes
    without = suite("5", str(data), **fake)
    assert without.returncode == 0 and "--results" not in (tmp_path / "notes").read_text().splitlines()[-1]
    refused = suite("5", str(tmp_path), **fake)
    assert refused.returncode == 2 and "stage 5 needs DATA" in refused.stderr


def test_a_failure_is_counted_and_the_rest_still_runs(fake, tmp_path):
    result = suite("2", FAIL="gpu_quantize", **fake)
    assert result.returncode == 1 and "quantization kernels FAILED (exit status 5)" in result.stdout
    assert "gpu_conv.py" in (tmp_path / "notes").read_text()


@pytest.mark.parametrize(
    ("stage", "name", "hanging", "steps"),
    [
        ("2", "quantization kernels", "gpu_quantize", ["quantization kernels", "convolutions"]),
        ("quick", "self-test", "selftest", list(SHORT["quick"])),
    ],
)
def test_a_step_that_hangs_is_stopped_and_the_rest_still_runs(fake, tmp_path, stage, name, hanging, steps):
    short = tmp_path / "gpu_suite.sh"
    text = SUITE.read_text().replace('cd "$(dirname "${BASH_SOURCE[0]}")/../.."', f'cd "{ROOT}"')
    short.write_text(re.sub(rf'step \d+ "{name}"', f'step 1 "{name}"', text))
    settings = {**os.environ, **fake, "HANG": hanging}
    result = subprocess.run(["bash", str(short), stage], capture_output=True, text=True, timeout=60, env=settings)
    assert result.returncode == 1 and f"{name} ran past its 1 s" in result.stdout
    assert re.findall(r"^--- (.*): \d+ s", result.stdout, re.MULTILINE) == steps


def test_every_stage_ends_below_nine_minutes():
    for stage in re.findall(r"stage_\d\(\) \{(.*?)\n\}", SUITE.read_text(), re.DOTALL):
        seconds = [int(n) for n in re.findall(r"step (\d+) ", stage)]
        repeats = 5 if "for seed in 0 1 2 3 4" in stage else 1
        assert seconds and repeats * sum(seconds) < 540
