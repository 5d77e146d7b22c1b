"""Rotary positions: how many a model has, and scaling rules that depend on the length of the sequence.

Under `longrope` (Phi-3, Phi-4) and `dynamic` NTK scaling transformers computes the angles of every position, the first one too, from
the longest sequence of the batch. Beyond a length the log-probs of one row then depend on the other rows of the batch, and keys that a
sampler cached before are those of another model. Results are not exact across that length, so no run crosses it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headwater.errors import UserError


@dataclass(frozen=True)
class LengthRule:
    """A rule for positions that depends on a sequence's length.

    kind       its name in the config
    limit      tokens up to which all sequences follow one rule
    two_rules  whether all longer ones follow one rule as well, rather than each a rule of its own
    """

    kind: str
    limit: int
    two_rules: bool


def length_rule(config: Any) -> LengthRule | None:
    """The rule of a model whose positions depend on the length of the sequence; None for all others."""
    text = config.get_text_config()
    known = getattr(text, "max_position_embeddings", None)
    sets = _rope_parameters(text)
    rules = []
    for rope in sets:
        kind = str(rope.get("rope_type", rope.get("type", "default")))
        if kind in ("longrope", "su"):
            outside = getattr(text, "original_max_position_embeddings", known)
            # transformers 5.19 fails on the second long batch of a model with a set for each kind of layer.
            rules.append((kind, rope.get("original_max_position_embeddings", outside), len(sets) == 1))
        elif "dynamic" in kind:
            rules.append((kind, known, False))
    limited = [LengthRule(kind, limit, two_rules) for kind, limit, two_rules in rules if isinstance(limit, int)]
    return min(limited, key=lambda rule: rule.limit, default=None)


def mixed_lengths(config: Any, shortest: int, prompt: int, completion: int) -> str | None:
    """What is wrong, and the remedy, if sequences of these lengths follow more than one rule for positions; None if they do not.

    shortest, prompt  tokens of the shortest and the longest prompt
    completion        most tokens of a completion
    """
    rule = length_rule(config)
    if rule is None or prompt + completion <= rule.limit or (rule.two_rules and shortest > rule.limit):
        return None
    limit, room = rule.limit, rule.limit - prompt
    remedies = [f"lower max_tokens to at most {room}" if room > 0 else f"use prompts well below {limit} tokens"]
    remedies += [f"use only prompts of more than {limit} tokens"] if rule.two_rules else []
    return (
        f"its positions ({rule.kind} scaling) change for a whole sequence once that is longer than {limit} tokens, and prompts of "
        f"{shortest} to {prompt} tokens with completions of up to {completion} can cross this, where sampler and trainer would "
        f"compute different log-probs; {', '.join(remedies)}, or take a model without this scaling"
    )


def refuse_mixed_lengths(config: Any, field: str, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
    """Raises UserError if sequences of these prompts, of at most `max_tokens` tokens, follow more than one rule for positions.

    field  the setting that names the model
    """
    lengths = sorted(map(len, prompts))
    problem = mixed_lengths(config, lengths[0], lengths[-1], max_tokens - lengths[-1])
    if problem is not None:
        raise UserError(f"{field}: {problem}")


def positions(config: Any) -> int | None:
    """Number of positions of a model, with the factor of a RoPE scaling where its config keeps the original number."""
    text = config.get_text_config()
    known = getattr(text, "max_position_embeddings", None)
    if known is None or known < 0:  # XLNet has no limit, and says -1
        return None
    scaled = [known]
    for rope in _rope_parameters(text):
        dynamic = "dynamic" in str(rope.get("rope_type", ""))
        original = rope.get("original_max_position_embeddings", known if dynamic else None)
        if original is not None:
            scaled.append(int(original * (rope.get("factor") or 1.0)))
    return max(scaled)


def _rope_parameters(text: Any) -> list[Mapping[str, Any]]:
    """The RoPE parameters of a text config: one set, or one for each kind of layer."""
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    nested = [parameters for parameters in rope.values() if isinstance(parameters, Mapping)]
    return nested or [rope]
