"""Schema of a training stage: objective, optimizer, sampling, length. Frozen; unknown keys are rejected."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from headwater.config.dense import Dense
from headwater.config.lora import Lora
from headwater.config.objectives import OBJECTIVES, ObjectiveSpec, Signal, default_objective, known_objective
from headwater.config.schema import Choices, Fraction, Natural, Positive, Steps, Strict, Tokens, Unit
from headwater.errors import UserError


class Sampling(Strict):
    """How completions are drawn. Training stages need a temperature above 0, top_p 1 and top_k 0."""

    temperature: Annotated[float, Field(ge=0.0, le=10.0)] = 1.0
    """Divides the logits before a token is drawn; 0 takes the most probable token (evaluations only)."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Sample from the most probable tokens whose probabilities add up to this; 1 keeps every token."""
    top_k: Annotated[Natural, Unit("tokens")] = 0
    """Sample from the k most probable tokens; 0 keeps every token."""
    max_tokens: Tokens = 512
    """Longest completion; a longer one is cut."""


class Optim(Strict):
    """The optimizer, AdamW."""

    lr: Annotated[float, Field(gt=0.0)] = 1e-6
    """Peak learning rate. Adapters need about ten times that of full fine-tuning."""
    beta1: Fraction = 0.9
    """Decay of the gradient's running mean."""
    beta2: Fraction = 0.999
    """Decay of the squared gradient's running mean."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """Added to the denominator of an update."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Decoupled weight decay."""
    grad_clip: Annotated[float, Field(gt=0.0)] = 1.0
    """Largest norm of the gradient; a larger gradient is scaled down to it."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after `warmup`: constant, or down to 0 at the stage's last step."""
    warmup: Annotated[Fraction, Unit("share of the steps")] = 0.0
    """Share of the stage's steps over which the learning rate rises linearly from 0."""


class Sparse(Strict):
    """Group-relative policy gradient (GRPO) and its usual variants."""

    advantage: Literal["group", "dr_grpo"] = "group"
    """`group` divides by the group's standard deviation; `dr_grpo` only subtracts the mean (2503.20783)."""
    clip_low: Annotated[float, Field(ge=0.0)] = 0.2
    """The importance ratio is clipped below 1 − clip_low."""
    clip_high: Annotated[float, Field(ge=0.0)] = 0.2
    """The importance ratio is clipped above 1 + clip_high."""
    kl_coef: Annotated[float, Field(ge=0.0)] = 5e-4
    """Weight of KL(policy ‖ the stage's starting weights), by the k3 estimate per token."""
    dynamic_sampling: Annotated[Natural, Unit("rounds")] = 0
    """Maximum number of extra sampling rounds that replace groups whose rewards are all equal."""


class Until(Strict):
    """Early stopping: end a stage before its last step when a metric has stopped improving.

    The metric is averaged over windows of `every` steps (validation is measured at the end of each). The stage ends after
    `patience` consecutive windows that do not improve on the best earlier one by the relative amount `least`.

    Example: `{metric: kl_teacher_student, every: 10, patience: 2, least: 0.05}`.
    """

    metric: Literal["kl_teacher_student", "kl_student_teacher", "loss", "reward", "validation"]
    """`validation` is the accuracy on `data.validation`, whose labels are counted separately; the others need no extra labels."""
    every: Steps = 10
    """Length of a window."""
    patience: Annotated[Positive, Unit("windows")] = 2
    """Consecutive windows without improvement that end the stage."""
    least: Annotated[float, Field(ge=0.0)] = 0.02
    """Smallest relative improvement that counts."""


class LengthSchedule(Strict):
    """Length curriculum: the longest completion grows linearly to `sampling.max_tokens` (2605.16826)."""

    start: Tokens
    """Longest completion in the first step."""
    steps: Steps
    """Steps after which `sampling.max_tokens` is reached."""


