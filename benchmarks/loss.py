"""Benchmark of the loss stage: exact reverse KL from hidden states and heads, with gradients for the student.

`loss` runs on the CPU in float32, `loss_gpu` on a GPU in bfloat16 with the heads of Qwen3-1.7B and Qwen3-8B. The
peers are TRL's chunked loss, the plain form (all logits at once) and, on a GPU, Liger-Kernel's fused loss.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import CannotRunError, Case, Figures, Step

Inputs = dict[str, Any]


def inputs_of(case: Case, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Hidden states (N, H) of student and teacher, their heads (V, H), and targets."""
    generator = torch.Generator().manual_seed(0)
    inputs: Inputs = {}
    for role, spec in (("student", case.student), ("teacher", case.teacher)):
        assert spec is not None
        _, size, vocabulary = spec.split(":")
        hidden = int(size.split("x")[1])
        inputs[f"{role}_hidden"] = torch.randn(case.tokens, hidden, generator=generator).to(device, dtype)
        # Without a temporary of the head's size: the process's peak would be that of loading.
        weight = torch.empty(int(vocabulary), hidden).normal_(std=0.02, generator=generator).to(device, dtype)
        head = nn.Linear(hidden, int(vocabulary), bias=False, device="meta")
        head.weight = nn.Parameter(weight, requires_grad=role == "student")
        inputs[f"{role}_head"] = head
    inputs["student_hidden"].requires_grad_()
    inputs["targets"] = torch.randint(int(vocabulary), (case.tokens,), generator=generator).to(device)
    return inputs


def headwater(inputs: Inputs) -> Tensor:
    from benchmarks import ours

    return ours.loss_stage(inputs)


def plain(inputs: Inputs) -> Tensor:
    """Full logits of both models."""
    student = inputs["student_head"](inputs["student_hidden"]).float().log_softmax(dim=-1)
    with torch.no_grad():
        teacher = inputs["teacher_head"](inputs["teacher_hidden"]).float().log_softmax(dim=-1)
    return (student.exp() * (student - teacher)).sum(dim=-1).mean()


def trl(inputs: Inputs) -> Tensor:
    """The loss of `DistillationTrainer` at β = 1."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    loss, _, _ = _chunked_divergence_loss(
        inputs["student_hidden"][None],
        inputs["teacher_hidden"][None],
        inputs["student_head"].weight,
        inputs["teacher_head"].weight,
        torch.ones_like(inputs["targets"])[None],
        beta=1.0,
    )
    return loss


def liger(inputs: Inputs) -> Tensor:
    """Liger-Kernel's fused linear JSD at β = 1, which is the reverse KL, without its cross-entropy term."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    fused = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, temperature=1.0)
    return fused(
        inputs["student_hidden"],
        inputs["student_head"].weight,
        inputs["teacher_hidden"],
        inputs["teacher_head"].weight,
        inputs["targets"],
    )


FORMS: dict[str, Callable[[Inputs], Tensor]] = {"headwater": headwater, "plain": plain, "trl": trl, "liger": liger}


def hidden_bytes(inputs: Inputs) -> int:
    """Bytes that every implementation needs: the gradient of the student's hidden states."""
    return inputs["student_hidden"].nbytes


def step_of(peer: str, case: Case) -> Step:
    """One loss with gradients. Raises CannotRunError if the case needs a GPU and there is none."""
    if case.kind == "loss_gpu":
        if not torch.cuda.is_available():
            raise CannotRunError("no GPU on this machine")
        device, dtype = torch.device("cuda"), torch.bfloat16
    else:
        device, dtype = torch.device("cpu"), torch.float32
    inputs, form = inputs_of(case, device, dtype), FORMS[peer]
    tiny = replace(case, student="random:1x8:16", teacher="random:1x8:16", tokens=2)
    form(inputs_of(tiny, device, dtype))  # import first: imports must not count as time or memory
    baseline = torch.cuda.memory_allocated() if device.type == "cuda" else 0

    def step(number: int) -> Figures:
        inputs["student_hidden"].grad = inputs["student_head"].weight.grad = None
        if device.type == "cpu":
            loss = form(inputs)
            loss.backward()
            return {"loss": loss.item(), "hidden_bytes": hidden_bytes(inputs)}
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        started = time.perf_counter()
        loss = form(inputs)
        loss.backward()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        used = torch.cuda.max_memory_allocated() - baseline
        return {"loss": loss.item(), "hidden_bytes": hidden_bytes(inputs), "seconds": seconds, "gpu_bytes": used}

    return step
