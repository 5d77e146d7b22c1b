"""Schema of low-rank adapters, for all stages of a role (`models.lora`) or for one (`stages.NAME.lora`)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from headwater.config.schema import Name, Strict


class Lora(Strict):
    """Low-rank adapters (peft) that a stage trains instead of all weights (docs/models.md)."""

    r: Annotated[int, Field(ge=1, le=65536)] = 16
    """Rank of the adapters."""
    alpha: Annotated[int, Field(ge=1, le=1_000_000)] = 32
    """The adapter's output is scaled by alpha / r."""
    dropout: float = 0.0
    """Must be 0: otherwise the trainer's log-probs differ from the sampler's."""
    targets: Literal["all-linear"] | tuple[Name, ...] = "all-linear"
    """Matrices that get an adapter, by the last part of their names, such as `[q_proj, v_proj]`; never the head."""
    roles: Annotated[tuple[Literal["teacher", "student"], ...], Field(min_length=1)] = ("teacher", "student")
    """Roles whose stages train adapters; stages of the other role train all weights."""
    quantize: Literal["nf4"] | None = None
    """Keep the frozen weights in four bits while an adapter trains (QLoRA); needs bitsandbytes."""
    output: Literal["merged", "adapter"] = "merged"
    """Output of a stage: a plain model folder with the adapter merged, or the adapter alone, which the next stage continues."""

    @model_validator(mode="after")
    def _trains_what_is_sampled(self) -> Lora:
        if self.dropout != 0.0:
            raise ValueError(
                "dropout must be 0: otherwise the trainer's log-probs differ from those that the sampler drew with"
            )
        if not self.targets:
            raise ValueError("targets is empty; name matrices, or all-linear")
        for name in self.targets if isinstance(self.targets, tuple) else ():
            if name in ("lm_head", "embed_tokens"):
                raise ValueError(f"targets: {name} gets no adapter here; name matrices of the layers")
        return self
