"""Let torch.compile trace under the context what the function mode sees, or does not see, in eager mode.

Bodies of higher-order operators: torch.utils.checkpoint, torch.cond, torch.compiler.nested_compile_region. In eager
mode they are ordinary code that the mode sees. Dynamo hands the operator itself to the mode first, as if it were a
torch call, and a mode is off in its own handler: the layers in the body would be traced as plain torch. But about such
an operator there is nothing to decide, only about the calls in its body. So Dynamo is made to trace it at once, with
the mode on.

What Dynamo does not hand to a mode: torch's grouped product, whose name is private. It is made to.
What only Dynamo hands to a mode: operators on numpy arrays, which it then calls as methods of Tensor that arrays lack,
and torch's C functions that it replaces by Python (in nn.Module.to), which it cannot look up in a dict.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch

from te_nvfp4_cv.backend.torch_private import constant_in_graphs, grouped_products


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


@functools.lru_cache(maxsize=1)
def repair_dynamo(mode: type, stacks: object) -> None:
    """Change what Dynamo does under a mode of that class: the bodies above, and what no mode needs to see.

    This is done as the first trace begins. Dynamo takes a second to import, so not before; and after a graph break it
    traces a function again and must find what it found before, so not later.
    """
    trace_bodies_under(mode, stacks)
    if _guarded:
        guard_hooks()
    from torch._dynamo.variables import functions, tensor, torch_function
    from torch._dynamo.variables import torch as variables

    dispatches: Any = getattr(torch_function, "can_dispatch_torch_function", None)
    array: Any = getattr(tensor, "NumpyNdarrayVariable", None)
    if dispatches is not None and array is not None:

        @functools.wraps(dispatches)
        def can_dispatch(tx: Any, args: Any, kwargs: Any) -> bool:
            return not any(isinstance(v, array) for v in (*args, *kwargs.values())) and dispatches(tx, args, kwargs)

        # The operators' classes look the function up at each call.
        torch_function.can_dispatch_torch_function = can_dispatch  # type: ignore[assignment]
    overridable: Any = getattr(variables, "get_overridable_functions", None)
    if overridable is not None:  # torch's public name for it, which Dynamo inlines, calls this one
        overridable().add(grouped_products[0])
    polyfilled: Any = getattr(functions, "PolyfilledFunctionVariable", None)
    if hasattr(polyfilled, "hash_impl") and "hash_impl" not in vars(polyfilled):  # new in torch 2.13
        polyfilled.hash_impl = lambda self, tx: (hash(self.fn), False)


_guarded = False  # entries have been made, which are hooks of modules


def guard_hooks() -> None:
    """Let graphs depend on the hooks of the modules in them, from the first entry of set_precision on.

    By default torch.compile uses for one block what it has traced for another one of its class, whatever their hooks.
    """
    global _guarded
    _guarded = True
    if "torch._dynamo" in sys.modules:
        torch._dynamo.config.skip_nnmodule_hook_guards = False


def repair_dynamo_later(mode: type, stacks: object) -> None:
    """Call repair_dynamo when the next trace begins."""
    context = torch._guards.TracingContext
    begin = context.__init__

    @functools.wraps(begin)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        if "torch._dynamo" in sys.modules:
            repair_dynamo(mode, stacks)

    context.__init__ = __init__  # type: ignore[method-assign]


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
