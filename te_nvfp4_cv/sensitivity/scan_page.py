"""Write the page of a scan: two pictures and the ranked table, in one HTML file without scripts.

The pictures are SVG made here, so that nothing needs to be installed for them: each layer's score in the order in which
layers run, and the cost of a layer beside its score. Names come from the user's model and are escaped.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

LEFT, WIDTH, ROW = 260, 560, 18  # pixels: names, bars, one layer
COLOURS = {True: "#D55E00", False: "#0072B2"}  # to spare; to quantize
STYLE = (
    "body{font:14px/1.45 system-ui,sans-serif;color:#222;margin:24px auto;padding:0 24px;max-width:1100px}"
    "svg{max-width:100%;height:auto}svg text{font:12px system-ui,sans-serif}"
    "table{border-collapse:collapse}th,td{border:1px solid #ddd;padding:3px 8px;text-align:right}"
    "th:first-child,td:first-child{text-align:left}tr.spared td{background:#fbe5d9}"
)


class Bar(NamedTuple):
    """One layer: its name and kind, its score, its share of the FLOPs, whether the suggestion spares it."""

    name: str
    op: str
    score: float
    flops: float
    spared: bool


def page(title: str, bars: Sequence[Bar], lines: Iterable[str]) -> str:
    """Return the page.

    Args:
        title: what was scanned.
        bars: the layers in the order in which they ran.
        lines: texts to show above the pictures.
    """
    ranked = sorted(bars, key=lambda bar: bar.score, reverse=True)
    rows = "".join(
        f'<tr{" class=spared" if bar.spared else ""}><td>{_text(bar.name)}</td><td>{_text(bar.op)}</td>'
        f"<td>{bar.flops:.1%}</td><td>{bar.score:.3g}</td></tr>"
        for bar in ranked
    )
    head = "<tr><th>layer</th><th>operator</th><th>FLOPs</th><th>score</th></tr>"
    notes = "".join(f"<p>{_text(line)}</p>" for line in lines)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        f"<style>{STYLE}</style></head><body><h1>{_text(title)}</h1>{notes}"
        "<p>Orange: the layers that the suggestion leaves in high precision.</p>"
        f"<h2>Scores, in the order in which layers run</h2>{_bars(bars)}"
        f"<h2>Score and cost</h2>{_points(bars)}"
        f"<h2>Ranked</h2><table>{head}{rows}</table></body></html>\n"
    )


def _text(value: object) -> str:
    return html.escape(str(value))


def _top(scores: Iterable[float]) -> float:
    """Return the largest finite score, or 1 if there is none above 0."""
    return max((score for score in scores if math.isfinite(score) and score > 0), default=1.0)


def _height(score: float, top: float) -> float:
    """Return a score as a share of the largest one; a score that is not finite is drawn like the largest."""
    return min(max(score, 0.0) / top, 1.0) if math.isfinite(score) else 1.0


def _bars(bars: Sequence[Bar]) -> str:
    top, parts = _top(bar.score for bar in bars), []
    for index, bar in enumerate(bars):
        y, width = index * ROW, WIDTH * _height(bar.score, top)
        name = bar.name if len(bar.name) <= 36 else f"…{bar.name[-35:]}"
        parts.append(
            f'<text x="{LEFT - 8}" y="{y + 13}" text-anchor="end">{_text(name)}</text>'
            f'<rect x="{LEFT}" y="{y + 2}" width="{width:.1f}" height="{ROW - 4}" fill="{COLOURS[bar.spared]}">'
            f"<title>{_text(bar.name)}: {bar.score:.3g}</title></rect>"
            f'<text x="{LEFT + width + 6:.1f}" y="{y + 13}">{bar.score:.3g}</text>'
        )
    return _svg(LEFT + WIDTH + 90, len(bars) * ROW + 4, parts, "scores of the layers")


def _points(bars: Sequence[Bar]) -> str:
    height, top, most = 300, _top(bar.score for bar in bars), max((bar.flops for bar in bars), default=0) or 1.0
    parts = [
        f'<path d="M60 10V{height}H{60 + WIDTH}" fill="none" stroke="#888"/>'
        f'<text x="{60 + WIDTH}" y="{height + 18}" text-anchor="end">share of the FLOPs, up to {most:.1%}</text>'
        f'<text x="60" y="{height + 18}">0</text><text x="54" y="20" text-anchor="end">{top:.2g}</text>'
    ]
    for bar in bars:
        x, y = 60 + WIDTH * bar.flops / most, height - (height - 14) * _height(bar.score, top)
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{COLOURS[bar.spared]}" fill-opacity="0.75">'
            f"<title>{_text(bar.name)}: score {bar.score:.3g}, {bar.flops:.1%} of the FLOPs</title></circle>"
        )
    return _svg(80 + WIDTH, height + 26, parts, "score of each layer over its share of the FLOPs")


def _svg(width: int, height: int, parts: Sequence[str], label: str) -> str:
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{label}" {size}>{"".join(parts)}</svg>'
