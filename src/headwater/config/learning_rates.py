"""Published learning rates of AdamW by signal and by what trains; `init mine` starts from them and the doctor judges by them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from headwater.config.objectives import Signal
from headwater.config.stage import Stage

SMALLEST_JUDGED = 64_000_000
"""Parameters. No rates are published for pretrained models below this size; the pocket models (0.1 to 0.6 million) need about 1e-3."""
SMALL = 1_000_000_000
"""Parameters below which three times the usual rate is suggested: small models take larger rates (published GRPO runs of 0.5 to 1.5
billion parameters use up to 5e-6; SmolLM2 fine-tunes 1.7 billion parameters at 3e-4 and 135 million at 1e-3)."""


@dataclass(frozen=True)
class Rates:
    """Rates for one signal, for all weights or for LoRA adapters.

    usual   where to start with a model of SMALL parameters or more
    low     below this, adapters hardly change the model in a few hundred steps; None: not judged
    high    above this, no published setting that we know trains stably
    source  where the numbers come from, as a phrase
    """

    usual: float
    low: float | None
    high: float
    source: str


RATES: Mapping[tuple[Signal, bool], Rates] = {
    ("reward", False): Rates(1e-6, None, 3e-5, "1e-6 (2605.12483, DAPO 2503.14476, TRL's default)"),
    ("reward", True): Rates(1e-5, 2e-6, 5e-4, "1e-5, ten times that of all weights (LoRA Without Regret, Schulman et al. 2025)"),
    ("teacher", False): Rates(
        1e-5, None, 3e-4, "1e-5, between 1e-6 (2605.12483, 17,398 prompts) and 5e-5 to 1e-4 (tinker-cookbook, Qwen3-8B)"
    ),
    ("teacher", True): Rates(1e-4, 1e-5, 2e-3, "1e-4 (tinker-cookbook for OPD; 1e-4 to 2e-4 in QLoRA, 2305.14314)"),
}  # fmt: skip
"""(signal, whether adapters train) -> rates."""


def signal_of(stage: Stage) -> Signal:
    """What a stage's gradient comes from: reward needs smaller rates, because its gradients are noisier."""
    return "reward" if stage.needs_labels else "teacher"


def suggested_rate(signal: Signal, adapters: bool, parameters: int) -> float:
    """Learning rate to start with.

    Example: `suggested_rate("reward", False, 135_000_000)` is 3e-6, of 8 billion parameters 1e-6.
    """
    usual = RATES[signal, adapters].usual
    return usual if adapters or parameters >= SMALL else float(f"{3 * usual:.0e}")


def judge_rate(rate: float, signal: Signal, adapters: bool, parameters: int) -> Literal["low", "high"] | None:
    """Whether a learning rate is outside the published range for a pretrained model of this size; None if not, or not known.

    Example: `judge_rate(1e-3, "teacher", False, 135_000_000)` is `"high"`.
    """
    rates = RATES[signal, adapters]
    if parameters < SMALLEST_JUDGED:
        return None
    if rate > rates.high:
        return "high"
    return "low" if rates.low is not None and rate < rates.low else None
