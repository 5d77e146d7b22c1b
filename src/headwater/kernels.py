"""The kernels of kernels.c, where the installation built them: one pass over memory for what takes torch many, on a CPU in float32.

They are a shared library beside this file, not a Python module, and are called through ctypes. Where no compiler was at hand there is
no library, and everything goes through torch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional

LANES = 16
"""Columns of the cache whose keys lie side by side (kernels.c)."""

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_ARGUMENTS = {
    "norm_rows": (*[_POINTER] * 3, _LONG, _INT, _FLOAT),
    "gate_rows": (*[_POINTER] * 2, _LONG, _INT),
    "attend_rows": (*[_POINTER] * 7, _LONG, *[_INT] * 3, _LONG, _FLOAT),
    "draw_rows": (*[_POINTER] * 4, _LONG, _LONG, _FLOAT),
    "linear_rows": (*[_POINTER] * 4, _LONG, _INT, _LONG, _INT),
    "product_pays": (),
    "product_rows": (*[_POINTER] * 4, _LONG, _INT, _LONG),
    "measure_rows": (*[_POINTER] * 4, _LONG, _LONG),
    "slope_rows": (*[_POINTER] * 5, _LONG, _LONG),
}


MEASURES, FIRST_MEASURE = 9, 4
"""Numbers a row that the loss stage keeps, and where those of interest begin (kernels.c)."""


@dataclass(frozen=True)
class Measures:
    """Of each row of logits: the target's log-prob, the entropy, KL(student ‖ teacher), KL(teacher ‖ student), the teacher's log-prob.

    held_RM  what the kernels keep, these included
    """

    held_RM: Tensor
    logp_R: Tensor
    entropy_R: Tensor
    student_teacher_R: Tensor
    teacher_student_R: Tensor
    teacher_logp_R: Tensor


@dataclass(frozen=True)
class Kernels:
    """Each takes float32 on the CPU, with contiguous rows, and gives a new tensor."""

    norm_rows: Callable[..., None]
    gate_rows: Callable[..., None]
    attend_rows: Callable[..., None]
    draw_rows: Callable[..., None]
    linear_rows: Callable[..., None]
    product_pays: Callable[[], int]
    product_rows: Callable[..., None]
    measure_rows: Callable[..., None]
    slope_rows: Callable[..., None]

    def norm(self, x_NH: Tensor, weight_H: Tensor | None, eps: float) -> Tensor:
        """RMS norm of each row (1910.07467)."""
        out_NH = torch.empty_like(x_NH)
        self.norm_rows(x_NH.data_ptr(), _of(weight_H), out_NH.data_ptr(), *x_NH.shape, eps)
        return out_NH

    def gate(self, gate_up_NI: Tensor) -> Tensor:
        """silu(gate) · up of rows that hold gate and up one after the other: (N, 2I) -> (N, I)."""
        rows, width = gate_up_NI.shape
        out_NI = gate_up_NI.new_empty(rows, width // 2)
        self.gate_rows(gate_up_NI.data_ptr(), out_NI.data_ptr(), rows, width // 2)
        return out_NI

    def attend(
        self,
        qkv_AD: Tensor,
        heads_norm: Tensor | None,
        turns_TD: Tensor,
        position_A: Tensor,
        keys: Tensor,
        values: Tensor,
        eps: float,
    ) -> Tensor:
        """One new token of each row: norm of heads, RoPE, its keys and values into the cache, attention up to it.

        qkv_AD      (A, (heads + 2 · kv_heads) · D), the halves of q's and k's heads in turns
        heads_norm  (heads + kv_heads, D), None where the model has none
        turns_TD    cos and sin in turns, for each position
        keys        (rows, kv_heads, columns / LANES, D, LANES), of which the first A rows are used
        values      (rows, kv_heads, columns, D)
        returns     (A, heads · D)
        """
        _, kv_heads, columns, width = values.shape
        heads = qkv_AD.shape[1] // width - 2 * kv_heads
        out_AD = qkv_AD.new_empty(len(qkv_AD), heads * width)
        self.attend_rows(
            qkv_AD.data_ptr(), _of(heads_norm), turns_TD.data_ptr(), position_A.data_ptr(), keys.data_ptr(), values.data_ptr(),
            out_AD.data_ptr(), len(qkv_AD), heads, kv_heads, width, columns, eps,
        )  # fmt: skip
        return out_AD

    def linear(self, x_NH: Tensor, packed: Tensor, bias_K: Tensor | None, columns: int) -> Tensor:
        """x Wᵀ + b: (N, K) for a weight of K rows that `packed` has laid out."""
        out_NK = x_NH.new_empty(len(x_NH), columns)
        self.linear_rows(x_NH.data_ptr(), packed.data_ptr(), _of(bias_K), out_NK.data_ptr(), *x_NH.shape, columns, 0)
        return out_NK

    def add_linear(self, to_NK: Tensor, x_NH: Tensor, packed: Tensor, bias_K: Tensor | None) -> None:
        """to += x Wᵀ + b, in place."""
        shape = (*x_NH.shape, to_NK.shape[1])
        self.linear_rows(x_NH.data_ptr(), packed.data_ptr(), _of(bias_K), to_NK.data_ptr(), *shape, 1)

    def product(self, x_NH: Tensor, weight_KH: Tensor, bias_K: Tensor | None, out_NK: Tensor) -> Tensor:
        """x Wᵀ + b into `out_NK`, for many rows and a weight as it lies; faster than torch where `product_pays`."""
        self.product_rows(
            x_NH.data_ptr(), weight_KH.data_ptr(), _of(bias_K), out_NK.data_ptr(), *x_NH.shape, len(weight_KH)
        )
        return out_NK

    def draw(self, logits_BV: Tensor, draws_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """One token a row by inverse cumulative distribution at float64 draws, and its log-prob."""
        token_B = torch.empty(len(logits_BV), dtype=torch.long)
        logp_B = torch.empty(len(logits_BV))
        self.draw_rows(
            logits_BV.data_ptr(), draws_B.data_ptr(), token_B.data_ptr(), logp_B.data_ptr(), *logits_BV.shape, 1.0 / temperature
        )  # fmt: skip
        return token_B, logp_B

    def measure(self, logits_RV: Tensor, teacher_RV: Tensor | None, targets_R: Tensor) -> Measures:
        """What is to be known of each row of logits, beside the teacher's where there is one."""
        held_RM = logits_RV.new_zeros(len(logits_RV), MEASURES)
        self.measure_rows(
            logits_RV.data_ptr(), _of(teacher_RV), targets_R.data_ptr(), held_RM.data_ptr(), *logits_RV.shape
        )
        return Measures(held_RM, *(column_R.clone() for column_R in held_RM[:, FIRST_MEASURE:].unbind(dim=1)))

    def slope(
        self, logits_RV: Tensor, teacher_RV: Tensor | None, targets_R: Tensor, measures: Measures, by_R3: Tensor
    ) -> None:
        """Logits become, in place, the gradient by them.

        by_R3  derivatives of the loss by the target's log-prob, KL(student ‖ teacher) and KL(teacher ‖ student)
        """
        self.slope_rows(
            logits_RV.data_ptr(), _of(teacher_RV), targets_R.data_ptr(), measures.held_RM.data_ptr(), by_R3.data_ptr(),
            *logits_RV.shape,
        )  # fmt: skip


def packed(weight_KH: Tensor) -> Tensor:
    """(K / LANES, rounded up, H, LANES): LANES outputs side by side, zeros for those that are not there."""
    rest = -len(weight_KH) % LANES
    whole = functional.pad(weight_KH, (0, 0, 0, rest)) if rest else weight_KH
    return whole.unflatten(0, (-1, LANES)).transpose(1, 2).contiguous()


@cache
def kernels() -> Kernels | None:
    """None where the library was not built, or is not of this machine."""
    found = find_spec("headwater._kernels")
    if found is None or found.origin is None:
        return None
    try:
        library = ctypes.CDLL(found.origin)
    except OSError:
        return None
    for name, arguments in _ARGUMENTS.items():
        getattr(library, name).argtypes, getattr(library, name).restype = (
            arguments,
            ctypes.c_int if name == "product_pays" else None,
        )
    return Kernels(**{name: getattr(library, name) for name in _ARGUMENTS})


def _of(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
