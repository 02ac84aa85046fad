"""Train an unmodified LightningModule in NVFP4: a precision plugin for PyTorch Lightning.

    from te_nvfp4_cv.lightning import NVFP4Precision
    trainer = Trainer(plugins=[NVFP4Precision("unet", root="net")])

Training, validation, test and predict steps run under torch.autocast and nvfp4_autocast. The recipe's [precision] table
is applied to the module. The checkpoint holds nv.extra_state and torch's random state of every rank, so a run that is
resumed at the end of an epoch on as many ranks goes on bit for bit. On another number of ranks each takes the states of
rank 0. Two limits are Lightning's: resumed within an epoch it starts the loader anew, and with max_steps instead of
max_epochs it shuffles anew.
Importing this file needs lightning or pytorch_lightning; importing te_nvfp4_cv does not. If both are installed, import
the one in use before this file.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from te_nvfp4_cv.context.context_manager import nvfp4_autocast
from te_nvfp4_cv.errors import runtime_error, value_error
from te_nvfp4_cv.integrations.ranks import gathered, of_this_rank, world
from te_nvfp4_cv.nn.precision import matches, set_precision
from te_nvfp4_cv.nn.resume import extra_state
from te_nvfp4_cv.recipe.block_scaling import as_recipe

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _plugins() -> Any:
    """Return the module of Lightning's precision plugins.

    Raises:
        RuntimeError: Lightning is not installed.
    """
    # A package that is imported already comes first: its Trainer takes only its own plugins.
    for package in sorted(("lightning.pytorch", "pytorch_lightning"), key=lambda name: name not in sys.modules):
        if importlib.util.find_spec(package.split(".")[0]) is not None:
            return importlib.import_module(f"{package}.plugins.precision")
    raise runtime_error(
        "te_nvfp4_cv.lightning: PyTorch Lightning is not installed.",
        got="neither a package lightning nor pytorch_lightning",
        needs="one of them",
        fix="pip install 'te_nvfp4_cv[adapters]', or pip install lightning",
    )


# At import: a class needs its base, and which of the two packages is in use may not change later.
_Base: Any = _plugins().MixedPrecision


class NVFP4Precision(_Base):
    """Lightning's mixed precision, with convolutions and linear layers in NVFP4.

    Args:
        recipe: An NVFP4BlockScaling recipe, TransformerEngine's recipe, the name or path of a recipe file, or None for
            the default recipe.
        dtype: The dtype of torch.autocast: "bf16", "fp16" (with a GradScaler), or "fp32" (no autocast).
        device: The device of torch.autocast. If None, the Trainer's.
        backend: "auto", "reference", "integer", "vendor", "triton" or "cudnn", as for nvfp4_autocast.
        share_amax: Let all ranks quantize with one tensor scale, that of the largest amax.
        root: The attribute of the LightningModule whose modules the recipe's [precision] table names. The default ""
            is the LightningModule itself.
        scaler: The scaler for fp16. If None, a torch.amp.GradScaler.
    Raises:
        TypeError: `recipe` is not a recipe.
        ValueError: The dtype or the backend is unknown, the recipe contradicts itself, or a scaler comes without fp16.

    Example:
        >>> from te_nvfp4_cv.lightning import NVFP4Precision
        >>> plugin = NVFP4Precision("unet", root="net", device="cpu")  # for Trainer(plugins=[plugin])
        >>> plugin.recipe.name
        'unet'
    """

    device: str
    scaler: Any

    def __init__(
        self,
        recipe: Any = None,
        *,
        dtype: str = "bf16",
        device: str | None = None,
        backend: str = "auto",
        share_amax: bool = False,
        root: str = "",
        scaler: Any = None,
    ) -> None:
        if dtype not in DTYPES:
            raise value_error(
                "NVFP4Precision: unknown dtype.",
                got=repr(dtype), needs=f"one of {', '.join(DTYPES)}", fix='dtype="bf16"'
            )
        if scaler is not None and dtype != "fp16":
            raise value_error(
                "NVFP4Precision: a scaler without fp16.",
                got=f"dtype={dtype!r}, scaler={type(scaler).__name__}",
                needs="no scaler: gradients of bf16 and fp32 do not underflow",
                fix='leave scaler out, or dtype="fp16"',
            )
        self._own_device, self._own_scaler = device is not None, scaler is not None
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        # Lightning makes a GradScaler for "16-mixed" only.
        super().__init__("16-mixed" if dtype == "fp16" else "bf16-mixed", device, scaler)
        if dtype == "fp32":
            self.precision = "32-true"  # Trainer.precision shows this
        self.recipe = as_recipe(recipe)
        nvfp4_autocast(self.recipe, backend=backend)  # refuses now what cannot run, not in the first step
        self.dtype, self.backend, self.share_amax, self.root = dtype, backend, share_amax, root
        self._module: nn.Module | None = None

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Apply the recipe's [precision] table to the module, and return the module.

        Raises:
            ValueError: `root` is not a submodule, or the table names no module below it.
        """
        try:
            root = module.get_submodule(self.root)
        except AttributeError as error:
            raise value_error(
                f"NVFP4Precision: the module has no submodule {self.root!r}.",
                got=f"{type(module).__name__} with {', '.join(name for name, _ in module.named_children())}",
                needs="the attribute whose modules the recipe's [precision] table names",
                fix="root='' for the names of the LightningModule itself",
            ) from error
        try:
            set_precision(root, self.recipe)
        except ValueError as error:
            # The usual mistake: the table was written for the network, which the LightningModule holds as an attribute.
            fitting = [name for name, child in root.named_children() if self._fits(child)]
            if not fitting:
                raise
            raise value_error(
                f"NVFP4Precision: the recipe's [precision] table names no modules of {type(root).__name__}.",
                got=str(error).splitlines()[0],
                needs="the attribute whose modules the table names",
                fix=" or ".join(f"root={'.'.join(filter(None, (self.root, name)))!r}" for name in fitting),
            ) from error
        self._follow(module)
        self._module = module
        return module

    def _fits(self, module: nn.Module) -> bool:
        """Return True if every pattern of the recipe's table names a module in here."""
        try:
            return bool(matches(module, list(self.recipe.precision)))
        except ValueError:
            return False

    def _follow(self, module: nn.Module) -> None:
        """Take the Trainer's device, which is known only now, unless the user gave one."""
        trainer = getattr(module, "_trainer", None)
        device = self.device if self._own_device or trainer is None else trainer.strategy.root_device.type
        # A scaler belongs to a device, and this one was made for a guess.
        if device != self.device and self.scaler is not None and not self._own_scaler:
            self.scaler = torch.amp.GradScaler(device)
        self.device = device

    def autocast_context_manager(self) -> torch.autocast:
        """Return torch.autocast with the plugin's dtype; for fp32 it is off."""
        # Without the cache of casts: it holds a weight's cast over forward passes of one autocast region.
        return torch.autocast(self.device, DTYPES[self.dtype], enabled=self.dtype != "fp32", cache_enabled=False)

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        """Enter torch.autocast and nvfp4_autocast, for one step."""
        # Asked at each step: the process group does not exist when the plugin is made.
        group = torch.distributed.group.WORLD if self.share_amax and world() > 1 else None
        context = nvfp4_autocast(self.recipe, backend=self.backend, amax_reduction_group=group)
        with self.autocast_context_manager(), context:
            yield

    def state_dict(self) -> dict[str, Any]:
        """Return what a bit-exact resume needs beyond module and optimizers. All ranks must call it together."""
        own: dict[str, Any] = {"rng": torch.get_rng_state()}
        if self.device == "cuda":  # stochastic rounding on a GPU draws from it
            own["cuda"] = torch.cuda.get_rng_state()
        if self._module is not None:
            own["nvfp4"] = extra_state(self._module)
        scaler = {"scaler": super().state_dict()}
        # Lightning writes rank 0's state_dict only, so it has to hold the states of all ranks.
        return scaler | (own if world() == 1 else {"ranks": gathered(own)})

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where state_dict() was taken."""
        if state_dict.get("scaler"):
            super().load_state_dict(state_dict["scaler"])
        # A checkpoint of one rank has no "ranks": it is the list's only element.
        own = of_this_rank(state_dict.get("ranks", [state_dict]))
        torch.set_rng_state(own["rng"])  # first: extra_state checks torch's seed
        if self.device == "cuda" and "cuda" in own:
            torch.cuda.set_rng_state(own["cuda"])
        if self._module is not None and "nvfp4" in own:
            extra_state(self._module, load=own["nvfp4"])
