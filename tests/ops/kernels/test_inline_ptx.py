"""The kernels' inline PTX, instruction by instruction: what no interpreter runs, with the PTX ISA's meaning.

decode       packed codes and scale bytes to fp16 products; squares of scale bytes transposed
numerics     E2M1 by the conversion of Blackwell, pairs of fp32 operations, bf16 pairs; codes joined by four and eight;
             the tensor scale's division
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from te_nvfp4_cv import formats
from tests import oracle
from tests.helpers import same_bits

triton = pytest.importorskip("triton", reason="triton is not installed")
import triton.language as tl  # noqa: E402

from te_nvfp4_cv.ops.triton import decode, numerics, packing, ptx  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
SCALES = 127  # bytes 0x00..0x7E
MASK = 0xFFFFFFFF


# ---- a machine ------------------------------------------------------------------------------------------------------


def run_ptx(
    text: str, inputs: dict[str, torch.Tensor], more: dict[str, Callable[..., torch.Tensor]] | None = None
) -> dict[str, torch.Tensor]:
    """The registers after straight-line PTX, given as int64 tensors of their bits; the few instructions used.

    more: instructions that the PTX ISA does not define to the bit.
    """
    instructions = {**INSTRUCTIONS, **(more or {})}
    registers = dict(inputs)
    for line in text.strip().removeprefix("{").removesuffix("}").split(";"):
        if not line.strip() or line.strip().startswith(".reg"):
            continue
        name, arguments = line.strip().split(None, 1)
        # Commas between registers, not those inside of a vector in braces
        target, *operands = [part.strip() for part in re.split(r",(?![^{]*\})", arguments)]
        values = [parts_of(operand, registers) for operand in operands]
        if name.startswith("mov.b"):
            wide = sum(part << (index * int(name[5:]) // len(values[0])) for index, part in enumerate(values[0]))
        else:
            assert name in instructions, f"unknown instruction {name}"
            wide = instructions[name](*(value for (value,) in values))
        targets = target.strip("{} ").split(",")
        for index, register in enumerate(targets):
            width = 64 if target[0] != "{" else int(name[5:]) // len(targets)
            part = wide if width == 64 else (torch.as_tensor(wide) >> (index * width)) & ((1 << width) - 1)
            registers[register.strip()] = torch.as_tensor(part)
    return registers


def parts_of(operand: str, registers: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    names = [name.strip() for name in operand.strip("{} ").split(",")]
    return [registers[name] if name in registers else torch.tensor(literal(name)) for name in names]


def literal(text: str) -> int:
    """Of an integer, or the bits of an fp32 number (0f3F800000)."""
    return int(text[2:], 16) if text.startswith("0f") else int(text, 0)


def halves(value: torch.Tensor) -> torch.Tensor:
    return torch.stack((value & 0xFFFF, value >> 16), -1).to(torch.uint16).view(torch.float16)


def number(bits: torch.Tensor) -> torch.Tensor:
    """fp32 of the low 32 bits."""
    return (((bits & MASK) ^ 0x80000000) - 0x80000000).to(torch.int32).view(torch.float32)


def bits_of(value: torch.Tensor) -> torch.Tensor:
    return value.view(torch.int32).to(torch.int64) & MASK


def permute(a: torch.Tensor, b: torch.Tensor, control: torch.Tensor) -> torch.Tensor:
    selected = [(int(control) >> (4 * i)) & 0xF for i in range(4)]
    assert all(s < 8 for s in selected)
    both = a | (b << 32)
    return sum((both >> (8 * s) & 0xFF) << (8 * i) for i, s in enumerate(selected))


def lookup3(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    assert int(table) == 0xEA  # (a & b) | c
    return (a & b) | c


def multiply_halves(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    product = (halves(a) * halves(b)).view(torch.uint16).to(torch.int64)
    return product[..., 0] | (product[..., 1] << 16)


def e2m1_pair(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """cvt.rn.satfinite.e2m1x2.f32: to nearest even, beyond 6 to 6, NaN to +6; the first operand in the high nibble."""
    codes = []
    for operand in (high, low):
        v = number(operand).double()
        grid = torch.tensor(oracle.E2M1, dtype=torch.float64)
        distance = (v.abs().clamp(max=6).nan_to_num(6.0)[..., None] - grid).abs()
        # Of two as near, the even code: other distances of fp32 values differ by more
        code = (distance + (torch.arange(8) % 2) * 1e-12).argmin(-1)
        codes.append(code | ((torch.signbit(v) & ~v.isnan()).long() << 3))
    return codes[0] << 4 | codes[1]


def bf16_pair(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    parts = [number(v).bfloat16().view(torch.uint16).to(torch.int64) for v in (high, low)]
    return parts[0] << 16 | parts[1]


def pairwise(operation: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    def both(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        low, high = (bits_of(operation(number(a >> shift), number(b >> shift))) for shift in (0, 32))
        return low | high << 32

    return both


def add_towards_zero(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    exact = a.double() + b.double()
    near = exact.float()
    return torch.where(near.double().abs() > exact.abs(), number(bits_of(near) - 1), near)


def fused(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    return bits_of((number(a).double() * number(b).double() + number(c).double()).float())


INSTRUCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "prmt.b32": permute,
    "shr.b32": lambda a, n: a >> int(n),
    "shl.b32": lambda a, n: (a << int(n)) & MASK,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "lop3.b32": lookup3,
    "sub.s32": lambda a, b: (a - b) & MASK,
    "min.u32": lambda a, b: torch.minimum(a & MASK, b),
    "neg.f32": lambda a: a ^ 0x80000000,
    "mul.rn.f32": lambda a, b: bits_of(number(a) * number(b)),
    "fma.rn.f32": fused,
    "mul.rn.f16x2": multiply_halves,
    "cvt.rn.satfinite.e2m1x2.f32": e2m1_pair,
    "cvt.rn.bf16x2.f32": bf16_pair,
    "add.rn.f32x2": pairwise(torch.add),
    "sub.rn.f32x2": pairwise(torch.sub),
    "mul.rn.f32x2": pairwise(torch.mul),
    "add.rz.f32x2": pairwise(add_towards_zero),
}


# ---- decode ---------------------------------------------------------------------------------------------------------


def test_packed_codes_are_decoded_exactly():
    """Each byte in each of the four places, its neighbours the complement, with scales that differ byte by byte."""
    byte = torch.arange(256)[:, None, None]
    place = torch.arange(4)[None, :, None]
    word = torch.zeros(256, 4, SCALES, dtype=torch.int64)
    for i in range(4):
        word |= torch.where(place == i, byte, 255 - byte) << (8 * i)
    scales = torch.arange(SCALES)[None, None, :]
    of_place = [(scales + 17 * i) % SCALES for i in range(4)]
    half = [
        (s.to(torch.uint8).view(torch.float8_e4m3fn).float() * 128).half().view(torch.uint16).to(torch.int64)
        for s in of_place
    ]
    inputs = {"$4": word, "$5": half[0] | half[1] << 16, "$6": half[2] | half[3] << 16}
    text = decode.UNPACK.value
    registers = run_ptx(text, {name: value.expand(word.shape) for name, value in inputs.items()})
    for i in range(4):
        code = (word >> (8 * i)) & 0xFF
        scale = of_place[i].to(torch.uint8).view(torch.float8_e4m3fn).float()
        for first, nibble in ((0, code & 15), (2, code >> 4)):
            bits = (registers[f"${first + i // 2}"] >> (16 * (i % 2))) & 0xFFFF
            got = bits.to(torch.uint16).view(torch.float16).float() * 128
            assert same_bits(got, formats.decode_e2m1(nibble) * scale)
    assert len(re.findall(";", text)) == 21  # 20 instructions for eight products and one declaration


def test_words_of_scales_are_transposed():
    bytes_of = torch.randint(0, 256, (4, 4, 1000))  # [word, byte, case]
    words = [sum(word[k] << (8 * k) for k in range(4)) for word in bytes_of]
    registers = run_ptx(decode.TRANSPOSE.value, {f"${4 + i}": word for i, word in enumerate(words)})
    for k in range(4):
        assert torch.equal(registers[f"${k}"], sum(bytes_of[i, k] << (8 * i) for i in range(4)))


# ---- numerics -------------------------------------------------------------------------------------------------------


def floats() -> torch.Tensor:
    """All bf16 values, grid points and their midpoints with neighbours on both sides, and random bits: fp32 [8 n]."""
    every = (torch.arange(1 << 16, dtype=torch.int64) << 16).to(torch.int32)
    edges = torch.tensor([k / 64 for k in range(33 * 16)]).view(torch.int32)
    edges = torch.cat([edges + step for step in (-2, -1, 0, 1, 2)])
    drawn = torch.randint(-(1 << 31), 1 << 31, (1 << 14,), dtype=torch.int64).to(torch.int32)
    near_one = torch.randint(0x3C000000, 0x41200000, (1 << 14,), dtype=torch.int64).to(torch.int32)
    bits = torch.cat([every, edges, edges ^ -(1 << 31), drawn, near_one, near_one ^ -(1 << 31)])
    v = bits[: bits.numel() // 8 * 8].view(torch.float32)
    return torch.where(v.isnan(), torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32), v)  # a GPU's one NaN


@pytest.mark.parametrize(("text", "width"), [(ptx.CONVERT8, 8), (ptx.CONVERT4, 4)], ids=["8", "4"])
def test_blackwells_conversion_gives_the_codes_of_the_specification(text, width):
    v = floats()
    inputs = {f"${k + 1}": bits_of(v.view(-1, width)[:, k]) for k in range(width)}
    word = run_ptx(text.value, inputs)["$0"]
    found = torch.stack([(word >> (4 * k)) & 15 for k in range(width)], 1).flatten()
    assert torch.equal(found, formats.encode_e2m1(v).long())
    some = torch.randperm(v.numel())[:2000]
    assert found[some].tolist() == [oracle.encode_e2m1(x) for x in v[some].tolist()]


@triton.jit
def _round(p_y, p_random, p_out, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(p_y + o)
    q, word = numerics.e2m1_stochastic(y, numerics.part_of_a_step(tl.load(p_random + o).to(tl.uint32), False), False)
    tl.store(p_out + o, numerics.signed(q, y))


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
def test_blackwells_conversion_packs_what_stochastic_rounding_gives(kernel_device):
    v = floats()
    v = v[~v.isnan()].repeat(3)
    v = v[: v.numel() // 4096 * 4096]
    random = torch.randint(0, 256, v.shape, dtype=torch.uint8)
    random[: v.numel() // 3] = 255
    rounded = torch.empty_like(v, device=kernel_device)
    _round[(v.numel() // 4096,)](v.to(kernel_device), random.to(kernel_device), rounded, BLOCK=4096)
    inputs = {f"${k + 1}": bits_of(rounded.cpu().view(-1, 8)[:, k]) for k in range(8)}
    word = run_ptx(ptx.CONVERT8.value, inputs)["$0"]
    found = torch.stack([(word >> (4 * k)) & 15 for k in range(8)], 1).flatten()
    assert torch.equal(found, formats.encode_e2m1_stochastic(v, random).long())


@triton.jit
def _join(p_y, p_out, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    y = tl.reshape(tl.load(p_y + tl.arange(0, BLOCK)), (BLOCK // 16, 16))
    q, word = numerics.e2m1_nearest(y)
    packing.store_rows(p_out, packing.join_rows(word, y, BLOCK, WIDTH), 0, 0, BLOCK, True, BLOCK, False)


@pytest.mark.parametrize("width", [4, 8])
def test_rows_are_joined_by_four_and_by_eight(width, kernel_device):
    v = floats()
    v = v[~v.isnan()][-4096:].contiguous().to(kernel_device)
    packed = torch.zeros(2048, dtype=torch.uint8, device=kernel_device)
    _join[(1,)](v, packed.view(torch.int32), BLOCK=4096, WIDTH=width)
    assert torch.equal(packed, formats.pack_nibbles(formats.encode_e2m1(v)))


@pytest.mark.parametrize(
    ("name", "operation"),
    [("add.rn", torch.add), ("sub.rn", torch.sub), ("mul.rn", torch.mul), ("add.rz", add_towards_zero)],
    ids=["add.rn", "sub.rn", "mul.rn", "add.rz"],  # not the functions': pytest-xdist wants equal names in all processes
)
def test_pairs_are_computed_as_two_values(name, operation):
    v = floats()
    a, b = v.view(-1, 2), v.flip(0).view(-1, 2)
    if name == "add.rz":
        a, b = a.abs().clamp(max=1e30), b.abs().clamp(max=1e30)
    text = ptx.PAIRS_BEFORE.value + name + ptx.PAIRS_AFTER.value
    inputs = {"$2": a[:, 0], "$3": a[:, 1], "$4": b[:, 0], "$5": b[:, 1]}
    registers = run_ptx(text, {register: bits_of(value) for register, value in inputs.items()})
    found = torch.stack([number(registers["$0"]), number(registers["$1"])], 1)
    expected = operation(a, b)
    assert same_bits(found.nan_to_num(7.0), expected.nan_to_num(7.0)) and torch.equal(found.isnan(), expected.isnan())


def test_bf16_pairs_are_widened_and_rounded():
    v = floats().view(-1, 2)
    narrow = v.bfloat16()
    words = narrow.view(torch.uint16).to(torch.int64)
    registers = run_ptx(ptx.WIDEN_PAIR.value, {"$2": words[:, 0] | words[:, 1] << 16})
    assert same_bits(torch.stack([number(registers["$0"]), number(registers["$1"])], 1), narrow.float())
    registers = run_ptx(ptx.ROUND_PAIR.value, {"$2": bits_of(v[:, 0]), "$3": bits_of(v[:, 1])})
    assert same_bits(torch.stack([number(registers["$0"]), number(registers["$1"])], 1), narrow.float())


@pytest.mark.parametrize("e4m3_max", [448, 256])
@pytest.mark.parametrize("off", [-2, 0, 2], ids="off by {}".format)  # ulps of rcp.approx, which promises 1
def test_the_tensor_scale_is_a_division(e4m3_max, off):
    """Each exponent, subnormal too, and mantissas from end to end."""
    mantissas = torch.cat([torch.arange(0, 1 << 23, 4999), (1 << 23) - 1 - torch.arange(64)])
    bits = (torch.arange(255)[:, None] << 23 | mantissas).flatten()
    bits = bits[bits > 0]
    amax, six_e = number(bits), torch.tensor(6.0 * e4m3_max)
    near = {"rcp.approx.ftz.f32": lambda v: bits_of(1 / number(v)) + off}
    registers = run_ptx(ptx.QUOTIENT.value, {"$1": bits, "$2": bits_of(six_e)}, near)
    found = number(registers["$0"])
    assert same_bits(found, formats.encode_scale(amax, e4m3_max))
