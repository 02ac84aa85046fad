"""examples/unet_coco under torchrun: the curves of one process, bit-exact resume, ends that leave a whole checkpoint.

    BAND    how far a step's loss may lie from the single process's with the same batches, relative. The loss itself is
            exact (its sums are over all ranks); rounding, dropout and, in NVFP4, a rank's own amaxes differ.
            Measured in 8 steps: bf16 1.7e-4, NVFP4 4.7e-4, with --share-amax 2.6e-4; DDP and FSDP2 alike.

FAULTY stands for a rank that fails: train.py, in which rank 1 stops in the second epoch.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from unet_coco import ranks as unet_ranks
from unet_coco.checkpoint import load_checkpoint
from unet_coco.data import load_data
from unet_coco.engine import Trainer
from unet_coco.initial import read_weights
from unet_coco.losses import IGNORE, dice_ce
from unet_coco.options import parse_options
from unet_coco.order import TrainOrder
from unet_coco.precision import parse_precisions
from unet_coco.stopping import SharedStop, Stop, Stopped
from unet_coco.train import compare, main
from unet_coco.unet import UNet

from tests.distributed.launch import Ranks, ranks_test, results, torchrun
from tests.examples.test_examples import same
from tests.examples.unet_coco_data import EXAMPLES, SMALL, draw_shapes

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools on numpy 2

BAND = {"bf16": 1e-3, "nvfp4": 5e-3}
TRAIN = str(EXAMPLES / "unet_coco" / "train.py")
TINY = [
    *SMALL,
    "--scale",
    "0.125",
    "--log-every",
    "1",
    "--pictures",
    "1",
    "--epochs",
    "3",
    "--eval-every",
    "2",
]  # epochs of 3
FAULTY = """
import os, signal, sys, time
from unet_coco.engine import Trainer
from unet_coco.ranks import run
from unet_coco.train import main

step, fault = Trainer._step, sys.argv.pop(1)

def faulty(self, images, masks, watch):
    if self.ranks.rank == 1 and self.position.step == 4 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        if fault == "killed":
            os.write(2, b"rank 1 is killed ")  # only the first rank prints
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "raises":
            raise ValueError("rank 1 has had enough")
        if fault == "breaks":
            raise KeyError("rank 1 has lost a key")
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun would wait 30 s for a rank that only notes it
        time.sleep(600)
    return step(self, images, masks, watch)

Trainer._step = faulty
run(main)
"""


def curve(out: Path, precision: str = "nvfp4") -> list[float]:
    return [row["loss"] for row in json.loads((out / "history.json").read_text())[precision]["curve"]]


def in_band(found: list[float], expected: list[float], precision: str = "nvfp4") -> None:
    assert len(found) == len(expected) > 0 and all(map(math.isfinite, found))
    worst = max(abs(a - b) / b for a, b in zip(found, expected, strict=True))
    assert worst <= BAND[precision], f"{precision}: {worst:.2e}"


def plain_and_full(path: Path, parallel: str) -> None:
    """A checkpoint that a plain UNet takes: read with weights_only, names and shapes as in one process."""
    state = load_checkpoint(path)
    assert all(type(w) is torch.Tensor for w in state["model"].values()), parallel
    model = UNet(len(state["identity"]["architecture"]["classes"]), scale=0.125)
    model.load_state_dict(state["model"])
    assert list(state["optimizer"]["state"]) == list(range(len(list(model.parameters()))))
    for number, w in enumerate(model.parameters()):
        assert state["optimizer"]["state"][number]["exp_avg"].shape == w.shape
    assert len(state["ranks"]) == 2 and not torch.equal(*(r["rng"]["torch"] for r in state["ranks"]))


# ---- on two ranks ---------------------------------------------------------------------------------------------------


def data_of(ranks: Ranks) -> Path:
    """The same small set for all functions, drawn by rank 0."""
    place = unet_ranks.Ranks(ranks.rank, ranks.world, "ddp")
    return place.first(lambda: draw_shapes(ranks.folder.parent))


def train(
    ranks: Ranks,
    out: Path,
    *options: str,
    share_amax: bool = False,
    base: Sequence[str] = TINY,
    stop: Stop | None = None,
) -> dict[str, Any]:
    """train.py's main within the process group that is there already."""
    data = data_of(ranks)
    settings = parse_options(["--data", str(data), "--out", str(out), "--precisions", "nvfp4", *base, *options])
    precisions = parse_precisions(list(settings.precisions), settings.recipe, ranks.group if share_amax else None)
    out.mkdir(parents=True, exist_ok=True)
    place = unet_ranks.Ranks(ranks.rank, ranks.world, settings.parallel)
    rows = compare(settings, precisions, load_data(data, "coco", None), ranks.device, place, stop)
    torch.distributed.barrier()  # until rank 0 has written
    return rows