class Stage(Strict):
    """Settings of one training stage: who samples × what scores × how densely, and for how long."""

    objective: Annotated[str, AfterValidator(known_objective), Choices(OBJECTIVES)]
    """Training objective, by default the stage's own: `grpo`, `opd`, `mixed`, `forward_kl`, `sft` or `constant`, as far as
    the stage accepts it."""
    steps: Annotated[Natural, Unit("steps")] | None = None
    """Length of the stage; takes precedence over `epochs`."""
    epochs: Annotated[float, Field(gt=0.0, le=1e6), Unit("passes")] | None = None
    """Passes over the stage's pool of prompts; ignored if `steps` is given."""
    until: Until | None = None
    """Early stopping. The learning-rate schedule still spans all steps."""
    batch_size: Annotated[Positive, Unit("rollouts")] = 64
    """Rollouts per step. On-policy stages sample batch_size / group_size prompts."""
    group_size: Annotated[Positive, Unit("rollouts")] = 8
    """Rollouts per prompt: sampled by the policy in a step, or cached from the teacher."""
    optim: Optim = Optim()
    """Learning rate and the optimizer's other settings."""
    sampling: Sampling = Sampling()
    """How the stage's completions are drawn."""
    prompts: Literal["pool", "every"] = "pool"
    """Problems that a stage without labels samples: those of its pool and `data.unlabeled`, or also `every` other problem of
    `data.labeled`, whose answers stay unread and cost no label."""
    lora: Lora | None = None
    """Train a low-rank adapter in this stage alone and merge it at the stage's end (2608.06802); None follows `models.lora`."""
    length_schedule: LengthSchedule | None = None
    """Sample shorter completions in the first steps; None samples `sampling.max_tokens` throughout."""
    sparse: Sparse = Sparse()
    """Policy gradient on rewards; for `grpo` and `mixed`."""
    dense: Dense = Dense()
    """Divergence from the teacher; for `opd`, `mixed` and `forward_kl`."""
    sparse_share: Fraction | None = None
    """λ of J_λ = (1−λ) dense + λ sparse; only for `mixed` (1 is GRPO, 0 is OPD)."""
    loss_mean: Literal["token", "sequence", "constant"] = "token"
    """Denominator of the loss: all tokens; tokens of a sequence, then sequences; or the constant batch_size × max_tokens (Dr.GRPO)."""
    minibatches: Positive = 1
    """Optimizer steps per pass over a sampled batch."""
    passes: Positive = 1
    """Passes over each sampled batch; after the first update the importance ratio is not 1."""
    eval_every: Annotated[Natural, Unit("steps")] = 0
    """Steps between evaluations within the stage; 0 evaluates at its end only."""
    checkpoint_every: Annotated[Natural, Unit("steps")] = 25
    """Steps between checkpoints that a stopped run resumes from; 0 writes one at the end only."""

    @property
    def prompts_per_step(self) -> int:
        """Distinct prompts in an on-policy step."""
        return self.batch_size // self.group_size

    def sampling_at(self, step: int) -> Sampling:
        """How completions are drawn in a step (from 0).

        Example: max_tokens 48 with {start: 16, steps: 4} samples up to 16, 24, 32, 40, then 48 tokens.
        """
        schedule, longest = self.length_schedule, self.sampling.max_tokens
        if schedule is None or step >= schedule.steps:
            return self.sampling
        length = schedule.start + (longest - schedule.start) * step // schedule.steps
        return self.sampling.model_copy(update={"max_tokens": length})

    def steps_over(self, prompts: int) -> int:
        """Number of steps on a pool of `prompts` prompts.

        Example: 2 epochs over 100 prompts with 16 per step are 13 steps. `steps`, if given, takes precedence.
        """
        if self.steps is not None:
            return self.steps
        rollouts = prompts * self.group_size
        return math.ceil((self.epochs or 0.0) * rollouts / self.batch_size)

    @property
    def spec(self) -> ObjectiveSpec:
        return OBJECTIVES[self.objective]

    @property
    def on_policy(self) -> bool:
        return self.spec.source == "policy"

    @property
    def signals(self) -> tuple[Signal, ...]:
        """What scores a rollout, without a signal that `sparse_share` gives weight 0, but with a reward that weighs its tokens."""
        weightless = (("reward", 0.0), ("teacher", 1.0))
        signals = tuple(signal for signal in self.spec.signals if (signal, self.sparse_share) not in weightless)
        graded = "teacher" in signals and "reward" not in signals and self.dense.weighs_by_verdict
        return ("reward", *signals) if graded else signals

    @property
    def needs_labels(self) -> bool:
        return "reward" in self.signals

    @property
    def grades_spent_labels(self) -> bool:
        """Whether the stage has no reward of its own and grades rollouts of prompts whose labels earlier stages used."""
        return self.needs_labels and "reward" not in self.spec.signals

    @property
    def needs_teacher(self) -> bool:
        return not self.on_policy or "teacher" in self.signals

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads log-probs of the stage's starting weights."""
        return self.spec.reference_kl and self.needs_labels and self.sparse.kl_coef > 0.0

    LATER = frozenset({"length_schedule", "prompts", "lora"})

    @model_validator(mode="after")
    def _check_consistency(self) -> Stage:
        if self.steps is None and self.epochs is None:
            raise ValueError("give steps or epochs")
        if self.on_policy and self.batch_size % self.group_size:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of group_size {self.group_size}")
        if self.needs_labels and self.group_size < 2:
            raise ValueError("group_size must be at least 2 where the reward is compared within a group")
        if self.spec.weighted != (self.sparse_share is not None):
            names = " or ".join(name for name, spec in OBJECTIVES.items() if spec.weighted)
            raise ValueError(f"sparse_share belongs to objective {names}, and {names} needs it")
        if self.sampling.top_p != 1.0 or self.sampling.top_k != 0:
            raise ValueError(
                "training must sample with top_p 1 and top_k 0: no loss accounts for a truncated distribution"
            )
        if self.sampling.temperature == 0.0:
            raise ValueError("sampling.temperature must be above 0: a stage trains on samples, not on greedy decoding")
        self._check_dense()
        if self.length_schedule is not None:
            self._check_length_schedule(self.length_schedule)
        if self.prompts == "every" and self.needs_labels:
            raise ValueError(f"prompts: every needs a stage without labels, and objective {self.objective} grades here")
        if self.lora is not None:
            self._check_lora(self.lora)
        if self.dense.start_update is not None and self.needs_reference:
            raise ValueError(
                "dense.start_update: sparse.kl_coef is a KL to the stage's start, which must then not move; set it to 0"
            )
        if self.until is not None:
            self._check_metric(self.until.metric)
        if self.minibatches > self.batch_size:
            raise ValueError(f"minibatches {self.minibatches} is more than batch_size {self.batch_size}")
        return self

    def _check_dense(self) -> None:
        """Refuse fields of `dense` that the objective cannot follow."""
        dense = self.dense
        if dense.gain_over is not None and (dense.divergence != "reverse" or dense.teacher_weights is not None):
            raise ValueError("dense.gain_over: needs divergence reverse and no teacher_weights")
        cached = "reads cached rollouts, which hold one teacher's distributions"
        compares_own = self.on_policy and "teacher" in self.signals
        own_rollouts = "does not compare the policy's own rollouts with a teacher"
        for name, given, accepted, reason in (
            ("gain_over", dense.gain_over is not None, self.on_policy, cached),
            ("teacher_weights", dense.teacher_weights is not None, self.on_policy, cached),
            ("candidates", dense.candidates != "teacher", compares_own, own_rollouts),
            ("normalize", dense.normalize == "tags", self.needs_teacher, "does not compare with a teacher"),
            ("token_weights", dense.token_weights is not None, compares_own, own_rollouts),
        ):
            if given and not accepted:
                raise ValueError(f"dense.{name}: objective {self.objective} {reason}")

    def _check_length_schedule(self, schedule: LengthSchedule) -> None:
        if not self.on_policy:
            raise ValueError(
                f"length_schedule: objective {self.objective} reads cached rollouts, which have their lengths"
            )
        if schedule.start >= self.sampling.max_tokens:
            raise ValueError(
                f"length_schedule.start {schedule.start} must be below sampling.max_tokens {self.sampling.max_tokens}"
            )

    def _check_lora(self, lora: Lora) -> None:
        if lora.roles != ("teacher", "student"):
            raise ValueError("lora.roles: a stage's adapter belongs to the role that the stage trains; leave it out")
        if lora.output != "merged":
            raise ValueError(
                "lora.output: the adapter of a stage is merged at its end; leave it out, or set models.lora"
            )
        if self.dense.start_update is not None:
            raise ValueError(
                "dense.start_update: the start under a stage's own adapter cannot move; set models.lora instead"
            )

    def _check_metric(self, metric: str) -> None:
        if metric == "reward" and not self.needs_labels:
            raise ValueError(f"until.metric reward: objective {self.objective} uses no reward")
        if metric.startswith("kl_") and "teacher" not in self.signals:
            raise ValueError(f"until.metric {metric}: objective {self.objective} does not compare with a teacher")


