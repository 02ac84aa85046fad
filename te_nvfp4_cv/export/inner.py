"""Packs kernels that a module multiplies in a forward of its own: subclasses of torch's layers, nn.MultiheadAttention.

Such a forward stays as it is, because it may do anything: pad its input, standardize its weight, multiply by a part of
a fused weight. Only its call of F.conv2d, F.linear and the like is replaced. The kernel becomes a layer inside of the
module, `packed_weight` in the place of the Parameter `weight`, and the call runs that layer:

    find      runs the forward of a module once, on a small input, to see which kernels it multiplies, and how
    install   puts the layers into the module and changes its class: its forward then runs them

A module that asks for the Parameter gets the weight of the layer inside. If that holds NVFP4 codes, torch's functions
run the layer with it (packed_weight.py). A kernel that the forward computes anew, from what stands where the Parameter
was, is recognized by its shape. ONNX export replaces layers inside like all others.
Not packed, and listed: kernels that hang on the input, several calls of one Parameter, biases that are computed, and
forwards that read a Parameter for more than the kernel that they compute from it, because its values are lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from te_nvfp4_cv.backend.torch_private import tree_leaves
from te_nvfp4_cv.context.function_mode import decide, entered
from te_nvfp4_cv.context.layer_calls import LayerCalls
from te_nvfp4_cv.context.state import State
from te_nvfp4_cv.export.manifest import join
from te_nvfp4_cv.layer import shortfall
from te_nvfp4_cv.layer.constants import running_modules
from te_nvfp4_cv.layer.execute import LayerCall
from te_nvfp4_cv.layer.inside import replaced
from te_nvfp4_cv.nn.base import OPS, NVFP4Module
from te_nvfp4_cv.nn.walk import LAYERS
from te_nvfp4_cv.ops.geometry import ConvArgs
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling
from te_nvfp4_cv.report.forward_pass import unwritten

PREFIX = "packed_"  # before the name of a Parameter: the name of the layer in its place
KINDS = {op: kind for kind, op in OPS.items()}


class Kernel(NamedTuple):
    """One kernel that a module's forward multiplies.

    Attributes:
        module: the module that has the Parameter: the one that multiplies, or a child of an attention.
        key: the Parameter's name there.
        layer: torch's layer with the kernel as its weight.
        bias: name of the bias in `owner`, or "" without one.
        owner: the module whose forward multiplies it.
        computed: the forward multiplies what it computes from the Parameter.
    """

    module: nn.Module
    key: str
    layer: nn.Module
    bias: str
    owner: nn.Module
    computed: bool

    @property
    def trained(self) -> Tensor | nn.Module:
        """What owns the kernel's delayed scales: the Parameter, or the module that computes the kernel."""
        parameter = self.module._parameters[self.key]
        if self.computed or parameter is None:
            return self.owner
        read: Tensor = getattr(parameter, "nvfp4_read", parameter)  # export/attention.py
        return read


class NotPacked(NamedTuple):
    """Why the kernels of a module are not packed, and whether they train in NVFP4 all the same."""

    reason: str
    trains: bool


# ---- find -----------------------------------------------------------------------------------------------------------


class _Catch(LayerCalls):
    """Note the layer calls that a module makes by itself, and whether they would run in NVFP4."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.calls: list[tuple[LayerCall, str]] = []

    def called(self, call: LayerCall, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run the call as it is."""
        if next(running_modules(), None) is self.module:
            self.calls.append((call, decide(call.op, call.x, call.w, call.args.groups)[1]))
        return function(*args, **kwargs)


