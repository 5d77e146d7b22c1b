"""Schema of token-level supervision by a teacher. Frozen; unknown keys are rejected."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from headwater.config.schema import Steps, Strict, Tokens, Unit

Candidates = Literal["teacher", "student", "both"]
"""Who chooses the tokens whose log-probs are requested from a served teacher."""


Weight = Annotated[float, Field(ge=-100.0, le=100.0)]


class TeacherWeights(Strict):
    """Weights of the log-probs of frozen models, whose normalized product is the teacher's distribution. They sum to 1.

    ExOPD (2602.12125) is `{teacher: 1.25, base_teacher: -0.25}`, or with `start` as the reference; weak-to-strong distillation
    (2607.26246) is `{start: 1, teacher: 1, base_teacher: -1}`.
    """

    teacher: Weight = 0.0
    """The stage's teacher."""
    base_teacher: Weight = 0.0
    """models.teacher before any training."""
    start: Weight = 0.0
    """The stage's own starting weights."""

    @model_validator(mode="after")
    def _check_sum(self) -> TeacherWeights:
        total = self.teacher + self.base_teacher + self.start
        if abs(total - 1.0) > 1e-6:
            raise ValueError(f"the weights sum to {total:g}; they must sum to 1, or the temperature changes too")
        return self


class StartUpdate(Strict):
    """How the model `start` follows the student while the stage trains: one of the two. Under an adapter a copy of the
    adapter follows."""

    every: Steps | None = None
    """Copy the student's weights every N steps (a lagged teacher)."""
    decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """After each step, start becomes decay · start + (1 − decay) · student: a moving average."""

    @model_validator(mode="after")
    def _one_rule(self) -> StartUpdate:
        if (self.every is None) == (self.decay is None):
            raise ValueError("give either every or decay")
        return self


class TokenWeights(Strict):
    """Weights of the tokens that the teacher's signal trains. They are rescaled to a mean of 1 over the tokens of a step, so that a
    selection does not change the learning rate."""

    prompts: Literal["all", "pass_rate", "all_wrong"] = "all"
    """`pass_rate` weights each prompt by p·(1−p), with p the share of its rollouts that are right (2603.11178); `all_wrong` keeps
    the prompts whose rollouts are all wrong, without rescaling (2608.00782). Both use labels, which must be the stage's
    own or spent by an earlier stage."""
    first: Tokens | None = None
    """Compare only the first tokens of a completion with the teacher (2602.15260); None compares all."""
    soft_or: Annotated[float, Field(gt=0.0, lt=1.0), Unit("share of the tokens")] | None = None
    """Keep the share of tokens with the highest h + d − h·d, with h the student's entropy and d KL(teacher‖student), both scaled
    to 0…1 over the step (2604.14084). Takes one more forward pass of the student."""


