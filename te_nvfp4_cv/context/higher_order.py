"""Let torch.compile trace the bodies of higher-order operators under the context.

A model calls them without naming them: torch.utils.checkpoint, torch.cond, torch.compiler.nested_compile_region. In
eager mode their bodies are ordinary code that the function mode sees. Dynamo hands the operator itself to the mode
first, as if it were a torch call, and a mode is off in its own handler: the layers in the body would be traced as plain
torch. But about such an operator there is nothing to decide, only about the calls in its body. So Dynamo is made to
trace it at once, with the mode on.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from te_nvfp4_cv.backend.torch_private import constant_in_graphs


@functools.lru_cache(maxsize=1)
def trace_bodies_under(mode: type, stacks: object) -> bool:
    """Make Dynamo trace the bodies of higher-order operators with a mode of that class on. Works once per process.

    Args:
        stacks: the object that remembers contexts and entries. A body may change it, which Dynamo allows to no other:
            all that enters a context or a module leaves it again before the body ends.
    Returns:
        False if this version of torch is built otherwise, and nothing was changed.
    """
    from torch._dynamo.variables import higher_order_ops, torch_function

    original: Any = getattr(torch_function, "dispatch_torch_function", None)
    operator: Any = getattr(higher_order_ops, "TorchHigherOrderOperatorVariable", None)
    stack: Any = getattr(torch_function, "TorchFunctionModeStackVariable", None)
    if original is None or not hasattr(operator, "_call_function") or not hasattr(stack, "register_mutation"):
        return False

    @functools.wraps(original)
    def dispatch(tx: Any, function: Any, args: Any, kwargs: Any) -> Any:
        modes = tx.symbolic_torch_function_state.mode_stack
        if isinstance(function, operator) and modes and issubclass(modes[-1].python_type(), mode):
            # A body may enter the mode again (attention does). Dynamo allows that to a body only if it counts the
            # stack of modes as changed already.
            stack.register_mutation(tx)
            return function._call_function(tx, args, kwargs)
        return original(tx, function, args, kwargs)

    # The operators' class looks the function up at each call.
    torch_function.dispatch_torch_function = dispatch  # type: ignore[assignment]
    _let_bodies_change(stacks)
    return True


def _let_bodies_change(stacks: object) -> None:
    from torch._dynamo.side_effects import SideEffects
    from torch._dynamo.variables import UserDefinedObjectVariable

    check = SideEffects.check_allowed_side_effect

    @functools.wraps(check)
    def allowed(self: Any, item: Any) -> bool:
        ours = isinstance(item, UserDefinedObjectVariable) and item.value is stacks
        return ours or check(self, item)

    SideEffects.check_allowed_side_effect = allowed  # type: ignore[method-assign]


def is_tracing() -> bool:
    """Return True in code that runs while torch.compile traces, in code that it traces and in code that traces it."""
    return torch.compiler.is_compiling() or torch._guards.TracingContext.try_get() is not None


@constant_in_graphs
def forget_traced_regions() -> bool:
    """Let no nested_compile_region use what was traced before a context or an entry of set_precision changed.

    Dynamo compares the values that a region read when it was traced, but not those that the traced code itself has set.
    """
    context = torch._guards.TracingContext.try_get()
    caches = getattr(context, "hop_dispatch_set_cache", None)
    regions = None if caches is None else caches.get_cache(torch.ops.higher_order.invoke_subgraph)
    for name in ("subgraph_reuse_cache", "subgraph_reuse_key_cache"):
        getattr(regions, name, {}).clear()
    return True
