"""Run layers on an installed wheel without a compiler: nothing is compiled, and one OpenMP runtime serves all.

    python .ci/wheel_check.py [MACHINE ...]     the best kernels for this processor, then those for each machine named
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def check(machine: str) -> str:
    """Check this process's kernels and return a line about them."""
    import torch

    import te_nvfp4_cv as nv
    from te_nvfp4_cv.backend import dispatch, native

    assert not any(map(shutil.which, ("g++", "clang++", "c++", "gcc", "cc"))), "a compiler is on the path"
    torch.set_num_threads(2)
    torch.randn(512, 512) @ torch.randn(512, 512)  # starts torch's threads
    torch.randn(1 << 20).exp_()
    threads = len(os.listdir("/proc/self/task"))
    library = native.load()
    assert library is not None, "no kernels"
    found = Path(library._name)
    assert found.parent == Path(nv.__file__).parent / "backend", f"{found} is not the wheel's"
    loop = library.nvfp4_machine().decode()
    assert machine in ("native", loop), f"{machine} was asked for, the kernels are for {loop}"
    assert dispatch.integer_passes(), "the kernels do not match the reference"
    results = []
    for backend in ("integer", "reference"):
        torch.manual_seed(0)
        x, w = torch.randn(16, 32, 24, 24, requires_grad=True), torch.randn(48, 32, 3, 3, requires_grad=True)
        y = nv.functional.conv2d(x, w, padding=1, recipe=nv.NVFP4BlockScaling(), backend=backend)
        y.square().sum().backward()
        results.append((y, x.grad, w.grad))
    assert torch.equal(results[0][0], results[1][0]), "the outputs differ from the reference's"
    assert len(os.listdir("/proc/self/task")) == threads, "the kernels started threads beside torch's"
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    runtimes = [path for path in mapped if re.match(r"lib(gomp|iomp|omp)", Path(path).name)]
    assert len(runtimes) == 1, f"several OpenMP runtimes: {runtimes}"
    left = [path.name for path in Path(os.environ["TE_NVFP4_CV_CACHE"]).iterdir() if path.suffix != ".json"]
    assert not left, f"compiled: {left}"
    return f"{found.name}: {loop}, {Path(runtimes[0]).name} of torch"


if __name__ == "__main__":
    if "TE_NVFP4_CV_CACHE" in os.environ:
        print(check(os.environ["TE_NVFP4_CV_MACHINE"]))
        sys.exit()
    for name in ["native", *sys.argv[1:]]:
        # A process each, with nothing in its environment that could name a compiler.
        with tempfile.TemporaryDirectory() as cache:
            environment = {"PATH": "", "TE_NVFP4_CV_CACHE": cache, "TE_NVFP4_CV_MACHINE": name}
            done = subprocess.run([sys.executable, __file__], env=environment)
            if done.returncode:
                sys.exit(f"failed for {name}")
