"""The backend "cudnn" without the GPU that it is for: what NVIDIA's libraries are given, and what comes of it.

scales     their layout, byte by byte, from its description
arguments  torch's checks of scaled_mm on meta tensors; what the engine of cudnn-frontend 1.32 asks of each operand
products   emulated from the arguments alone, they are the reference's
choice     which layers the libraries do not take, and where the backend does not run
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import te_nvfp4_cv as nv
from te_nvfp4_cv.backend import dispatch
from te_nvfp4_cv.ops.conv import cudnn, operators
from te_nvfp4_cv.ops.gemm import cublas, reference
from te_nvfp4_cv.ops.gemm.operator import gemm
from te_nvfp4_cv.ops.geometry import ConvGeometry
from te_nvfp4_cv.ops.records import Face
from tests.helpers import make_geometry, relative_error
from tests.ops.kernels.gemm_helpers import faces_of, packed

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:nvfp4. backend 'cudnn'")]
VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
CONVOLUTIONS = {
    "3x3": make_geometry(2, (64, 20), (5, 4), 3, 1, 1),
    "3x3 stride 2": make_geometry(2, (64, 64), (6, 5), 3, 2, 1),
    "3x2 dilated": make_geometry(1, (128, 64), (7, 6), (3, 2), 1, (2, 0), (2, 1)),
    "1-d": make_geometry(3, (64, 64), (9,), 3, 1, 2),
    "3-d": make_geometry(1, (64, 64), (3, 3, 4), (2, 3, 1), 1, (0, 1, 0)),
    "transposed": make_geometry(2, (64, 64), (4, 3), 2, 1, transposed=True),
}
MATRICES = {
    "1x1": make_geometry(16, (64, 32), (4, 3), 1),
    "transposed 1x1": make_geometry(16, (32, 64), (2, 3), 1, transposed=True),
    "linear": ConvGeometry(50, 96, 32, (), (), (), (), (), (), (), 1, False),
}
TRITON = {
    "groups": make_geometry(2, (64, 64), (4, 4), 3, 1, 1, groups=2),
    "few channels": make_geometry(2, (48, 48), (4, 4), 3, 1, 1),
    "linear": ConvGeometry(5, 40, 24, (), (), (), (), (), (), (), 1, False),
}


# ---- what stands for the libraries ----------------------------------------------------------------------------------


def plain(scale: Tensor, rows: int, blocks: int) -> Tensor:
    """Undo the layout of scales by its description: fp64 [rows, blocks]."""
    row, block = torch.meshgrid(torch.arange(rows), torch.arange(blocks), indexing="ij")
    tile = row // 128 * -(-blocks // 4) + block // 4
    return scale.double()[tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4]


def decoded(codes: Tensor) -> Tensor:
    """E2M1 values of pairs of codes, the first one in the low nibble: [..., n] -> fp64 [..., 2 n]."""
    byte = codes.view(torch.uint8).to(torch.int64)
    nibbles = torch.stack([byte & 15, byte >> 4], -1).flatten(-2)
    return VALUES[nibbles & 7] * torch.where(nibbles >= 8, -1.0, 1.0)


def scaled_mm(a: Tensor, b: Tensor, *scales: Any, **named: Any) -> Tensor:
    """Stand for torch's function: first its own checks, for a GPU, then the product."""
    meta = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") if isinstance(t, Tensor) else t
            for t in (a, b, *scales)]  # fmt: skip
    checked = SCALED_MM(*meta, **named)
    depth = a.shape[1] * 2
    values = [
        decoded(codes) * plain(scale, codes.shape[0], depth // 16).repeat_interleave(16, 1)
        for codes, scale in ((a, scales[0]), (b.t(), scales[2]))
    ]
    found = (values[0] @ values[1].t()).to(checked.dtype)
    assert found.shape == checked.shape
    return found


SCALED_MM = F.scaled_mm


def engine(g: ConvGeometry, to_b: bool, device: torch.device) -> Any:
    """Stand for cudnn-frontend: check what its NVFP4 engine checks at a launch (1.32, conv/frost), then convolve."""
    operands = cudnn.Operands(g, to_b)

    def run(x: Face, rows: Tensor, scales: Tensor) -> Tensor:
        image, image_scales, weight, weight_scales, y = operands.bound(x, rows, scales)
        for codes, size in ((image, operands.image), (weight, operands.weight)):
            half = (size[0], size[1] // 2, *size[2:])
            assert codes.shape == half and codes.dtype == torch.float4_e2m1fn_x2
            assert list(codes.stride()) == cudnn.last(half) and codes.data_ptr() % 16 == 0
        n, c, *pixels = operands.image
        blocks = c // 16
        assert image_scales.shape == (n * torch.Size(pixels).numel(), blocks, 1) and blocks % 4 == 0
        assert image_scales.stride() == (blocks, 1, 1) and image_scales.dtype == torch.float8_e4m3fn
        k, _, *kernel = operands.weight
        taps = torch.Size(kernel).numel()
        assert weight_scales.shape == (512 * -(-k // 128) * -(-taps * blocks // 4),)
        assert y.shape == operands.output and list(y.stride()) == cudnn.last(operands.output)
        values = decoded(image.movedim(1, -1)).view(-1, blocks, 16) * image_scales.double()
        kernel_values = decoded(weight.movedim(1, -1)).view(k, taps * blocks, 16)
        kernel_values = kernel_values * plain(weight_scales, k, taps * blocks)[..., None]
        a = values.view(n, *pixels, c).movedim(-1, 1)
        b = kernel_values.view(k, *kernel, c).movedim(-1, 1)
        y.copy_(F.conv3d(a, b, None, operands.stride, operands.padding, operands.dilation))
        return y.movedim(1, -1)

    return run


@pytest.fixture(autouse=True)
def _libraries(monkeypatch, kernel_device):
    if kernel_device.type == "cuda":
        pytest.skip("the layouts are tested on a CPU; the self-test runs the libraries")
    monkeypatch.setattr(F, "scaled_mm", scaled_mm)
    monkeypatch.setattr(cudnn, "library", engine)


def both(g: ConvGeometry, name: str, backend: str) -> Tensor:
    """One product with alpha, and bias where it is fprop, in fp32."""
    q = packed(g, torch.device("cpu"))
    a, b = (q[face] for face in faces_of(g)[name])
    alpha = torch.tensor([0.75])
    if name == "fprop":
        return operators.conv_fprop(a, b, alpha, torch.arange(g.y_shape[-1]) / 8, g, torch.float32, backend)
    return getattr(operators, f"conv_{name}")(a, b, alpha, g, torch.float32, backend)


# ---- scales ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (128, 4), (130, 7), (300, 16)])
def test_scales_lie_as_described(rows, blocks):
    scale = (torch.arange(rows * blocks) % 120 + 1).view(rows, blocks).to(torch.uint8)
    made = cublas.swizzled(scale)
    assert made.dtype == torch.float8_e4m3fn and made.shape == (-(-rows // 128) * -(-blocks // 4) * 512,)
    assert torch.equal(plain(made, rows, blocks), scale.view(torch.float8_e4m3fn).double())
    assert made.view(torch.uint8).count_nonzero() == rows * blocks  # the padding is zeros


# ---- products -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fprop", "dgrad"])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions_equal_the_reference(case, name):
    g = CONVOLUTIONS[case]
    assert relative_error(both(g, name, "cudnn"), both(g, name, "reference")) <= 1e-6


@pytest.mark.parametrize("name", ["fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize("case", MATRICES)
def test_matrices_go_to_cublas_and_equal_the_reference(case, name, monkeypatch):
    calls = []
    monkeypatch.setattr(F, "scaled_mm", lambda *a, **named: calls.append(a) or scaled_mm(*a, **named))
    g = MATRICES[case]
    assert relative_error(both(g, name, "cudnn"), both(g, name, "reference")) <= 1e-6
    assert len(calls) == 1


def test_the_gemm_of_te_is_cublas_where_it_takes_it():
    generator = torch.Generator().manual_seed(0)
    data = [torch.randint(0, 256, (rows, 32), generator=generator).to(torch.uint8) for rows in (20, 48)]
    scale = [torch.randint(1, 126, (rows, 4), generator=generator).to(torch.uint8) for rows in (20, 48)]
    pairs = [(d, s.view(torch.float8_e4m3fn)) for d, s in zip(data, scale, strict=True)]
    assert relative_error(cublas.multiply(*pairs[0], *pairs[1]), reference.multiply(*pairs[0], *pairs[1])) <= 1e-6
    operands = [[d, s, torch.ones(1)] for d, s in pairs]
    expected = gemm(*operands, [448, 0, 448, 0], None, None, torch.float32, "reference")
    assert relative_error(gemm(*operands, [448, 0, 448, 0], None, None, torch.float32, "cudnn"), expected) <= 1e-6


def test_a_layer_runs_under_the_context(monkeypatch):
    monkeypatch.setattr(dispatch, "interpreted", lambda: True)
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(64, 64, 3, padding=1)
    x = torch.randn(16, 64, 2, 2, requires_grad=True)
    recipe = nv.NVFP4BlockScaling(disable_stochastic_rounding=True)
    found = {}
    for backend in ("reference", "cudnn"):
        with nv.nvfp4_autocast(recipe, backend=backend):
            y = conv(x)
        found[backend] = (y, *torch.autograd.grad(y.square().sum(), [x, *conv.parameters()]))
    for mine, theirs in zip(found["cudnn"], found["reference"], strict=True):
        assert relative_error(mine, theirs) <= 1e-5


# ---- what is chosen -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", TRITON)
def test_what_no_library_takes_goes_to_triton_and_is_said(case, monkeypatch):
    def refuse(*given: Any, **named: Any) -> Any:
        raise AssertionError("a library was called")

    monkeypatch.setattr(F, "scaled_mm", refuse)
    monkeypatch.setattr(cudnn, "library", refuse)
    said: list[str] = []
    monkeypatch.setattr(cudnn, "warn_once", lambda key, text: said.append(text))
    g = TRITON[case]
    for name in ("fprop", "dgrad"):
        assert relative_error(both(g, name, "cudnn"), both(g, name, "reference")) <= 1e-6
    assert said and all("Triton" in text and "->" in text for text in said)


def test_each_limit_of_the_engine_has_a_reason():
    def reason(to_b: bool = True, **changes: Any) -> str | None:
        values = dict(batch=2, channels=(64, 64), size=(20, 20), kernel=3, stride=1, padding=1, dilation=1) | changes
        return cudnn.refusal(make_geometry(*values.values()), to_b)

    assert reason() is None and reason(to_b=False) is None and reason(stride=2) is None
    for c, to_b in itertools.product((16, 96, 320, 384), (True, False)):
        assert "channels" in str(reason(to_b, channels=(c, c)))
    assert "strides" in str(reason(False, stride=2)) and "strides" in str(reason(stride=9))
    assert "16 pixels" in str(reason(dilation=17, padding=17, size=(40, 40)))
    assert "multiple of 4" in str(reason(channels=(64, 18)))
    assert "16 pixels" in str(reason(False, padding=3))  # the gradient would have negative padding


@pytest.mark.parametrize(
    ("capability", "packages", "told"), [((9, 0), True, "9.0"), ((12, 0), True, "12.0"), ((10, 0), False, "cutlass")]
)
def test_where_it_cannot_run_is_an_error(monkeypatch, capability, packages, told):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(dispatch, "missing_for_cudnn", lambda: "" if packages else "nvidia-cutlass-dsl")
    with pytest.raises(RuntimeError, match="backend 'cudnn' cannot run") as caught:
        dispatch.resolve("cudnn", torch.device("cuda", 0))
    assert told in str(caught.value) and "pip install" in str(caught.value)


def test_it_runs_on_sm_100(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    monkeypatch.setattr(dispatch, "missing_for_cudnn", lambda: "")
    assert dispatch.resolve("cudnn", torch.device("cuda", 0)) == "cudnn"


def test_the_graph_is_one_that_the_engine_takes():
    """With the library at hand, its own analysis of the graph that is built here; no GPU is asked."""
    library = pytest.importorskip("cudnn", reason="nvidia-cudnn-frontend is not installed")
    engines = pytest.importorskip("cudnn.conv.frost.engine", reason="nvidia-cutlass-dsl is not installed")
    for g, to_b in itertools.product(CONVOLUTIONS.values(), (True, False)):
        if cudnn.refusal(g, to_b) is None:
            graph, _ = cudnn.graph_of(library, cudnn.Operands(g, to_b), None)
            graph.validate()
            engines._Sm100FrostBlockScaleConvPlan._check_graph_support(engines.analyze(graph))
