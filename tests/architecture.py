"""The rules of the house, each a function from a `House`, which is a package and its page, to a list of violations.

The floors and the list of torch's private names are read from docs/ARCHITECTURE.md, so the page and
tests/test_architecture.py, which applies the rules, cannot disagree. The source is read with ast: an import inside a
function or a TYPE_CHECKING block counts like one at the top, and `from package import module` counts as an import of
the module. Importing a module of a folder is no import of the folder's __init__; importing a name from the folder is
one.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from xml.etree import ElementTree

PACKAGE = "te_nvfp4_cv"
MOST_FILES, MOST_FOLDERS, FILES_WITHOUT_README, MOST_TO_READ = 12, 16, 5, 8
ROOMS = {  # an optional package: patterns of the files that may import it; * also matches folders
    "triton": "ops/triton/*.py ops/*/triton/*.py",
    "cudnn": "ops/conv/cudnn.py",
    "wandb": "telemetry/*.py",
    "matplotlib": "telemetry/*.py",
    "plotly": "telemetry/*.py",
    "jinja2": "telemetry/templates.py",
    "pandas": "sensitivity/scan_report.py",
    "tensorboard": "telemetry/*.py",
    "onnx": "export/*.py",
    "onnxscript": "export/*.py",
    "onnxruntime": "export/*.py",
    "ml_dtypes": "export/*.py",
    "transformer_engine": "integrations/transformer_engine_faces.py",
    "lightning": "integrations/lightning.py",
    "pytorch_lightning": "integrations/lightning.py",
    "accelerate": "",
    "transformers": "integrations/transformers.py cli/libraries.py",
    "timm": "cli/libraries.py",
    "torchvision": "cli/torchvision_ops.py",
}


# ---- the page -------------------------------------------------------------------------------------------------------


def rows_below(page: str, heading: str) -> list[list[str]]:
    """Return the cells of the first table below this heading, without the table's two head lines."""
    _, found, rest = page.partition(f"\n## {heading}\n")
    assert found, f"docs/ARCHITECTURE.md has no heading {heading!r}"
    section = rest.split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    assert len(lines) > 2, f"docs/ARCHITECTURE.md has no table below {heading!r}"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def in_code(cell: str) -> list[str]:
    """Return what stands between backticks."""
    return re.findall(r"`([^`]+)`", cell)


def floors_on(page: str) -> list[tuple[int, str]]:
    """Return the floor of each folder ("ops/") and file ("errors.py") as the page lists them."""
    return [(int(floor), name) for floor, names, *_ in rows_below(page, "The floors") for name in in_code(names)]


def privates_on(page: str) -> list[tuple[str, str, str]]:
    """Return subject, file and name of each of torch's private names that the page lists."""
    rows = rows_below(page, "Torch's private names")
    return [(subject, *in_code(file), name) for subject, file, names in rows for name in in_code(names)]


