"""The accuracy study on paper: its statistics by hand, its plan, its results files, its tables and plots."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest

from tests.examples.unet_coco_data import EXAMPLES  # noqa: F401  (puts examples/ on the path)

from accuracy import choice, pairs, plots, table  # noqa: E402  isort: skip
from accuracy.plan import PLAN, read_plan  # noqa: E402  isort: skip
from accuracy.rows import Arm, append_row, collect, read_rows  # noqa: E402  isort: skip
from accuracy.tasks import BLOCKS, TASKS, variants_of  # noqa: E402  isort: skip

ARM = Arm("shapes-unet", "cpu", "fp32", 12, "baseline", 0)


def run_row(variant: str, seed: int, score: float, **more) -> dict:
    row = replace(ARM, variant=variant, seed=seed).to_row()
    row |= {"score": score, "ema_score": score, "tail_loss": 1.0, "diverged": False, "cpu_seconds": 60.0}
    return row | {"steps": 768, "curve": [3.0, 2.0], "nvfp4_flops_share": 0.9} | more


def table_of(*rows: dict) -> dict[Arm, dict]:
    return {Arm.of(row): row for row in rows}


def test_the_interval_is_students():
    assert pairs.interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(4.303 / 3**0.5, rel=1e-3))
    mean, half = pairs.interval([0.1, -0.3, 0.2, 0.0, 0.5])
    deviation = np.std([0.1, -0.3, 0.2, 0, 0.5], ddof=1)
    assert mean == pytest.approx(0.1) and half == pytest.approx(2.776 * deviation / 5**0.5, rel=1e-3)
    assert pairs.interval([0.7]) == (0.7, None)


def test_the_number_of_pairs_is_the_smallest_that_reaches_the_target():
    first = [0.0, 0.4, 0.0, 0.4]  # sd 0.2309
    assert pairs.pairs_planned(first[:3], 4, 0.3, 20) == 4
    wanted = pairs.pairs_planned(first, 4, 0.3, 20)
    # t(4) at 97 % is 3.298, t(5) 3.003: 0.2309 * 3.298 / sqrt(5) = 0.341, 0.2309 * 3.003 / sqrt(6) = 0.283
    assert wanted == 6
    assert pairs.half_width(1.0, 10) == pytest.approx(2.262 / math.sqrt(10), rel=1e-3)
    assert pairs.pairs_planned(first, 4, 0.01, 20) == 20
    # the same deviations with another mean ask for the same number: a gap decides nothing
    assert pairs.pairs_planned([d - 3 for d in first], 4, 0.3, 20) == wanted
    # after the planned pairs the rule is applied once more, with the deviation of all of them
    assert pairs.pairs_planned([*first, 0.2, 9.0], 4, 0.3, 20) == 20
    assert pairs.pairs_planned([*first, 0.2, 0.2, 9.0], 4, 0.3, 20) == 6


def test_runs_are_paired_by_seed():
    rows = [run_row("baseline", s, 50 + 10 * s) for s in range(3)]
    rows += [run_row("preset", s, 49 + 10 * s + s / 10, tail_loss=1.02) for s in (2, 0, 1)]
    rows += [run_row("preset", 7, 1.0)]  # without a baseline
    found = pairs.pairs_of(table_of(*rows), replace(ARM, variant="preset"))
    assert found.differences("score") == pytest.approx([-1.0, -0.9, -0.8]) and found.diverged == 0
    assert found.loss_ratios() == pytest.approx([1.02] * 3)
    rows += [run_row("baseline", 7, 1.0, diverged=True), run_row("preset", 8, 1.0, epochs=3)]
    found = pairs.pairs_of(table_of(*rows), replace(ARM, variant="preset"))
    assert len(found.rows) == 3 and found.diverged == 1


def test_averaged_weights_decide_where_they_halve_the_noise():
    def made(factor: float) -> pairs.Pairs:
        scores = [1.0, -1.0, 1.0, -1.0]
        return pairs.Pairs([(run_row("p", 0, s, ema_score=s * factor), run_row("b", 0, 0.0)) for s in scores])

    assert made(0.49).chosen_score(4) == "ema_score" and made(0.51).chosen_score(4) == "score"
    assert made(0.1).chosen_score(5) == "score"  # not known yet


def test_what_counts_as_a_gap():
    def made(gaps: list[float], ratio: float = 1.0, diverged: int = 0) -> pairs.Pairs:
        rows = [(run_row("p", 0, g, tail_loss=ratio), run_row("b", 0, 0.0)) for g in gaps]
        return pairs.Pairs(rows, diverged)

    assert not pairs.has_gap(made([0.1, -0.1, 0.1]), "score") and pairs.has_gap(made([0.1, 0.11, 0.1]), "score")
    assert pairs.has_gap(made([0.1, -0.1, 0.1], ratio=1.011), "score")
    assert not pairs.has_gap(made([0.1, -0.1, 0.1], ratio=0.991), "score")
    assert pairs.has_gap(made([0.1, -0.1], diverged=1), "score") and pairs.has_gap(made([], diverged=1), "score")


# ---- the plan -------------------------------------------------------------------------------------------------------


def test_the_plan_can_be_run_and_names_every_variant():
    for size in ("cpu", "full"):
        assert list(read_plan(PLAN, size).wanted({}))
    plan = read_plan(PLAN, "cpu")
    named = {"baseline"} | {name for stage in plan.stages for name in stage.variants}
    assert named == set(variants_of("cifar-resnet20"))
    for task in TASKS:
        for variant in variants_of(task).values():
            if variant.recipe is not None:
                variant.recipe.validate_for_use()
    assert set(BLOCKS) == set(TASKS)


def finished(plan, rows: dict[Arm, dict], gap: float, noise: float) -> list[Arm]:
    """Finish what the plan wants until it wants nothing more; the preset has that gap."""
    order = []
    while arm := next(plan.wanted(rows), None):
        order.append(arm)
        score = 90.0 + arm.seed + (gap + noise * (-1) ** arm.seed if arm.variant == "preset" else 0.0)
        rows[arm] = {**run_row(arm.variant, arm.seed, score), **arm.to_row()}
    return order


def test_levers_are_tried_where_there_is_a_gap_and_not_before_the_pairs_are_complete():
    plan = read_plan(PLAN, "cpu")
    plan = replace(plan, budget_hours=1e9)
    order = finished(plan, {}, gap=-1.0, noise=0.2)
    preset = [arm for arm in order if arm.variant == "preset" and arm.task == "shapes-unet" and arm.epochs == 12]
    levers = [arm for arm in order if arm.variant == "4over6 weights" and arm.task == "shapes-unet"]
    assert len(preset) == len(levers) == 8  # the target takes six, and the levers' other seeds are compared with it too
    assert order.index(preset[5]) < order.index(levers[0]) < order.index(preset[6]) < order.index(levers[6])
    assert len(order) == len(set(order))
    assert len([arm for arm in order if arm.variant == "thin layers in NVFP4"]) == 8 + 4
    without = finished(plan, {}, gap=0.0, noise=0.2)
    unscaled = ", no tensor scale, loss times 2^20"
    formats = {"MXFP4", "UE5M3 scales, no tensor scale", f"UE5M3 scales{unscaled}", f"E4M3 scales{unscaled}"}
    techniques = {"minus RHT", "minus SR", "minus 2D"}
    assert {arm.variant for arm in without} == {"baseline", "preset"} | techniques | formats
    noisy = finished(plan, {}, gap=0.0, noise=5.0)
    assert max(arm.seed for arm in noisy if arm.task == "cifar-resnet20") == 15  # the largest number of pairs


def test_a_variant_other_than_the_preset_is_confirmed_to_the_target_on_seeds_of_its_own():
    plan = read_plan(PLAN, "cpu")
    stage = replace(plan.stages[0], tasks=("shapes-unet",), variants=("minus SR",), first_seed=100)
    plan = replace(plan, stages=(plan.stages[0], stage), budget_hours=1e9)
    order, rows = [], {}
    while arm := next(plan.wanted(rows), None):
        order.append(arm)
        noise = {"preset": 0.0, "minus SR": 0.2}.get(arm.variant, 0.0) * (-1) ** arm.seed
        rows[arm] = {**run_row(arm.variant, arm.seed, 90.0 + noise), **arm.to_row()}
    confirmed = [arm for arm in order if arm.task == "shapes-unet" and arm.seed >= 100]
    assert [(arm.variant, arm.seed) for arm in confirmed] == [
        (variant, 100 + pair) for pair in range(6) for variant in ("baseline", "minus SR")
    ]  # sd 0.23 takes six pairs, and the preset, whose pairs do not differ, takes four
    assert {arm.seed for arm in order if arm.variant == "preset"} == set(range(4))
    assert table.summary(rows, confirmed[-1], plan)["to_go"] == 0
    del rows[confirmed[-1]]
    assert table.summary(rows, confirmed[1], plan)["to_go"] == 1


@pytest.mark.parametrize(
    ("score", "loss", "pairs"),
    [(-0.1, 1.1, 4), (0.0, 1.0, 4), (0.1, 1.1, 8), (-0.1, 0.9, 8)],
    ids=["worse in both", "the same", "a better score", "a better loss"],
)
def test_a_lever_that_is_better_in_nothing_ends_halfway(score, loss, pairs):
    plan = replace(read_plan(PLAN, "cpu"), budget_hours=1e9)
    lever, rows = "mean shift", {}
    while arm := next(plan.wanted(rows), None):
        gap, ratio = {"baseline": (0.0, 1.0), lever: (score - 1.0, loss * 1.2)}.get(arm.variant, (-1.0, 1.2))
        late = 5.0 if arm.variant == lever and arm.seed >= 4 else 0.0  # what comes later does not count
        row = run_row(arm.variant, arm.seed, 90.0 + gap + late)
        rows[arm] = {**row, **arm.to_row(), "tail_loss": row["tail_loss"] * ratio}
    assert [arm.seed for arm in rows if arm.variant == lever and arm.task == "shapes-unet"] == list(range(pairs))
    assert [arm.seed for arm in rows if arm.variant == "minus SR"] == list(range(8))


@pytest.mark.parametrize(
    ("levers", "expected"),
    [
        ({}, None),
        ({"A": (0.20, 0.0, 0.8)}, "A"),
        ({"A": (0.20, 0.0, 0.8), "B": (0.17, 0.0, 0.9)}, "B"),
        ({"A": (0.20, 0.0, 0.8), "B": (0.10, 0.0, 0.9)}, "A"),
        ({"A": (0.20, 0.0, 0.8), "B": (0.17, 0.0, 0.7)}, "A"),
        ({"A": (-0.20, 0.1, 0.8)}, "A"),
        ({"A": (0.20, 0.0, 0.8), "B": (0.0, 0.19, 0.9)}, "A"),
        ({"A": (0.0, 0.50, 0.8)}, None),
    ],
    ids=[
        "none is better", "a better score", "nearly as good, more FLOPs", "not nearly as good",
        "nearly as good, fewer FLOPs", "a better loss only", "a score goes before a loss", "a loss that is too small",
    ],
)  # fmt: skip
def test_a_better_preset_is_chosen_by_the_rule(levers, expected):
    plan = read_plan(PLAN, "cpu")
    names = {"A": "mean shift", "B": "delayed scales"}
    stage = next(stage for stage in plan.stages if stage.only_after_gap)
    given = {names[short]: gains for short, gains in levers.items()}

    def judged(pairs: int) -> list[choice.Judged]:
        rows = {}
        for variant in ("baseline", *stage.variants):
            score, loss, share = given.get(variant, (0.0, 0.0, 0.8) if variant == "preset" else (-0.1, -0.1, 0.8))
            for seed in range(pairs):
                noise = 0.0 if variant in ("baseline", "preset") else 0.01 * (-1) ** seed
                arm = plan.arm("shapes-unet", variant, seed)
                ratio = 1.0 if variant == "baseline" else 1.2 - loss + noise
                row = run_row(variant, seed, 90.0 + score + noise, tail_loss=ratio, nvfp4_flops_share=share)
                rows[arm] = row | arm.to_row()
        return choice.judged(rows, plan)

    best = choice.chosen(judged(8))
    assert (None if best is None else best.variant) == names.get(expected)
    assert [lever.variant for lever in judged(8)] == list(stage.variants[1:])
    states = {lever.variant: lever.state for lever in judged(7)}  # one pair is missing
    assert states == {name: "runs" if name in given else "ended halfway" for name in stage.variants[1:]}
    assert choice.chosen(judged(7)) is None


def test_levers_that_end_halfway_do_not_hold_up_the_choice():
    plan = read_plan(PLAN, "cpu")
    stage = next(stage for stage in plan.stages if stage.only_after_gap)
    rows = {}
    for variant in ("baseline", *stage.variants):
        better = 0.2 if variant == "mean shift" else 0.0
        for seed in range(8 if variant in ("baseline", "preset", "mean shift") else 4):
            arm = plan.arm("shapes-unet", variant, seed)
            noise = 0.001 * (-1) ** seed * (better > 0)
            rows[arm] = run_row(variant, seed, 90.0 + better + noise) | arm.to_row()
    best = choice.chosen(choice.judged(rows, plan))
    assert best is not None and best.variant == "mean shift"
    cells = {line[0]: line for line in choice.lines(rows, plan)}
    assert cells["mean shift"] == ["mean shift", "8", "+0.20 ± 0.00", "+0.000 ± 0.000", "90.0%", "**chosen**"]
    assert cells["delayed scales"][-1] == "ended halfway"


def test_no_run_starts_when_the_budget_is_spent():
    plan = replace(read_plan(PLAN, "cpu"), budget_hours=0.1)
    rows = table_of(*(run_row("baseline", s, 1.0) for s in range(5)))
    assert list(plan.wanted(rows))
    assert not list(plan.wanted(rows | table_of(run_row("preset", 0, 1.0))))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"variants": '["minus everything"]'}, "unknown variant[\\s\\S]*minus everything"),
        ({"tasks": '["cifar-vgg"]'}, "unknown task[\\s\\S]*cifar-vgg"),
        ({"epoch": "48"}, "unknown field of a stage[\\s\\S]*epoch"),
        ({"pairs": '"to the target"', "variants": '["preset", "minus SR"]'}, "one target and several variants"),
        ({"pairs": '"to the target"'}, "unknown task of \\[tasks\\][\\s\\S]*shapes-unet"),
        ({"variants": '["last 15 % of epochs in high precision"]', "epochs": "2"}, "2 epochs are too few"),
    ],
)
def test_a_plan_that_cannot_be_run_is_refused(changed, told, tmp_path):
    stage = {"title": '"a test"', "tasks": '["shapes-unet"]', "variants": '["preset"]', "pairs": "1"} | changed
    text = '[cpu]\ncompute = "fp32"\nbackend = "auto"\nfirst_pairs = 4\nbudget_hours = 1\n[cpu.tasks]\n[[cpu.stages]]\n'
    (tmp_path / "plan.toml").write_text(text + "".join(f"{key} = {value}\n" for key, value in stage.items()))
    with pytest.raises(ValueError, match=told):
        read_plan(tmp_path / "plan.toml", "cpu")
    with pytest.raises(ValueError, match="no such size"):
        read_plan(tmp_path / "plan.toml", "huge")


# ---- results files --------------------------------------------------------------------------------------------------


def test_rows_survive_a_kill_in_the_middle_of_a_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert read_rows([path]) == {}
    append_row(path, run_row("baseline", 0, 1.0))
    with path.open("a") as file:
        file.write('{"task": "shapes-u')
    assert list(read_rows([path])) == [ARM]
    append_row(path, run_row("preset", 0, 2.0))
    append_row(path, run_row("baseline", 0, 3.0))
    rows = read_rows([path])
    assert [row["score"] for row in rows.values()] == [3.0, 2.0] and len(path.read_text().splitlines()) == 3
    path.write_text("x\n" + path.read_text())
    with pytest.raises(ValueError, match="line 1"):
        read_rows([path])


def test_rows_are_collected_once(tmp_path):
    rows, results = tmp_path / "rows.jsonl", tmp_path / "docs" / "study.jsonl"
    for seed in range(3):
        append_row(rows, run_row("baseline", seed, 1.0))
        assert collect([rows], results) == (seed + 1, 1)
    assert collect([rows], results) == (3, 0)
    assert [json.loads(line)["seed"] for line in results.read_text().splitlines()] == [0, 1, 2]


def test_arms_have_file_names_of_their_own():
    arms = [replace(ARM, variant=name, seed=seed) for name in variants_of(ARM.task) for seed in (1, 11)]
    names = {arm.file_name for arm in arms}
    assert len(names) == len(arms) and all(re.fullmatch(r"[\w-]+", name) for name in names)


# ---- tables and plots -----------------------------------------------------------------------------------------------


def some_rows() -> dict[Arm, dict]:
    rows = [run_row("baseline", s, 50 + s, ema_score=51.0 + s) for s in range(4)]
    rows += [run_row("preset", s, 49 + s + s / 10, ema_score=50.0 + s, tail_loss=1.02) for s in range(4)]
    rows += [run_row("minus SR", 0, 40.0), run_row("minus SR", 1, 0.0, diverged=True)]
    return table_of(*rows)


def test_the_table_shows_gaps_and_what_remains(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    for row in some_rows().values():
        append_row(file, row)
    text = table.main([str(file)])
    assert text in capsys.readouterr().out and "**shapes-unet, cpu, 12 epochs, activations in fp32**" in text
    assert "| baseline | 4 | 51.50 | 52.50 |  |  |  |  | 90.0% |  |" in text
    line = "| preset | 4 | 50.65 | 51.50 | -0.85 ± 0.25 (0.13) | -1.00 ± 0.00 (0.00) * |  | 1.020 ± 0.000 | 90.0% | 0 |"
    assert line in text
    assert "| minus SR (1 diverged) | 1 | 40.00 | 40.00 | -10.00 | -11.00 |" not in text
    assert "| minus SR (1 diverged) | 1 | 40.00 | 40.00 | -10.00 * | -11.00 | -9.00 | 1.000 | 90.0% |  |" in text


def test_the_table_reads_the_small_study_of_before():
    files = sorted(PLAN.parent.glob("*_small_cpu.jsonl"))
    assert len(files) == 2
    text = table.main([str(path) for path in files])
    assert "**camvid-unet, small, 20 epochs, activations in fp32**" in text
    assert "| preset | 5 | 32.50 |  | -2.09 ± 3.06 (2.46) * |" in text
    learning_rate = next(line for line in text.splitlines() if line.startswith("| preset, learning rate x2 "))
    assert "-0.81 ± 9.84" in learning_rate


def test_pictures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "rows.jsonl"
    for row in some_rows().values():
        append_row(file, row)
    plots.main([str(file), "--out", str(tmp_path)])
    made = {path.name: path.read_text() for path in tmp_path.glob("*.svg")}
    assert set(made) == {"forest.svg", "curves_shapes-unet_cpu_fp32_12.svg"}
    plots.main([str(file), "--out", str(tmp_path / "again")])
    assert all((tmp_path / "again" / name).read_text() == content for name, content in made.items())


def test_a_variant_that_fails_is_written_and_does_not_flatten_the_other_gaps(tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "rows.jsonl"
    failed = table_of(*(run_row("minus RHT", s, 5.0 + s) for s in range(4)))
    for row in (some_rows() | failed).values():
        append_row(file, row)
    plots.main([str(file), "--out", str(tmp_path)])
    drawn = (tmp_path / "forest.svg").read_text()
    assert "\u2190 -46 \u00b1 0" in drawn and "\u221240" not in drawn  # no tick of the axis there
