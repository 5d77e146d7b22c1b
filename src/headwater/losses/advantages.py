"""Group-relative advantages from rewards."""

from __future__ import annotations

import torch
from torch import Tensor

STD_FLOOR = 1e-6


def group_normalised(rewards_PG: Tensor) -> Tensor:
    """A = (r − mean) / (std + 1e-6) within each group (GRPO, 2402.03300 eq. for outcome supervision).

    The standard deviation is the population's (divided by G). A group whose rewards are all equal gets exactly 0.

    Shapes: rewards (P, G) float -> advantages (P, G) float.

    Example: rewards `[[1, 0, 0, 0]]` have mean 0.25 and std 0.433, so advantages `[[1.732, -0.577, -0.577, -0.577]]`.
    """
    centred_PG = mean_centred(rewards_PG)
    std_P1 = centred_PG.square().mean(dim=1, keepdim=True).sqrt()
    return centred_PG / (std_P1 + STD_FLOOR)


def mean_centred(rewards_PG: Tensor) -> Tensor:
    """A = r − mean within each group (Dr.GRPO, 2503.20783): no division, so hard and easy problems have the same weight.

    Example: rewards `[[1, 0, 0, 0]]` give `[[0.75, -0.25, -0.25, -0.25]]`.
    """
    centred_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    return torch.where(informative(rewards_PG)[:, None], centred_PG, torch.zeros_like(centred_PG))


def informative(rewards_PG: Tensor) -> Tensor:
    """Mask of the groups with a learning signal, whose rewards are not all equal: (P, G) -> (P,) bool."""
    return (rewards_PG != rewards_PG[:, :1]).any(dim=1)


ADVANTAGES = {"group": group_normalised, "dr_grpo": mean_centred}
