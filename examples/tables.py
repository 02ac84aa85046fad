"""Write the tables of README.md and of the results' pages from raw rows, so that no figure in them is typed.

    python examples/tables.py              or: make tables
    python examples/tables.py --check      change nothing; exit status 1 if a page has other tables than the rows give

    docs/accuracy/study.jsonl              runs of the accuracy study (examples/accuracy/study.py)
    docs/accuracy/*_small_cpu.jsonl        runs of the smaller study before it, for tasks that the study has not yet
    docs/accuracy/why.jsonl                networks that were examined (examples/accuracy/why.py)
    docs/results/measured.jsonl            what benchmarks measured with --keep; the last row of a case counts

A page says where a table goes: between the lines <!-- table: NAME --> and <!-- end of the table -->.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from accuracy import choice  # noqa: E402
from accuracy.pairs import FIXED, PLANNED  # noqa: E402
from accuracy.plan import read_plan  # noqa: E402
from accuracy.rows import read_rows  # noqa: E402
from accuracy.table import kinds, markdown, shown, summary  # noqa: E402

DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", DOCS / "RESULTS.md", *(DOCS / "results" / f"{page}.md" for page in ("accuracy", "why")))
TASKS = {
    "cifar-resnet20": "ResNet-20 on CIFAR-10",
    "shapes-unet": "UNet on drawn shapes (mIoU)",
    "camvid-unet": "UNet on CamVid (mIoU)",
    "cifar-resnet18": "ResNet-18 on CIFAR-10",
    "cifar-resnet10": "ResNet-10 on CIFAR-10",
    "cifar-mobilenet": "MobileNetV2 style on CIFAR-10",
}
CASES = {
    "big": "UNet, 64x64",
    "small": "UNet of a quarter of the width, 128x128",
    "resnet50": "ResNet-50, 96x96",
    "conv input": "input of a convolution",
    "resnet50_96": "ResNet-50, 96x96",
    "resnet50_1": "ResNet-50, 224x224",
    "deeplabv3_resnet50": "DeepLabV3 on ResNet-50",
    "densenet121": "DenseNet-121",
}
FORMATS = {
    "preset": "NVFP4",
    "MXFP4": "MXFP4",
    "UE5M3 scales, no tensor scale": "UE5M3 scales, no tensor scale",
    "UE5M3 scales, no tensor scale, loss times 2^20": "the same, the loss times 2^20",
    "E4M3 scales, no tensor scale, loss times 2^20": "E4M3 scales, no tensor scale, the loss times 2^20",
}
KERNELS = {"avx2": "AVX2", "avx_vnni": "AVX-VNNI", "avx512_vnni": "AVX-512"}
WORK = {"training": "training step", "evaluation": "evaluation", "inference": "exported network"}
Lines = list[str]


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Read rows of benchmarks, keeping the last one of each table, case, kernels, threads and set of variants."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found[row["table"], row["case"], row["kernels"], row["threads"], *sorted(row["values"])] = row
    return list(found.values())


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> Lines:
    """Return a table in Markdown."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines)]


def accuracies() -> list[dict[str, Any]]:
    """Return what is known of the default preset: one summary a task, of the study where it has three pairs or more."""
    study = [DOCS / "accuracy" / "study.jsonl"]
    small = sorted((DOCS / "accuracy").glob("*_small_cpu.jsonl"))
    found: dict[str, dict[str, Any]] = {}
    for paths, plan in ((small, None), (study, read_plan(DOCS / "accuracy" / "plan.toml", "cpu"))):
        rows = read_rows(paths)
        for kind, variants in kinds(rows).items():
            if "preset" not in variants:
                continue
            is_planned = plan is not None and plan.has_target(replace(kind, variant="preset"))
            mine = summary(rows, replace(kind, variant="preset"), plan)
            base = summary(rows, kind, None)
            score = mine["decides"]
            if mine["pairs"] > 2 and score in base:
                mine |= {"task": kind.task, "steps": "study" if plan else "small", "base": base[score]}
                mine |= {"gap": mine["gaps"][score], "level": PLANNED if is_planned else FIXED}
                found[kind.task] = mine
    return [found[task] for task in TASKS if task in found]


