"""Describe batch norms that are folded: saving, loading and ONNX export meet them, too, and not only quantization.

A folded norm has been multiplied into the convolution or linear layer before it (ptq/norm_folding.py). In its place
stands a FoldedNorm, which knows the layer and returns its input. Norms of other libraries may call children after the
norm, such as an activation; a FoldedNorm has these and calls them.
"""

from __future__ import annotations

from torch import Tensor, nn

from te_nvfp4_cv.errors import value_error
from te_nvfp4_cv.fusion.children import child_of
from te_nvfp4_cv.fusion.stand_ins import Untraceable
from te_nvfp4_cv.fusion.subclasses import tail_of
from te_nvfp4_cv.layer.names import plain_name

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class FoldedNorm(nn.Identity):  # models that version 0.1 pickled find it under this file's name
    """What is left of `norm`, a batch norm that is now part of `layer`: an identity, or the norm's own children.

    Raises:
        ValueError: The norm has children, and it is not known how it calls them.
    """

    tail: tuple[str, ...] = ()  # on the class, because instances that version 0.1 pickled have none

    def __init__(self, layer: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self._layer = [layer]  # a list hides it from the module tree: it is a child of its own parent already
        tail = tail_of_batch_norm(norm)
        if tail is None and norm._modules:
            raise value_error(
                f"a folded batch norm cannot take the place of this {type(norm).__name__}.",
                got=f"a module with the children {', '.join(norm._modules)}",
                needs="torch's batch norm, or a norm that calls torch's and then children, as timm's BatchNormAct2d",
                fix="convert norms (SyncBatchNorm, ...) after loading, or quantize with fold_bn=False",
            )
        self.tail = tail or ()
        self._modules.update(norm._modules)

    @property
    def layer(self) -> nn.Module:
        """Return the layer that the norm is part of."""
        return self._layer[0]

    def forward(self, x: Tensor) -> Tensor:
        """Return x, or what the norm's children make of it."""
        for path in self.tail:
            child = child_of(self, path)
            assert child is not None
            x = child(x)
        return x

    def extra_repr(self) -> str:
        """Return the class of that layer, for print(model)."""
        return f"in the {type(self.layer).__name__} before it"


def tail_of_batch_norm(norm: nn.Module) -> tuple[str, ...] | None:
    """Return the paths of the children that a batch norm calls, or None if it is not torch's norm and then children."""
    if type(norm) in NORMS:
        return ()
    if not isinstance(norm, NORMS):
        return None
    try:
        return tail_of(norm)[0]
    except Untraceable:
        return None


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
