"""Make torch's own ways to run a forward pass later, or elsewhere, respect the context.

    torch.utils.checkpoint          recomputes during backward: under what was active in the first forward
    torch.amp.custom_fwd, _bwd      the forward remembers what is active, the backward runs under it
    other autograd Functions        a warning, if backward repeats outside what forward ran in NVFP4, or writes it out
    backward(), autograd.grad       inside a context: the forward passes that run inside of them are seen
    torch.autocast(enabled=False)   keeps plain layers in high precision: islands.py
    nn.DataParallel                 runs replicas, if several, in threads that no context reaches: an error
    nn.TransformerEncoderLayer      no whole layer as one operator in evaluation, which torch.compile would choose
    torch.jit.script                makes models whose calls no context sees: torchscript.py
    torch.compile                   traces what the mode sees in eager mode, and nothing else: tracing.py

This is done once, at the first entry of a context. Only what is shared is replaced: names of torch that were imported
before (`from torch.utils.checkpoint import ...`, decorators that have been applied) work as well.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from te_nvfp4_cv.context import islands, torchscript, tracing
from te_nvfp4_cv.context.direct_calls import GRADIENTS
from te_nvfp4_cv.context.function_mode import Mode, mode_is_on
from te_nvfp4_cv.context.layer_calls import LayerCalls
from te_nvfp4_cv.context.state import active_recipe, local, state
from te_nvfp4_cv.errors import runtime_error, warn_once
from te_nvfp4_cv.layer import shortfall
from te_nvfp4_cv.layer.delayed_scaling import first_pass
from te_nvfp4_cv.layer.execute import LayerCall

Capture = Callable[[], Callable[[Callable[..., Any]], Callable[..., Any]]]


@functools.lru_cache(maxsize=1)
def patch_torch(capture: Capture) -> None:
    """Make the changes above. Only the first call does anything.

    Args:
        capture: Returns a decorator, whose functions run under the contexts that are active when `capture` is called.
    """
    _patch_checkpoint(capture)
    _patch_custom_functions(capture)
    _patch_backward()
    _patch_data_parallel()
    _patch_attention()
    islands.patch_autocast()
    torchscript.patch_script()
    tracing.repair_dynamo_later(Mode, local)


def _patch_checkpoint(capture: Capture) -> None:
    import torch.utils.checkpoint as checkpoint

    # The frame of a checkpoint without reentrance is made when its forward begins, by whatever interface.
    begin = checkpoint._CheckpointFrame.__init__

    @functools.wraps(begin)
    def __init__(self: Any, recompute_fn: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, capture()(recompute_fn), *args, **kwargs)

    checkpoint._CheckpointFrame.__init__ = __init__  # type: ignore[method-assign]
    forward = checkpoint.CheckpointFunction.forward

    def reentrant(ctx: Any, run_function: Any, *args: Any) -> Any:
        with first_pass(bool(ctx.next_functions)):  # its grad mode is off; a graph is being recorded all the same
            return forward(ctx, capture()(run_function), *args)

    checkpoint.CheckpointFunction.forward = staticmethod(reentrant)  # type: ignore[assignment]


_USED = "_fwd_used_autocast"  # the attribute that torch.amp.custom_fwd sets on a Function's ctx, for custom_bwd to read
_AGAIN = "_nvfp4_again"
_RAN = "_nvfp4_ran"  # on the ctx of a Function whose forward has run layers in NVFP4


def _patch_custom_functions(capture: Capture) -> None:
    """Let every Function whose forward is decorated with custom_fwd run its backward under what was active.

    The decorator may have been applied long before, so it is noticed by what it does: it sets an attribute of ctx.
    """
    node = torch.autograd.function.BackwardCFunction

    def set_used(ctx: Any, value: bool) -> None:
        ctx.__dict__[_USED] = value
        if local.states:
            ctx.__dict__[_AGAIN] = capture()

    def get_used(ctx: Any) -> bool:
        try:
            return bool(ctx.__dict__[_USED])
        except KeyError:
            raise AttributeError(f"{type(ctx).__name__!r} object has no attribute {_USED!r}") from None

    setattr(node, _USED, property(get_used, set_used))
    apply = torch.autograd.Function.__dict__["apply"]  # from torch 2.15 on written in C: it takes the class as it is
    torch.autograd.Function.apply = classmethod(_marked(getattr(apply, "__func__", apply)))  # type: ignore[assignment]
    for name in ("apply", "apply_boxed"):  # the second is new in torch 2.13
        run = getattr(node, name, None)
        if run is not None:
            setattr(node, name, _run_again(run))


def _run_again(run: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(run)
    def apply(self: Any, *args: Any) -> Any:
        again = self.__dict__.get(_AGAIN)
        if again is None:
            if local.states or _RAN not in self.__dict__:
                return run(self, *args)
            again = _Outside(type(self).__name__.removesuffix("Backward"))
        with again:
            return run(self, *args)

    return apply


def _marked(apply: Callable[..., Any]) -> Callable[..., Any]:
    """Let Function.apply leave a mark on the ctx of a Function whose forward runs layers in NVFP4."""

    @functools.wraps(apply)
    def marking(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if not local.states:
            return apply(cls, *args, **kwargs)
        before = shortfall.local.macs
        y = apply(cls, *args, **kwargs)
        if shortfall.local.macs != before:
            for output in y if isinstance(y, tuple) else (y,):
                node = getattr(output, "grad_fn", None)
                if isinstance(node, torch.autograd.function.BackwardCFunction):
                    node.__dict__[_RAN] = True
        return y

    return marking


class _Outside(LayerCalls):
    """Warns of layers that a Function's backward repeats outside of the context in which its forward ran them."""

    hands_values_on = True  # see layer/deferred.py

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def called(self, call: LayerCall, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run the call as it is. What is repeated records a graph; a gradient that is written out does not."""
        if torch.is_grad_enabled() and not local.states:
            warn_once(
                f"repeated {self._name}",
                f"nvfp4: the backward of the autograd Function {self._name} runs layers in high precision that its "
                "forward ran in NVFP4, as backward() is called outside of the context. Decorate its forward and "
                "backward with torch.amp.custom_fwd and custom_bwd, or keep nv.capture() in its forward and enter it "
                "in its backward",
            )
        return function(*args, **kwargs)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: A002
        if function in GRADIENTS and not local.states:
            warn_once(
                f"written out {self._name}",
                f"nvfp4: the backward of the autograd Function {self._name} computes gradients in high precision of "
                "layers that its forward ran in NVFP4: it calls torch.nn.grad or aten.convolution_backward, which no "
                "context takes. Let autograd differentiate the layer, or repeat it in backward (nv.capture)",
            )
        return super().__torch_function__(function, types, args, kwargs)


def _patch_backward() -> None:
    # A call of Tensor.backward or autograd.grad is handed to the mode, which is off in its own handler. Both end here.
    run = torch.autograd._engine_run_backward

    @functools.wraps(run)
    def backward(*args: Any, **kwargs: Any) -> Any:
        if not local.states or mode_is_on():
            return run(*args, **kwargs)
        with Mode():
            return run(*args, **kwargs)

    torch.autograd._engine_run_backward = backward


def _patch_data_parallel() -> None:
    # nn.DataParallel and nn.parallel.data_parallel both end here, with several devices: with one, or on a CPU, they run
    # the module itself in this thread.
    names = torch.nn.parallel.data_parallel.__globals__
    parallel = names["parallel_apply"]

    @functools.wraps(parallel)
    def refuse(modules: Any, *args: Any, **kwargs: Any) -> Any:
        current = state()
        if current is not None and current.enabled and len(modules) > 1:
            raise runtime_error(
                "nvfp4_autocast: nn.DataParallel is not supported on several devices.",
                got=f"{len(modules)} replicas inside the context, which run in threads of their own",
                needs="one process per GPU",
                fix="torch.nn.parallel.DistributedDataParallel (DDP), started by torchrun",
            )
        return parallel(modules, *args, **kwargs)

    names["parallel_apply"] = refuse


def _patch_attention() -> None:
    # In eager mode torch asks whether a mode is on; while torch.compile traces, that question is answered "no".
    enabled = torch.backends.mha.get_fastpath_enabled

    @functools.wraps(enabled)
    def get_fastpath_enabled() -> bool:
        # The setting itself, as Dynamo does not trace torch's function where it first sees this one in its place.
        return torch.backends.mha._is_fastpath_enabled and active_recipe() is None

    torch.backends.mha.get_fastpath_enabled = get_fastpath_enabled