def accuracy_table() -> Lines:
    """Return the table of accuracies: what the preset scores beside fp32."""
    head = ["network and data", "pairs", "fp32", "NVFP4 - fp32", "training loss, ratio", "FLOPs in NVFP4"]
    lines = []
    for s in accuracies():
        pairs = f"{s['pairs']}" + (f" of {s['pairs'] + s['to_go']}" if s.get("to_go") else "")
        share = f"{s['flops']:.1%}" if s.get("flops") else ""
        size = "" if s["steps"] == "study" else ", small runs"
        cells = [TASKS[s["task"]] + size, pairs, f"{s['base']:.1f}", shown(*s["gap"][:2]), f"{s['loss_ratio']:.3f}"]
        lines.append([*cells, share])
    return table(head, lines)


def study_tables() -> Lines:
    """Return all that the study's rows give, a table a task."""
    plan = read_plan(DOCS / "accuracy" / "plan.toml", "cpu")
    return markdown(read_rows([DOCS / "accuracy" / "study.jsonl"]), {"cpu": plan}).strip().splitlines()


def choice_table() -> Lines:
    """Return the table of levers beside the default preset, by which a better one is chosen."""
    plan = read_plan(DOCS / "accuracy" / "plan.toml", "cpu")
    return table(choice.HEAD, choice.lines(read_rows([DOCS / "accuracy" / "study.jsonl"]), plan))


def formats_table() -> Lines:
    """Return the table of FP4 formats: the UNet on drawn shapes, trained in each."""
    rows = read_rows([DOCS / "accuracy" / "study.jsonl"])
    kind = read_plan(DOCS / "accuracy" / "plan.toml", "cpu").arm("shapes-unet", "baseline")
    lines = []
    for variant, name in FORMATS.items():
        s = summary(rows, replace(kind, variant=variant), None)
        to_nvfp4 = shown(*s["against_preset"][:2]) if s.get("against_preset") else ""
        loss = f"{s['loss_ratio']:.3f} ± {s['loss_half']:.3f}"
        lines.append([name, str(s["pairs"]), shown(*s["gaps"][s["decides"]][:2]), to_nvfp4, loss])
    return table(["format", "pairs", "to fp32, points of mIoU", "to NVFP4", "training loss, ratio to fp32"], lines)


def memory_table() -> Lines:
    """Return the table of bytes that autograd keeps for backward."""
    lines = []
    for row in rows_of(DOCS / "results" / "measured.jsonl"):
        if row["table"] != "memory":
            continue
        bf16, ours = row["values"]["bf16"], row["values"]["nvfp4"]
        large = (ours - row["values"]["nvfp4, half the size"]) / (bf16 - row["values"]["bf16, half the size"])
        name = CASES.get(row["case"], row["case"]).split(",")[0]  # the head of the table has the size
        lines.append([name, f"{bf16 / 2**20:.1f} MiB", f"{ours / 2**20:.1f} MiB", f"{ours / bf16:.2f}", f"{large:.2f}"])
    return table(["batch of 16 at 64x64", "bf16", "NVFP4", "NVFP4 / bf16", "the same, large images"], lines)


def speed_table() -> Lines:
    """Return the table of times: one line a kind of work, machine and network."""
    lines = []
    for row in rows_of(DOCS / "results" / "measured.jsonl"):
        peer, ours = peers(row["values"])
        if row["table"] not in WORK or not ours:
            continue
        values, case = row["values"], row["case"].split(",")[0]
        where = f"{KERNELS.get(row['kernels'], row['kernels'])}, {row['threads']} thread" + "s" * (row["threads"] > 1)
        where += ", bf16 autocast" * (peer == "bf16")
        what = f"{WORK[row['table']]}: {CASES.get(case, case)}"
        lines.append([what, where, f"{peer} {_short(values[peer])} ms", f"{_short(values[ours])} ms", _ratio(row)])
    return table(["work", "machine", "full precision", "NVFP4", "ratio"], sorted(lines, key=_order))


