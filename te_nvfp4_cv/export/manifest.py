"""Describe a packed model: the manifest that its file carries, as JSON with a digest of itself.

A field is added to LayerEntry or Manifest with a default value, so that files without it still load. What is read from
a file is checked: its sizes are used to allocate.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from te_nvfp4_cv.backend.torch_private import BatchOrInstanceNorm
from te_nvfp4_cv.errors import value_error
from te_nvfp4_cv.layer.plan import Plan, weight_plan
from te_nvfp4_cv.nn.walk import torch_class
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling

VERSION = 2
READABLE = (1, 2)  # version 1 has no `kinds`
SHIFTS = ("input_shift", "output_shift")
PARTS = ("weight", "weight_scale", "weight_scale_2", "input_scale", *SHIFTS)  # of one quantized layer
OPS = re.compile(r"(grouped_)?linear|conv(_transpose)?[123]d")  # the only operators that a manifest may name
SCALES: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
    "nvfp4": (torch.float8_e4m3fn, (0x7F, 0xFF)),
    "fp4_e4m3_only": (torch.float8_e4m3fn, (0x7F, 0xFF)),
    "mxfp4": (torch.uint8, (0xFF,)),  # E8M0; torch has a dtype for it, which older readers of safetensors lack
    "nvfp4_ue5m3": (torch.uint8, (0xFF,)),
}
"""By block format: the dtype under which a file holds scales, and the bytes that stand for no number."""
CALL = ("stride", "padding", "dilation", "output_padding", "padding_mode")  # of a module
AXES = {"linear": 2, "grouped_linear": 3}  # of their weights; convolutions have two more than their images


@dataclass(frozen=True)
class LayerEntry:
    """One quantized layer as the manifest describes it.

    Attributes:
        op: the operator, as nv.functional names it.
        shape: torch's shape of the weight.
        amax: the exact amax of the weight.
        recipe: index into Manifest.recipes.
        tiles: one scale holds for 16 rows.
        k_order: the order of the contracted index, in words (matrix.py).
        input_amax: the exact amax of a static activation scale, or None.
        call: stride, padding and the like, under the names that the module gives them.
        shifted: x is shifted before it is quantized; the file has the tensors SHIFTS of this layer.
        block_format: as NVFP4BlockScaling names it. Formats without a tensor scale have one of 1 in the file.
        activations: "nvfp4" or "high", as the layer ran when it was saved.
    """

    op: str
    shape: tuple[int, ...]
    groups: int
    amax: float
    e4m3_max: int
    recipe: int
    tiles: bool
    channels_last: bool
    k_order: str
    input_amax: float | None = None
    call: dict[str, Any] = field(default_factory=dict)
    shifted: bool = False
    block_format: str = "nvfp4"
    activations: str = "nvfp4"

    @property
    def transposed(self) -> bool:
        """Tell whether the layer is a transposed convolution."""
        return "transpose" in self.op

    def plan(self) -> Plan:
        """Return the weight's part of the layer's plan, as far as the file's tensors decide it."""
        form = NVFP4BlockScaling(disable_2d_quantization=not self.tiles, block_format=self.block_format)
        routed = self.op == "grouped_linear"
        return weight_plan(torch.Size(self.shape), self.groups, self.transposed, form, "reference", routed)