def resume_is_bit_exact(ranks: Ranks, parallel: str, steps: int) -> str:
    """4 steps and the rest against all `steps`; 4 is in the middle of an epoch. Tests below use what it leaves."""
    options = ("--parallel", parallel)
    straight = train(ranks, ranks.folder / "straight", "--steps", str(steps), *options)
    train(ranks, ranks.folder / "half", "--steps", "4", *options)
    if ranks.rank == 0:
        shutil.copytree(ranks.folder / "half", ranks.folder / "resumed")
    torch.distributed.barrier()
    torch.manual_seed(99)  # what ran before must not matter
    resumed = train(ranks, ranks.folder / "resumed", "--steps", str(steps), "--resume", *options)
    paths = [ranks.folder / name / "nvfp4" / "last.pt" for name in ("straight", "resumed")]
    a, b = map(load_checkpoint, paths)
    assert a["position"]["step"] == steps
    same(a, b)
    plain_and_full(paths[1], parallel)
    rows = [{k: v for k, v in row["nvfp4"].items() if k != "step_ms"} for row in (straight, resumed)]
    assert rows[0] == rows[1] and rows[0]["nvfp4_flops_share"] > 0.5
    return str(ranks.folder)


def on_ranks_ddp(ranks: Ranks) -> str:
    return resume_is_bit_exact(ranks, "ddp", 8)


def on_ranks_fsdp(ranks: Ranks) -> str:
    return resume_is_bit_exact(ranks, "fsdp", 6)


def on_ranks_ddp_goes_on_as_fsdp_and_back(ranks: Ranks) -> None:
    straight = curve(ranks.folder.parent / "ddp" / "straight")
    for before, after in (("ddp", "fsdp"), ("fsdp", "ddp")):
        out = ranks.folder / after
        if ranks.rank == 0:
            shutil.copytree(ranks.folder.parent / before / "half", out)
        torch.distributed.barrier()
        train(ranks, out, "--steps", "5", "--resume", "--parallel", after)
        in_band(curve(out), straight[:5])


def on_ranks_a_signal_to_one_rank_stops_all_at_one_step(ranks: Ranks) -> None:
    """In steps and in a validation, to either rank or twice, as torchrun and a scheduler may both send it."""
    out, straight = ranks.folder / "out", ranks.folder.parent / "ddp" / "straight" / "nvfp4" / "last.pt"
    step, evaluate, signals = Trainer._step, Trainer.evaluate, [1, 3, 6]
    saved: list[int] = []

    def signalled(self: Trainer, *arguments: Any) -> torch.Tensor:
        if signals and self.position.step == signals[0] and ranks.rank == signals.pop(0) % 2:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGUSR1)
        return step(self, *arguments)

    def validation(self: Trainer, split: str, **options: Any) -> dict[str, float]:
        if ranks.rank == 1 and not options and 6 not in saved:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, split, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", signalled)
        patch.setattr(Trainer, "evaluate", validation)
        for _ in range(6):
            stop = SharedStop(timedelta(seconds=60))
            try:
                with stop.listening():
                    train(ranks, out, "--steps", "8", "--resume", stop=stop)
                break
            except Stopped as stopped:
                assert stopped.status == 143
                saved.append(load_checkpoint(out / "nvfp4" / "last.pt")["position"]["step"])
                assert stopped.done == f"step {saved[-1]} of 8 of nvfp4"
    # A look is one step late: a signal in the step after 1 is seen after the one after 2.
    assert saved == [3, 5, 6, 8], saved
    same(load_checkpoint(out / "nvfp4" / "last.pt"), load_checkpoint(straight))


def on_ranks_shards_hold_what_one_file_does(ranks: Ranks) -> None:
    """Written by FSDP2, with the bits of one file, gone on with by DDP; test_kills.py goes on with FSDP2."""
    options, fsdp = ("--parallel", "fsdp"), ranks.folder.parent / "fsdp"
    train(ranks, ranks.folder / "half", "--steps", "4", "--sharded-checkpoints", "--save-every", "2", *options)
    half = ranks.folder / "half" / "nvfp4"
    state = load_checkpoint(half / "last.pt")
    assert not state["model"] and not state["optimizer"], "no rank holds the whole"
    assert [path.name for path in half.glob("shards-*")] == [state["shards"]]
    files = [path.name for path in (half / state["shards"]).iterdir()]
    assert len(files) == ranks.world and all(name.endswith(".safetensors") for name in files), "and no pickle"
    weights, expected = read_weights(half / "last.pt"), load_checkpoint(fsdp / "half" / "nvfp4" / "last.pt")["model"]
    same(dict(sorted(weights.items())), dict(sorted(expected.items())))
    if ranks.rank == 0:
        shutil.copytree(ranks.folder / "half", ranks.folder / "ddp")
    torch.distributed.barrier()
    train(ranks, ranks.folder / "ddp", "--steps", "5", "--resume")
    assert not list((ranks.folder / "ddp" / "nvfp4").glob("shards-*"))
    in_band(curve(ranks.folder / "ddp"), curve(fsdp / "straight")[:5])
    if ranks.rank == 0:
        (half / state["shards"] / files[0]).unlink()
    torch.distributed.barrier()
    with pytest.raises(ValueError, match=r"shards in .* cannot be read"):
        train(ranks, ranks.folder / "half", "--steps", "6", "--resume", *options)
    with pytest.raises(ValueError, match="no shards to write"):
        parse_options(["--sharded-checkpoints"])


