"""The recipe that `headwater init mine` writes: the rules of `fitted` applied to one pair, its data and a device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from headwater.config.commented_yaml import Setting, commented_yaml
from headwater.config.fitted import (
    EVAL_SECONDS,
    FEWEST_EVALUATED,
    FEWEST_ROLLOUTS,
    FEWEST_STEPS,
    GROUP,
    MOST_EVALUATED,
    MOST_LABELS,
    OPD_GROUP,
    OPD_PASSES,
    OPD_STEPS,
    RL_PASSES,
    RL_STEPS,
    ROLLOUTS,
    SMALL_CACHE,
    STAGE_SECONDS,
    STEP_SECONDS,
    TEMPLATES,
    WARMUP_PASSES,
    WARMUP_STEPS,
    DataFacts,
    DeviceFacts,
    Form,
    ModelFacts,
    duration,
    max_tokens,
    millions,
    passes,
    rounded_up,
    steps_for,
)
from headwater.config.learning_rates import RATES, Signal, suggested_rate

Trained = Literal["student", "teacher"]


@dataclass(frozen=True)
class FittedRecipe:
    """Settings for one pair, its data and a device, in one form of training; `text()` is the commented YAML."""

    student: ModelFacts
    teacher: ModelFacts
    data: DataFacts
    device: DeviceFacts
    form: Form

    def text(self) -> str:
        """The recipe as YAML: facts first, then every value with what it is and where it comes from."""
        head = "\n".join(f"# {line}".rstrip() for line in self.header())
        blocks = (commented_yaml({name: value}) for name, value in self.settings().items())
        return head + "\n\n" + "".join(f"\n{block}" if "\n  " in block else block for block in blocks)

    def header(self) -> list[str]:
        data, device = self.data, self.device
        answers = "no worked solutions"
        if data.solution_tokens is not None:
            answers = f"worked solutions of {data.solution_tokens[0]:.0f} tokens on average"
        return [
            "Written by `headwater init mine` from this pair, these problems and this device. Every value may be changed; its comment",
            "says what it is and where it comes from. `headwater doctor` judges changed values too.",
            "",
            *(
                f"{role}  {model.name}: {millions(model.parameters)} parameters, vocabulary {model.vocabulary:,}"
                + ("" if model.positions is None else f", {model.positions:,} positions")
                for role, model in (("student", self.student), ("teacher", self.teacher))
            ),
            f"data     {data.path}: {data.task_reason}; {answers}",
            f"device   {device.name}, {device.memory / 2**30:.1f} GiB of memory free, {device.source}",
            f"form     {self.form}",
            *self.remarks(),
            "",
            "headwater doctor my.yaml            check everything that could fail or spoil a run",
            "headwater probe my.yaml             measure whether the labels belong on the teacher or on the student",
            "headwater run my.yaml --dry-run     list the stages with their costs; with --on h100, hours on that device",
            "headwater run my.yaml --out runs/my",
        ]

    def remarks(self) -> list[str]:
        """What the user should know before anything else."""
        lines = []
        if self.teacher.parameters <= self.student.parameters:
            lines.append(
                "note     the teacher is not larger than the student: it can pass on only what the reward teaches it"
            )
        if self.slow:
            lines.append(
                "note     this device is slow for the pair: stages are cut to about 2 hours each, enough to try everything and"
            )
            lines.append(
                "         little to learn from; `init mine … --device h100` (or rtx4090, …) writes a recipe for a GPU elsewhere"
            )
        return lines

    def stage_values(self, stage: str, rewarded: bool) -> dict[str, Any]:
        """The values that decide memory and how fast the student learns in one stage, by field: for recipes of that stage alone."""
        form, field = self.form, f"stages.{stage}"
        values = {
            "models.dtype": form.dtype,
            "models.gradient_checkpointing": form.checkpointing,
            f"{field}.batch_size": self.rollouts if rewarded else self.transfer_rollouts,
            f"{field}.sampling.max_tokens": self.completion.value,
            f"{field}.optim.lr": self.rate("student", "reward" if rewarded else "teacher").value["lr"],
            "evaluate.sampling.max_tokens": self.completion.value,
            "compute.microbatch_tokens": self.microbatch(),
            "compute.sample_batch": self.sample_batch(),
        }
        if form.adapted:
            values["models.lora"] = self.models()["lora"].value
        return values

    # Sizes ------------------------------------------------------------------------------------------------------------

    @property
    def budget(self) -> int:
        """Labels: all up to MOST_LABELS; on a slow device, what one pass of a GRPO stage can use."""
        step_seconds = self.rl_seconds("teacher", FEWEST_ROLLOUTS)
        affordable = max(FEWEST_STEPS, int(STAGE_SECONDS / step_seconds)) * FEWEST_ROLLOUTS // GROUP
        budget = min(self.data.labels, MOST_LABELS, affordable)
        return budget // 8 * 8 if budget < self.data.labels else budget

    @property
    def completion(self) -> Setting:
        """`max_tokens` of a completion."""
        positions = [model.positions for model in (self.student, self.teacher) if model.positions is not None]
        return max_tokens(self.data, min(positions, default=None))

    @property
    def longest_prompt(self) -> int:
        return rounded_up(1.25 * self.data.prompt_tokens, 64)

    def seconds(self, rollouts: int, weights: float) -> float:
        """Of completions half as long as the limit, where each token is multiplied with `weights` (2 FLOPs each)."""
        return rollouts * (self.completion.value / 2 + self.data.prompt_tokens) * 2 * weights / self.device.flops

    def rl_seconds(self, role: Trained, rollouts: int) -> float:
        """Of a GRPO step: sampling, and a forward and backward pass."""
        return self.seconds(rollouts, 4 * self.model(role).parameters)

    def transfer_seconds(self, rollouts: int) -> float:
        """Of a step of warm-up or OPD: the same for the student, and one pass of the teacher."""
        return self.seconds(rollouts, 4 * self.student.parameters + self.teacher.parameters)

    def model(self, role: Trained) -> ModelFacts:
        return self.student if role == "student" else self.teacher

    @property
    def slow(self) -> bool:
        """Whether the device, and not the data, decides how much is trained."""
        return self.rl_seconds("teacher", ROLLOUTS) > STEP_SECONDS

    @property
    def rollouts(self) -> int:
        """Of a GRPO step: fewer where it would take longer than STEP_SECONDS, or the labels are few."""
        rollouts = ROLLOUTS
        while rollouts > FEWEST_ROLLOUTS and (
            self.rl_seconds("teacher", rollouts) > STEP_SECONDS or rollouts // GROUP > self.budget // 4
        ):
            rollouts //= 2
        return rollouts

    @property
    def transfer_rollouts(self) -> int:
        return max(FEWEST_ROLLOUTS, self.rollouts // 2)

    def microbatch(self) -> int:
        """Tokens of a pass; at least one row."""
        row = rounded_up(self.longest_prompt + self.completion.value, 256)
        return max(8192 if self.device.kind == "cuda" else 2048, row)

    def sample_batch(self) -> int:
        numbers = max(1, self.student.cache_numbers, self.teacher.cache_numbers)
        width = 2 if self.form.dtype == "bfloat16" else 4
        row, rows = (self.longest_prompt + self.completion.value) * numbers * width, 256
        while rows > 8 and (rows * row > self.device.memory / 5 or rows > max(16, 2 * self.rollouts)):
            rows //= 2
        return rows

    # Blocks -----------------------------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """The recipe, block by block."""
        limit, evaluate = self.evaluation()
        longest_transfer = max(self.warmup().value["steps"].value, self.opd().value["steps"].value)
        return {
            "name": "mine",
            "seed": 0,
            "task": Setting(self.data.task, f"{self.data.task_reason}; docs/tasks.md lists other graders"),
            "models": self.models(),
            "prompt": self.prompt(),
            "data": self.sources(limit),
            "labels": {"budget": Setting(self.budget, self._budget_comment())},
            "stages": {
                "teacher_rl": self.grpo("teacher", "stage 1: reward on the teacher, where the labels are spent"),
                "warmup": self.warmup(),
                "opd": self.opd(),
                "student_rl": self.grpo("student", "stage 3: reward on the student, in arms such as bridge_rl and direct_grpo"),
            },
            "evaluate": evaluate,
            "conditions": Setting(
                {
                    "problems": Setting(
                        min(self.data.held_out, 4 if self.slow else 16), "held-out problems; 0 measures nothing"
                    ),
                    "every": Setting(
                        max(1, math.ceil(longest_transfer / 2)), "steps: at the start, in the middle and at the end"
                    ),
                    "top_k": Setting(
                        max(1, min(16, self.student.vocabulary // 4)), "most probable tokens whose overlap is measured"
                    ),
                },
                "distance between student and teacher, measured without labels",
            ),
            "compute": self.compute(),
        }  # fmt: skip

    def models(self) -> dict[str, Any]:
        form = self.form
        dtype = "of forward and backward passes; weights that train stay float32"
        checkpointing = "activations are computed twice: less memory, a third more work"
        block: dict[str, Any] = {
            "student": self.student.name,
            "teacher": self.teacher.name,
            "dtype": Setting(form.dtype, dtype + ("" if form.dtype == "bfloat16" else ". Most CPUs compute bfloat16 slowly")),
            "gradient_checkpointing": Setting(
                form.checkpointing, checkpointing if form.checkpointing else "not needed: activations fit"
            ),
        }  # fmt: skip
        if form.adapted:
            lora: dict[str, Any] = {"r": 32, "alpha": 64}
            if form.adapted == ("teacher",):
                lora["roles"] = ["teacher"]
            if form.quantize:
                lora |= {"quantize": "nf4", "output": "adapter"}
            extra = "qlora" if form.quantize else "lora"
            comment = (
                f"adapters, because all weights would not fit into {self.device.memory / 2**30:.0f} GiB (16 bytes a weight while it "
                f"trains). Needs pip install 'headwater[{extra}]'. Rank 32 is enough for RL (LoRA Without Regret)"
            )
            block["lora"] = Setting(lora, comment)
        return block

    def prompt(self) -> dict[str, Any]:
        data = self.data
        template = "{problem}" if data.asks_for_form else TEMPLATES.get(data.task, "{problem}")
        own_form = "the problems ask for the form of the answer themselves"
        thinking = "the template's thinking mode; it needs several times the max_tokens below"
        return {
            "template": Setting(template, own_form if data.asks_for_form else f"asks for the form that the {data.task} grader reads"),
            "thinking": Setting(False, thinking if self.student.thinking else "the chat template has no thinking mode"),
            "max_tokens": Setting(
                self.longest_prompt, f"the longest prompt has {data.prompt_tokens} tokens; a longer one is refused, never cut"
            ),
        }  # fmt: skip

    def sources(self, limit: int | None) -> dict[str, Any]:
        data, share = self.data, self.data.held_out_share
        labeled: dict[str, Any] = {"path": data.path}
        held_out: dict[str, Any] = {"path": data.evals_path}
        if data.columns:
            labeled["columns"] = held_out["columns"] = dict(data.columns)
        above = below = ""
        if share is not None:
            labeled["hash_range"], held_out["hash_range"] = [share, 1], [0, share]
            above = f": the part of the file whose content hash is at least {share:g}; no row order changes it"
            below = f": the part of the file whose content hash is below {share:g}"
        count = f"{data.held_out:,}"
        if limit is not None:
            held_out["limit"], count = limit, f"{limit} of {data.held_out:,}"
        return {
            "labeled": Setting(labeled, f"{data.labels:,} problems with an answer{above}"),
            "evals": {"held_out": Setting(held_out, f"{count} problems, never trained on{below}")},
        }

    def _budget_comment(self) -> str:
        if self.budget < min(self.data.labels, MOST_LABELS):
            return f"problems whose answer training may use, of {self.data.labels:,}: what a stage of 2 h can use on this device"
        if self.budget < self.data.labels:
            return f"problems whose answer training may use, of {self.data.labels:,}; raise it if labels are not scarce"
        return "problems whose answer training may use: all of them"

    def rate(self, role: Trained, signal: Signal) -> Setting:
        """Optimizer with its learning rate."""
        parameters, adapters = self.model(role).parameters, role in self.form.adapted
        rate, what = suggested_rate(signal, adapters, parameters), "adapters" if adapters else "all weights"
        times = rate / RATES[signal, adapters].usual
        more = f", × {times:.2g} below 1 billion parameters" if round(times, 6) != 1 else ""
        return Setting({"lr": rate, "warmup": 0.05}, f"for {what}: {RATES[signal, adapters].source}{more}")

    def grpo(self, role: Trained, comment: str) -> Setting:
        rollouts, first = self.rollouts, role == "teacher"
        prompts, seconds = rollouts // GROUP, self.rl_seconds(role, rollouts)
        steps = steps_for(RL_STEPS, math.ceil(self.budget / prompts), RL_PASSES, seconds)
        kl = "no KL to the start, as DAPO and Dr. GRPO; the paper's 5e-4 needs another copy of the model"
        return Setting(
            {
                "objective": "grpo",
                "steps": Setting(
                    steps,
                    f"{passes(steps * prompts / self.budget)} over {self.budget} labels (the paper makes {RL_PASSES})"
                    f"{self._time(steps, seconds)}",
                ),
                "batch_size": Setting(rollouts, f"rollouts a step: {prompts} problems × {GROUP}{self._few}"),
                "group_size": Setting(
                    GROUP, "rollouts of one problem, whose rewards are compared; 8 as the paper's script"
                ),
                "sampling": Setting({"max_tokens": self.completion.value}, self.completion.comment if first else ""),
                "optim": self.rate(role, "reward"),
                "sparse": Setting({"kl_coef": 0.0}, kl if first else ""),
            },
            comment,
        )

    def warmup(self) -> Setting:
        batch, rollouts = self.transfer_rollouts, self.budget * GROUP
        seconds = self.transfer_seconds(batch)
        steps = steps_for(WARMUP_STEPS, math.ceil(rollouts / batch), WARMUP_PASSES, seconds)
        fields: dict[str, Any] = {
            "objective": "forward_kl",
            "steps": Setting(
                steps,
                f"{passes(steps * batch / rollouts)} over the {rollouts:,} cached rollouts (the paper makes 1)"
                f"{self._time(steps, seconds)}",
            ),
            "batch_size": Setting(batch, f"rollouts a step{self._few}"),
            "group_size": Setting(GROUP, "teacher rollouts of each problem that are cached"),
            "sampling": {"max_tokens": self.completion.value},
            "optim": self.rate("student", "teacher"),
        }
        vocabulary = self.student.vocabulary
        if 4 * vocabulary * rollouts * self.completion.value > SMALL_CACHE:
            fields["dense"] = Setting(
                {"top_k": 64},
                "the cache keeps 64 tokens and the mass of the rest, 0.3 KB for each position; all "
                f"{vocabulary:,} take {vocabulary / 250:,.0f} KB",
            )
        return Setting(fields, "stage 2a: forward KL to the teacher, on the teacher's rollouts")

    def opd(self) -> Setting:
        batch = self.transfer_rollouts
        seconds, prompts = self.transfer_seconds(batch), batch // OPD_GROUP
        steps = steps_for(OPD_STEPS, math.ceil(self.budget / prompts), OPD_PASSES, seconds)
        return Setting(
            {
                "objective": "opd",
                "steps": Setting(
                    steps, f"{passes(steps * prompts / self.budget)} over the problems{self._time(steps, seconds)}"
                ),
                "batch_size": Setting(batch, f"rollouts a step: {prompts} problems × {OPD_GROUP}{self._few}"),
                "group_size": Setting(OPD_GROUP, "student rollouts of one problem"),
                "sampling": {"max_tokens": self.completion.value},
                "optim": self.rate("student", "teacher"),
            },
            "stage 2b: reverse KL to the teacher, on the student's own rollouts",
        )

    @property
    def _few(self) -> str:
        return "; few, because this device is slow for the pair" if self.slow else ""

    def _time(self, steps: int, seconds: float) -> str:
        return f"; about {duration(seconds)} a step here, {duration(steps * seconds)} in all" if self.slow else ""

    def evaluation(self) -> tuple[int | None, Setting]:
        """(limit of the evaluation's problems, None for all of them; the block `evaluate`)."""
        samples = 1 if self.slow else 4
        seconds = self.seconds(samples, max(self.student.parameters, self.teacher.parameters))
        affordable = max(FEWEST_EVALUATED, int(EVAL_SECONDS / max(seconds, 1e-9)))
        problems = min(MOST_EVALUATED, self.data.held_out, affordable)
        own = self.student.sampling
        sampling = {"temperature": 1.0, **own, "max_tokens": self.completion.value}
        fields = {
            "samples": Setting(samples, f"completions of one problem{self._few}"),
            "sampling": Setting(
                sampling, "from the student's generation_config.json" if own else "the model's own distribution"
            ),
        }
        error = 98 / math.sqrt(problems)
        comment = f"on {problems} problems: a 95 % interval of about ±{error:.0f} points at an accuracy of 50 %"
        return (None if problems == self.data.held_out else problems), Setting(fields, comment)

    def compute(self) -> dict[str, Any]:
        block = {
            "device": Setting("auto", "the GPU if there is one"),
            "microbatch_tokens": Setting(self.microbatch(), "tokens of one forward and backward pass; lower it if memory is short"),
            "sample_batch": Setting(self.sample_batch(), "sequences decoded at once; KV cache within a fifth of the memory"),
        }  # fmt: skip
        if self.device.kind == "cpu":
            block["workers"] = Setting(1, "one stage at a time, since each holds its models in memory")
        return block
