"""Resolve what `--precisions` names: fp32, fp16, bf16, nvfp4 (the recipe of --recipe), or any recipe.

    fp32            no autocast
    fp16, bf16      torch.autocast of that dtype; fp16 with a GradScaler
    nvfp4, recipes  te_nvfp4_cv.nvfp4_autocast(recipe), after set_precision(model, recipe), inside torch.autocast of
                    --compute: bf16, fp16 with a GradScaler, or none for fp32

A recipe is given by its name or its path. Recipes are loaded only if a precision asks for them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from te_nvfp4_cv.errors import value_error

PLAIN = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Precision:
    """Describe one way to train: a name for tables and folders, autocast's dtype, and the recipe, if any.

    `backend` is where NVFP4 layers run, as nv.nvfp4_autocast takes it.
    """

    name: str
    dtype: torch.dtype | None
    recipe: Any = None
    amax_group: Any = None  # torch.distributed group whose ranks share tensor scales
    backend: str = "auto"

    @property
    def compute(self) -> str:
        """Return the name of the dtype of activations: fp32, fp16 or bf16."""
        return next(name for name, dtype in PLAIN.items() if dtype == self.dtype)

    @property
    def recipe_text(self) -> str:
        """Return the recipe as TOML, or "" for a plain precision. It is part of a checkpoint's identity."""
        return "" if self.recipe is None else self.recipe.to_toml()

    def prepare(self, model: nn.Module) -> None:
        """Apply the recipe's table of high-precision modules to the model."""
        if self.recipe is not None:
            import te_nvfp4_cv as nv

            nv.set_precision(model, self.recipe)

    @contextlib.contextmanager
    def context(self, device: torch.device, nvfp4: bool = True) -> Iterator[None]:
        """Enter the contexts of a forward pass; without `nvfp4`, only those of high precision."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._autocast(device))
            if self.recipe is not None:
                import te_nvfp4_cv as nv

                options = {"enabled": nvfp4, "backend": self.backend, "amax_reduction_group": self.amax_group}
                stack.enter_context(nv.nvfp4_autocast(self.recipe, **options))
            yield

    def _autocast(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.dtype is None else torch.autocast(device.type, self.dtype)

    def extra_state(self, model: nn.Module) -> dict[str, Any] | None:
        """Return the NVFP4 state that is not in the state_dict, such as the position of the rounding stream."""
        if self.recipe is None:
            return None
        import te_nvfp4_cv as nv

        return nv.extra_state(model)

    def load_extra_state(self, model: nn.Module, state: dict[str, Any] | None) -> None:
        """Restore what `extra_state` returned."""
        if self.recipe is not None and state is not None:
            import te_nvfp4_cv as nv

            nv.extra_state(model, load=state)

    def flops_share(self, model: nn.Module, images: Tensor, *inputs: Any) -> float:
        """Return the share of the model's FLOPs that run in NVFP4, according to the library's coverage report."""
        if self.recipe is None:
            return 0.0
        import te_nvfp4_cv as nv

        was_training = model.training
        # The forward pass of the report must not move the generator that training uses.
        generators = torch.random.fork_rng(devices=[images.device] if images.is_cuda else [])
        with generators, self._autocast(images.device):
            report = nv.coverage(model, images, *inputs, recipe=self.recipe, backend=self.backend).to_dict()
        model.train(was_training)
        return float(report["nvfp4_flops_share"])


def parse_precisions(
    names: list[str], recipe: str, amax_group: Any = None, compute: str = "bf16", backend: str = "auto"
) -> list[Precision]:
    """Resolve `--precisions`.

    Args:
        names: The names as given; a recipe's path is shown by its stem.
        recipe: The recipe that "nvfp4" means.
        amax_group: The group whose ranks share tensor scales, for precisions with a recipe.
        compute: The dtype of activations for precisions with a recipe: bf16, fp16 or fp32.
        backend: Where the layers of precisions with a recipe run.
    Raises:
        ValueError: If a name occurs twice, or is neither a precision nor a recipe.
    """
    found = []
    for name in names:
        if name in PLAIN:
            found.append(Precision(name, PLAIN[name]))
        else:
            source = recipe if name == "nvfp4" else name
            found.append(Precision(Path(name).stem, PLAIN[compute], _load_recipe(source, name), amax_group, backend))
    shown = [precision.name for precision in found]
    if len(set(shown)) != len(shown):
        raise value_error(
            "--precisions names a precision twice.",
            got=" ".join(shown),
            needs="each name once (a recipe's path counts by its file name)",
            fix="leave one out, or rename the recipe file",
        )
    return found


def _load_recipe(source: str, name: str) -> Any:
    import te_nvfp4_cv as nv

    try:
        return nv.load_recipe(source)
    except (ValueError, OSError) as error:
        if name == "nvfp4" or Path(source).is_file():
            option = "--recipe" if name == "nvfp4" else "--precisions"
            raise ValueError(f"{option} {source}: {error}") from error
        raise value_error(
            "--precisions: unknown precision.",
            got=repr(name),
            needs=f"{', '.join(PLAIN)}, nvfp4, or a recipe: {str(error).strip()}",
            fix="--precisions bf16 nvfp4",
        ) from error