def _short(ms: float) -> str:
    """Return three digits, and all those before the point."""
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


def _order(cells: Sequence[str]) -> tuple[int, str, str]:
    """Sort by the kind of work in WORK's order, then by machine and network."""
    return [cells[0].startswith(f"{name}:") for name in WORK.values()].index(True), cells[1], cells[0]


def peers(values: dict[str, float]) -> tuple[str, str]:
    """Return which variant is full precision and which is ours: fp32 beside integer, or bf16 beside auto."""
    for peer, ours in (("bf16", "auto"), ("fp32", "integer"), ("fp32", "nvfp4 cached")):
        if peer in values and ours in values:
            return peer, ours
    return "", ""


def _ratio(row: dict[str, Any]) -> str:
    peer, ours = peers(row["values"])
    return f"{row['values'][ours] / row['values'][peer]:.2f}"


def readme_table() -> Lines:
    """Return the README's table: accuracy in the study, time and memory, a line each."""
    lines = []
    for s in accuracies():
        if s["steps"] == "study":
            what = f"accuracy: {TASKS[s['task']]}, {s['pairs']} pairs"
            gap = f"{shown(*s['gap'][:2])} points, {100 * s['flops']:.0f} % of FLOPs in NVFP4"
            lines.append([what, f"fp32: {s['base']:.1f} %", gap])
    rows = rows_of(DOCS / "results" / "measured.jsonl")
    for kernels, name in KERNELS.items():
        for peer, more in (("fp32", ""), ("bf16", " and units for bf16")):
            mine = [
                row for row in rows if row["table"] == "training" and row["kernels"] == kernels and row["threads"] == 1
            ]
            ratios = sorted(_ratio(row) for row in mine if peers(row["values"])[0] == peer)
            if ratios:
                what = f"time: a training step on one CPU core with {name}{more}"
                lines.append([what, f"{peer}: 1", f"{ratios[0]} to {ratios[-1]}"])
    for row in rows:
        if row["table"] == "memory" and row["case"] == "resnet50":
            bf16, ours = row["values"]["bf16"], row["values"]["nvfp4"]
            large = (ours - row["values"]["nvfp4, half the size"]) / (bf16 - row["values"]["bf16, half the size"])
            what = "memory for backward: ResNet-50, small and large images"
            lines.append([what, "bf16: 1", f"{ours / bf16:.2f} and {large:.2f}"])
    return table(["", "full precision", "NVFP4"], lines)


def why_tables() -> Lines:
    """Return the tables of each network that was examined."""
    from accuracy.why import table as one  # needs torchvision

    rows = (DOCS / "accuracy" / "why.jsonl").read_text(encoding="utf-8").splitlines()
    return "\n".join(one(json.loads(row)) for row in rows).splitlines()


TABLES: dict[str, Callable[[], Lines]] = {
    "readme": readme_table,
    "accuracy": accuracy_table,
    "study": study_tables,
    "choice": choice_table,
    "formats": formats_table,
    "memory": memory_table,
    "speed": speed_table,
    "why": why_tables,
}


def filled(text: str) -> str:
    """Return a page's text with its tables made anew."""

    def made(match: re.Match[str]) -> str:
        return "\n".join([f"<!-- table: {match[1]} -->", *TABLES[match[1]](), "<!-- end of the table -->"])

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end of the table -->", made, text, flags=re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the tables into the pages, or with --check say which pages have others; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--check", action="store_true", help="change nothing, and fail if something would change")
    options = parser.parse_args(arguments)
    status = 0
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = filled(before)
        if before == after:
            continue
        print(f"{page.relative_to(ROOT)}: {'has other tables than the rows give' if options.check else 'written'}")
        status = int(options.check)
        if not options.check:
            page.write_text(after, encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
