"""Choose the layers to leave in high precision: the worst first, as long as they fit into a budget."""

from __future__ import annotations

from collections.abc import Sequence

from te_nvfp4_cv.errors import value_error


def check_share(caller: str, name: str, share: object) -> float:
    """Return a share of the FLOPs that a user gave.

    Raises:
        ValueError: It is no number from 0 to 1.
    """
    # True is an integer in Python, and surely a mistake here.
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
        raise value_error(f"{caller}: bad {name}.", got=repr(share), needs="a share, 0 to 1", fix=f"{name}=0.1")
    return float(share)


def worst_within(scores: Sequence[float], costs: Sequence[float], limit: float) -> list[int]:
    """Return the indices of the layers with the highest scores above 0 whose costs fit into the limit together.

    A layer that does not fit any more is passed over. The best subset would be a knapsack problem, and scores do not
    add up exactly.
    """
    chosen = []
    for index in sorted(range(len(scores)), key=lambda index: scores[index], reverse=True):
        if scores[index] > 0 and costs[index] <= limit:
            chosen.append(index)
            limit -= costs[index]
    return chosen
