"""One training step of a model, and what to compare of two: shared by the tests of this folder."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn


def step(model: nn.Module, x: Tensor, *context: Any) -> list[Tensor]:
    """Output, gradients and buffers of one training step."""
    torch.manual_seed(1)
    random.seed(1)
    model.zero_grad()
    if context:
        with context[0]:
            y = model(x)
    else:
        y = model(x)
    y = y["out"] if isinstance(y, dict) else y
    y.float().square().mean().backward()
    return [
        y.detach(),
        *(p.grad for p in model.parameters() if p.grad is not None),
        *(b.clone() for b in model.buffers()),
    ]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def near(a: list[Tensor], b: list[Tensor]) -> bool:
    """Without batch statistics a weight's gradient may differ in its last bit."""
    return len(a) == len(b) and all(torch.allclose(x, y, rtol=1e-5, atol=1e-6) for x, y in zip(a, b, strict=True))


def nodes(y: Tensor, kind: str) -> int:
    """How many autograd nodes of this class name lie behind y."""
    seen, todo = set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [other for other, _ in node.next_functions]
    return sum(kind in type(node).__name__ for node in seen)
