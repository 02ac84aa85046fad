"""Fixtures of the tests of layers."""

from __future__ import annotations

from typing import Any

import pytest

from te_nvfp4_cv.layer import check, execute
from te_nvfp4_cv.layer.plan import Plan


@pytest.fixture
def plans(monkeypatch) -> list[Plan]:
    """The Plan of each call, as calls happen."""
    found: list[Plan] = []

    def planned(*arguments: Any) -> Plan:
        found.append(check.planned(*arguments))
        return found[-1]

    monkeypatch.setattr(execute, "planned", planned)
    return found