@dataclass(frozen=True)
class Manifest:
    """The description of a model that its file carries.

    Attributes:
        library: the version of te_nvfp4_cv that wrote the file.
        recipe: the recipe of the whole model, as TOML with its [precision] table.
        recipes: the recipes of single layers, as TOML.
        layers: the quantized layers by name.
        high: convolutions and linear layers in high precision, with the reason.
        folded: names of the folded batch norms, with the name of the layer that each is part of.
        sha256: checksums of each tensor's bytes, by name.
        kinds: dtype and shape of each tensor, by name, as `kind_of` writes them. Version 1 has none: an edited dtype
            is not found out there.
        inner: names of the layers that lie inside of modules with a forward of their own (inner.py), each with the name
            of its bias there; a name with "=" before it is that of a kernel which the forward computes.
        settings: what the tensors of other convolutions, of norms and of attention do not show, as `settings_of` gives
            it, by name.
    """

    library: str
    recipe: str
    recipes: tuple[str, ...]
    layers: dict[str, LayerEntry]
    high: dict[str, str]
    folded: dict[str, str] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)
    inner: dict[str, str] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    version: int = VERSION

    def to_json(self) -> str:
        """Return the manifest as JSON, together with a digest of that JSON."""
        fields = asdict(self)
        # A file without such layers stays one that earlier versions read.
        for key in ("inner", "settings"):
            if not fields[key]:
                del fields[key]
        for entry in fields["layers"].values():
            if not entry["shifted"]:
                del entry["shifted"]
            for key in ("block_format", "activations"):
                if entry[key] == "nvfp4":
                    del entry[key]
        text = json.dumps(fields, sort_keys=True)  # stored as one string, so that the digest is that of its bytes
        return json.dumps({"digest": hashlib.sha256(text.encode()).hexdigest(), "manifest": text})

    @classmethod
    def from_json(cls, text: str, source: str) -> Manifest:
        """Read what to_json wrote; `source` names the file in errors.

        Raises:
            ValueError: The manifest is damaged, or of another version.
        """
        try:
            outer = json.loads(text)
            inner = outer["manifest"]
            # Compared before the inner text is parsed: a damaged one is called damaged, whatever it parses to.
            if hashlib.sha256(inner.encode()).hexdigest() != outer["digest"]:
                raise ValueError("its digest does not fit")
            fields = json.loads(inner)
            # Read alone: the fields of another version need not fit this one's records.
            version = fields["version"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise damaged(source, f"its manifest: {error}") from error
        if version not in READABLE:
            raise value_error(
                f"{source}: another version of the library wrote this.",
                got=f"version {version!r} of the format, te_nvfp4_cv {fields.get('library')!r}",
                needs=f"version {' or '.join(map(str, READABLE))}",
                fix="load it with the version that wrote it, and save it again from the trained model",
            )
        try:
            # An unknown or missing field is a TypeError here. JSON has no tuples, and a shape is compared with torch's.
            layers = {name: LayerEntry(**{**e, "shape": tuple(e["shape"])}) for name, e in fields["layers"].items()}
            manifest = cls(**{**fields, "layers": layers, "recipes": tuple(fields["recipes"])})
            for name, entry in layers.items():
                _check_entry(name, entry, len(manifest.recipes))
            for texts in (manifest.folded, manifest.high, manifest.sha256, manifest.inner, manifest.kinds):
                if type(texts) is not dict or not all(type(t) is str for pair in texts.items() for t in pair):
                    raise ValueError(f"not names and texts: {texts}")
            if type(manifest.settings) is not dict or not all(type(own) is dict for own in manifest.settings.values()):
                raise ValueError(f"no settings of modules: {manifest.settings}")
            if not all(type(t) is str for t in (manifest.library, manifest.recipe, *manifest.recipes)):
                raise ValueError("a recipe is not a text")
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise damaged(source, f"its manifest: {error}") from error
        return manifest


def _check_entry(name: str, entry: LayerEntry, recipes: int) -> None:
    # Sizes from a file are used to allocate and to reshape: a manifest with a valid digest may still be malicious.
    sizes = [entry.groups, *entry.shape]
    amaxes = (entry.amax,) if entry.input_amax is None else (entry.amax, entry.input_amax)
    good = (
        OPS.fullmatch(entry.op)
        # type() and not isinstance: True is an int to Python, and JSON may hold one.
        and all(type(n) is int and 0 < n < 2**31 for n in sizes)
        and len(entry.shape) == AXES.get(entry.op, 2 + int(entry.op[-2]) if "conv" in entry.op else 0)  # "conv2d"
        and math.prod(sizes) < 2**48
        and entry.shape[0] % entry.groups == 0
        and entry.e4m3_max in (256, 448)
        and type(entry.block_format) is str
        and entry.block_format in SCALES
        and entry.activations in ("nvfp4", "high")
        and type(entry.recipe) is int
        and 0 <= entry.recipe < recipes
        and type(entry.tiles) is type(entry.channels_last) is type(entry.shifted) is bool
        and not (entry.shifted and entry.transposed)
        and (not entry.channels_last or len(entry.shape) in (4, 5))
        and type(entry.call) is dict
        and all(type(a) is float and math.isfinite(a) and a >= 0 for a in amaxes)
    )
    if not good:
        raise ValueError(f"the layer {name!r} is described as {entry}")


def join(name: str, part: str) -> str:
    """Return the name of a layer's tensor; the layer has the name "" if it is the whole model."""
    return f"{name}.{part}" if name else part


def call_of(module: nn.Module) -> dict[str, Any]:
    """Return how a layer is called (stride, padding, ...), for the manifest; an empty dict for a linear layer.

    "same" and "valid" become numbers where they can, so that a model that says the same in numbers fits the file.
    """
    found: dict[str, Any] = {}
    for name in CALL:
        value: Any = getattr(module, name, None)
        if isinstance(value, (int, tuple, list)):
            values = (value,) if isinstance(value, int) else tuple(value)
            # Some models set stride=2 after construction, where torch itself stores (2, 2): both must compare equal.
            rank = len(module.kernel_size) if len(values) == 1 else 1  # type: ignore[arg-type]
            found[name] = [int(n) for n in values * rank]
        elif value is not None:
            found[name] = value
    if found.get("padding") == "valid":
        found["padding"] = [0] * len(found["dilation"])
    elif found.get("padding") == "same":
        kernel: Any = module.kernel_size
        totals = [d * (k - 1) for d, k in zip(found["dilation"], kernel, strict=True)]
        # An odd total puts one more zero at the end than at the start, which no number per axis can say.
        found["padding"] = "same" if any(total % 2 for total in totals) else [total // 2 for total in totals]
    return found


def settings_of(module: nn.Module) -> dict[str, Any]:
    """Return what decides a module's outputs beside its tensors, or an empty dict for most kinds of modules.

    Of a convolution it is its call, of a norm eps and groups, of torch's attention its number of heads and its flags.
    """
    if torch_class(module) not in (None, nn.Linear):  # a convolution; a subclass of one may use the names otherwise
        return {**call_of(module), "groups": int(module.groups)}  # type: ignore[arg-type]
    if isinstance(module, nn.MultiheadAttention):
        said = {name: getattr(module, name, None) for name in ("num_heads", "batch_first", "add_zero_attn")}
        return {name: int(value) for name, value in said.items() if value is not None}
    if isinstance(module, (BatchOrInstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)):
        found = {name: getattr(module, name, None) for name in ("eps", "num_groups")}
        return {name: value for name, value in found.items() if isinstance(value, (int, float))}
    return {}


def damaged(source: str, why: str) -> ValueError:
    """Return the error for a file that is not what it should be."""
    return value_error(
        f"{source} is damaged.", got=why, needs="a whole file, as nv.export.save wrote it", fix="copy it again"
    )