def on_ranks_shared_amax(ranks: Ranks) -> None:
    train(ranks, ranks.folder / "out", "--steps", "2", share_amax=True)
    in_band(curve(ranks.folder / "out"), curve(ranks.folder.parent / "ddp" / "straight")[:2])


def on_ranks_equal_weights_and_one_log(ranks: Ranks) -> None:
    logs: list[str] = []
    digests: list[str] = []
    summary = Trainer.summary

    def noted(trainer: Trainer) -> dict[str, float | int]:
        weights = [w.detach().cpu().contiguous().numpy().tobytes() for w in trainer.model.parameters()]
        digests.append(hashlib.sha256(b"".join(weights)).hexdigest())
        return summary(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **o: logs.append(o["name"]), Settings=dict))
        patch.setattr(Trainer, "summary", noted)
        logged = [option for option in TINY if option != "--no-wandb"]
        train(ranks, ranks.folder / "out", "--steps", "3", base=logged)
    told: list[Any] = [None] * ranks.world
    torch.distributed.all_gather_object(told, (logs, digests))
    assert [names for names, _ in told] == [["nvfp4"], *[[]] * (ranks.world - 1)]
    assert len(digests) == 1 and all(theirs == digests for _, theirs in told)


def on_ranks_refusals(ranks: Ranks) -> None:
    with pytest.raises(ValueError, match=r"cannot be cut into equal parts[\s\S]*batches of 5 images, on 2 ranks"):
        train(ranks, ranks.folder / "out", "--batch-size", "5")
    with pytest.raises(ValueError, match="fp16 cannot train with --parallel fsdp"):
        train(ranks, ranks.folder / "out", "--precisions", "fp16", "--parallel", "fsdp")
    assert not list(ranks.folder.rglob("*.pt"))


def on_ranks_loss_is_that_of_the_whole_batch(ranks: Ranks) -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(2 * ranks.world, 5, 8, 8), torch.randint(0, 4, (2 * ranks.world, 8, 8))
    target[0], target[1, :4] = IGNORE, 4  # the parts have different classes and numbers of valid pixels
    for weights in (None, torch.tensor([0.5, 2.0, 0.0, 1.0, 7.0])):
        whole = logits.clone().requires_grad_()
        expected = dice_ce(whole, target, class_weights=weights, ce_weight=0.5)
        expected.backward()
        mine = slice(2 * ranks.rank, 2 * ranks.rank + 2)
        part = logits[mine].to(ranks.device).requires_grad_()
        weights = None if weights is None else weights.to(ranks.device)
        of_part = target[mine].to(ranks.device)
        found = dice_ce(part, of_part, group=ranks.group, class_weights=weights, ce_weight=0.5)
        found.backward()
        torch.testing.assert_close(found.cpu(), expected)
        torch.testing.assert_close(part.grad.cpu() / ranks.world, whole.grad[mine])  # DDP divides by the ranks' number


def on_ranks_errors_of_the_first_reach_all(ranks: Ranks) -> None:
    place = unet_ranks.Ranks(ranks.rank, ranks.world, "ddp")

    def fails() -> None:
        raise RuntimeError(f"rank {ranks.rank}: the disk is full")

    with pytest.raises(RuntimeError, match="rank 0: the disk is full"):
        place.first(fails)
    assert place.first(lambda: 7 + ranks.rank) == 7


test_on_ranks = ranks_test(globals(), worlds=(2,))


# ---- against one process --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_shapes(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def single(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 steps of one process, bf16 and nvfp4."""
    out = tmp_path_factory.mktemp("single")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    main(["--data", str(shapes), "--out", str(out), "--precisions", "bf16", "nvfp4", "--steps", "8", *TINY])
    torch.set_num_threads(threads)
    return out