# ---- the tree -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class House:
    """A package's folder, the text of its page, and the text of the page's picture, an SVG."""

    package: Path
    page: str
    picture: str

    @cached_property
    def modules(self) -> dict[str, Path]:
        """The dotted name of each module, relative to the package ("" is the package), with its file."""
        found = {}
        for path in sorted(self.package.rglob("*.py")):
            parts = list(path.relative_to(self.package).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
        return found

    @cached_property
    def trees(self) -> dict[str, ast.Module]:
        """The parsed source of each module."""
        return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in self.modules.items()}

    @cached_property
    def floors(self) -> dict[str, int]:
        """The floor of each entry of the package's folder, by the name of its module."""
        return {self.entry(name): floor for floor, name in floors_on(self.page)}

    @staticmethod
    def entry(name: str) -> str:
        """Return the module that a name on the page stands for: "ops/" -> "ops", "__init__.py" -> ""."""
        return name.rstrip("/").removesuffix(".py").replace("__init__", "")

    def where(self, module: str) -> str:
        """Return the module's file as messages show it."""
        return self.modules[module].relative_to(self.package).as_posix()

    @cached_property
    def imports(self) -> list[tuple[str, int, str]]:
        """All imports of the package: importing module, line, imported module or package with its full dotted name."""
        return [(name, line, target) for name in self.modules for line, target in self._imports_of(name)]

    @cached_property
    def inner_imports(self) -> list[tuple[str, int, str]]:
        """The imports of modules of the package by modules of the package, all named relative to the package."""
        inner = (
            (name, line, target.removeprefix(PACKAGE).removeprefix("."))
            for name, line, target in self.imports
            if target.split(".")[0] == PACKAGE
        )
        return [(name, line, target) for name, line, target in inner if target != name]

    def _imports_of(self, name: str) -> Iterator[tuple[int, str]]:
        full = [PACKAGE, *name.split(".")] if name else [PACKAGE]
        here = full if self.modules[name].name == "__init__.py" else full[:-1]
        for node in ast.walk(self.trees[name]):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = here[: len(here) - node.level + 1] if node.level else []
                source = ".".join([*base, *([node.module] if node.module else [])])
                for alias in node.names:
                    target = f"{source}.{alias.name}"
                    yield node.lineno, target if target.removeprefix(PACKAGE + ".") in self.modules else source
            elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                called = getattr(node.func, "attr", getattr(node.func, "id", ""))
                if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                    yield node.lineno, node.args[0].value

    def folders(self) -> list[str]:
        """Return the modules that are packages: the folders below this one, and this one ("")."""
        return [name for name, path in self.modules.items() if path.name == "__init__.py"]

    def children(self, folder: str) -> set[str]:
        """Return the names of the files and folders directly in a folder, without its __init__."""
        inside = f"{folder}." if folder else ""
        names = (name.removeprefix(inside) for name in self.modules if name.startswith(inside) and name != folder)
        return {name.split(".")[0] for name in names}


# ---- the rules ------------------------------------------------------------------------------------------------------


def page_and_tree_agree(house: House) -> list[str]:
    """List what is on no floor, what the page lists twice, and what the page names and the tree lacks."""
    names = [name for _, name in floors_on(house.page)]
    found = [f"{name}: twice on the page" for name in sorted(set(names)) if names.count(name) > 1]
    there = {f"{path.name}/" if path.is_dir() else path.name for path in house.package.iterdir() if _is_code(path)}
    found += [f"{name}: on no floor of the page" for name in sorted(there - set(names))]
    for name in dict.fromkeys(in_code(house.page)):
        if re.fullmatch(r"[\w/]+(/|\.py|\.cpp)", name):
            if not any((folder / name).exists() for folder in (house.package, house.package.parent)):
                found.append(f"{name}: on the page and not in the tree")
    return found


def picture_and_table_agree(house: House) -> list[str]:
    """List what the picture of the floors shows at another height than the table, or does not show."""
    texts = ElementTree.fromstring(house.picture).iter("{http://www.w3.org/2000/svg}text")
    rooms = [(float(text.get("y", 0)), text.text or "") for text in texts if text.get("class") == "room"]
    heights = sorted({y for y, _ in rooms}, reverse=True)
    floors = sorted({floor for floor, _ in floors_on(house.page)})
    if len(heights) != len(floors):
        return [f"the picture shows {len(heights)} floors, the table {len(floors)}"]
    floor_at = dict(zip(heights, floors, strict=True))
    shown = {(floor_at[y], name) for y, name in rooms}
    listed = set(floors_on(house.page))
    found = [f"{name}: on floor {floor} of the picture only" for floor, name in shown - listed]
    return sorted(found + [f"{name}: on floor {floor} of the table only" for floor, name in listed - shown])


def the_way_of_the_data_is_short(house: House) -> list[str]:
    """List files of the reading order that do not exist, and its length if it is too long."""
    files = [name for _, cell, *_ in rows_below(house.page, "The way of the data") for name in in_code(cell)]
    found = [f"{name}: to be read and not in the tree" for name in files if not (house.package / name).is_file()]
    return found + ([f"{len(files)} files to read, {MOST_TO_READ} allowed"] if len(files) > MOST_TO_READ else [])


def _is_code(path: Path) -> bool:
    return path.suffix == ".py" or (path.is_dir() and any(path.rglob("*.py")))


