"""backend/tuning.py with a timer that is told the times: what is chosen, stored, shared and refused."""

from __future__ import annotations

import json

import pytest
import torch

from te_nvfp4_cv import files
from te_nvfp4_cv.backend import cache, tuning
from tests.backend import fake_gpu

TABLE = {
    0: {"BLOCK": 4096, "num_warps": 1},
    80: {"BLOCK": 512, "num_warps": 4},
    90: {"BLOCK": 1024, "num_warps": 4},
    100: lambda key: {"BLOCK": 16 * key[0], "num_warps": 8},
}
CANDIDATES = [{"BLOCK": block, "num_warps": warps} for block in (512, 1024) for warps in (4, 8)]


class Kernel:
    """A launch that notes its calls; `times` (ms by configuration) is what the timer will say."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: dict[tuple[int, int], float]) -> None:
        self.calls: list[tuple[int, int]] = []
        self.times = times
        monkeypatch.setattr(tuning, "milliseconds", self.milliseconds)

    def launch(self, config: tuning.Config) -> None:
        self.calls.append((config["BLOCK"], config["num_warps"]))
        if self.times[self.calls[-1]] < 0:
            raise RuntimeError("out of resource: shared memory")

    def milliseconds(self, run) -> float:
        run()
        return self.times[self.calls[-1]]


@pytest.fixture(autouse=True)
def setting(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "_table", {})
    monkeypatch.setattr(tuning, "_candidates", {})
    monkeypatch.setattr(tuning, "_looked_up", {})
    fake_gpu.install(monkeypatch, tmp_path)
    monkeypatch.setenv("TE_NVFP4_CV_AUTOTUNE", "1")
    tuning.register("quantize", TABLE, lambda key: CANDIDATES)
    yield
    fake_gpu.new_process()


FASTEST = {(512, 4): 3.0, (512, 8): 2.0, (1024, 4): 4.0, (1024, 8): 5.0}


def kept(tmp_path) -> list:
    return sorted(tmp_path.glob("tuned_*.json"))


def test_the_table_serves_the_highest_class_not_above(monkeypatch):
    monkeypatch.delenv("TE_NVFP4_CV_AUTOTUNE")
    blocks = {arch: tuning.config("quantize", arch, (4,))["BLOCK"] for arch in (0, 80, 86, 89, 90, 100, 103, 120)}
    assert blocks == {0: 4096, 80: 512, 86: 512, 89: 512, 90: 1024, 100: 64, 103: 64, 120: 64}
    assert [arch for arch, _ in tuning.entries()["quantize"]] == [0, 80, 90, 100]


@pytest.mark.parametrize(("kernel", "arch"), [("quantise", 90), ("quantize", 75)])
def test_what_is_not_in_the_table_is_refused(kernel, arch):
    with pytest.raises(ValueError, match="(?s)no entry.*needs.*quantize"):
        tuning.config(kernel, arch)


def test_an_incomplete_table_is_refused():
    with pytest.raises(ValueError, match="not complete"):
        tuning.register("other", {90: {"BLOCK": 1}})


def test_nothing_is_searched_unless_asked_for(monkeypatch, tmp_path):
    kernel = Kernel(monkeypatch, FASTEST)
    monkeypatch.setenv("TE_NVFP4_CV_AUTOTUNE", "0")
    assert tuning.config("quantize", 90, (6,), kernel.launch) == TABLE[90]
    monkeypatch.setenv("TE_NVFP4_CV_AUTOTUNE", "1")
    assert tuning.config("quantize", 0, (6,), kernel.launch) == TABLE[0], "the interpreter has no speed"
    assert tuning.config("quantize", 90, (6,)) == TABLE[90]
    assert not kernel.calls and not kept(tmp_path)


def test_the_fastest_is_kept_for_this_process_and_the_next(monkeypatch, tmp_path):
    kernel = Kernel(monkeypatch, FASTEST)
    assert tuning.config("quantize", 90, (6,), kernel.launch) == {"BLOCK": 512, "num_warps": 8}
    assert sorted(kernel.calls) == sorted(FASTEST), "every candidate once, the table's entry among them"
    tuning.config("quantize", 90, (6,), kernel.launch)
    fake_gpu.new_process()
    assert tuning.config("quantize", 90, (6,), kernel.launch) == {"BLOCK": 512, "num_warps": 8}
    assert len(kernel.calls) == 4
    tuning.config("quantize", 90, (7,), kernel.launch)
    assert len(kernel.calls) == 8, "another key is another search"
    (path,) = kept(tmp_path)
    assert set(json.loads(path.read_text())["content"]) == {"quantize 6", "quantize 7"}


def test_another_gpu_or_version_searches_again(monkeypatch, tmp_path):
    kernel = Kernel(monkeypatch, FASTEST)
    tuning.config("quantize", 90, (6,), kernel.launch)
    fake_gpu.install(monkeypatch, tmp_path, name="Another GPU")
    tuning.config("quantize", 90, (6,), kernel.launch)
    monkeypatch.setattr(cache, "driver_version", lambda: "590.1")
    fake_gpu.new_process()
    tuning.config("quantize", 90, (6,), kernel.launch)
    assert len(kernel.calls) == 12 and len(kept(tmp_path)) == 3


def test_candidates_that_do_not_run_are_left_out(monkeypatch):
    monkeypatch.setattr("te_nvfp4_cv.errors._warned", set())
    kernel = Kernel(monkeypatch, {**FASTEST, (512, 8): -1})
    with pytest.warns(UserWarning, match="shared memory"):
        assert tuning.config("quantize", 90, (6,), kernel.launch) == {"BLOCK": 512, "num_warps": 4}


@pytest.mark.filterwarnings("ignore:te_nvfp4_cv. quantize does not run")
def test_a_kernel_that_never_runs_raises(monkeypatch, tmp_path):
    kernel = Kernel(monkeypatch, dict.fromkeys(FASTEST, -1))
    with pytest.raises(RuntimeError, match="out of resource"):
        tuning.config("quantize", 90, (6,), kernel.launch)
    assert not kept(tmp_path)


def test_a_launch_knows_that_it_is_one_of_a_search(monkeypatch):
    monkeypatch.setattr("te_nvfp4_cv.errors._warned", set())
    said: list[bool] = []
    kernel = Kernel(monkeypatch, {**FASTEST, (512, 8): -1})

    def launch(config: tuning.Config) -> None:
        said.append(tuning.searching())
        kernel.launch(config)

    with pytest.warns(UserWarning, match="does not run"):
        launch(tuning.config("quantize", 90, (11,), launch))
    assert said == [True] * 4 + [False] and not tuning.searching()


def test_no_search_while_a_graph_is_captured(monkeypatch, tmp_path):
    kernel = Kernel(monkeypatch, FASTEST)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuning.config("quantize", 90, (6,), kernel.launch) == TABLE[90]
    assert not kernel.calls and not kept(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    best = tuning.config("quantize", 90, (6,), kernel.launch)
    fake_gpu.new_process()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuning.config("quantize", 90, (6,), kernel.launch) == best, "an earlier result serves a capture"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"content": 3}', "\xff\xfe", None], ids=str)
def test_a_damaged_file_is_searched_and_written_again(monkeypatch, tmp_path, text):
    kernel = Kernel(monkeypatch, FASTEST)
    tuning.config("quantize", 90, (6,), kernel.launch)
    (path,) = kept(tmp_path)
    good = json.loads(path.read_text())
    if text is None:  # an entry of an older table
        path.write_text(json.dumps({**good, "content": {"quantize 6": {"BLOCK": 7, "num_warps": 3}}}))
    else:
        path.write_bytes(text.encode("latin-1"))
    fake_gpu.new_process()
    assert tuning.config("quantize", 90, (6,), kernel.launch) == {"BLOCK": 512, "num_warps": 8}
    assert len(kernel.calls) == 8 and json.loads(path.read_text()) == good


def test_a_folder_that_cannot_be_written_costs_only_the_file(monkeypatch, tmp_path):
    kernel = Kernel(monkeypatch, FASTEST)
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(PermissionError("read-only")))
    assert tuning.config("quantize", 90, (6,), kernel.launch) == {"BLOCK": 512, "num_warps": 8}
    assert not list(tmp_path.iterdir())


def test_two_processes_keep_each_others_results(monkeypatch, tmp_path):
    kernel = Kernel(monkeypatch, FASTEST)
    tuning.config("quantize", 90, (6,), kernel.launch)
    (path,) = kept(tmp_path)
    theirs = json.loads(path.read_text())
    theirs["content"]["dequantize 6"] = {"BLOCK": 1024, "num_warps": 4}
    path.write_text(json.dumps(theirs))
    tuning.config("quantize", 90, (7,), kernel.launch)
    assert set(json.loads(path.read_text())["content"]) == {"quantize 6", "quantize 7", "dequantize 6"}
    assert list(tmp_path.iterdir()) == [path], "no temporary file is left"


def test_the_median_of_the_times_counts_and_warm_up_does_not(monkeypatch):
    class Event:
        clock = 0.0

        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = Event.clock

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, other: Event) -> float:
            return other.at - self.at

    costs = iter([900.0] * tuning.WARM_UP + [5.0, 1.0, 2.0, 100.0, 3.0, 4.0, 3.5])
    monkeypatch.setattr(torch.cuda, "Event", Event)

    def run() -> None:
        Event.clock += next(costs)

    assert tuning.milliseconds(run) == pytest.approx(3.5)


def test_keys_of_sizes_are_coarse():
    assert [tuning.bucket(n) for n in (0, 1, 2, 3, 4, 5, 1024, 1025)] == [0, 0, 1, 2, 2, 3, 10, 11]
    assert tuning.arch_of(torch.device("cpu")) == 0 and tuning.arch_of(fake_gpu.DEVICE) == 90
