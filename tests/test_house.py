"""The script that measures the house, on small planted packages; and the benchmark of host time, for two rounds."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from te_nvfp4_cv.backend import native
from tests import house

ROOT = Path(__file__).resolve().parent.parent


def plant(folder: Path, **files: str) -> Path:
    """Write a package `pack` with these files; `a__b` is the file a/b.py."""
    package = folder / "pack"
    for name, text in {"__init__": "", **files}.items():
        path = package / f"{name.replace('__', '/') if name != '__init__' else name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return package


def chain(package: Path, in_functions: bool = False) -> list[str]:
    modules = house.modules_of(package)
    return house.longest_chain({name: house.imports_of(name, modules, in_functions) for name in modules})


def test_files_and_folders_at_the_root(tmp_path):
    package = plant(tmp_path, a="", b="", ops__c="", nn__d="")
    (package / "pictures").mkdir()
    found = house.figures(package)
    assert found["files at the root"] == 3 and found["folders at the root"] == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import pack.b\n", ["pack.a", "pack.b"]),
        ("from pack import b\n", ["pack.a", "pack.b"]),
        ("from . import b\n", ["pack.a", "pack.b"]),
        ("from .b import name\n", ["pack.a", "pack.b"]),
        ("class A:\n    from pack import b\n", ["pack.a", "pack.b"]),
        ("if TYPE_CHECKING:\n    from pack import b\nelse:\n    from pack import c\n", ["pack.a", "pack.c"]),
        ("if typing.TYPE_CHECKING:\n    from pack import b\n", ["pack"]),
        ("def f():\n    from pack import b\n", ["pack"]),
        ("import torch\n", ["pack"]),
    ],
)
def test_imports_at_module_level(tmp_path, text, expected):
    found = chain(plant(tmp_path, a=text, b="", c=""))
    assert found == expected if len(expected) > 1 else len(found) == 1


@pytest.mark.parametrize("inside", ["from pack import b", "importlib.import_module('pack.b')"])
def test_imports_in_functions_count_for_the_second_chain(tmp_path, inside):
    package = plant(tmp_path, a=f"def f():\n    {inside}\n", b="from pack import c\n", c="")
    assert chain(package) == ["pack.b", "pack.c"]
    assert chain(package, in_functions=True) == ["pack.a", "pack.b", "pack.c"]


def test_the_chain_is_the_longest_path_and_a_cycle_counts_all_its_modules(tmp_path):
    texts = {"a": "from pack import b, d\n", "b": "from pack import c\n", "c": "from pack import d\n", "d": ""}
    straight = plant(tmp_path / "1", **texts)
    assert chain(straight) == ["pack.a", "pack.b", "pack.c", "pack.d"]
    cycle = plant(tmp_path / "2", a="import pack.b\n", b="import pack.c\n", c="import pack.b\nimport pack.d\n", d="")
    assert chain(cycle) == ["pack.a", "pack.b", "pack.c", "pack.d"]


def test_parameters(tmp_path):
    text = """
class A:
    def eight(self, a, b, c, d, e, f, g, h): ...
    def nine(self, a, b, c, d, /, e, f, *, g, h, i): ...
    def __init__(self, a, b, c, d, e, f, g, h, i): ...
def stars(a, b, c, d, e, f, g, h, *args, **kwargs): ...
def _private(a, b, c, d, e, f, g, h, i): ...
@triton.jit
def kernel(a, b, c, d, e, f, g, h, i): ...
@operator.register_fake
def _(a, b, c, d, e, f, g, h, i): ...
"""
    found = house.read_source(plant(tmp_path, a=text))
    assert [line.split(": ", 1)[1] for line in found.many_parameters] == [
        "_private: 9 parameters, private",
        "_: 9 parameters, private",
        "nine: 9 parameters",
        "__init__: 9 parameters",
    ]
    assert found.private_with_many == 2 and found.functions == 6


def test_lines_and_comments(tmp_path):
    text = '''"""Head.

More.
"""
# why

import a  # noqa

TEXT = """one
# no comment

