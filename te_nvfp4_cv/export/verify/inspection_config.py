"""Read the quantization configs of other tools: which algorithm they give for a layer. Nothing in them is trusted.

    ModelOpt             quant_algo, quantized_layers {name: {quant_algo}} of mixed precision, exclude_modules
    compressed-tensors   format, config_groups {group: {targets, format, weights}}, ignore

A config says that a layer is NVFP4 if the algorithm or format that applies to the layer has that name. Targets and
exclusions are names (of the layer or of a module above it), wildcards, classes of torch, or "re:" and a regular
expression. An expression that could take more than MOST_STEPS for a name is not run, and is a problem of the file.
"""

from __future__ import annotations

import fnmatch
import functools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from re import _parser  # type: ignore[attr-defined]
from typing import Any

MOST_STEPS = 1e8
MOST_TIMES = 1000  # a pattern that asks for more repeats fits no name, but matching would try them all the same
CLASSES = {"Linear": 2, "Conv1d": 3, "Conv2d": 4, "Conv3d": 5}  # axes of the weight
FILES = (("hf_quant_config.json", "quantization"), ("config.json", "quantization_config"))
WEIGHT_ONLY = " (weights only)"  # after the name of an algorithm
MIXED = ("mixed_precision", "mixed-precision")
# Python's own parser of expressions, which is private: it shows their structure without running them.
_parsed = functools.lru_cache(_parser.parse)
EMBEDDING = re.compile(r"(.*\.)?(\w*embed\w*|wte|wpe)", re.IGNORECASE)


@dataclass
class Config:
    """A quantization config, as far as it can be read.

    Attributes:
        algorithm: the algorithm of all layers.
        layers: the algorithms of single layers, by name or pattern.
        groups: pairs of an algorithm and the targets that it holds for.
        ignored: patterns of layers that are left out.
        problems: parts of the config that cannot be read.
    """

    algorithm: str = ""
    layers: dict[str, str] = field(default_factory=dict)
    groups: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    ignored: tuple[str, ...] = ()
    problems: list[str] = field(default_factory=list)

    @functools.cached_property
    def _ignored(self) -> tuple[frozenset[str], list[str]]:
        """Return the names, to be looked up at once (large models leave out thousands of layers), and the patterns."""
        patterns = [p for p in self.ignored if _is_pattern(p)]
        return frozenset(self.ignored).difference(patterns), patterns

    @functools.cached_property
    def _layer_patterns(self) -> list[str]:
        return [p for p in self.layers if _is_pattern(p)]

    def algorithm_of(self, name: str, axes: int) -> str:
        """Return the algorithm or format that applies to a layer, in small letters, or "" if there is none.

        Args:
            axes: the number of axes of the layer's weight, which tells its class.
        """
        above = _above(name)
        # Exclusions first: in both tools they win over every table and group.
        names, patterns = self._ignored
        if above & names or any(self._selects(p, name, axes) for p in patterns):
            return ""
        if self.layers:
            # The longest name first: what is said of a layer beats what is said of a module above it.
            plain = next((self.layers[n] for n in sorted(above, key=len, reverse=True) if n in self.layers), "")
            fitting = (self.layers[p] for p in self._layer_patterns if self._selects(p, name, axes))
            return plain or next(fitting, "")
        if self.groups:  # the first group that fits rules
            fitting = (a for a, targets in self.groups if any(self._selects(t, name, axes) for t in targets))
            return next(fitting, "")
        return self.algorithm

    def activations_of(self, name: str) -> str:
        """Return "high" if the config says that a linear layer's activations are not in NVFP4, else "nvfp4"."""
        said = self.algorithm_of(name, CLASSES["Linear"])
        return "high" if WEIGHT_ONLY in said or re.search(r"w4a(8|16)", said) else "nvfp4"

    def _selects(self, pattern: str, name: str, axes: int) -> bool:
        if pattern.startswith("re:"):
            return self._matches(pattern, name)
        if pattern in CLASSES:
            return CLASSES[pattern] == axes
        # fnmatchcase: plain fnmatch would ignore case on Windows only.
        return fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")

    def _matches(self, pattern: str, name: str) -> bool:
        """Tell whether an expression fits the start of a name; one that must not be run is a problem of the file."""
        problem = ""
        try:
            if _log_steps(_parsed(pattern[3:]), len(name)) <= math.log(MOST_STEPS):
                # match, not fullmatch, as compressed-tensors does.
                return re.match(pattern[3:], name) is not None
            problem = "could take too long to match"
        except (re.error, RecursionError, OverflowError) as error:
            problem = f"cannot be read: {error}"
        text = f"the pattern {pattern[:80]!r} of its config {problem}"
        self.problems += [] if text in self.problems else [text]  # once, though it is asked for every layer
        return False


