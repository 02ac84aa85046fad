"""The report and the interactive pictures as a real browser shows them, on a desk and on a phone.

Measured are texts that overlap or stick out, axes without anything in them, pages that scroll sideways, and a toolbar
that covers the title. The screenshots are left in pytest's folder, to be looked at.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from te_nvfp4_cv.telemetry import render_heatmaps, write_report
from tests.browser import Browser, Page, find_browser
from tests.telemetry.synthetic_runs import write_run

for package in ("matplotlib", "plotly", "jinja2"):
    pytest.importorskip(package, reason="needs the extra [telemetry]")
pytestmark = pytest.mark.skipif(find_browser() is None, reason="no Chromium here (apt install chromium)")

WIDTHS = pytest.mark.parametrize("width", (1400, 420))
# Each text that is seen, of HTML and of SVG, with the box around its letters, and whether a table's window holds it.
TEXTS = """(() => { const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = []
  while (walk.nextNode()) {
    const text = walk.currentNode, on = text.parentElement, range = document.createRange()
    if (!text.data.trim() || on.closest('script') || !on.checkVisibility({opacityProperty: true})) continue
    range.selectNode(text)
    const b = range.getBoundingClientRect()
    found.push([text.data.trim().slice(0, 40), b.left, b.top, b.right, b.bottom, !!on.closest('.scroll')]) }
  return found })()"""
BOXES = """(names => names.map(n => { const b = document.querySelector(n).getBoundingClientRect()
  return [b.top, b.bottom] }))"""


def faults(page: Page, width: int) -> list[str]:
    """Return what is wrong with the texts and the width of a page."""
    found = []
    wide = page.value("document.documentElement.scrollWidth")
    if wide > width:
        found.append(f"the page is {wide} wide: it scrolls sideways")
    texts = page.value(TEXTS)
    boxes = np.array([text[1:5] for text in texts], float)
    found += [
        f"{text[0]!r} sticks out" for text in texts if not text[5] and (text[1] < -1 or text[3] > width + 1)
    ]  # what lies in a table's own window may stick out: it is scrolled there
    near = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:]) - np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    for i, j in np.argwhere((near > 1.5).all(axis=-1)):  # letters do not fill their boxes: they may touch
        if i < j:
            found.append(f"{texts[i][0]!r} lies on {texts[j][0]!r}")
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the report of two runs and the pictures of one."""
    folder = tmp_path_factory.mktemp("pages")
    names = ["backbone.layer3.22.downsample.conv1", "down.0.conv", "mid", "up.0", "head"]
    runs = [
        write_run(folder / f"{name}.jsonl", steps=5, name=name, names=names, high=name == "bf16")
        for name in ("bf16", "nvfp4")
    ]
    write_report(runs, folder / "report.html")
    render_heatmaps(runs[1], folder)
    return folder


@WIDTHS
def test_the_report_fills_the_page_and_no_text_lies_on_another(width, browser, pages):
    page = browser.open(pages / "report.html", width)
    page.picture(pages / f"report_{width}.png")
    assert not faults(page, width)
    images = page.value("[...document.images].map(i => [i.naturalWidth, i.width, i.getBoundingClientRect().right])")
    assert len(images) > 12 and all(natural > 0 for natural, _, _ in images)
    # A letter of size 8 is 8 / 72 of an inch, so in a picture of 5.6 inches 2 % of its width: 7 pixels or more.
    assert all(shown > 350 for _, shown, _ in images)
    assert max(right for _, _, right in images) > 0.95 * width


@WIDTHS
@pytest.mark.parametrize("name", ["prequantize/mean", "quantized/usage", "correlation"])
def test_an_interactive_picture_shows_its_values_below_title_and_toolbar(name, width, browser, pages):
    page = browser.open(pages / "heatmaps" / "UNet-nvfp4" / "weights" / f"{name}.html", width)
    page.picture(pages / f"{name.replace('/', '_')}_{width}.png")
    assert not faults(page, width)
    drawn = "path.js-line" if name == "correlation" else ".heatmaplayer image"
    boxes = page.value(f"{BOXES}(['h1', 'body > p:last-of-type', '.modebar', '{drawn}'])")
    assert all(top < bottom for top, bottom in boxes), "an axis without values"
    ends, starts = [bottom for _, bottom in boxes[:-1]], [top for top, _ in boxes[1:]]
    assert all(end <= start + 1 for end, start in zip(ends, starts, strict=True)), boxes


def test_no_axes_of_the_report_are_empty(browser, pages):
    page = browser.open(pages / "report.html", 1400)
    count = page.value("document.images.length")
    for number in range(count):
        # What a picture shows of values has a colour; axes, grids and texts have none.
        share = page.value(f"""(() => {{ const c = document.createElement('canvas'), i = document.images[{number}];
            c.width = i.naturalWidth; c.height = i.naturalHeight; const x = c.getContext('2d'); x.drawImage(i, 0, 0);
            const d = x.getImageData(0, 0, c.width, c.height).data; let n = 0;
            for (let k = 0; k < d.length; k += 4)
              n += Math.max(d[k], d[k+1], d[k+2]) - Math.min(d[k], d[k+1], d[k+2]) > 60;
            return 4 * n / d.length }})()""")
        assert share > 0.001, page.value(f"document.images[{number}].alt")


def test_what_is_wrong_is_found(browser, tmp_path):
    """A page with one text on another, one that sticks out, and one that makes it scroll sideways."""
    place = "position:absolute;top"
    (tmp_path / "bad.html").write_text(
        '<!DOCTYPE html><meta name="viewport" content="width=device-width">'
        f'<p style="{place}:9px">under</p><p style="{place}:14px">over</p><p style="{place}:90px;left:-20px">left</p>'
        '<svg style="position:absolute;top:200px" width="900" height="90"><text x="700" y="40">right</text></svg>'
    )
    page = browser.open(tmp_path / "bad.html", 420)
    page.picture(tmp_path / "bad.png")
    found = " ".join(faults(page, 420))
    for fault in ("scrolls sideways", "'under' lies on 'over'", "'left' sticks out", "'right' sticks out"):
        assert fault in found
    assert Image.open(io.BytesIO((tmp_path / "bad.png").read_bytes())).width >= 420
