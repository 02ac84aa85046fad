"""Find, read and write recipe files: recipes/*.toml.

    description = "what it is for"        optional, for people
    name = "mine"                         optional; the file's name without it
    [recipe]                              fields of NVFP4BlockScaling that deviate from the default
    disable_rht = true
    [precision]                           patterns of module names, in order, the last match wins
    "head" = "high"                       high precision
    "layer4.*" = "no_rht"                 another recipe, by name or path, or its fields in braces: {disable_rht = true}

Refused, with the file's name, the key and what is allowed: unknown keys, bad values, text that is not TOML, a missing
file, a [precision] table inside a recipe that a [precision] table names, and fields that a version removed. A file that
holds the old default of a removed field still loads.
"""

from __future__ import annotations

import difflib
import functools
import os
import tomllib
from pathlib import Path
from typing import Any

from te_nvfp4_cv.errors import message, value_error
from te_nvfp4_cv.recipe.block_scaling import NVFP4BlockScaling, as_recipe, load_names_with
from te_nvfp4_cv.recipe.fields import HIGH, PLAIN, without_removed

# The table of precision has a section of its own, beside [recipe].
FIELDS = tuple(field for field in PLAIN if field != "precision")
TOP_LEVEL = ("description", "name", "recipe", "precision")


def recipe_folder() -> Path:
    """Return the folder of the package's own recipes: inside an installed package, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "recipes"  # a wheel holds the files inside of the package
    return installed if installed.is_dir() else package.parent / "recipes"


def list_recipes() -> dict[str, str]:
    """Return the names of the recipes that come with the package, each with its description.

    Example:
        >>> import te_nvfp4_cv as nv
        >>> sorted(nv.list_recipes())[:3]
        ['current_pow2', 'default', 'delayed']
    """
    paths = sorted(recipe_folder().glob("*.toml"))
    return {path.stem: str(_parse(path).get("description", "")) for path in paths}


def load_recipe(name_or_path: str | os.PathLike[str]) -> NVFP4BlockScaling:
    """Load a recipe by its name, or from a file.

    Args:
        name_or_path: A name as `list_recipes` returns it, or a path: anything with a separator or the ending .toml.
    Raises:
        FileNotFoundError: There is no such recipe. The message lists the names that exist.
        ValueError: The file is not TOML, or has unknown keys or bad values.

    Example:
        >>> import te_nvfp4_cv as nv
        >>> nv.load_recipe("no_rht")
        NVFP4BlockScaling(name='no_rht', disable_rht=True)
    """
    return _load(name_or_path, Path.cwd(), inner=False)


def save_recipe(recipe: NVFP4BlockScaling | str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Write a recipe, or the one of that name, to a file, which `load_recipe` reads back as an equal recipe.

    Example:
        >>> import tempfile, te_nvfp4_cv as nv
        >>> recipe = nv.NVFP4BlockScaling(name="mine", high_precision_gemms=("wgrad",))
        >>> path = tempfile.mkdtemp() + "/mine.toml"
        >>> nv.save_recipe(recipe, path)
        >>> nv.load_recipe(path) == recipe
        True
    """
    Path(path).write_text(as_recipe(recipe).to_toml(), encoding="utf-8")


def parse_recipe(text: str, source: str = "recipe text") -> NVFP4BlockScaling:
    """Read a recipe from the text that `to_toml` returns, wherever it was stored.

    Args:
        source: What error messages call the text.
    Raises:
        ValueError: The text is not TOML, or has unknown keys or bad values.
    """
    return _from_table(Path(source), _parse_text(Path(source), text), inner=False)


def _given(name_or_path: str | os.PathLike[str]) -> NVFP4BlockScaling:
    """Load the recipe that a caller names in the place of a recipe: quickly, as a context may be made in each step."""
    path = _find(name_or_path, Path.cwd())
    is_name = isinstance(name_or_path, str) and path.parent == recipe_folder()
    return _own(path) if is_name else _from_table(path, _parse(path), inner=False)


@functools.lru_cache(maxsize=64)
def _own(path: Path) -> NVFP4BlockScaling:
    # The package's own files do not change while a program runs. A user's may, and are read each time.
    return _from_table(path, _parse(path), inner=False)


load_names_with(_given)


def _load(name_or_path: str | os.PathLike[str], folder: Path, *, inner: bool) -> NVFP4BlockScaling:
    path = _find(name_or_path, folder)
    return _from_table(path, _parse(path), inner=inner)


def _from_table(path: Path, table: dict[str, Any], *, inner: bool) -> NVFP4BlockScaling:
    _check_keys(path, "top level", table, TOP_LEVEL)
    for section in ("recipe", "precision"):
        if not isinstance(table.get(section, {}), dict):
            raise _bad(path, section, table[section], "a table: a line [" + section + "], then its keys")
    for text in ("description", "name"):
        if not isinstance(table.get(text, ""), str):
            raise _bad(path, text, table[text], "a string")
    if inner and table.get("precision"):  # two tables over one model would contradict each other
        raise _bad(path, "[precision]", tuple(table["precision"]), "no such table in a recipe that another one names")
    recipes = {pattern: _precision(path, pattern, value) for pattern, value in table.get("precision", {}).items()}
    return _build(path, "[recipe]", table.get("recipe", {}), table.get("name", path.stem), tuple(recipes.items()))