def _is_pattern(text: str) -> bool:
    return text in CLASSES or text.startswith("re:") or any(mark in text for mark in "*?[")


def _above(name: str) -> frozenset[str]:
    """Return a layer's name and the names of the modules above it."""
    parts = name.split(".")
    return frozenset(".".join(parts[:n]) for n in range(1, len(parts) + 1))


def is_embedding(name: str) -> bool:
    """Tell by its name whether a layer is an embedding: other tools do not quantize embeddings, and do not say so."""
    return EMBEDDING.fullmatch(name) is not None


def read_config(own: Mapping[str, Any], folder: Path) -> Config:
    """Read the config in a file's metadata, or else in the files that other tools put beside it."""
    if own:
        return _parse(own)
    for name, key in FILES:
        if not (folder / name).is_file():
            continue
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except (ValueError, OSError, RecursionError) as error:
            return Config(problems=[f"{name} beside it cannot be read: {type(error).__name__}"])
        found = content.get(key) if isinstance(content, dict) else None
        if found is not None:
            return _parse(found) if isinstance(found, dict) else Config(problems=[f"{key} of {name} is no table"])
    return Config()


def _parse(raw: Mapping[str, Any]) -> Config:
    config = Config()
    texts = [raw.get(key) for key in ("quant_algo", "format")]
    config.problems += [f"its config: {text!r:.80} is no algorithm" for text in texts if not _is(str, text)]
    config.algorithm = next((text.lower() for text in texts if text and isinstance(text, str)), "")
    ignored = [name for key in ("ignore", "exclude_modules") for name in _names(config, key, raw.get(key))]
    config.ignored = tuple(ignored)
    for key in ("quantized_layers", "config_groups"):
        table = raw.get(key)
        if not _is(dict, table) or not all(isinstance(part, dict) for part in (table or {}).values()):
            config.problems.append(f"its config: {key} is {table!r:.80}, not a table of tables")
            continue
        for name, part in (table or {}).items():
            if key == "quantized_layers":
                config.layers[name] = str(part.get("quant_algo", "")).lower()
            else:
                targets = part.get("targets")
                targets = ["*"] if targets is None else _names(config, f"{key}.{name}.targets", targets)
                # compressed-tensors has one format for both kinds, and says null of the activations.
                mark = WEIGHT_ONLY if part.get("input_activations", 0) is None else ""
                config.groups.append((_of_group(part, config.algorithm) + mark, tuple(targets)))
    return config


def _of_group(group: Mapping[str, Any], algorithm: str) -> str:
    """Return the algorithm of a group: the group's format, or that of the whole config, or what its numbers mean."""
    own = group.get("format")
    if isinstance(own, str):
        return own.lower()
    # "mixed precision" names no algorithm: each group's numbers have to tell.
    if algorithm and algorithm not in MIXED:
        return algorithm
    numbers = group.get("weights")
    if not isinstance(numbers, dict):
        return ""
    told = [numbers.get(key) for key in ("num_bits", "type", "group_size")]
    return "nvfp4" if told == [4, "float", 16] else "another"


def _names(config: Config, key: str, value: Any) -> list[str]:
    """Return a list of names; anything else is a problem of the file, and gives an empty list."""
    if value is None:
        return []
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return value
    config.problems.append(f"its config: {key} is {value!r:.80}, not a list of names")
    return []


def _is(kind: type, value: Any) -> bool:
    return value is None or isinstance(value, kind)


def _log_steps(tree: Any, length: int) -> float:
    """Return the logarithm of a bound of the number of ways in which an expression can fit a text of that length."""
    total, free, repeats = 0.0, 0.0, 0
    for kind, value in tree:
        name = str(kind)
        if name.endswith("_REPEAT"):
            least, most, part = value
            # In logarithms: nested repeats soon exceed a float. A text holds no more repeats than it has characters.
            inner, most = _log_steps(part, length), max(least, min(most, length))
            total += math.inf if least > MOST_TIMES else most * inner
            free, repeats = free + math.log(1 + most), repeats + 1
        elif name == "BRANCH":
            # Each branch may be tried; the worst one stands for all.
            total += math.log(len(value[1])) + max(_log_steps(branch, length) for branch in value[1])
        else:
            total += sum(_log_steps(part, length) for part in _parts(value))
    return total + min(free, math.log(math.comb(length + repeats, repeats)))  # repeats in a row share the text


def _parts(value: Any) -> list[Any]:
    """List the expressions inside one part of an expression."""
    if isinstance(value, _parser.SubPattern):
        return [value]
    return [inner for one in value for inner in _parts(one)] if isinstance(value, (tuple, list)) else []
