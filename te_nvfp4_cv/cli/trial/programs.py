"""The checks of the same step in other programs: compiled, checkpointed, both, fused, averaged, in channels_last."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._functorch.config
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from te_nvfp4_cv.cli.trial.cells import SLACK, Cell, Finding, NotHere, Trial, counted, in_words, plainly
from te_nvfp4_cv.cli.trial.subject import descend, evaluate, same, seeded
from te_nvfp4_cv.fusion.fuse import fuse
from te_nvfp4_cv.nn.walk import LAYERS
from te_nvfp4_cv.ops.layouts import CHANNELS_LAST

COMPILER = "aot_eager"  # traces, differentiates and partitions as every backend does, and compiles no kernels
LAYER = "te_nvfp4_cv::layer"  # the node of a graph that is one layer's forward pass
os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler writes two lines to stderr each time
PASSES = 4
REGION = "Torch-Compiled Region"  # the profiler's name for a graph that runs
# What libraries call it: timm, diffusers, transformers.
METHODS = ("set_grad_checkpointing", "enable_gradient_checkpointing", "gradient_checkpointing_enable")


# ---- torch.compile --------------------------------------------------------------------------------------------------


def compiled(trial: Trial) -> Cell:
    """Compile the model: as many graphs as plain torch needs, every layer of the eager step in them, and its values."""
    return _compiled(trial, lambda model: model)


def checkpointed(trial: Trial) -> Cell:
    """Checkpoint the model's blocks: the gradients of the step without it."""
    plainly(lambda: trial.step(_checkpointing(trial.copy())), "torch")
    model = _checkpointing(trial.copy())
    with counted() as calls:
        found = trial.step(model, trial.context())
    # What backward repeats is told, too: at most everything once more.
    if not trial.calls <= len(calls) <= 2 * trial.calls:
        raise Finding(f"{len(calls)} calls in NVFP4, with repetitions; {trial.calls} without checkpoints")
    return Cell(True, trial.compared(found))


def compiled_checkpointed(trial: Trial) -> Cell:
    """Compile the model with its blocks checkpointed: the forward graph holds every layer of the eager step."""
    return _compiled(trial, _checkpointing)


def _compiled(trial: Trial, prepared: Callable[[nn.Module], nn.Module]) -> Cell:
    found, layers, graphs, broken = None, 0, 0, ""
    for full in (True, False):
        try:
            found, layers, graphs = _compile(trial, prepared(trial.copy()), full, nvfp4=True)
            break
        except Exception as error:  # torch's own errors, and those of the code that it traces
            broken = broken or in_words(error)
            if not full:
                plainly(lambda: _compile(trial, prepared(trial.copy()), False, nvfp4=False), "torch")
                raise
    assert found is not None
    if broken:
        # One graph where plain torch has one, and no more than its number elsewhere.
        _, _, usual = plainly(lambda: _compile(trial, prepared(trial.copy()), False, nvfp4=False), "torch")
        if graphs > usual:
            raise Finding(f"{graphs} graphs, {usual} of plain torch: {broken}")
    if layers != trial.calls:
        raise Finding(f"{layers} of {trial.calls} layers in NVFP4")
    kept = trial.compared(found)
    return Cell(True, kept if graphs < 2 else f"{kept}, {graphs} graphs")


