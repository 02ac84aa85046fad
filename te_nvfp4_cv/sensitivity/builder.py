"""Find the function that makes the model and loss of a bundle.

    unet_coco.rebuild:build               of the examples/ folder beside the package: may be named by the bundle alone
    my_package.rebuild:build              named by the user: imported as Python would, the current folder included
    path/to/rebuild.py:build              the same as a file; a file inside of a package becomes a module of it

A bundle is a file that may come from anywhere, so the code that it names is not imported unless it is one of this
project's examples, or the user names it too.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from te_nvfp4_cv.errors import value_error

Build = Callable[[dict[str, Any]], Any]
OPERATORS = "operator torchvision::"  # in the text of torchvision's error beside a torch of another build
SHIPPED = "unet_coco"  # the only example with a training run that writes bundles


def examples() -> Path:
    """Return the folder of examples of a checkout, beside the package."""
    return Path(__file__).resolve().parents[2] / "examples"


def recorded(name: str, path: str) -> Build:
    """Return the builder that a bundle names, if it is one of this project's examples.

    Args:
        name: the builder's name in the bundle, MODULE:FUNCTION.
        path: the path of the bundle, for the message.
    Raises:
        ValueError: any other builder; the message shows the command that names it.
    """
    module, _, function = name.partition(":")
    folder = examples()
    parts = module.split(".")
    file = folder.joinpath(*parts).with_suffix(".py")
    # Only plain names: "..", say, must not lead out of the examples' folder.
    shipped = parts[0] == SHIPPED and all(part.isidentifier() for part in (*parts, function)) and file.is_file()
    if not shipped:
        known = parts[0] == SHIPPED and not (folder / SHIPPED).is_dir()
        raise value_error(
            f"diagnose: the bundle's builder {name!r} is not imported without your consent.",
            got="no examples/ folder beside the package" if known else "code that does not ship with this project",
            needs="--builder, which says that you trust this code, or diagnose(bundle, build=...) in Python",
            fix=f"te-nvfp4-cv diagnose {path} --builder {name}",
        )
    found = _import(module, folder, "--builder")
    if Path(found.__file__).resolve() != file:  # a module of that name was imported before
        raise value_error(
            f"diagnose: {name!r} is another module here.", got=found.__file__, needs=str(file),
            fix=f"start Python again without the other {SHIPPED}, or name it with --builder",
        )
    return _function(found, function, name, "--builder")


def given(name: str, option: str = "--builder") -> Build:
    """Import the function that the user names as MODULE:FUNCTION or FILE.py:FUNCTION.

    Args:
        name: what the user gave.
        option: the command-line option by which it was given, for messages.
    Raises:
        ValueError: there is no such module, file or function.
    """
    source, colon, function = name.rpartition(":")
    if not colon or not source or not function:
        raise value_error(
            f"bad {option}.", got=repr(name), needs="MODULE:FUNCTION or FILE.py:FUNCTION", fix="x.py:build"
        )
    if not source.endswith(".py"):
        return _function(_import(source, Path.cwd(), option), function, name, option)
    file = Path(source).expanduser().resolve()
    if not file.is_file():
        raise value_error(f"{option}: no such file.", got=source, needs="a Python file", fix="correct the path")
    # A file of a package may import its neighbours by relative imports, so it is imported under the package's name.
    parts, folder = [file.stem], file.parent
    while (folder / "__init__.py").is_file():
        parts.insert(0, folder.name)
        folder = folder.parent
    found = _import(".".join(parts), folder, option)
    if Path(found.__file__).resolve() != file:
        raise value_error(
            f"{option}: another module is called {'.'.join(parts)!r} here.",
            got=str(found.__file__), needs=str(file), fix="rename the file"
        )
    return _function(found, function, name, option)


def _import(module: str, folder: Path, option: str) -> Any:
    """Import a module with `folder` first on the path."""
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(module)
    except Exception as error:  # the module's own code runs, and may raise anything
        # A torchvision that was built for another torch fails with this text, which says nothing of the cause.
        if OPERATORS in str(error):
            raise value_error(
                f"{option}: torchvision does not load beside this torch.",
                got=f"{type(error).__name__}: {error}",
                needs="torch and torchvision of one build: both for a CPU, or both for the same CUDA",
                fix="install both from the same index",
            ) from error
        raise value_error(
            f"{option}: the module {module!r} cannot be imported.", got=f"{type(error).__name__}: {error}",
            needs=f"a module that imports with {folder} on the path", fix="correct it, or name another one",
        ) from error
    finally:
        sys.path.remove(str(folder))  # what is imported later must not be found in the user's folder by accident


def _function(module: Any, function: str, name: str, option: str) -> Build:
    found = getattr(module, function, None)
    if not callable(found):
        raise value_error(
            f"{option}: no function {name!r}.",
            got=f"{module.__name__} without a function {function!r}",
            needs="a function of the bundle's arguments that returns (model, loss)"
            if option == "--builder"
            else "a function that returns the model",
            fix="correct the name after the colon",
        )
    return found  # type: ignore[no-any-return]
