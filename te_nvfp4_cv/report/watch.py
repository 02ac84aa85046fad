"""Report what runs in NVFP4, what does not and why, and what autograd saves: nv.coverage.

It watches one forward pass of the model. Names are those of the modules that own the weights; random state, buffers,
hooks and training flags are put back as they were. A model with lazy parameters is refused, because the forward pass
would create them.

    FLOPs of a layer  2 * multiply-adds, three times (fprop, dgrad, wgrad); in NVFP4: the GEMMs that its recipe names
    padding waste     1 - (elements of x and dy) / (those as quantized: channels padded to 16, images folded and padded)
    saved_bytes       storages that autograd holds after the forward pass, each once, but parameters, buffers, inputs
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from te_nvfp4_cv.backend import dispatch, native
from te_nvfp4_cv.backend.torch_private import tree_leaves
from te_nvfp4_cv.context.context_manager import nvfp4_autocast
from te_nvfp4_cv.context.direct_calls import DIRECT, direct_call
from te_nvfp4_cv.errors import check_module, check_trainable
from te_nvfp4_cv.layer import delayed_scaling, observe, shortfall
from te_nvfp4_cv.layer.constants import memory_of
from te_nvfp4_cv.layer.inside import replaced
from te_nvfp4_cv.layer.plan import row_scaling_applies
from te_nvfp4_cv.nn.walk import LAYERS, named_modules
from te_nvfp4_cv.ops.geometry import BLOCK, ConvGeometry
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling
from te_nvfp4_cv.report.forward_pass import gemm_flops, recipe_in_force, running, untouched
from te_nvfp4_cv.report.table import Coverage, Layer

RECURRENT = (nn.RNNBase, nn.RNNCellBase)


def coverage(model: nn.Module, *inputs: Any, recipe: Any = None, backend: str = "auto", **kwargs: Any) -> Coverage:
    """Run `model(*inputs, **kwargs)` once under nvfp4_autocast(recipe), and report on every layer.

    The model keeps its mode, training or evaluation, and is left unchanged. If torch.autocast is on, the layers run in
    its dtype.

    Args:
        recipe: a recipe, its name or path; if None, that of the enclosing context, and without one the default recipe.
        backend: where layers run, as for nvfp4_autocast.
    Returns:
        A Coverage: print it, or call `to_dict()`.
    Raises:
        TypeError: `model` is not a module.
        ValueError: the model has lazy parameters.
        Exception: whatever the forward pass itself raises.

    Example:
        >>> import torch, te_nvfp4_cv as nv
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 32, 3))
        >>> report = nv.coverage(model, torch.randn(16, 3, 8, 8))
        >>> [(row.name, row.nvfp4) for row in report.rows]
        [('0', False), ('2', True)]
    """
    check_module("coverage", model, "coverage(model, *inputs)")
    check_trainable("coverage", model)
    resolved = recipe_in_force(recipe)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module  # DDP's own forward waits for a backward pass
    watch = _Watch(model, backend)
    with ExitStack() as stack:
        stack.enter_context(untouched(model))
        stack.enter_context(torch.enable_grad())  # without a graph autograd would save nothing that could be counted
        watch.stack = stack.enter_context(running(watch.modules, watch.enter, watch.leave))
        stack.enter_context(observe.observe(watch.called))
        stack.enter_context(delayed_scaling.reading_only())
        stack.enter_context(replaced(shortfall.local, quiet=True))  # the report says so itself
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(watch.pack, lambda saved: saved.tensor))
        stack.enter_context(nvfp4_autocast(resolved, backend=backend))
        stack.enter_context(_Unseen(watch))
        output = model(*inputs, **kwargs)
    report = watch.report(resolved, (inputs, kwargs))
    del output  # it keeps the graph, whose storages were counted
    return report


# ---- during the forward pass ----------------------------------------------------------------------------------------


class _Saved:
    """Stand in for a tensor that autograd saves; it lives as long as the node of the graph that saved it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@dataclass
class _Row:
    """A layer while it is being counted."""

    layer: Layer
    real: int = 0  # elements of x and dy
    padded: int = 0  # elements of both as quantized


