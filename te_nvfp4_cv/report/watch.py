"""What runs in NVFP4, what does not and why, and what autograd keeps: one forward pass of the model, watched.

    FLOPs of a layer  2 * multiply-adds, three times (fprop, dgrad, wgrad); in NVFP4: the GEMMs that its recipe says
    padding waste     1 - (elements of x and dy) / (those as quantized: channels padded to 16, images folded and padded)
    saved_bytes       storages that autograd keeps after the forward pass, each once, but parameters, buffers, inputs

Names are those of the modules that own the weights. Random state, buffers, hooks and training flags are put back as
they were. Refused: a model with lazy parameters, which the forward pass would create.
"""

from __future__ import annotations

import math
import random
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from te_nvfp4_cv.context import context_manager, state
from te_nvfp4_cv.errors import check_module, check_trainable
from te_nvfp4_cv.layer import delayed_scaling, observe
from te_nvfp4_cv.layer.plan import row_scaling_applies
from te_nvfp4_cv.nn.walk import LAYERS, named_modules
from te_nvfp4_cv.ops.geometry import BLOCK, ConvGeometry
from te_nvfp4_cv.ops.quantize import rounding_seeds
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling, as_recipe
from te_nvfp4_cv.report.table import Coverage, Layer

RECURRENT = (nn.RNNBase, nn.RNNCellBase)


def coverage(model: nn.Module, *inputs: Any, recipe: Any = None, backend: str = "auto", **kwargs: Any) -> Coverage:
    """Run `model(*inputs, **kwargs)` once under nvfp4_autocast(recipe) and report on every layer.

    Training or evaluation mode stays as it is; torch.autocast counts where it is on. Nothing of the model is changed.

    Args:
        recipe: None: that of the enclosing context, or the default recipe.
        backend: as for nvfp4_autocast.
    Returns:
        Coverage: print it, or take `to_dict()`.
    Raises:
        TypeError: no module; ValueError: lazy parameters; whatever the forward pass raises.
    """
    check_module("coverage", model, "coverage(model, *inputs)")
    check_trainable("coverage", model)
    current = state.state()
    if recipe is None and current is not None and current.enabled:
        resolved = current.recipe
    else:
        resolved = as_recipe(recipe)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module  # DDP's own forward waits for a backward pass
    watch = _Watch(model)
    with ExitStack() as stack:
        stack.enter_context(untouched(model))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(watch.module_names())
        stack.enter_context(observe.observe(watch.called))
        stack.enter_context(delayed_scaling.reading_only())
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(watch.pack, lambda saved: saved.tensor))
        stack.enter_context(context_manager.nvfp4_autocast(resolved, backend=backend))
        stack.enter_context(_Unseen(watch))
        output = model(*inputs, **kwargs)
    report = watch.report(resolved, (inputs, kwargs))
    del output  # it keeps the graph, whose storages were counted
    return report


# ---- the forward pass, watched --------------------------------------------------------------------------------------