class _Stand(LayerCalls):
    """Run a layer in the place of a module's call with a kernel that it has computed, as _Replay does later."""

    def __init__(self, module: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self.module, self.layer = module, layer

    def called(self, call: LayerCall, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run the layer, or the call as it is if it is that of another kernel or module."""
        own = next(running_modules(), None) is self.module and call.w.shape == self.layer.weight.shape
        return self.layer(call.x) if own else function(*args, **kwargs)


def has_own_forward(module: nn.Module) -> bool:
    """Return True for a module whose kernels `find` looks for."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    attention = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)  # its parent multiplies it
    return isinstance(module, LAYERS) and not isinstance(module, (NVFP4Module, Inner)) and not attention


def find(module: nn.Module, recipe: NVFP4BlockScaling) -> list[Kernel] | NotPacked:
    """Return the kernels that a module's forward multiplies in NVFP4, or why they cannot be packed.

    The module runs in evaluation mode, twice; its buffers and flags stay as they were.
    """
    children = list(module.modules())
    flags = [child.training for child in children]
    try:
        for child in children:
            child.training = False
        with unwritten(module):
            first, second = _calls(module, recipe, 0), _calls(module, recipe, 1)
    except Exception as error:  # a forward of somebody's may raise anything on an input that it did not expect
        text = f"its forward does not run on an input of its own: {type(error).__name__}: {error}"
        return NotPacked(text.split("\n")[0], True)
    finally:
        for child, flag in zip(children, flags, strict=True):
            child.training = flag
    if not first:
        return NotPacked("its forward calls no torch.nn.functional convolution or linear", False)
    found: list[Kernel] = []
    for (call, reason), (again, _) in zip(first, second, strict=False):
        if reason:
            return NotPacked(reason, False)
        if not torch.equal(call.w, again.w):
            return NotPacked("its kernel hangs on the input", True)
        kernel = _kernel(module, call)
        if isinstance(kernel, str):
            return NotPacked(kernel, True)
        if any(kernel[:2] == other[:2] for other in found) or (found and (kernel.computed or found[0].computed)):
            return NotPacked("its forward multiplies several kernels", True)
        found.append(kernel)
    if found and found[0].computed and not _is_read_only_there(module, found[0]):
        return NotPacked("its forward reads a Parameter for more than the kernel that it computes from it", True)
    return found


def _is_read_only_there(module: nn.Module, kernel: Kernel) -> bool:
    """Tell whether outputs stay what they are with the computed kernel in the place of the Parameter."""
    inputs, own = _inputs(module, 0), kernel.module._parameters[kernel.key]
    w: Any = kernel.layer.weight
    children = list(module.modules())
    flags = [child.training for child in children]
    try:
        for child in children:
            child.training = False
        with unwritten(module), torch.no_grad(), torch.autocast(w.device.type, enabled=False):
            expected = tree_leaves(_forward(module, inputs))
            share_bias(kernel)
            kernel.module._parameters[kernel.key] = nn.Parameter(w.detach().clone(), requires_grad=False)
            with _Stand(module, kernel.layer):
                found = tree_leaves(_forward(module, inputs))
    except Exception:  # a forward of somebody's
        return False
    finally:
        kernel.module._parameters[kernel.key] = own
        kernel.layer._parameters["bias"] = None  # until `install`
        for child, flag in zip(children, flags, strict=True):
            child.training = flag
    return len(found) == len(expected) and all(_is_close(*pair) for pair in zip(found, expected, strict=True))


def _is_close(found: Any, expected: Any) -> bool:
    if not isinstance(expected, Tensor) or not expected.is_floating_point():
        return True
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    # The same operators on the same numbers, but a GPU may add in another order.
    return bool((found.double() - expected.double()).norm() <= 1e-2 * expected.double().norm())


def _calls(module: nn.Module, recipe: NVFP4BlockScaling, seed: int) -> list[tuple[LayerCall, str]]:
    inputs, catch = _inputs(module, seed), _Catch(module)
    # Not module(...): hooks are the user's. Autocast off: the kernel is wanted as the Parameter's dtype has it.
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(replaced(shortfall.local, quiet=True))
        # In this order: autocast that is off inside of the context would be an island of high precision.
        stack.enter_context(torch.autocast(inputs[0].device.type, enabled=False))
        stack.enter_context(entered(State(True, recipe, "auto", relu_mask=False)))
        stack.enter_context(catch)
        _forward(module, inputs)
    return catch.calls


def _inputs(module: Any, seed: int) -> tuple[Tensor, ...]:
    """Return a small random input of a module."""
    like = next(module.parameters())
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(like.device, like.dtype)

    if isinstance(module, nn.MultiheadAttention):
        first = values(2, 2, module.embed_dim)
        same = module.kdim == module.vdim == module.embed_dim
        rest = (first, first) if same else (values(2, 2, module.kdim), values(2, 2, module.vdim))
        return first, *rest
    if isinstance(module, nn.Linear):
        return (values(2, module.in_features),)
    sizes = zip(module.kernel_size, module.dilation, strict=True)
    return (values(2, module.in_channels, *(max(8, d * (k - 1) + 1) for k, d in sizes)),)


def _forward(self: Any, inputs: tuple[Tensor, ...]) -> Any:
    """Run a module's forward without its hooks."""
    # By the name `self` running_modules finds it. Its forward may call its first argument something else.
    return type(self).forward(self, *inputs)


def _kernel(module: nn.Module, call: LayerCall) -> Kernel | str:
    """Return the kernel of one call, with a layer that holds it."""
    places = [(child, key, p) for child in (module, *module.children()) for key, p in child._parameters.items()]
    taken = [(child, key) for child, key, p in places if p is call.w]
    computed = not taken
    if computed:  # from the one Parameter that has its shape
        taken = [(child, key) for child, key, p in places if p is not None and p.shape == call.w.shape]
    if len(taken) != 1:
        return "its kernel cannot be told from its Parameters"
    biases = [key for key, p in module._parameters.items() if p is call.bias and p is not None]
    out_proj = getattr(module, "out_proj", None)
    if isinstance(out_proj, nn.Linear) and call.bias is not None and call.bias is out_proj.bias:
        biases = ["out_proj.bias"]
    if computed and call.bias is not None and not biases:
        return "its bias is computed"
    bias = biases[0] if biases else ""
    return Kernel(*taken[0], layer_of(call.op, call.w.detach(), call.args), bias, module, computed)


def layer_of(op: str, w: Tensor, args: ConvArgs) -> nn.Module:
    """Return torch's layer of an operator with the weight w, without a copy, and without a bias."""
    kind: Any = KINDS[op]
    if op == "linear":
        layer = kind(w.shape[1], w.shape[0], bias=False, device="meta")
    else:
        axes = (w.shape[0], w.shape[1] * args.groups)
        channels = axes if "transpose" in op else axes[::-1]
        own = args._asdict()
        if "transpose" not in op:
            own.pop("output_padding")
        sizes = {key: tuple(value) if isinstance(value, list) else value for key, value in own.items()}
        layer = kind(*channels, tuple(w.shape[2:]), bias=False, device="meta", **sizes)
    layer.weight = nn.Parameter(w, requires_grad=False)
    return layer.eval()


# ---- install --------------------------------------------------------------------------------------------------------


def traced() -> bool:
    """Return True in a trace of torch.compile or torch.export, which take a mark better than a tensor subclass."""
    return torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting()


class Inner(nn.Module):
    """Base of the classes that `install` makes: the forward is the user's, and its kernels are layers inside."""

    keys: tuple[str, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward. Instead of a kernel that it computes anew, the layer with the result runs."""
        if not traced() and not getattr(self._modules[PREFIX + self.keys[0]], "nvfp4_computed", False):
            return super().forward(*args, **kwargs)
        with _Replay(self):
            return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, and a pickle finds classes by name.
        cls = type(self)
        return _rebuilt, (cls.__bases__[1], cls.keys), self.__getstate__()  # type: ignore[no-untyped-call]


def _rebuilt(cls: type[nn.Module], keys: tuple[str, ...]) -> nn.Module:
    made = _inner_class(cls, keys)
    return made.__new__(made)


def _inner_class(cls: type[nn.Module], keys: tuple[str, ...]) -> type[nn.Module]:
    """Return the class that a module gets: the same one for the same class and Parameters."""
    made = _classes.get((cls, keys))
    if made is None:
        made = _classes[cls, keys] = _new_class(cls, keys)
    return made


_classes: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def _new_class(cls: type[nn.Module], keys: tuple[str, ...]) -> type[nn.Module]:
    def reading(key: str) -> property:
        def kernel(self: nn.Module) -> Tensor:
            layer: Any = self._modules[PREFIX + key]
            w: Tensor = layer.marked_weight() if traced() and hasattr(layer, "marked_weight") else layer.weight
            return w

        return property(kernel)

    body: dict[str, Any] = {key: reading(key) for key in keys}
    return type(f"Packed{cls.__name__}", (Inner, cls), {**body, "keys": keys, "__module__": cls.__module__})


class _Replay(LayerCalls):
    """Run the layer inside of a module in the place of the module's call with a kernel that it has computed."""

    hands_values_on = True  # it reads no values: see layer/deferred.py

    def __init__(self, module: Inner) -> None:
        super().__init__()
        self.layer: Any = module._modules[PREFIX + module.keys[0]]
        self.computed = getattr(self.layer, "nvfp4_computed", False)

    def called(self, call: LayerCall, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run the layer that the kernel belongs to, if there is one."""
        layer = getattr(call.w, "packed_layer", None)
        if layer is not None:
            return layer.multiply(call.x, call.bias, call.args)
        if not self.computed or call.w.shape != self.layer.weight.shape:
            return function(*args, **kwargs)
        return self.layer(call.x)  # its bias is the module's

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: A002
        if function is Tensor.unflatten:  # a method written in Python, which Dynamo does not trace inside of a mode
            function = torch.unflatten
        return super().__torch_function__(function, types, args, kwargs)


def install(kernels: Iterable[Kernel]) -> None:
    """Put layers into modules, in the place of the Parameters that they were found for. All of one module at once."""
    by_module: dict[nn.Module, list[Kernel]] = {}
    for kernel in kernels:
        by_module.setdefault(kernel.module, []).append(kernel)
    for module, own in by_module.items():
        for kernel in own:
            layer: Any = kernel.layer
            layer.nvfp4_bias, layer.nvfp4_computed = kernel.bias, kernel.computed
            share_bias(kernel)
            del module._parameters[kernel.key]
            module._modules[PREFIX + kernel.key] = layer
        module.__class__ = _inner_class(type(module), tuple(kernel.key for kernel in own))


def share_bias(kernel: Kernel) -> None:
    """Let the layer inside have the bias that the module around it passes to torch."""
    owner, _, name = kernel.bias.rpartition(".")
    layer = kernel.layer
    layer._parameters["bias"] = kernel.owner.get_submodule(owner)._parameters[name] if kernel.bias else None


def around(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the layers that `install` put into a model, by name."""
    for name, module in model.named_modules():
        if isinstance(module, Inner):
            yield from ((join(name, PREFIX + key), module._modules[PREFIX + key]) for key in module.keys)
