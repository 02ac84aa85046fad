"""Measure the house: how large, how deep, how well explained, and how many steps a convolution takes.

    python -m tests.house                  the table
    python -m tests.house --json           the same as one JSON object
    python -m tests.house --calls          also every package function called in the counted forward and backward
    python -m tests.house --docstrings     also every docstring that opens badly, as file:line
    python -m tests.house --parameters     also every function with more than 8 parameters, as file:line
    python -m tests.house --chain          also the modules of both import chains

Everything but the calls is read from the source with ast and tokenize, so that the figures of two commits can be
compared whatever their folders are. `--package FOLDER` measures another copy; calls are counted only in the package
that Python imports.

Files and folders   Python files in the package's folder itself, and its folders that hold Python files.
Import chain        The number of modules on the longest path of imports. `from package import module` counts as an
                    import of the module, not of the package around it. Imports in a TYPE_CHECKING block are not
                    counted. The second figure also follows imports inside of functions and import_module("...").
                    Modules that import each other are one step, which counts all of them.
Calls               sys.setprofile's "call" events in files of the package, generator expressions included, after two
                    calls that warm up: entering the context with a recipe, F.conv2d on Parameters (16 -> 16, 3x3,
                    stride and padding as tuples, batch 16, 4x4 images) and leaving it; then its backward. Python 3.12
                    runs list comprehensions without a call of their own, so compare figures of one Python version.
Parameters          All named parameters but self, cls and a Function's ctx; *args and **kwargs are not counted. Triton
                    kernels are left out, because their pointers and sizes cannot be packed. Custom operators and their
                    fakes count; a fake called `_` counts as private.
Comments            All comments, those at the end of a line and those for tools included, for 100 lines of code. A line
                    of code holds at least one token that is neither a comment nor part of a docstring.
Docstrings          Those of modules, classes and functions. An opening is *private* if it starts with a bracket, a
                    number, a symbol, a dtype or a lower-case word, or with a word that starts a fragment, such as
                    "Whether", "What" or "Of". An opening is *a phrase* if it is not private, and neither starts with
                    a verb ("Return ...") nor is a sentence. Nouns may name modules, classes and properties, so
                    phrases are counted for other functions only. What is a verb and what a sentence is guessed from
                    words.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import io
import json
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PACKAGE = "te_nvfp4_cv"
MANY_PARAMETERS = 8
Function = ast.FunctionDef | ast.AsyncFunctionDef

FRAGMENT_WORDS = set(
    """
    whether why what of how where which who whom whose when while as by for with without per in into inside over against
    from to at on under among between than then also likewise and or but not that
    """.split()
)
VERBS = set(
    """
    accept accumulate add adjust align allocate allow answer append apply ask assemble assert attach average begin
    bind block bound broadcast build cache calibrate call cast change check choose claim clear clip clone close
    collect combine compare compile compute concatenate configure connect continue convert copy count create cut
    decide decode define delete dequantize derive describe detach detect determine differentiate disable discard
    dispatch divide do draw drop emulate enable encode ensure enter enumerate estimate evaluate exchange execute
    exit expand explain export extend extract fail fake fill find finish fit flag flatten fold follow forbid forget
    format forward free freeze fuse gather generate get give group guess handle hash hold ignore import infer
    initialize insert inspect install invert iterate join judge keep launch lay learn leave let limit list load
    locate log look loop lower make map mark mask match measure merge modify move multiply name normalize note
    notify observe open order pack pad parse pass patch pick place plan plot point pop prepare pretend prevent print
    produce profile propagate provide push put quantize query raise rank read rebuild recompute record reduce refuse
    register reject release remember remove rename render repeat replace replay report request require reset reshape
    resolve restore return reuse reverse rewrite rotate round run sample save say scale scan scatter search see seed
    select send serve set settle share shift show skip slice solve sort split stack start stop store stream strip
    substitute subtract suggest sum summarize swap switch take tell test time trace track train transform translate
    transpose traverse treat trim try tune turn undo unify unpack unpad unwrap update use validate verify view visit
    wait walk warn watch weigh wrap write yield zero
    """.split()
)
OBJECTS = set(
    """
    a an the one two three this these those each every all both any its their it them no nothing whether what how where
    which why up down out
    """.split()
)
NOT_VERBS = OBJECTS | set(
    """
    number sum name names value values some most others other here there nobody everything ours only same such many
    is are do does
    """.split()
)
FINITE = set(
    """
    is are was were be isn't aren't has have had does do did don't doesn't can cannot can't could may might must shall
    should will won't would
    """.split()
)
SUBORDINATORS = set(
    "that which who whom whose where when while if as because until unless what how why whether".split()
)
NOUN_MARKERS = set(
    """
    a an the of one two three these those each every all both any its their no and or several some other with for by
    from in to on at as
    """.split()
)
DTYPES = re.compile(r"^(fp|bf|int|uint|float)\d|^[A-Z]+\d+[A-Z]*\d*$|_")
NOUNS_TOO = set(
    """
    forward backward count name time rank group value sum scale mask cut block call run replay limit estimate batch
    sample track plan cache copy place point order list handle report record request stack step weight table model
    plot start note view trace profile search mark lay shape slice update use range measure map pass pad answer
    label
    """.split()
)


# ---- files and imports ----------------------------------------------------------------------------------------------


def modules_of(package: Path) -> dict[str, Path]:
    """Return the dotted name of each module of the package, with its file."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = [package.name, *path.relative_to(package).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(name: str, modules: dict[str, Path], in_functions: bool) -> set[str]:
    """Return the modules of the package that this module imports."""
    path = modules[name]
    here = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found: set[str] = set()
    for node in _statements(ast.parse(path.read_text(encoding="utf-8")), in_functions):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            names = (f"{source}.{alias.name}" for alias in node.names)
            found.update(full if full in modules else source for full in names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if in_functions and called in ("import_module", "__import__"):
                found.add(str(node.args[0].value))
    return {target for target in found if target in modules and target != name}


def _statements(node: ast.AST, in_functions: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield other
                yield from _statements(other, in_functions)
        elif in_functions or not isinstance(child, Function | ast.Lambda):
            yield child
            yield from _statements(child, in_functions)


def longest_chain(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules on the longest path, from the importer down; modules of one cycle stand side by side."""
    best: dict[int, list[str]] = {}
    group_of: dict[str, int] = {}
    for index, group in enumerate(_cycles(graph)):  # comes from the bottom up: what a group imports has its answer
        group_of.update(dict.fromkeys(group, index))
        below = {group_of[target] for name in group for target in graph[name]} - {index}
        best[index] = [*sorted(group), *max((best[i] for i in sorted(below)), key=len, default=[])]
    return max(best.values(), key=len, default=[])


def _cycles(graph: dict[str, set[str]]) -> Iterator[list[str]]:
    """Yield groups of modules that import each other, alone ones too, imported ones first (Tarjan's algorithm)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []

    def visit(name: str) -> Iterator[list[str]]:
        order[name] = low[name] = len(order)
        stack.append(name)
        for target in sorted(graph[name]):
            if target not in order:
                yield from visit(target)
                low[name] = min(low[name], low[target])
            elif target in stack:
                low[name] = min(low[name], order[target])
        if low[name] == order[name]:
            at = stack.index(name)
            group = stack[at:]
            del stack[at:]
            yield group

    for name in sorted(graph):
        if name not in order:
            yield from visit(name)


# ---- one file's source ----------------------------------------------------------------------------------------------


@dataclass
class Source:
    """What the source of some files says: counts, and the places behind them as "file:line: ..."."""

    code_lines: int = 0
    comments: int = 0
    functions: int = 0
    docstrings: int = 0
    many_parameters: list[str] = field(default_factory=list)
    private_with_many: int = 0
    private_openings: list[str] = field(default_factory=list)
    phrases: list[str] = field(default_factory=list)


def read_source(package: Path) -> Source:
    """Read every Python file below the folder."""
    found = Source()
    for path in sorted(package.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        where = path.relative_to(package.parent).as_posix()
        documented = _documented(tree)
        _count_lines(text, [node.body[0] for node in documented], found)
        for node in documented:
            _judge_docstring(node, where, found)
        for node in ast.walk(tree):
            if isinstance(node, Function):
                _count_parameters(node, where, found)
    return found


def _documented(tree: ast.AST) -> list[Any]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(tree) if isinstance(node, kinds) and ast.get_docstring(node) is not None]


def _count_lines(text: str, docstrings: list[ast.stmt], found: Source) -> None:
    layout = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            found.comments += 1
        elif token.type not in layout:
            code.update(range(token.start[0], token.end[0] + 1))
    for node in docstrings:
        code.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    found.code_lines += len(code)


def _count_parameters(node: Function, where: str, found: Source) -> None:
    if any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
        return
    found.functions += 1
    names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    count = len(names) - (names[:1] in (["self"], ["cls"], ["ctx"]))
    if count > MANY_PARAMETERS:
        private = node.name.startswith("_") and not node.name.endswith("__")
        found.private_with_many += private
        label = ", private" if private else ""
        found.many_parameters.append(f"{where}:{node.lineno}: {node.name}: {count} parameters{label}")


# ---- docstrings -----------------------------------------------------------------------------------------------------


def _judge_docstring(node: Any, where: str, found: Source) -> None:
    text = ast.get_docstring(node) or ""
    found.docstrings += 1
    kind = opening(text)
    line = f"{where}:{node.body[0].lineno}: {text.splitlines()[0] if text else ''}"
    if kind == "private":
        found.private_openings.append(line)
    elif kind == "phrase" and isinstance(node, Function) and not _is_property(node):
        found.phrases.append(line)


def _is_property(node: Function) -> bool:
    return any(ast.unparse(decorator).split(".")[-1].endswith("property") for decorator in node.decorator_list)


def opening(docstring: str) -> str:
    """Return "verb", "sentence", "phrase" or "private": what the docstring starts with, as the module head defines."""
    words = docstring.split()
    if not words or not docstring[0].isupper():
        return "private"
    first = words[0].strip(",.:;()'\"`*")
    if first.lower() in FRAGMENT_WORDS or DTYPES.search(first):
        return "private"
    alone = len(words) == 1 or words[0][-1] in ",:;"
    if _is_imperative(first.lower(), "" if alone else words[1].lower()):
        return "verb"
    return "sentence" if _is_sentence(docstring) else "phrase"


def _is_imperative(first: str, second: str) -> bool:
    if first in NOUNS_TOO:  # an object must follow, or "Time of a step" would pass
        return second in OBJECTS
    if first in VERBS:
        return True
    plural = first.endswith("s") and not first.endswith("ss")
    return second in OBJECTS and first.isalpha() and first not in NOT_VERBS and not plural


def _is_sentence(docstring: str) -> bool:
    """Return whether the first sentence has more finite verbs than words that start a clause below the main one."""
    first = re.split(r"(?<=[.:;])\s|\n\n", docstring, maxsplit=1)[0]
    words = [word.strip(",.:;()\"`*").lower() for word in first.split()]
    pairs = list(zip(words, words[1:], strict=False))
    finite = sum(word in FINITE or (before not in NOUN_MARKERS and _third_person(word)) for before, word in pairs)
    return finite > sum(word in SUBORDINATORS for word in words[1:])


def _third_person(word: str) -> bool:
    stems = (word[:-1], word[:-2], word[:-3] + "y") if word.endswith("s") else ()
    return any(stem in VERBS and stem not in NOUNS_TOO for stem in stems)


# ---- calls ----------------------------------------------------------------------------------------------------------

Calls = Counter[tuple[str, str]]


def count_calls(function: Callable[[], Any], package: Path) -> Calls:
    """Run the function and count the calls of Python functions in the package, by (file, qualified name)."""
    found: Calls = Counter()
    inside = str(package) + "/"

    def profile(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(inside):
            found[frame.f_code.co_filename.removeprefix(inside), frame.f_code.co_qualname] += 1

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(before)
    return found


def convolution_calls() -> tuple[Calls, Calls]:
    """Return the package calls of one convolution's forward, with the context around it, and of its backward."""
    import torch

    import te_nvfp4_cv as nv

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 16, 4, 4, generator=generator).requires_grad_()
    w = torch.nn.Parameter(torch.randn(16, 16, 3, 3, generator=generator))
    recipe = nv.NVFP4BlockScaling()
    output: list[torch.Tensor] = []

    def forward() -> None:
        with nv.nvfp4_autocast(recipe):
            output[:] = [torch.nn.functional.conv2d(x, w, None, (1, 1), (1, 1))]

    for _ in range(2):
        forward()
        output[0].sum().backward()
    package = Path(nv.__file__).resolve().parent
    there = count_calls(forward, package)
    gradient = torch.ones_like(output[0])
    return there, count_calls(lambda: output[0].backward(gradient), package)


# ---- the table ------------------------------------------------------------------------------------------------------


def figures(package: Path) -> dict[str, Any]:
    """Return every figure that is read from the source, with the lists behind them under "lists"."""
    modules = modules_of(package)
    chains = [
        longest_chain({name: imports_of(name, modules, in_functions) for name in modules})
        for in_functions in (False, True)
    ]
    source = read_source(package)
    bad = len(source.private_openings)
    return {
        "files at the root": len(list(package.glob("*.py"))),
        "folders at the root": sum(1 for path in package.iterdir() if path.is_dir() and any(path.rglob("*.py"))),
        "longest import chain": len(chains[0]),
        "longest import chain, with imports in functions": len(chains[1]),
        "functions with more than 8 parameters": len(source.many_parameters),
        "of these private": source.private_with_many,
        "comments per 100 lines of code": round(100 * source.comments / max(1, source.code_lines), 1),
        "docstrings": source.docstrings,
        "docstrings with a private opening, %": round(100 * bad / max(1, source.docstrings), 1),
        "functions' docstrings that are phrases": len(source.phrases),
        "private openings and phrases, %": round(100 * (bad + len(source.phrases)) / max(1, source.docstrings), 1),
        "lines of code": source.code_lines,
        "lists": {
            "chain": chains,
            "parameters": source.many_parameters,
            "private openings": source.private_openings,
            "phrases": source.phrases,
        },
    }


def call_figures(forward: Calls, backward: Calls) -> dict[str, int]:
    """Return the figures of convolution_calls."""
    return {
        "package calls, forward": forward.total(),
        "package calls, backward": backward.total(),
        "files entered, forward": len({file for file, _ in forward}),
        "files entered, backward": len({file for file, _ in backward}),
    }


def main(arguments: list[str] | None = None) -> int:
    """Print the table, and the lists that were asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.house", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--package", type=Path, help="measure this folder's source instead, without the calls")
    parser.add_argument("--json", action="store_true")
    for name in ("calls", "docstrings", "parameters", "chain"):
        parser.add_argument(f"--{name}", action="store_true")
    options = parser.parse_args(arguments)
    if options.package and options.calls:
        parser.error("--calls runs the package that Python imports: leave out --package")
    package = options.package or _imported()
    if not (package / "__init__.py").is_file():
        parser.error(f"{package} is no package: it holds no __init__.py")
    table = figures(package.resolve())
    lists = table.pop("lists")
    there, back = (Counter(), Counter()) if options.package else convolution_calls()
    if not options.package:
        table |= call_figures(there, back)
    if options.json:
        calls = {way: _rows(found) for way, found in (("forward", there), ("backward", back))}
        print(json.dumps({**table, **({"calls": calls} if options.calls else {})}))
        return 0
    for name, value in table.items():
        print(f"{name:50}{value:>10}")
    if options.calls:
        for way, found in (("forward", there), ("backward", back)):
            print(f"\n{way}", *(f"{count:5}  {where}" for where, count in _rows(found).items()), sep="\n")
    if options.docstrings:
        print("\nprivate openings", *lists["private openings"], "\nphrases", *lists["phrases"], sep="\n")
    if options.parameters:
        print("\nmore than 8 parameters", *lists["parameters"], sep="\n")
    if options.chain:
        print("\nmodule level", *lists["chain"][0], "\nwith imports in functions", *lists["chain"][1], sep="\n")
    return 0


def _rows(calls: Calls) -> dict[str, int]:
    return {f"{file}:{name}": count for (file, name), count in sorted(calls.items(), key=lambda item: -item[1])}


def _imported() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None and spec.origin is not None, f"{PACKAGE} cannot be imported"
    return Path(spec.origin).parent


if __name__ == "__main__":
    sys.exit(main())