class _Saved:
    """What autograd keeps in the place of a tensor; it lives as long as its node of the graph."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@dataclass
class _Row:
    """A layer while it is being counted."""

    layer: Layer
    real: int = 0  # elements of x and dy, and as quantized
    padded: int = 0


class _Watch:
    """Collects rows from the calls of the forward pass, and what autograd saves meanwhile."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names: dict[nn.Module, str] = {}
        self.owners: dict[int, tuple[nn.Module, str]] = {}  # id(Parameter) -> its module, its name there
        self.modules = list(named_modules(model))
        for name, module in self.modules:
            self.names.setdefault(module, name)
            if not isinstance(module, torch.jit.ScriptModule):
                for key, parameter in module._parameters.items():
                    self.owners.setdefault(id(parameter), (module, key))
        self.stack: list[nn.Module] = []  # modules that are running
        self.entered: set[nn.Module] = set()
        self.reached: set[nn.Module] = set()  # modules that a row stands for
        self.rows: dict[tuple[Any, ...], _Row] = {}
        self.current: _Row | None = None  # whose call is running
        self.saved: list[tuple[weakref.ref[_Saved], _Row | None]] = []

    @contextmanager
    def module_names(self) -> Iterator[None]:
        """Hooks on every module, to know which one is running."""
        handles = []
        for module in self.names:
            if not isinstance(module, torch.jit.ScriptModule):
                handles.append(module.register_forward_pre_hook(self._enter))
                handles.append(module.register_forward_hook(self._leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        self.stack.append(module)
        self.entered.add(module)
        if isinstance(module, RECURRENT):
            self.current = self._recurrent(module, args)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if module in self.stack:
            del self.stack[len(self.stack) - 1 - self.stack[::-1].index(module) :]
        if isinstance(module, RECURRENT):
            self.current = None

    def pack(self, tensor: Tensor) -> _Saved:
        """Autograd saves a tensor."""
        saved = _Saved(tensor.detach())  # with its history a result would hold the node that holds it
        self.saved.append((weakref.ref(saved), self.current))
        return saved

    def called(self, call: observe.Call) -> observe.Seen:
        """A convolution or linear call starts; returns what to do with its result."""
        return observe.Seen(self._counted(call))

    def _counted(self, call: observe.Call) -> Callable[[Tensor], None]:
        recipe, geometry = call.recipe, call.geometry
        name = self._name(call.weight)
        note = ""
        if recipe is not None and geometry is not None and recipe.settings("input").row_scaled:
            note = "" if row_scaling_applies(geometry) else "one tensor scale: row scaling does not apply here"
        row = self._row(Layer(name, call.op, tuple(call.weight.shape), recipe is not None, call.reason, note))
        if geometry is not None and recipe is not None:
            real, padded = _elements(geometry, recipe)
            row.real, row.padded = row.real + real, row.padded + padded
        self.current = row

        def finished(y: Tensor) -> None:
            self.current = None
            source = call.x if "transpose" in call.op else y
            gemm = 2 * source.numel() * math.prod(call.weight.shape[1:])  # of each of the three
            row.layer.flops += 3 * gemm
            row.layer.nvfp4_flops += len(recipe.nvfp4_gemms) * gemm if recipe is not None else 0

        return finished

    def unseen(self, op: str, weight: Any, reason: str) -> Callable[[Tensor], None]:
        """A convolution that nvfp4_autocast does not hand over."""
        call = observe.Call(op, weight, weight, None, None, reason)
        return self._counted(call)

    def _recurrent(self, module: nn.Module, args: Any) -> _Row:
        weights = [w for w in module.parameters(recurse=False) if w.dim() == 2]
        x = getattr(args[0], "data", args[0]) if args else None  # a PackedSequence holds its rows in .data
        steps = x.numel() // int(module.input_size) if isinstance(x, Tensor) else 0  # type: ignore[arg-type]
        self.reached.add(module)
        row = self._row(
            Layer(self._shown(module), type(module).__name__, tuple(weights[0].shape), False, "recurrent layer")
        )
        row.layer.flops += 3 * 2 * steps * sum(w.numel() for w in weights)
        return row

    def _row(self, layer: Layer) -> _Row:
        key = (layer.name, layer.op, layer.kernel, layer.nvfp4, layer.reason, layer.note)
        if key in self.rows:
            self.rows[key].layer.calls += 1
        else:
            self.rows[key] = _Row(layer)
        return self.rows[key]

    def _shown(self, module: nn.Module) -> str:
        return self.names.get(module, "") or type(module).__name__

    def _name(self, weight: Tensor) -> str:
        """Of the module that owns the weight; of the one that is running where no module does."""
        running = self.stack[-1] if self.stack else self.model
        for candidate in (weight, weight._base):
            own = [key for key, p in running._parameters.items() if p is candidate and p is not None]
            found = (running, own[0]) if own else self.owners.get(id(candidate))
            if candidate is not None and found is not None:
                module, key = found
                self.reached.add(module)
                return self._shown(module) + ("" if key == "weight" else f".{key}")
        self.reached.add(running)
        return self._shown(running)

    # ---- afterwards

    def report(self, recipe: NVFP4BlockScaling, inputs: Any) -> Coverage:
        """While the output is alive: what was saved and is still held counts."""
        report = Coverage(recipe=repr(recipe))
        seen = {_storage(t) for t in (*self.model.parameters(), *self.model.buffers(), *_tensors(inputs))}
        for reference, row in self.saved:
            saved = reference()
            storage = None if saved is None else _storage(saved.tensor)
            if saved is None or storage is None or storage in seen:
                continue
            seen.add(storage)
            count = saved.tensor.untyped_storage().nbytes()
            report.saved_bytes += count
            if row is not None:
                row.layer.saved_bytes += count
            elif saved.tensor.dtype == torch.uint8 and saved.tensor.dim() == 1:  # nothing else in torch saves such
                report.relu_mask_bytes += count
        for row in self.rows.values():
            row.layer.padding_waste = 1 - row.real / row.padded if row.padded else 0.0
            report.rows.append(row.layer)
        report.rows.extend(self._not_seen())
        return report

    def _not_seen(self) -> Iterator[Layer]:
        listed: set[nn.Module] = set()
        for name, module in self.modules:
            if module in listed or module in self.reached:
                continue
            listed.add(module)
            kind = type(module).__name__
            weight = getattr(module, "weight", None)
            kernel = tuple(weight.shape) if isinstance(weight, Tensor) else ()
            if isinstance(module, torch.jit.ScriptModule):
                reason = "ScriptModule: nvfp4_autocast does not see inside; its FLOPs are not counted"
                yield Layer(name or kind, module.original_name, (), False, reason)
            elif isinstance(module, (*LAYERS, *RECURRENT)) or kind == "DeformConv2d":
                reason = "not reached in this forward pass"
                if module in self.entered:
                    reason = "its forward calls no torch.nn.functional convolution or linear"
                yield Layer(name or kind, kind, kernel, False, reason, calls=0)


class _Unseen(TorchFunctionMode):
    """Sees the convolutions that nvfp4_autocast leaves alone."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: A002
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if "deform_conv2d" in name:
            reason = "deformable convolution"
        elif function in (torch.convolution, torch._convolution):
            reason = f"torch.{name} called directly"
        else:
            return function(*args, **kwargs)
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        finished = self.watch.unseen(name.split(".")[0], weight, reason)
        y = function(*args, **kwargs)
        finished(y)
        return y


# ---- helpers --------------------------------------------------------------------------------------------------------


def _elements(geometry: ConvGeometry, recipe: NVFP4BlockScaling) -> tuple[int, int]:
    """(elements of x and dy, elements as quantized: channels padded per group, images folded where wgrad needs it)."""
    g = geometry
    real = padded = 0
    folded = "wgrad" in recipe.nvfp4_gemms
    for size, channels, fold in zip((g.a_size, g.b_size), (g.channels_a, g.channels_b), g.folds(), strict=True):
        pixels = g.batch * math.prod(size)
        kept = fold.images * fold.rows * math.prod(size[1:]) if folded else pixels
        wide = -(-channels // g.groups // BLOCK) * BLOCK * g.groups
        real += pixels * channels
        padded += max(pixels, kept) * wide  # a stride may skip more pixels than padding adds
    return real, padded


def _storage(tensor: Tensor) -> int | None:
    """Identity of the memory that a tensor lives in."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse and wrapper tensors have none of their own
        return None


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Random states, buffers and training flags are put back."""
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    python, numpy_state, stream = random.getstate(), numpy.random.get_state(), rounding_seeds.state()
    buffers = [(b, b._version, b.detach().clone()) for b in model.buffers()]
    plain = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    before = [(m, m.training, dict(m._buffers)) for m in plain]
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(numpy_state)
        rounding_seeds.set_state(stream)
        for module, training, own in before:
            module.training = training
            module._buffers.update(own)
        with torch.no_grad():
            for buffer, version, value in buffers:
                if buffer._version != version or not torch.equal(buffer, value):
                    buffer.copy_(value)
