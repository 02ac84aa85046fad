"""examples/tables.py: the tables of the README and of docs/RESULTS.md come from raw rows, each figure of them."""

from __future__ import annotations

import json
import re

import pytest

from tests.examples import unet_coco_data as _  # noqa: F401  (puts examples/ on sys.path)

pytest.importorskip("scipy")

import tables  # noqa: E402


def test_the_pages_have_the_tables_that_the_rows_give(capsys):
    assert tables.main(["--check"]) == 0, capsys.readouterr().out
    for page in tables.PAGES:
        names = re.findall(r"<!-- table: (\w+) -->", page.read_text(encoding="utf-8"))
        assert names, page
        assert all(len(tables.TABLES[name]()) > 3 for name in names)  # a head, its line, and two rows at least


BYTES = {"bf16": 400, "nvfp4": 200, "bf16, half the size": 200, "nvfp4, half the size": 50}


def row(table, case, **values):
    return {"table": table, "case": case, "values": values, "kernels": "avx2", "threads": 1}


@pytest.fixture
def rows(monkeypatch, tmp_path):
    """A function that writes rows of benchmarks, which the tables then read. Runs of the study stay as they are."""
    (tmp_path / "results").mkdir()
    (tmp_path / "accuracy").symlink_to(tables.DOCS / "accuracy")
    monkeypatch.setattr(tables, "DOCS", tmp_path)

    def write(*lines):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / "results" / "measured.jsonl").write_text(text)

    return write


def test_the_last_row_of_a_case_counts_and_ratios_are_of_one_run(rows):
    rows(
        row("training", "big", fp32=100.0, integer=90.0),
        row("training", "big", fp32=200.0, integer=120.0),
        row("training", "small", fp32=100.0, integer=80.0),
        row("training", "big", bf16=50.0, auto=60.0),
        row("evaluation", "big", fp32=10.0, integer=7.0),
        row("training", "resnet50", fp32=100.0, vendor=130.0),  # nothing of ours to compare
    )
    speed = tables.speed_table()
    assert [line.split(" | ")[2:] for line in speed[2:]] == [
        ["fp32 100 ms", "80 ms", "0.80 |"],  # sorted by the kind of work, the machine, the network
        ["fp32 200 ms", "120 ms", "0.60 |"],
        ["bf16 50 ms", "60 ms", "1.20 |"],
        ["fp32 10 ms", "7 ms", "0.70 |"],
    ]
    times = [line for line in tables.readme_table() if line.startswith("| time")]
    assert [line.split(" | ")[1:] for line in times] == [["fp32: 1", "0.60 to 0.80 |"], ["bf16: 1", "1.20 to 1.20 |"]]


def test_memory_of_large_images_is_the_growth_between_two_sizes(rows):
    rows(row("memory", "resnet50", **BYTES))
    assert tables.memory_table()[2].endswith("| 0.50 | 0.75 |")
    assert tables.readme_table()[-1].endswith("| 0.50 and 0.75 |")


def test_another_figure_in_a_page_is_found(rows, monkeypatch, tmp_path, capsys):
    rows(row("memory", "resnet50", **BYTES))
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n<!-- table: memory -->\n<!-- end of the table -->\n\nIts end.\n")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "PAGES", (page,))
    assert tables.main(["--check"]) == 1 and "0.50" not in page.read_text()
    assert tables.main([]) == 0 and "| 0.50 | 0.75 |" in page.read_text()
    assert tables.main(["--check"]) == 0
    assert page.read_text().startswith("# A page\n\n<!--") and page.read_text().endswith("-->\n\nIts end.\n")
    page.write_text(page.read_text().replace("0.75", "0.57"))
    assert tables.main(["--check"]) == 1
    assert "page.md has other tables" in capsys.readouterr().out.replace(":", "")
