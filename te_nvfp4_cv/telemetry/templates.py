"""Fill the HTML templates that lie beside this file; whatever goes into them is escaped.

report.html    several runs side by side: what report.py writes
picture.html   one interactive picture: what heatmaps.py writes
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any


@cache
def _environment() -> Any:
    import jinja2

    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    # StrictUndefined: a name that nobody gives is an error, and not an empty place in the page.
    return jinja2.Environment(
        loader=folder, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def fill(name: str, **values: Any) -> str:
    """Return the template of that name, filled with the values.

    Text of a run (layers, names, recipes) is given as it is, because the template escapes it.
    """
    return str(_environment().get_template(name).render(**values))
