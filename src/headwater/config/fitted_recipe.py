"""The recipe that `headwater init mine` writes: the rules of `fitted` applied to one pair, its data and a device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from headwater.config.commented_yaml import Setting, commented_yaml
from headwater.config.fitted import (
    GROUP,
    LENGTHS,
    MOST_EVALUATED,
    MOST_LABELS,
    OPD_GROUP,
    SMALL_CACHE,
    TEMPLATES,
    Trained,
    duration,
    millions,
    passes,
    steps_for,
)
from headwater.config.fitted_sizes import FittedSizes
from headwater.config.learning_rates import RATES, suggested_rate
from headwater.config.objectives import Signal


@dataclass(frozen=True)
class FittedRecipe(FittedSizes):
    """Settings for one pair, its data and a device, in one form of training; `text()` is the commented YAML.

    times  estimated seconds of each stage and, as `total`, of the default arm, for the comments; empty before the estimate
    """

    times: Mapping[str, float] = field(default_factory=dict)

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
            "yaml-language-server: $schema=recipe.schema.json",
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
            "headwater explain --schema > recipe.schema.json   complete fields in editors, by the first line of this file",
        ]

    def remarks(self) -> list[str]:
        """Notes of the header: what limits this recipe, and how long it takes."""
        lines = []
        if self.teacher.parameters <= self.student.parameters:
            lines.append(
                "note     the teacher is not larger than the student: it can pass on only what the reward teaches it"
            )
        if self.data.alignment:
            lines.append(
                "note     the tokenizers differ: each model reads its own chat template, and texts are aligned by bytes"
            )
        if "total" in self.times:
            time = f"time     {duration(self.times['total'])} for `headwater run my.yaml` if every completion reaches max_tokens"
            lines.append(f"{time}, as --dry-run estimates")
            if self.device.kind == "cuda":
                lines.append("         from data sheets; loading, grading and the overhead of small models come on top")
        if self.slow:
            lines.append(
                "note     this device is slow for the pair: the recipe is cut to what it can do, enough to try everything and little to"
            )
            lines.append(
                "         learn from; --hours changes the limit, and --device h100 (or rtx4090, …) writes a recipe for a GPU elsewhere"
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
            values["models.lora"] = self.lora()
        return values

    # Blocks -----------------------------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """The recipe, block by block."""
        limit, evaluate = self.evaluation()
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
                    "max_share": Setting(
                        0.1, "of a stage's FLOPs at most; `problems` and `every` measure as often as they say instead"
                    ),
                    "top_k": Setting(
                        max(1, min(16, self.student.vocabulary // 4)), "most probable tokens whose overlap is measured"
                    ),
                },
                "distance between student and teacher, measured without labels",
            ),
            **self.guards(),
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
            extra = "qlora" if form.quantize else "lora"
            comment = (
                f"adapters, because all weights would not fit into {self.device.memory / 2**30:.0f} GiB (16 bytes a weight while it "
                f"trains). Needs pip install 'headwater[{extra}]'. Rank 32 is enough for RL (LoRA Without Regret)"
            )
            output = (
                "a stage keeps its adapter alone, which the next one continues; `headwater merge` writes a whole model"
            )
            block["lora"] = Setting({**self.lora(), "output": Setting("adapter", output)}, comment)
        return block

    def lora(self) -> dict[str, Any]:
        """The adapters of a form that has any."""
        lora: dict[str, Any] = {"r": 32, "alpha": 64}
        if self.form.adapted == ("teacher",):
            lora["roles"] = ["teacher"]
        return lora | ({"quantize": "nf4", "output": "adapter"} if self.form.quantize else {})

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
            return (
                f"problems whose answer training may use, of {self.data.labels:,}: what the stages can use in the time"
            )
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
        stage, rollouts, first = f"{role}_rl", self.rollouts, role == "teacher"
        prompts, over = rollouts // GROUP, f"{self.budget} labels (the paper makes {LENGTHS[stage][1]})"
        kl = "no KL to the start, as DAPO and Dr. GRPO; the paper's 5e-4 needs another copy of the model"
        return Setting(
            {
                "objective": "grpo",
                "steps": self.steps(stage, prompts, self.budget, self.rl_seconds(role, rollouts), over),
                "batch_size": Setting(rollouts, f"rollouts a step: {prompts} problems × {GROUP}{self._few}"),
                "group_size": Setting(
                    GROUP, "rollouts of one problem, whose rewards are compared; 8 as the paper's script"
                ),
                "sampling": Setting(
                    {"temperature": 1.0, "max_tokens": self.completion.value},
                    f"{self.completion.comment}. Where the model is right only at a lower temperature, lower it"
                    if first
                    else "",
                ),
                "optim": self.rate(role, "reward"),
                "sparse": Setting({"kl_coef": 0.0}, kl if first else ""),
            },
            comment,
        )

    def steps(self, stage: str, in_step: int, in_pass: int, seconds: float, over: str) -> Setting:
        """Length of a stage whose steps take `in_step` of the prompts or rollouts and `seconds` each, and whose passes take `in_pass`.

        over  names what a pass is over, for the comment
        """
        wanted, most_passes = LENGTHS[stage]
        steps = steps_for(wanted, math.ceil(in_pass / in_step), most_passes, seconds, self.effort)
        time = f"; about {duration(self.times[stage])}" if stage in self.times else ""
        return Setting(steps, f"{passes(steps * in_step / in_pass)} over {over}{time}")

    def warmup(self) -> Setting:
        batch, rollouts = self.transfer_rollouts, self.budget * GROUP
        over = f"{rollouts:,} teacher rollouts (the paper makes 1)"
        fields: dict[str, Any] = {
            "objective": "forward_kl",
            "steps": self.steps("warmup", batch, rollouts, self.transfer_seconds(batch), over),
            "batch_size": Setting(batch, f"rollouts a step{self._few}"),
            "group_size": Setting(
                GROUP, "teacher rollouts of a problem; fewer are sampled where the steps train on fewer"
            ),
            "sampling": {"max_tokens": self.completion.value},
            "optim": self.rate("student", "teacher"),
        }
        dense = self.aligned(self.data.alignment)
        vocabulary = self.student.vocabulary
        if 4 * vocabulary * rollouts * self.completion.value > SMALL_CACHE:
            dense["top_k"] = Setting(
                64,
                "the cache keeps 64 tokens and the mass of the rest, 0.3 KB for each position; all "
                f"{vocabulary:,} take {vocabulary / 250:,.0f} KB",
            )
        if dense:
            fields["dense"] = dense
        return Setting(fields, "stage 2a: forward KL to the teacher, on the teacher's rollouts")

    def opd(self) -> Setting:
        batch, prompts = self.transfer_rollouts, self.transfer_rollouts // OPD_GROUP
        return Setting(
            {
                "objective": "opd",
                "steps": self.steps("opd", prompts, self.budget, self.transfer_seconds(batch), "the problems"),
                "batch_size": Setting(batch, f"rollouts a step: {prompts} problems × {OPD_GROUP}{self._few}"),
                "group_size": Setting(OPD_GROUP, "student rollouts of one problem"),
                "sampling": {"max_tokens": self.completion.value},
                "optim": self.rate("student", "teacher"),
                **({"dense": self.aligned("as in the warm-up")} if self.data.alignment else {}),
            },
            "stage 2b: reverse KL to the teacher, on the student's own rollouts",
        )

    def aligned(self, comment: str) -> dict[str, Any]:
        """The field that aligns two tokenizers, where they differ."""
        return {"tokenizers": Setting("prefix", comment)} if self.data.alignment else {}

    @property
    def _few(self) -> str:
        return "; few, because time is short" if self.tight else ""

    def evaluation(self) -> tuple[int | None, Setting]:
        """(limit of the evaluation's problems, None for all of them; the block `evaluate`)."""
        samples = 1 if self.tight else 4
        seconds = self.seconds(samples, max(self.student.parameters, self.teacher.parameters))
        affordable = max(self.effort.fewest_evaluated, int(self.effort.evaluation / max(seconds, 1e-9)))
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

    def guards(self) -> dict[str, Any]:
        """Longer patience where a step has few groups."""
        if self.patience == 3:
            return {}
        groups = self.patience * self.rollouts // GROUP
        comment = f"steps without any difference in rewards before a stage is stopped: {groups} groups, so that chance rarely does it"
        return {"guards": {"patience": Setting(self.patience, comment)}}

    def compute(self) -> dict[str, Any]:
        block = {
            "device": Setting("auto", "the GPU if there is one"),
            "microbatch_tokens": Setting(self.microbatch(), "tokens of one forward and backward pass; lower it if memory is short"),
            "sample_batch": Setting(self.sample_batch(), "sequences decoded at once; KV cache within a fifth of the memory"),
        }  # fmt: skip
        if self.device.kind == "cpu":
            block["workers"] = Setting(1, "one stage at a time, since each holds its models in memory")
        return block
