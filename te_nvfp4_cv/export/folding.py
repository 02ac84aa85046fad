"""Describe batch norms that are folded: saving, loading and ONNX export meet them, too, and not only quantization.

A folded norm has been multiplied into the convolution or linear layer before it (ptq/norm_folding.py). In its place
stands a FoldedNorm, which returns its input and knows the layer.
"""

from __future__ import annotations

from torch import nn

from te_nvfp4_cv.errors import value_error
from te_nvfp4_cv.nn.names import plain_name

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class FoldedNorm(nn.Identity):  # models that version 0.1 pickled find it under this file's name
    """An identity in the place of a batch norm that is now part of `layer`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = [layer]  # a list hides it from the module tree: it is a child of its own parent already

    @property
    def layer(self) -> nn.Module:
        """Return the layer that the norm is part of."""
        return self._layer[0]

    def extra_repr(self) -> str:
        """Return the class of that layer, for print(model)."""
        return f"in the {type(self.layer).__name__} before it"


def folded_norms(model: nn.Module) -> dict[str, str]:
    """Map the name of each folded norm to the name of its layer, both without the parts that wrappers add.

    Raises:
        ValueError: The layer of a norm is outside of the model.
    """
    names = {id(module): plain_name(name) for name, module in model.named_modules()}
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, FoldedNorm):
            if id(module.layer) not in names:
                raise value_error(
                    f"nv.export.save: the batch norm {name!r} is folded into a layer outside of the model.",
                    got="a part of a quantized network",
                    needs="the layer and its norm together",
                    fix="save the whole network, or quantize the part: nv.export.quantize(part, loader)",
                )
            # By id: the norm holds the layer outside of the module tree, where it has no name.
            found[plain_name(name)] = names[id(module.layer)]
    return found