def imports_point_down(house: House) -> list[str]:
    """List imports from a higher floor, and from another folder or file of the same floor."""
    found = []
    for name, line, target in house.inner_imports:
        here, there = name.split(".")[0], target.split(".")[0]
        floors = house.floors.get(here), house.floors.get(there)
        if here == there or None in floors:  # an entry that is missing on the page is another check's finding
            continue
        if floors[1] >= floors[0]:  # type: ignore[operator]
            way = "on its own floor" if floors[0] == floors[1] else f"up to floor {floors[1]}"
            found.append(f"{house.where(name)}:{line}: floor {floors[0]} imports {target or PACKAGE}, {way}")
    return found


def folders_have_an_order(house: House) -> list[str]:
    """List the files and folders of one folder that import each other, with the lines; __init__ is one of the files."""
    found = []
    for folder in house.folders():
        if not folder:  # its order is that of the floors
            continue
        edges: dict[str, dict[str, str]] = defaultdict(dict)
        for name, line, target in house.inner_imports:
            here, there = _child(name, folder), _child(target, folder)
            if here and there and here != there:
                edges[here].setdefault(there, f"{house.where(name)}:{line}")
        reached = {child: _reached(child, edges) for child in edges}
        circles = {
            tuple(sorted(other for other in reached[child] if child in reached.get(other, ())))
            for child in reached
            if child in reached[child]
        }
        for circle in sorted(circles):
            lines = [f"{a} -> {b} ({edges[a][b]})" for a in circle for b in sorted(edges[a]) if b in circle]
            found.append(f"{folder.replace('.', '/')}/: a cycle: {', '.join(lines)}")
    return found


def _child(module: str, folder: str) -> str:
    """Return the file or folder of `folder` that holds the module: "" outside, "__init__" for the folder's own file."""
    if module == folder:
        return "__init__"
    return module.removeprefix(folder + ".").split(".")[0] if module.startswith(folder + ".") else ""


def _reached(start: str, edges: dict[str, dict[str, str]]) -> set[str]:
    seen: set[str] = set()
    ahead = list(edges.get(start, ()))
    while ahead:
        name = ahead.pop()
        if name not in seen:
            seen.add(name)
            ahead.extend(edges.get(name, ()))
    return seen


def the_root_is_small(house: House) -> list[str]:
    """List the figures of the package's folder that exceed their limit."""
    entries = [path for path in house.package.iterdir() if _is_code(path)]
    folders = sum(path.is_dir() for path in entries)
    counts = ((len(entries) - folders, MOST_FILES, "files"), (folders, MOST_FOLDERS, "folders"))
    return [f"{count} {what} at the root, {most} allowed" for count, most, what in counts if count > most]


def optional_packages_stay_in_their_rooms(house: House) -> list[str]:
    """List imports of optional packages in files that ROOMS does not name."""
    found = []
    for name, line, target in house.imports:
        top, where = target.split(".")[0], house.where(name)
        if top in ROOMS and not any(fnmatch(where, room) for room in ROOMS[top].split()):
            found.append(f"{where}:{line}: imports {top} outside of its room ({ROOMS[top] or 'none in the package'})")
    return found


def names_do_not_hide_names(house: House) -> list[str]:
    """List files and folders that bear the name of a public attribute of their parent.

    `import te_nvfp4_cv.coverage.watch as w` would find the function nv.coverage instead of a folder of that name. A
    public module, nv.functional say, is itself the attribute of its parent, so it is not listed.
    """
    found = []
    for folder in house.folders():
        dots = f"{folder}." if folder else ""
        public = _public_names(house, folder)
        for child in sorted(house.children(folder) & set(public)):
            if public[child] != f"{dots}{child}":
                what = f"{PACKAGE}.{dots}{child}"
                found.append(f"{dots.replace('.', '/')}{child}: hides the public name {what}, or is hidden by it")
    return found


def _public_names(house: House, folder: str) -> dict[str, str | None]:
    """Return the public names that a package's __init__ binds, with the module that each is, if it is one."""
    names: dict[str, str | None] = {}
    for node in _outside_of_functions(house.trees[folder]):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                full = f"{node.module}.{alias.name}".removeprefix(PACKAGE + ".")
                names[alias.asname or alias.name] = full if full in house.modules else None
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names[node.name] = None
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names[node.id] = None
    return {name: module for name, module in names.items() if not name.startswith("_")}