class _Watch:
    """Collect a row for each layer that is called, and what autograd saves meanwhile."""

    def __init__(self, model: nn.Module, backend: str) -> None:
        self.model, self.backend = model, backend
        self.names = {module: name for name, module in named_modules(model)}
        # ScriptModules take no hooks and show no parameters.
        self.modules = [module for module in self.names if not isinstance(module, torch.jit.ScriptModule)]
        self.owners: dict[int, tuple[nn.Module, str]] = {}  # id(Parameter) -> its module, and its name there
        for module in self.modules:
            for key, parameter in module._parameters.items():
                self.owners.setdefault(id(parameter), (module, key))
        self.stack: list[nn.Module] = []  # modules that are running
        self.entered: set[nn.Module] = set()
        self.reached: set[nn.Module] = set()  # modules that a row stands for
        self.rows: dict[tuple[Any, ...], _Row] = {}
        self.current: _Row | None = None  # the layer whose call is running: what autograd saves now is because of it
        self.saved: list[tuple[weakref.ref[_Saved], _Row | None]] = []

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Note that a module starts."""
        self.entered.add(module)
        # A recurrent layer calls no function that the context could see, so its module is counted instead.
        if isinstance(module, RECURRENT):
            self.current = self._recurrent(module, args[0] if args else kwargs.get("input"))

    def leave(self, module: nn.Module, args: Any) -> None:
        """Note that a module has ended."""
        if isinstance(module, RECURRENT):
            self.current = None

    def pack(self, tensor: Tensor) -> _Saved:
        """Note a tensor that autograd saves, and return what it holds instead."""
        saved = _Saved(tensor.detach())  # with its history a result would hold the node that holds it
        self.saved.append((weakref.ref(saved), self.current))
        return saved

    def called(self, call: observe.Call) -> observe.Seen:
        """Note the start of a convolution or linear call, and ask for its result."""
        return observe.Seen(self.counted(call))

    def counted(self, call: observe.Call, macs: Callable[[Any], int] | None = None) -> Callable[[Any], None]:
        """Add a call to its layer's row, and return the function to call with its result.

        Args:
            macs: counts the multiply-adds of a call that is no layer of ours, by its result.
        """
        recipe, geometry = call.recipe, call.geometry
        name = self._name(call.weight)
        note = ""
        if recipe is not None and geometry is not None and recipe.settings("input").row_scaled:
            note = self._about_row_scales(call.x.device, geometry)
        if recipe is not None and recipe.block_format != "nvfp4":
            where = "by compiled kernels" if native.available(call.x.device) else "in plain torch"
            note = f"blocks of {recipe.block_format}, quantized {where}"
        row = self._row(Layer(name, call.op, tuple(call.weight.shape), recipe is not None, call.reason, note))
        if geometry is not None and recipe is not None:
            real, padded = _elements(geometry, recipe)
            row.real, row.padded = row.real + real, row.padded + padded
        self.current = row

        def finished(y: Any) -> None:
            self.current = None
            gemm = gemm_flops(call.op, call.x, call.weight.shape, y) if macs is None else 2 * macs(y)
            row.layer.flops += 3 * gemm
            row.layer.nvfp4_flops += len(recipe.nvfp4_gemms) * gemm if recipe is not None else 0

        return finished

    def _about_row_scales(self, device: torch.device, geometry: ConvGeometry) -> str:
        """Return what to say of a layer whose recipe asks for row-scaled activations."""
        if not row_scaling_applies(geometry):
            return "one tensor scale: row scaling does not apply here"
        # The kernels of the integer backend, which "auto" would else choose on a CPU, have one tensor scale only.
        elsewhere = device.type == "cpu" and self.backend == "auto" and dispatch.integer_passes()
        return "row scales: on the vendor backend" if elsewhere else ""

    def _recurrent(self, module: nn.Module, x: Any) -> _Row:
        weights = [w for w in module.parameters(recurse=False) if w.dim() == 2]
        # A PackedSequence holds its rows in .data; a tensor's .data is the tensor itself.
        x = getattr(x, "data", x)
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
        """Return the name of the module that owns the weight, or else of the module that is running."""
        running = self.stack[-1] if self.stack else self.model
        for candidate in (weight, weight._base):  # attention multiplies by a view of its fused weight
            # The running module is asked first: FSDP swaps parameters while a module runs, and `owners` knows the old.
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
        """Return the report. The output must still be alive: what autograd saved and still holds is counted."""
        report = Coverage(recipe=repr(recipe))
        known = (*self.model.parameters(), *self.model.buffers(), *tree_leaves(inputs))
        seen = {memory_of(leaf) for leaf in known if isinstance(leaf, Tensor)}
        for reference, row in self.saved:
            saved = reference()
            storage = None if saved is None else memory_of(saved.tensor)
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
        for module, name in self.names.items():
            if module in self.reached:
                continue
            kind = type(module).__name__
            weight = getattr(module, "weight", None)
            kernel = tuple(weight.shape) if isinstance(weight, Tensor) else ()
            if isinstance(module, torch.jit.ScriptModule):
                reason = "ScriptModule: nvfp4_autocast does not see inside; its FLOPs are not counted"
                yield Layer(name or kind, module.original_name, (), False, reason)
            elif type(module).__module__.startswith("torch.ao.nn.") and callable(weight):
                yield Layer(name or kind, kind, kernel, False, "quantized by torch.ao: runs in a format of its own")
            elif isinstance(module, (*LAYERS, *RECURRENT)) or kind == "DeformConv2d":
                reason = "not reached in this forward pass"
                if module in self.entered:
                    reason = "its forward calls no torch.nn.functional convolution or linear"
                yield Layer(name or kind, kind, kernel, False, reason, calls=0)


class _Unseen(TorchFunctionMode):
    """Tell a watch of the products with weights that nvfp4_autocast leaves alone."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: A002
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if "deform_conv2d" in name:
            w = args[1] if len(args) > 1 else kwargs["weight"]
            told = observe.Call(name.split(".")[0], w, w, None, None, "deformable convolution")
            macs = None
        elif self.watch.current is None and function in DIRECT and (call := direct_call(function, args, kwargs)):
            told = observe.Call(call.name, call.weight, call.weight, None, None, call.reason)
            macs = call.macs
        else:
            return function(*args, **kwargs)
        finished = self.watch.counted(told, macs)
        y = function(*args, **kwargs)
        finished(y)
        return y


# ---- helpers --------------------------------------------------------------------------------------------------------


def _elements(geometry: ConvGeometry, recipe: NVFP4BlockScaling) -> tuple[int, int]:
    """Count the elements of x and dy, and those as quantized: channels padded, images folded where wgrad needs it."""
    g = geometry
    real = padded = 0
    folded = "wgrad" in recipe.nvfp4_gemms
    for size, channels, fold in zip((g.a_size, g.b_size), (g.channels_a, g.channels_b), g.folds, strict=True):
        pixels = g.batch * math.prod(size)
        stored = fold.images * fold.rows * math.prod(size[1:]) if folded else pixels
        channels = channels // g.routes
        wide = -(-channels // g.row_groups // BLOCK) * BLOCK * g.row_groups
        real += pixels * channels
        padded += max(pixels, stored) * wide  # a stride may skip more pixels than padding adds
    return real, padded