four"""


def f():
    """Return 1."""
    return (
        1
    )
'''
    found = house.read_source(plant(tmp_path, a=text))
    assert (found.code_lines, found.comments) == (9, 2)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Return the output.", "verb"),
        ("Quantize x and w.", "verb"),
        ("See operands.quantize.", "verb"),
        ("Frobnicate the operand.", "verb"),  # an object follows
        ("Time a step.", "verb"),
        ("Time of a step.", "phrase"),
        ("Gradients: the law.", "phrase"),
        ("Names of layers.", "phrase"),
        ("The tensor whose state it is.", "phrase"),
        ("The tensor that the layer reads.", "phrase"),
        ("The layer that the hook finds keeps its weight.", "sentence"),
        ("The context manager turns NVFP4 on.", "sentence"),
        ("Nothing is held open.", "sentence"),
        ("(dx, dw) of one layer.", "private"),
        ("fp32 [1].", "private"),
        ("E4M3 bytes.", "private"),
        ("one lower-case start.", "private"),
        ("`x` with its strides.", "private"),
        ("Whether the layer runs.", "private"),
        ("What it costs is written.", "private"),
        ("Of the colour bar.", "private"),
        ("As the plain module's.", "private"),
        ("", "private"),
    ],
)
def test_openings(text, kind):
    assert house.opening(text) == kind


def test_docstrings_are_listed_with_their_places(tmp_path):
    text = '''"""The parts of a layer."""
class A:
    """One part."""
    @property
    def size(self):
        """The length."""
    def run(self):
        """The result of a run."""
    async def stop(self):
        """Whether it stops."""
def undocumented(): ...
'''
    found = house.figures(plant(tmp_path, a=text))
    assert found["lists"]["phrases"] == ["pack/a.py:8: The result of a run."]
    assert found["lists"]["private openings"] == ["pack/a.py:10: Whether it stops."]
    assert found["docstrings"] == 5 and found["docstrings with a private opening, %"] == 20.0
    assert found["private openings and phrases, %"] == 40.0


def test_calls_in_a_package_are_counted_and_others_are_not(tmp_path):
    text = "def f(n):\n    return n and f(n - 1)\nclass B:\n    def m(self):\n        return f(2)\n"
    path = plant(tmp_path, a=text) / "a.py"
    spec = importlib.util.spec_from_file_location("planted", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def outside():
        return module.B().m() + module.f(0)

    assert house.count_calls(outside, path.parent) == {("a.py", "B.m"): 1, ("a.py", "f"): 4}
    assert house.count_calls(outside, tmp_path / "pac") == {}


def test_the_convolution_runs_quantized():
    forward, backward = house.convolution_calls()
    for calls, word in ((forward, "forward"), (backward, "backward")):
        assert any(name == f"QuantizedConv.{word}" for _, name in calls), f"no quantized {word} among {sorted(calls)}"
    assert any("quantize" in file for file, _ in forward)


def test_the_table(tmp_path, capsys):
    package = plant(tmp_path, a='"""What."""\nfrom pack import b\n', b="def f(a, b, c, d, e, f, g, h, i): ...\n")
    assert house.main(["--package", str(package), "--docstrings", "--parameters", "--chain"]) == 0
    printed = capsys.readouterr().out
    for line in ("pack/a.py:1: What.", "pack/b.py:1: f: 9 parameters", "pack.a\npack.b\n"):
        assert line in printed
    assert house.main(["--package", str(package), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["longest import chain"] == 2 and "package calls, forward" not in found
    for wrong in (["--package", str(tmp_path)], ["--package", str(package), "--calls"]):
        with pytest.raises(SystemExit):
            house.main(wrong)


def test_the_table_of_this_package_names_calls_and_keeps_to_what_is_asked():
    """In a process of its own: what other tests have used (entries of set_precision, say) is asked at each call."""
    command = [sys.executable, "-m", "tests.house", "--json", "--calls"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    for way in ("forward", "backward"):
        assert sum(found["calls"][way].values()) == found[f"package calls, {way}"] > 0
        assert found[f"package calls, {way}"] <= 120
    # With a compiler the integer kernels run; plain torch in their place enters more files.
    assert found["files entered, forward"] <= 14 or not native.available(torch.device("cpu")), found["calls"]["forward"]
    assert found["longest import chain"] <= 16, "python -m tests.house --chain names it"
    assert found["functions with more than 8 parameters"] <= 24 and not found["of these private"]
    assert found["comments per 100 lines of code"] >= 7 and found["private openings and phrases, %"] <= 5


# ---- examples/benchmarks/host_time.py ----


@pytest.fixture
def host_time():
    path = ROOT / "examples" / "benchmarks" / "host_time.py"
    spec = importlib.util.spec_from_file_location("host_time", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


def test_host_time_prints_both_and_the_ratio(host_time, capsys):
    assert host_time.main(["--rounds", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ratio"] == found["nvfp4_ms"] / found["plain_ms"] and found["plain_ms"] > 0
    assert found["cpu_ratio"] == found["nvfp4_cpu_ms"] / found["plain_cpu_ms"]
    assert host_time.main(["--rounds", "2"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["torch", "plain", "nvfp4"]
    with pytest.raises(SystemExit):
        host_time.main(["--rounds", "0"])


@pytest.mark.parametrize(("factor", "told"), [(1.0, "equals plain torch's"), (-1.0, "is wrong")])
def test_host_time_of_wrong_results_is_not_printed(host_time, monkeypatch, capsys, factor, told):
    exact = host_time.variants()["plain"]
    steps = {"plain": exact, "nvfp4": lambda: [factor * tensor for tensor in exact()]}
    monkeypatch.setattr(host_time, "variants", lambda: steps)
    assert host_time.main(["--rounds", "1", "--json"]) == 1
    printed = capsys.readouterr()
    assert told in printed.err and not printed.out