def _find(name_or_path: str | os.PathLike[str], folder: Path) -> Path:
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise value_error(
            "recipe: not a name.",
            got=f"{name_or_path!r:.80}",
            needs="a recipe's name or the path of a recipe file",
            fix="a recipe object needs no loading: pass it on as it is",
        )
    text = os.fspath(name_or_path)
    # A slash separates folders on each system, and os.sep on this one.
    if isinstance(name_or_path, os.PathLike) or "/" in text or os.sep in text or text.endswith(".toml"):
        # Relative to the file that names it, so that a folder of recipes can be moved.
        path = folder / Path(text).expanduser()
        if path.is_file():
            return path
        got = f"{text!r}: " + ("a folder" if path.is_dir() else "no such file")
        fix = "correct the path, or use a name: " + ", ".join(_names())
        text = message("recipe: no such file.", got=got, needs="the path of a .toml file", fix=fix)
        raise FileNotFoundError(text)
    path = recipe_folder() / f"{text}.toml"
    if text and path.is_file():  # "" would be the file .toml
        return path
    close = difflib.get_close_matches(text, _names(), 3, 0.5)
    fix = "use one of these names, or a path that ends in .toml"
    if text == "high":  # it is a word of tables, where it stands for high precision
        fix = 'nvfp4_autocast(enabled=False), or a table of precision: {"head": "high"}'
    elif close:
        fix = f"did you mean {' or '.join(map(repr, close))}?"
    raise FileNotFoundError(
        message("recipe: no recipe of this name.", got=repr(text), needs="one of: " + ", ".join(_names()), fix=fix)
    )


def _names() -> list[str]:
    return sorted(path.stem for path in recipe_folder().glob("*.toml"))


def _parse(path: Path) -> dict[str, Any]:
    return _parse_text(path, path.read_bytes())


def _parse_text(path: Path, text: str | bytes) -> dict[str, Any]:
    try:
        # Windows' editors put a mark before the text, which UTF-8 allows and TOML's readers do not.
        return tomllib.loads(text if isinstance(text, str) else text.decode("utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise value_error(
            f"recipe file '{path}': not TOML.",
            got=str(error),
            needs="a UTF-8 TOML file with the keys " + ", ".join(TOP_LEVEL),
            fix="correct the file at that place",
        ) from None


def _check_keys(path: Path, where: str, table: dict[str, Any], allowed: tuple[str, ...]) -> None:
    for key in table:
        if key in allowed:
            continue
        close = difflib.get_close_matches(key, allowed, 1)
        fix = f"did you mean {close[0]!r}?" if close else f"remove {key!r}"
        field = difflib.get_close_matches(key, FIELDS, 1)
        if where == "top level" and key in FIELDS:  # the most common mistake: the line [recipe] is missing
            fix = f"put {key!r} below a line [recipe]"
        elif where == "top level" and not close and field:
            fix = f"did you mean {field[0]!r}? It belongs below a line [recipe]"
        elif where.startswith("[precision]") and not close:  # TOML reads layer4.0 as a table in a table
            fix += ', or put a pattern with dots in quotes, as in "layer4.0" = "high"'
        title = f"recipe file '{path}': unknown key {key!r} ({where})."
        raise value_error(title, got=f"{key} = {table[key]!r}", needs="one of: " + ", ".join(allowed), fix=fix)


def _bad(path: Path, key: str, value: object, needs: str) -> ValueError:
    title = f"recipe file '{path}': bad value of {key}."
    return value_error(title, got=f"{value!r:.120}", needs=needs, fix=f"correct {key}")


def _build(
    path: Path,
    where: str,
    fields: dict[str, Any],
    name: str,
    precision: tuple[tuple[str, NVFP4BlockScaling | None], ...] = (),
) -> NVFP4BlockScaling:
    try:
        values = without_removed(fields)
    # The recipe's own message does not know from which file and section the value comes.
    except ValueError as error:
        raise ValueError(f"recipe file '{path}', {where}: {error}") from None
    _check_keys(path, where, values, FIELDS)
    if values.get("backward_override") == "none":  # TOML has no null
        values["backward_override"] = None
    try:
        return NVFP4BlockScaling(**values, precision=precision, name=name)
    except ValueError as error:
        raise ValueError(f"recipe file '{path}', {where}: {error}") from None


def _precision(path: Path, pattern: str, value: object) -> NVFP4BlockScaling | None:
    where = f"[precision] {pattern!r}"
    if value in HIGH:
        return None
    if isinstance(value, str):
        try:
            return _load(value, path.parent, inner=True)
        # A ValueError now: the file that was asked for is there, but names one that is not.
        except FileNotFoundError as error:
            raise ValueError(f"recipe file '{path}', {where}: neither \"high\" nor a recipe: {error}") from None
        except ValueError as error:
            raise ValueError(f"recipe file '{path}', {where}: {error}") from None
    if isinstance(value, dict):
        fields = {key: item for key, item in value.items() if key != "name"}
        return _build(path, where, fields, str(value.get("name", "")))
    raise _bad(path, where, value, 'the string "high", a recipe\'s name or path, or its fields in braces')
