"""ctypes bindings of the fused CPU kernels in kernels.c (float32): decoding and the linear-head loss.

The shared library is next to this file; it is not a Python module. Without a C compiler at installation there is no library, and
`kernels()` is None: callers then use torch.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional

LANES = 16
"""Cache columns whose keys are interleaved (kernels.c)."""
STATS, FIRST_STAT = 9, 4
"""Numbers per row that `loss_stats` keeps, and the index of the first public one (kernels.c)."""

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


@dataclass(frozen=True)
class LossStats:
    """Per row of logits: log-prob of the target, entropy, both KLs, the teacher's log-prob of the target.

    raw_RM  all numbers that `loss_gradient` reads again, these included
    """

    raw_RM: Tensor
    logp_R: Tensor
    entropy_R: Tensor
    kl_student_teacher_R: Tensor
    kl_teacher_student_R: Tensor
    teacher_logp_R: Tensor


@dataclass(frozen=True)
class Kernels:
    """The kernels as methods. Inputs are float32 CPU tensors with contiguous rows; unless noted, the result is a new tensor."""

    library: ctypes.CDLL

    def rms_norm(self, x_NH: Tensor, weight_H: Tensor | None, eps: float) -> Tensor:
        """RMS norm of each row (1910.07467)."""
        out_NH = torch.empty_like(x_NH)
        self.library.norm_rows(x_NH.data_ptr(), _pointer(weight_H), out_NH.data_ptr(), *x_NH.shape, eps)
        return out_NH

    def silu_gate(self, gate_up_NI: Tensor) -> Tensor:
        """silu(gate) · up for rows that concatenate gate and up: (N, 2I) -> (N, I)."""
        rows, width = gate_up_NI.shape
        out_NI = gate_up_NI.new_empty(rows, width // 2)
        self.library.gate_rows(gate_up_NI.data_ptr(), out_NI.data_ptr(), rows, width // 2)
        return out_NI

    def decode_attention(
        self,
        qkv_AD: Tensor,
        head_norm: Tensor | None,
        rope_TD: Tensor,
        position_A: Tensor,
        keys: Tensor,
        values: Tensor,
        eps: float,
    ) -> Tensor:
        """Attention of one new token per row: head norm, RoPE, write its keys and values to the cache, attend to it.

        qkv_AD      (A, (heads + 2 · kv_heads) · D), the halves of the heads of q and k interleaved
        head_norm   (heads + kv_heads, D), None where the model has none
        rope_TD     cos and sin interleaved, for each position
        keys        (rows, kv_heads, columns / LANES, D, LANES), of which the first A rows are used
        values      (rows, kv_heads, columns, D)
        returns     (A, heads · D)
        """
        _, kv_heads, columns, width = values.shape
        heads = qkv_AD.shape[1] // width - 2 * kv_heads
        out_AD = qkv_AD.new_empty(len(qkv_AD), heads * width)
        self.library.attend_rows(
            qkv_AD.data_ptr(), _pointer(head_norm), rope_TD.data_ptr(), position_A.data_ptr(), keys.data_ptr(),
            values.data_ptr(), out_AD.data_ptr(), len(qkv_AD), heads, kv_heads, width, columns, eps,
        )  # fmt: skip
        return out_AD

    def linear(self, x_NH: Tensor, packed: Tensor, bias_K: Tensor | None, columns: int) -> Tensor:
        """x Wᵀ + b: (N, K), for a weight of K rows in the layout of `pack_weight`."""
        out_NK = x_NH.new_empty(len(x_NH), columns)
        self._linear(out_NK, x_NH, packed, bias_K, add=0)
        return out_NK

    def add_linear(self, to_NK: Tensor, x_NH: Tensor, packed: Tensor, bias_K: Tensor | None) -> None:
        """to += x Wᵀ + b, in place."""
        self._linear(to_NK, x_NH, packed, bias_K, add=1)

    def _linear(self, out_NK: Tensor, x_NH: Tensor, packed: Tensor, bias_K: Tensor | None, add: int) -> None:
        self.library.linear_rows(
            x_NH.data_ptr(), packed.data_ptr(), _pointer(bias_K), out_NK.data_ptr(), *x_NH.shape, out_NK.shape[1], add
        )

    def matmul_is_faster(self) -> bool:
        """Whether `matmul` beats torch on this processor."""
        return bool(self.library.product_pays())

    def matmul(self, x_NH: Tensor, weight_KH: Tensor, bias_K: Tensor | None, out_NK: Tensor) -> Tensor:
        """x Wᵀ + b into `out_NK`, for many rows and a weight that is not packed."""
        self.library.product_rows(
            x_NH.data_ptr(), weight_KH.data_ptr(), _pointer(bias_K), out_NK.data_ptr(), *x_NH.shape, len(weight_KH)
        )
        return out_NK

    def sample(self, logits_BV: Tensor, draws_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """One token per row by inverse CDF of float64 uniform draws, and its log-prob."""
        token_B = torch.empty(len(logits_BV), dtype=torch.long)
        logp_B = torch.empty(len(logits_BV))
        self.library.draw_rows(
            logits_BV.data_ptr(), draws_B.data_ptr(), token_B.data_ptr(), logp_B.data_ptr(), *logits_BV.shape, 1.0 / temperature
        )  # fmt: skip
        return token_B, logp_B

    def loss_stats(self, logits_RV: Tensor, teacher_RV: Tensor | None, targets_R: Tensor) -> LossStats:
        """Statistics of each row of logits; those of the teacher are 0 without one."""
        raw_RM = logits_RV.new_zeros(len(logits_RV), STATS)
        self.library.measure_rows(
            logits_RV.data_ptr(), _pointer(teacher_RV), targets_R.data_ptr(), raw_RM.data_ptr(), *logits_RV.shape
        )
        return LossStats(raw_RM, *(column_R.clone() for column_R in raw_RM[:, FIRST_STAT:].unbind(dim=1)))

    def loss_gradient(
        self, logits_RV: Tensor, teacher_RV: Tensor | None, targets_R: Tensor, stats: LossStats, grad_R3: Tensor
    ) -> None:
        """Overwrite the logits with the gradient of the loss with respect to them.

        grad_R3  derivatives of the loss by the target's log-prob, KL(student ‖ teacher) and KL(teacher ‖ student)
        """
        self.library.slope_rows(
            logits_RV.data_ptr(), _pointer(teacher_RV), targets_R.data_ptr(), stats.raw_RM.data_ptr(), grad_R3.data_ptr(),
            *logits_RV.shape,
        )  # fmt: skip


def pack_weight(weight_KH: Tensor) -> Tensor:
    """Interleave LANES output rows: (K, H) -> (K / LANES rounded up, H, LANES), with zeros for missing rows."""
    missing = -len(weight_KH) % LANES
    padded = functional.pad(weight_KH, (0, 0, 0, missing)) if missing else weight_KH
    return padded.unflatten(0, (-1, LANES)).transpose(1, 2).contiguous()


@cache
def kernels() -> Kernels | None:
    """Load the library once. None where it was not built, or was built for another machine."""
    spec = find_spec("headwater._kernels")
    if spec is None or spec.origin is None:
        return None
    try:
        library = ctypes.CDLL(spec.origin)
    except OSError:
        return None
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes = arguments
        function.restype = ctypes.c_int if name == "product_pays" else None
    return Kernels(library)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