# Else a layer that is called twice on equal inputs, as diffusers' DiT does, is one node.
@torch._functorch.config.patch(cse=False)
def _compile(trial: Trial, model: nn.Module, full: bool, nvfp4: bool) -> tuple[Any, int, int]:
    """Return a step of the compiled model, how many layers of its forward pass ran in NVFP4, and in how many graphs."""
    torch.compiler.reset()
    try:
        called: Any = torch.compile(model, backend=COMPILER, fullgraph=full)
        context: Callable[[], Any] = trial.context if nvfp4 else torch.enable_grad
        # Watched from the beginning: a graph made without an observer would be made again for one.
        with counted() as calls:
            found = trial.step(model, context(), called)
            layers = graphs = 0
            for _ in range(PASSES):
                calls.clear()
                args, kwargs = trial.subject.training_call()
                seeded()
                with torch.autograd.profiler.profile(use_kineto=False) as profiler, context():
                    called(*args, **kwargs)
                events = [event.name for event in profiler.function_events or ()]
                # Eager calls between the graphs go past the dispatcher, so the profiler sees those of the graphs alone.
                layers, graphs = events.count(LAYER) + len(calls), sum(name.startswith(REGION) for name in events)
                if layers == trial.calls:  # else it may have been traced again, which calls every operator, too
                    break
        return found, layers, graphs
    finally:
        torch.compiler.reset()


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def _checkpointing(model: nn.Module) -> nn.Module:
    """Checkpoint a model's blocks by the method that its library has, or else its first children that hold layers."""
    for name in METHODS:
        method = getattr(model, name, None)
        if method is not None:
            try:
                method()
                return model
            except (ValueError, NotImplementedError, AssertionError, TypeError):  # the class has it, not this model
                pass
    for block in list(_blocks(model)) or [model]:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
    return model


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that are called one after the other: below lone children and lists, those that hold layers."""
    children = [child for child in model.children() if any(isinstance(m, LAYERS) for m in child.modules())]
    for child in children:
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)) or (len(children) == 1 and not isinstance(child, LAYERS)):
            yield from _blocks(child)
        elif isinstance(child, nn.Sequential):
            yield child
        elif not isinstance(child, LAYERS):
            yield child


# ---- changes of the model -------------------------------------------------------------------------------------------


def fused(trial: Trial) -> Cell:
    """Fuse norms with what follows them: the step's values stay."""
    model = trial.copy()
    report = fuse(model, report=True)
    if not report.rows:
        raise NotHere("no norms")
    count = f"{report.fused}/{len(report.rows)}"
    trial.compared(trial.step(model, trial.context()), f"{count}: ")
    return Cell(True, count)


def averaged(trial: Trial) -> Cell:
    """Average weights while they are trained: the average evaluates as a new model with its values does."""
    model = trial.copy()
    average = plainly(lambda: AveragedModel(model, use_buffers=True), "torch")
    for _ in range(2):
        trial.step(model, trial.context())
        descend(model)
        average.update_parameters(model)
        found = evaluate(average, trial.subject, trial.context())
    fresh = trial.copy()
    fresh.load_state_dict(average.module.state_dict())
    if not same(found, evaluate(fresh, trial.subject, trial.context())):
        if not same(evaluate(average, trial.subject), evaluate(fresh, trial.subject)):
            raise NotHere("torch: the copy evaluates differently")
        raise Finding("the average evaluates with old weights")
    return Cell(True, "equal bits")


def channels_last(trial: Trial) -> Cell:
    """Train in channels_last: the gradient is as near to high precision."""
    sizes: list[Any] = [getattr(m, "kernel_size", ()) for m in trial.base.modules() if isinstance(m, LAYERS)]
    ranks = {len(size) for size in sizes}
    wanted = [CHANNELS_LAST[rank] for rank in sorted(ranks) if rank in CHANNELS_LAST]
    if not wanted:
        raise NotHere("no images")

    def laid_out() -> nn.Module:
        model = trial.copy()
        # A model of 2-D and 3-D convolutions gets both: each format touches tensors of its own rank.
        for layout in wanted:
            plainly(lambda layout=layout: model.to(memory_format=layout), "torch")  # type: ignore[misc,call-overload]
        return model

    found = trial.step(laid_out(), trial.context())
    try:
        return Cell(True, trial.compared(found))
    except Finding:
        # On CPUs torch's transposed 3-D depthwise convolution leaves a part of dw unwritten in this format.
        with _nan_in_new_memory():
            error = trial.step(laid_out()).error(trial.high)
        if not error <= SLACK:
            raise NotHere(f"torch: its own gradient is {error:.2g} off") from None
        raise


@contextlib.contextmanager
def _nan_in_new_memory() -> Iterator[None]:
    """Let torch fill new tensors with NaN, so that what an operator leaves unwritten shows at each run."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