def _outside_of_functions(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            yield from _outside_of_functions(child)


def every_file_says_what_it_is_for(house: House) -> list[str]:
    """List files without a docstring, and large folders without a README.md that names each of their files."""
    found = [f"{house.where(name)}: no docstring" for name, tree in house.trees.items() if not ast.get_docstring(tree)]
    for folder in house.folders():
        path = house.modules[folder].parent
        files = sorted(file.name for file in path.glob("*.py"))
        if len(files) <= FILES_WITHOUT_README:
            continue
        readme = path / "README.md"
        where = readme.relative_to(house.package).as_posix()
        if not readme.is_file():
            found.append(f"{where}: missing, {len(files)} files are in that folder")
            continue
        text = readme.read_text(encoding="utf-8")
        found += [f"{where}: does not name {file}" for file in files if file != "__init__.py" and file not in text]
    return found


def torch_privates_are_listed(house: House) -> list[str]:
    """List private names of torch that a file touches and the page does not list there, and the reverse."""
    touched = {(house.where(name), private) for name in house.modules for private in private_names(house.trees[name])}
    listed = {(file, private) for _, file, private in privates_on(house.page)}
    found = [f"{file}: touches {private}, which the page does not list there" for file, private in touched - listed]
    found += [f"{file}: does not touch {private}, which the page lists there" for file, private in listed - touched]
    return sorted(found)


def each_torch_private_has_one_file(house: House) -> list[str]:
    """List subjects and names that the page gives to more than one file."""
    files: dict[str, set[str]] = defaultdict(set)
    for subject, file, private in privates_on(house.page):
        files[subject].add(file)
        files[private].add(file)
    return [f"{what}: in {', '.join(sorted(places))}" for what, places in sorted(files.items()) if len(places) > 1]


def private_names(tree: ast.Module) -> set[str]:
    """Return the private names of torch's modules and classes that the source uses, up to their first private part.

    Found are imports, attributes of whatever an import bound (`F._x`, `torch.overrides._x`), getattr with a literal,
    and strings that name a private module. All names below torch._C are private and are given in full. Operators in
    torch.ops are registered by name, so `torch.ops.aten._x` is not counted. Attributes of instances (`w._base`) are
    not counted either, because the source alone does not show that they are torch's.
    """
    bound: dict[str, str] = {}  # what a name of this file stands for, where that is something of torch
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    bound[alias.asname or "torch"] = alias.name if alias.asname else "torch"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch" and not node.level:
            bound.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    chains = set(bound.values())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            chains.update(alias.name for alias in node.names)
        elif isinstance(node, ast.Attribute):
            chains.add(_dotted(node, bound))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
            if len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
                chains.add(f"{_dotted(node.args[0], bound)}.{node.args[1].value}")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            chains.add(node.value if re.fullmatch(r"torch(\.\w+)+", node.value) else "")
    found = {_up_to_private(chain) for chain in chains} - {""}
    return {name for name in found if not any(other.startswith(name + ".") for other in found)}


def _dotted(node: ast.AST, bound: dict[str, str]) -> str:
    """Return the full dotted name of an expression like `F.relu`, or "" where it does not start with torch."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id not in bound:
        return ""
    return ".".join([bound[node.id], *reversed(parts)])


def _up_to_private(chain: str) -> str:
    parts = chain.split(".")
    if parts[0] != "torch" or parts[:2] == ["torch", "ops"]:
        return ""
    if parts[1:2] == ["_C"]:
        return chain
    private = (part.startswith("_") and not part.endswith("__") and PACKAGE not in part for part in parts)
    at = next((i for i, found in enumerate(private) if found), None)  # a mark of ours on a function of torch is no find
    return "" if at is None else ".".join(parts[: at + 1])


RULES: tuple[Callable[[House], list[str]], ...] = (
    page_and_tree_agree,
    picture_and_table_agree,
    the_way_of_the_data_is_short,
    imports_point_down,
    folders_have_an_order,
    the_root_is_small,
    optional_packages_stay_in_their_rooms,
    names_do_not_hide_names,
    every_file_says_what_it_is_for,
    torch_privates_are_listed,
    each_torch_private_has_one_file,
)
