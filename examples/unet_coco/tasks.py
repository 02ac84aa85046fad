"""List the tasks by their names on the command line."""

from __future__ import annotations

from .detection import Detection
from .instance import Instance
from .options import Settings
from .semantic import Semantic
from .split import SegmentationData
from .task import Task

KINDS: dict[str, type[Task]] = {"semantic": Semantic, "instance": Instance, "detection": Detection}


def make_task(settings: Settings, data: SegmentationData) -> Task:
    """Create the task of --task on these data.

    Raises:
        ValueError: If the task cannot learn from the data.
    """
    return KINDS[settings.task](settings, data)
