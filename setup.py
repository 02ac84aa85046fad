"""Build a wheel for every platform, or, where TE_NVFP4_CV_WHEEL is 1 (`make wheel`), one with compiled CPU kernels.

All metadata are in pyproject.toml, except the long description, which is made here from README.md. A plain
`pip install .` compiles nothing and needs no compiler.
"""

import os
import platform
import re
import runpy
import sys
import tomllib
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

BACKEND = Path("te_nvfp4_cv", "backend")
OLDEST_GLIBC = 17  # of 2.17: what manylinux has no older name for, short of manylinux_2_5 and 2_12


def long_description(readme: str, project: dict) -> str:
    """Return README.md as a package index can show it, which has none of the repository's files.

    Links to files lead to the repository if pyproject.toml names it (project.urls.Repository, such as
    https://HOST/OWNER/NAME). Without it they become their text and the file's path, and pictures are left out.
    """
    home = project.get("urls", {}).get("Repository", "").rstrip("/")
    relative = r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)\s]+)\)"

    def rewrite(link):
        picture, label, path = link.groups()
        if home:
            return f"{picture}[{label}]({home}/{'raw' if picture else 'blob'}/HEAD/{path})"
        return "" if picture else label if label == path else f"{label} (`{path}`)"

    return re.sub(relative, rewrite, readme)


class BuildKernels(build_py):
    """Copy the package, then compile the kernels for each instruction set beside it."""

    def run(self):
        super().run()
        compilation = runpy.run_path(str(BACKEND / "compilation.py"))  # importing the package would need torch
        cxx = compilation["compiler"]()
        if cxx is None or sys.platform != "linux" or platform.machine() != "x86_64":
            sys.exit("a wheel with compiled kernels needs Linux on x86-64 and a C++ compiler (g++)")
        for machine in compilation["WHEEL_MACHINES"]:
            made = compilation["compile_for_wheel"](cxx, machine, Path(self.build_lib, BACKEND))
            print(f"compiled {made.name}")


class PlatformWheel(bdist_wheel):
    """Name the wheel after the oldest glibc that loads its kernels. They do not depend on Python's version."""

    def get_tag(self):
        kernels = Path(self.bdist_dir, BACKEND).glob("*.so")
        # Each version that the dynamic linker must find is a name in the file's table of strings.
        asked = [int(n) for path in kernels for n in re.findall(rb"\0GLIBC_2\.(\d+)", path.read_bytes())]
        return "py3", "none", f"manylinux_2_{max([OLDEST_GLIBC, *asked])}_x86_64"


class WithKernels(Distribution):
    """A distribution that setuptools treats as one with extension modules: its files depend on the platform."""

    def has_ext_modules(self):
        return True


PROJECT = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
DESCRIPTION = {
    "long_description": long_description(Path("README.md").read_text(encoding="utf-8"), PROJECT),
    "long_description_content_type": "text/markdown",
}
if os.environ.get("TE_NVFP4_CV_WHEEL") == "1":
    setup(**DESCRIPTION, distclass=WithKernels, cmdclass={"build_py": BuildKernels, "bdist_wheel": PlatformWheel})
else:
    setup(**DESCRIPTION)