@pytest.mark.slow
def test_torchrun_gives_the_curve_of_one_process(shapes: Path, single: Path, tmp_path: Path) -> None:
    arguments = ["--data", str(shapes), "--out", str(tmp_path), "--precisions", "bf16", "nvfp4", "--steps", "8", *TINY]
    done = torchrun([TRAIN, *arguments, "--device", "cpu"], 2)
    assert done.returncode == 0, done.stdout
    assert "ddp on 2 ranks" in done.stdout and done.stdout.count("step      8/8") == 2, "rank 0 alone prints"
    for precision in BAND:
        in_band(curve(tmp_path, precision), curve(single, precision), precision)
    one, two = (json.loads((folder / "summary.json").read_text()) for folder in (single, tmp_path))
    assert two["bf16"]["val_loss"] == pytest.approx(one["bf16"]["val_loss"], rel=BAND["bf16"])
    assert (tmp_path / "predictions.png").is_file() and (tmp_path / "table.md").is_file()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_one_process_goes_on_from_two_ranks(
    parallel: str, shapes: Path, single: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = Path(results(__file__, 2, parallel, tmp_path_factory)[0])
    straight = curve(folder / "straight")
    in_band(straight, curve(single)[: len(straight)])
    shutil.copytree(folder / "half", tmp_path / "out")
    arguments = ["--data", str(shapes), "--out", str(tmp_path / "out"), "--precisions", "nvfp4", "--steps", "8"]
    main([*arguments, "--resume", *TINY])
    in_band(curve(tmp_path / "out"), curve(single))


# ---- ends -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "seconds", "said"),
    [
        ("raises", 100, ["error on rank 1: rank 1 has had enough", "ValueError: rank 1 has had enough"]),
        pytest.param("breaks", 100, ["KeyError: 'rank 1 has lost a key'"], marks=pytest.mark.stress),
        ("hangs", 6, ["error: ", "imed out"]),
    ],
)
def test_a_rank_that_fails_ends_the_job(
    fault: str, seconds: int, said: list[str], shapes: Path, tmp_path: Path
) -> None:
    """Long before gloo's own timeout, with the message and the checkpoint of the epoch before."""
    script, out = tmp_path / "faulty.py", tmp_path / "out"
    script.write_text(FAULTY)
    arguments = ["--data", str(shapes), "--out", str(out), "--precisions", "bf16", "--device", "cpu", *TINY]
    begun = time.monotonic()
    done = torchrun([str(script), fault, *arguments, "--timeout", str(seconds)], 2)
    assert done.returncode not in (0, None) and time.monotonic() - begun < 90, done.stdout
    assert all(text in done.stdout for text in said), done.stdout
    assert load_checkpoint(out / "bf16" / "last.pt")["position"]["step"] == 3
    assert [path.name for path in (out / "bf16").iterdir()] == ["last.pt", "telemetry.jsonl"], "no draft is left"


@pytest.mark.slow
def test_torchrun_starts_a_killed_job_again_in_its_folder(shapes: Path, tmp_path: Path) -> None:
    """Not in that of the other run which has the name; from the checkpoint of --save-every, without being told."""
    script, out = tmp_path / "faulty.py", tmp_path / "out"
    script.write_text(FAULTY)
    (out / "bf16").mkdir(parents=True)
    (out / "bf16" / "last.pt").touch()
    arguments = ["--data", str(shapes), "--out", str(out), "--precisions", "bf16", "--device", "cpu", *TINY]
    call = ["--max-restarts", "1", str(script), "killed", *arguments, "--steps", "6", "--save-every", "1"]
    done = torchrun(call, 2)
    # Torchrun names the rank whose end it sees first: the killed one, or the other, whose connection is reset by that.
    assert done.returncode == 0 and "rank 1 is killed" in done.stdout, done.stdout
    assert re.search(r"failed \(exitcode: (-9|1)\)", done.stdout), done.stdout
    assert "the job was started again; it goes on in" in done.stdout and "resumed at step 4" in done.stdout
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out", "out_2"]
    assert load_checkpoint(tmp_path / "out_2" / "bf16" / "last.pt")["position"]["step"] == 6


def test_the_parts_of_ranks_are_the_batches_of_one_process() -> None:
    whole = list(TrainOrder(14, 4, seed=3))
    parts = [list(TrainOrder(14, 4, 3, rank, 2)) for rank in range(2)]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole
    with pytest.raises(ValueError, match=r"batches of 3 images, of which there are only 3 images, on 2 ranks"):
        TrainOrder(3, 8, 0, 0, 2)


@pytest.mark.parametrize("option", [("--parallel", "fsdp"), ("--share-amax",)])
def test_options_that_need_ranks(option: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{option[0]}[\s\S]*needs ranks[\s\S]*torchrun"):
        main(["--out", str(tmp_path), *TINY, *option])


def test_one_gpu_for_all_ranks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match=r"one GPU for all ranks[\s\S]*cuda:0"):
        main(["--out", str(tmp_path), *TINY, "--device", "cuda:0"])