class Stages(Strict):
    """Training stages; a recipe needs only those of the arms that it is run with."""

    teacher_rl: Stage | None = None
    """GRPO on the teacher, with labels."""
    warmup: Stage | None = None
    """Forward KL on the teacher's rollouts, without labels."""
    opd: Stage | None = None
    """On-policy distillation: divergence from the teacher on the student's own rollouts, without labels."""
    student_rl: Stage | None = None
    """GRPO on the student, with labels."""
    sft: Stage | None = None
    """Hard-label fine-tuning in the arms `teacher_sft` and `sft_teacher`; None takes the warm-up's settings."""

    @property
    def named(self) -> dict[str, Stage]:
        """The stages that the recipe has, by name, in the order in which they run."""
        stages = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: stage for name, stage in stages.items() if stage is not None}

    def require(self, name: str) -> Stage:
        """The stage of that name. Raises UserError if the recipe has none."""
        if name not in self.named:
            raise UserError(f"stages.{name}: required here, but missing from the recipe")
        return self.named[name]

    @model_validator(mode="before")
    @classmethod
    def _fill_in_objectives(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {
            name: {"objective": default_objective(name), **stage}
            if isinstance(stage, dict) and name in cls.model_fields
            else stage
            for name, stage in value.items()
        }

    @model_validator(mode="after")
    def _check_objectives(self) -> Stages:
        if not self.named:
            raise ValueError(f"name at least one of {', '.join(type(self).model_fields)}")
        for name, stage in self.named.items():
            if name not in stage.spec.stages:
                allowed = " or ".join(objective for objective, spec in OBJECTIVES.items() if name in spec.stages)
                raise ValueError(f"{name}.objective is {stage.objective}; this stage takes {allowed}")
        if self.student_rl is not None and self.student_rl.until is not None:
            raise ValueError(
                "student_rl.until: stage 3 needs a fixed number of steps, because its matched replay takes as many"
            )
        return self
