"""The records that operators take and give: nothing is lost between a record and its flat form."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from te_nvfp4_cv.ops.geometry import Fold
from te_nvfp4_cv.ops.records import (
    DEQUANTIZED,
    ERRORS,
    NONE,
    PACKED,
    Face,
    Operand,
    OperandSpec,
    WeightCodes,
    WeightSpec,
)

FORMS = (NONE, PACKED, DEQUANTIZED)
sizes = st.integers(0, 2**40)
folds = st.builds(Fold, sizes, sizes, sizes, sizes, sizes)


def same_fields(a: OperandSpec | WeightSpec, b: OperandSpec | WeightSpec) -> bool:
    """Return True if the fields are equal and of the same types: True is no 1 here."""
    return a == b and [type(v) for v in a] == [type(v) for v in b]


@given(groups=st.integers(1, 2**31), fold=folds)
def test_operand_specs_round_trip_whatever_the_sizes(groups, fold):
    spec = OperandSpec(groups, fold, PACKED, DEQUANTIZED, True, False, "MAE", 256, False)
    ints = spec.to_ints()
    assert all(type(n) is int for n in ints) and same_fields(OperandSpec.from_ints(ints), spec)


def test_operand_specs_round_trip_with_every_setting():
    flags, fold = (False, True), Fold(3, 2, 4, 1, 16)
    settings = itertools.product(FORMS, FORMS, flags, flags, ERRORS, (448, 256), flags)
    specs = [OperandSpec(2, fold, *setting) for setting in settings]
    encoded = [tuple(spec.to_ints()) for spec in specs]
    assert len(set(encoded)) == len(specs) == 9 * 4 * 3 * 2 * 2
    assert all(same_fields(OperandSpec.from_ints(list(ints)), spec) for ints, spec in zip(encoded, specs, strict=True))


@given(groups=st.integers(1, 2**31))
def test_weight_specs_round_trip_with_every_setting(groups):
    flags = (False, True)
    specs = [
        WeightSpec(groups, *setting) for setting in itertools.product(FORMS, FORMS, flags, ERRORS, (448, 256), flags)
    ]
    encoded = [tuple(spec.to_ints()) for spec in specs]
    assert len(set(encoded)) == len(specs) == 9 * 2 * 3 * 2 * 2
    assert all(same_fields(WeightSpec.from_ints(list(ints)), spec) for ints, spec in zip(encoded, specs, strict=True))


@pytest.mark.parametrize("value", [True, 1])
def test_an_equal_spec_of_other_types_leaves_no_trace_in_the_cache(value):
    """Ints and bools are equal and have one hash: which came first must not show in what is decoded."""
    ints = OperandSpec(7919, Fold(1, 0, 1, 0, 16), PACKED, PACKED, value).to_ints()
    assert OperandSpec.from_ints([*map(int, ints)]).rht is True
    assert OperandSpec.from_ints(ints).rht is True


def test_operands_round_trip_in_the_order_that_the_operators_document():
    row_data, row_scale, row_amax, col_data, col_scale, col_amax, observed = tensors = torch.arange(7).unbind()
    made = Operand(Face(row_data, row_scale), row_amax, Face(col_data, col_scale), col_amax, observed)
    assert [id(t) for t in made.flat()] == [id(t) for t in tensors]
    again = Operand.from_flat(made.flat())
    assert [id(t) for t in again.flat()] == [id(t) for t in tensors] and type(again.row) is type(again.col) is Face


def test_weight_codes_round_trip_and_name_their_faces():
    row_data, row_scale, col_data, col_scale, amax = tensors = torch.arange(5).unbind()
    codes = WeightCodes(Face(row_data, row_scale), Face(col_data, col_scale), amax)
    assert [id(t) for t in codes.flat()] == [id(t) for t in tensors]
    assert [id(t) for t in WeightCodes.from_flat(codes.flat()).flat()] == [id(t) for t in tensors]
    assert codes.face("row") is codes.row and codes.face("col") is codes.col


@pytest.mark.parametrize("name", ["row", "col"])
def test_a_record_of_one_face_has_an_empty_other(name):
    face, amax = Face(torch.ones(3, dtype=torch.uint8), torch.ones(2, dtype=torch.uint8)), torch.ones(1)
    codes = WeightCodes.of_face(name, face, amax)
    other = codes.face("col" if name == "row" else "row")
    assert codes.face(name) is face and codes.amax is amax
    assert other.data.numel() == other.scale.numel() == 0 and other.data.dtype == other.scale.dtype == torch.uint8
