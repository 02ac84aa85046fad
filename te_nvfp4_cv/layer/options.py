"""The others that may take part in one call of a quantized layer, and what they must be able to do.

Most calls have nobody: `ALONE`. The protocols are met higher up (telemetry watches, distributed exchanges) or beside
this file (delayed_scaling.py, deferred.py); the layer knows them by these protocols only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from te_nvfp4_cv.layer.plan import Plan
from te_nvfp4_cv.ops.experts import Experts
from te_nvfp4_cv.ops.records import Collector, Face, Move, Operand, OperandSpec, WeightCodes
from te_nvfp4_cv.recipe.fields import Role


class Scales(Protocol):
    """Gives amaxes that are not the operand's own: delayed ones, calibrated ones, those of all ranks."""

    group: Any  # the ranks that wait for one another in both passes, or None

    def amax(self, role: Role, operand: Tensor) -> Tensor | None:
        """Return fp32 [2] for quantize_operand, or None if the operand's own amaxes rule."""

    def knows(self, role: Role) -> bool:
        """Return True if `amax` answers without reading the operand."""

    def collector(self, role: Role) -> Collector | None:
        """Return where a call with given amaxes leaves what it observes; None if nobody wants to know."""

    def backward_ran(self) -> None:
        """Take note that the backward pass of the call has quantized dy."""

    def take_move(self) -> Move | None:
        """Return what has to move before `amax` is asked; the caller moves it. Otherwise `amax` does."""


class Watch(Protocol):
    """Looks on while one call is quantized (telemetry). It must not change what it sees."""

    def quantized(
        self,
        role: Role,
        operand: Tensor,
        made: Operand | WeightCodes,
        seed: Tensor | None,
        plan: Plan,
        experts: Experts | None = None,
    ) -> None:
        """See that `operand` has become `made`; `seed` rounded it, if it was rounded stochastically."""

    def weight_gradient(self, dy: Tensor, dw: Tensor, plan: Plan, experts: Experts | None) -> None:
        """See that dy [B, *image, O] has led to dw [axis 0, taps, axis 1]."""


class Producer(Protocol):
    """Makes the operand of an activation that was never written to memory (deferred.py)."""

    def quantize(self, plan: Plan, need_dw: bool, scales: Scales | None) -> Operand:
        """Return what quantizing the activation would give."""


class Ranks(Protocol):
    """Exchanges one call's operands and results between ranks that share out a layer's channels, or an image's rows.

    Where something is whole on this rank already, the method gives its argument back. Gathers start at the call and
    are waited for when the returned function is called, so that a rank quantizes while bytes travel.
    """

    x_shape: tuple[int, ...]  # this rank's part of x and y as arrays [B, *image, channels], and as torch has y
    y_shape: tuple[int, ...]
    y_torch_shape: tuple[int, ...]
    input_plan: Plan  # how this rank's parts of x and of dy are quantized
    gradient_plan: Plan
    fprop_plan: Plan  # what this rank multiplies
    dgrad_plan: Plan
    wgrad_plan: Plan
    adds_bias: bool  # one rank adds the bias of a summed result
    wgrad_first: bool  # before dgrad: dy's rows are on their way meanwhile

    def begin(self, role: Role, operand: Tensor, spec: OperandSpec, amax: Tensor | None) -> None:
        """Take note that x or dy is about to be quantized with these amaxes: what others need may be sent first."""

    def gather_rows(self, role: Role, face: Face) -> Callable[[], Face]:
        """Gather a rowwise face, in the form that the backend multiplies."""

    def gather_columns(self, role: Role, face: Face) -> Callable[[], Face]:
        """Gather a columnwise face: packed for x, which backward unpacks, else in the form that is multiplied."""

    def with_columns(self, role: Role, operand: Tensor, made: Operand, needed: bool) -> Operand:
        """Return what x or dy was quantized to, with a columnwise face that had to wait for the rowwise one."""

    def weight_amax(self, w: Tensor) -> Tensor | None:
        """Return fp32 [1], the amax of the whole weight; None if w is the whole weight."""

    def seed(self, seed: Tensor) -> Tensor:
        """Return the seed for this rank's part of dy: ranks with different parts must not round alike."""

    def sum_output(self, y: Tensor) -> Tensor:
        """Return the sum of the ranks' parts of y."""

    def sum_input_gradient(self, dx: Tensor) -> Tensor:
        """Return the sum of the ranks' parts of dx."""

    def whole_bias_gradient(self, total: Tensor) -> Tensor:
        """Return db of all of dy from that of this rank's part."""


class Prepared(Protocol):
    """Runs both passes of a plain call by launches that were looked up before (prepared.py)."""

    like: Any  # forward_backward.Like of the call's tensors

    def forward(self, x: Tensor, w: Tensor, bias: Tensor | None, scales: Scales | None) -> tuple[Tensor, Tensor]:
        """Return y, and what backward needs in one tensor."""

    def backward(self, dy: Tensor, saved: Tensor, scales: Scales | None, need_db: bool) -> tuple[Tensor | None, ...]:
        """Return dx, dw and db."""

    def parts(self, saved: Tensor) -> tuple[Tensor, ...]:
        """Return the fields of forward_backward.Saved."""


class CallOptions(NamedTuple):
    """The others that take part in one call.

    Attributes:
        codes: of w, made before the call; if None, w is quantized.
        unpacked: code * scale of w [axis 0, taps, axis 1], where it is stored so between calls.
        scales: gives the amaxes of x and dy; if None, their own rule.
        producer: makes the operand of an x that was not written; if None, x is there.
        watch: is shown every operand.
        ranks: exchanges operands and results; None on a single device.
        experts: which rows go to which expert; None but for grouped linear layers.
        prepared: runs both passes; then there are none of the others but scales.
    """

    codes: WeightCodes | None = None
    unpacked: Tensor | None = None
    scales: Scales | None = None
    producer: Producer | None = None
    watch: Watch | None = None
    ranks: Ranks | None = None
    experts: Experts | None = None
    prepared: Prepared | None = None


ALONE = CallOptions()