class Dense(Strict):
    """Token-level teacher supervision."""

    divergence: Literal["reverse", "forward", "jsd", "skewed", "entropy_aware", "sampled", "uld"] = "reverse"
    """`reverse` KL(student‖teacher), `forward` KL(teacher‖student), `jsd` with `beta`, `skewed` KL(student‖beta·teacher +
    (1−beta)·student), `entropy_aware` reverse plus forward where the teacher is uncertain, exact over the vocabulary;
    `sampled` is the one-token estimate (k1) as an advantage; `uld` the distance of the sorted probabilities, for two tokenizers."""
    tokenizers: Literal["same", "prefix", "shared"] = "same"
    """`same`: student and teacher must tokenize alike. The others are cross-tokenizer distillation: texts are aligned by bytes, and
    tokens are grouped by the common token that they begin with (`prefix`), or those that both vocabularies hold are compared and all
    others are one event (`shared`; docs/teachers.md)."""
    beta: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Weight of the teacher in the mixture of `jsd` and `skewed`."""
    entropy_above: Annotated[float, Field(ge=0.0), Unit("nats")] = 0.8
    """Entropy of the teacher above which `entropy_aware` adds the forward KL."""
    clip: Annotated[float, Field(gt=0.0), Unit("nats")] | None = None
    """Upper bound on one token's divergence; above it the token has no gradient. None sets no bound."""
    teacher_weights: TeacherWeights | None = None
    """A teacher composed of several frozen models; None is the stage's teacher alone."""
    start_update: StartUpdate | None = None
    """Let `start` in `teacher_weights` follow the student; None keeps the weights that the stage starts with."""
    gain_over: Literal["base_teacher", "start"] | None = None
    """Follow the teacher's gain over this model, where it agrees with the distance to the teacher (OPD², 2607.15161):
    `base_teacher` is models.teacher before any training, `start` the stage's starting weights. None follows the teacher."""
    token_weights: TokenWeights | None = None
    """Weights of prompts and tokens; None weights all tokens equally."""
    top_k: Tokens | None = None
    """Teacher distributions keep the top k tokens and the total mass of the others; None keeps the whole vocabulary."""
    candidates: Candidates = "teacher"
    """Who chooses the `top_k` tokens of a teacher behind a server: the server by its own probabilities, the student by its, so that
    the reverse KL covers the student's mass, or both (up to 2·top_k). The last two take one more forward pass of the student."""
    normalize: Literal["tokens", "tags"] = "tokens"
    """What `loss_mean` averages over: the tokens of all problems, or those of each tag, whose means then count equally, so that a
    domain with long completions does not outweigh the others."""

    @property
    def weighs_by_verdict(self) -> bool:
        """Whether a token's weight depends on whether its prompt's rollouts are right, so that they must be graded."""
        return self.token_weights is not None and self.token_weights.prompts != "all"

    @property
    def trains_wrong_groups(self) -> bool:
        """Whether prompts whose rollouts are all wrong are those that learn from the teacher."""
        return self.token_weights is not None and self.token_weights.prompts == "all_wrong"

    @property
    def exact(self) -> bool:
        """Whether the divergence sums over the vocabulary, so that it needs the teacher's whole distribution."""
        return self.divergence != "sampled"

    @property
    def measures_kl(self) -> bool:
        """Whether both KLs are measured at each token."""
        return self.divergence != "uld" and (self.exact or self.tokenizers == "same")

    @model_validator(mode="after")
    def _check_start(self) -> Dense:
        if self.start_update is not None and (self.teacher_weights is None or not self.teacher_weights.start):
            raise ValueError("start_update: needs start in teacher_weights, such as {start: 1}")
        return self

    @model_validator(mode="after")
    def _check_tokenizers(self) -> Dense:
        if self.divergence == "uld" and self.tokenizers == "same":
            raise ValueError(
                "divergence uld: compares sorted probabilities of two tokenizers; set tokenizers to prefix"
            )
        if self.divergence == "uld" and self.top_k is not None:
            raise ValueError("top_k: divergence uld needs the teacher's whole distribution")
        if self.candidates != "teacher" and (self.top_k is None or not self.exact or self.tokenizers != "same"):
            raise ValueError(
                f"candidates {self.candidates}: needs top_k, a divergence over the vocabulary, and one tokenizer"
            )
        if self.tokenizers != "same" and self.teacher_weights is not None:
            raise ValueError("teacher_weights: a composed teacher needs one vocabulary; set tokenizers to same")
        if self.tokenizers != "same" and self.gain_over is not None:
            raise ValueError("gain_over: needs one vocabulary; set tokenizers to same")
        if self.token_weights is not None and self.token_weights.soft_or is not None and not self.measures_kl:
            raise ValueError(
                f"token_weights.soft_or: needs a KL at each token, and divergence {self.divergence} has none here"
            )
        return self

    LATER = frozenset({
        "entropy_above", "clip", "teacher_weights", "gain_over", "token_weights", "tokenizers", "start_update", "normalize",
        "candidates",
    })  # fmt: skip
