"""Choose the recipe and the backend of a call of an NVFP4 module: its own ones, or the context's.

    which recipe:   set_precision's entry (in an enabled context)  >  the module's  >  the context's  >  the default
    which backend:  the context's inside of one, else the module's

The table of the layers that NVFP4 can compute stands here, too, and beside it that of their NVFP4 classes, which
modules.py fills. Walks over a model need the tables, and not what the layers compute.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn
from torch.fx import Proxy

from te_nvfp4_cv.backend import dispatch
from te_nvfp4_cv.context import entries, state
from te_nvfp4_cv.errors import runtime_error
from te_nvfp4_cv.layer.check import checked_recipe, refuse_jit_trace
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling, default_recipe

OPS: dict[type[nn.Module], str] = {
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.ConvTranspose1d: "conv_transpose1d",
    nn.ConvTranspose2d: "conv_transpose2d",
    nn.ConvTranspose3d: "conv_transpose3d",
    nn.Linear: "linear",
}
NVFP4_CLASSES: dict[type[nn.Module], type[NVFP4Module]] = {}  # modules.py fills it


class NVFP4Module(nn.Module):
    """A layer of torch that computes in NVFP4, with a recipe and a backend of its own.

    Args:
        recipe: The layer's recipe. If None, the layer follows the context, or the default recipe outside of all.
        backend: The layer's backend outside of a context: "auto", "reference", "integer", "vendor", "triton", "cudnn".
        *args: The parameters of torch's layer.
        **kwargs: The parameters of torch's layer.
    Raises:
        TypeError: `recipe` is not a recipe.
        ValueError: The recipe contradicts itself, or the backend is unknown.
    """

    op: ClassVar[str]
    recipe: NVFP4BlockScaling | None
    backend: str

    def __init_subclass__(cls, plain: type[nn.Module] | None = None) -> None:
        super().__init_subclass__()
        if plain is not None:  # one of modules.py; a user's subclass inherits the operator and is in no table
            cls.op = OPS[plain]
            NVFP4_CLASSES[plain] = cls

    def __init__(self, *args: Any, recipe: Any = None, backend: str = "auto", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        dispatch.check_backend(backend)
        self.recipe, self.backend = None if recipe is None else checked_recipe(recipe), backend

    def chosen(self) -> tuple[NVFP4BlockScaling | None, str]:
        """Return the recipe (None for high precision) and the backend that a call would use now.

        Raises:
            RuntimeError: torch.jit.trace is at work.
        """
        found = self._chosen()
        if found[0] is not None:
            refuse_jit_trace(f"an {type(self).__name__}")
        return found

    def _chosen(self) -> tuple[NVFP4BlockScaling | None, str]:
        current = state.entered_state()
        if current is None or current.passive:
            return self.recipe or default_recipe(), self.backend
        if not current.enabled:
            return None, current.backend
        # Not self.weight: reading that may compute it.
        rule = entries.ruling(self._parameters.get("weight")) if entries.used else state.innermost_override()
        if rule is not None or self.recipe is None:
            recipe = current.recipe if rule is None else rule[1]
            # A recipe without any NVFP4 GEMM is high precision: torch's own call is then the better one.
            return (recipe if recipe is not None and recipe.nvfp4_gemms else None), current.backend
        return self.recipe, current.backend

    def __prepare_scriptable__(self) -> None:
        """Refuse torch.jit.script, which calls this.

        Raises:
            RuntimeError: Always.
        """
        raise runtime_error(
            f"nvfp4: torch.jit.script does not take an {type(self).__name__}.",
            got="torch.jit.script of a model after nv.convert_model",
            needs="Python at each call: a layer asks the context for its recipe",
            fix="torch.compile or torch.export in its place, or script the model before convert_model, without NVFP4",
        )

    def extra_repr(self) -> str:
        """Return what torch's layer shows, then the recipe."""
        backend = "" if self.backend == "auto" else f", backend={self.backend!r}"
        return f"{super().extra_repr()}, recipe={self.recipe!r}{backend}"


def as_node(module: nn.Module, *args: Any) -> Proxy:
    """Return the node for a call of `module` that torch.fx traces: a leaf, as torch's own layers are."""
    # fx asks the class's file whether a module is a leaf, and knows torch's only.
    tracer = args[0].tracer
    found: Proxy = tracer.create_proxy("call_module", tracer.path_of_module(module), args, {})
    return found


def is_plain_layer(module: nn.Module) -> bool:
    """Return True if a layer's forward is torch's or that of modules.py, and not one of somebody's subclass."""
    return type(module) in NVFP4_CLASSES or type(module) in NVFP4_CLASSES.values()
