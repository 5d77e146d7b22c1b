"""Table and runner of the checks behind `headwater doctor`, `run` and `study`.

A check is a generator of findings and a row of CHECKS. A new one is a function, a row, a line in docs/checks.md and a test that
plants the fault.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from headwater.config.recipe import Recipe
from headwater.doctor import data_checks as data
from headwater.doctor import model_checks as models
from headwater.doctor import prompt_checks as prompts
from headwater.doctor import resource_checks as resources
from headwater.doctor import saving_checks, signal_checks, tokenizer_checks, training_checks
from headwater.doctor import teacher_checks as teachers
from headwater.doctor import weight_checks as weights
from headwater.doctor.context import DoctorContext
from headwater.doctor.finding import Finding, texts, told_once, try_each, unreadable
from headwater.errors import RefusedError, UserError
from headwater.runs.inputs import RunInputs
from headwater.runs.plan import Plan
from headwater.runs.read_once import InputError
from headwater.runs.setup import prompt_day
from headwater.storage.run_dir import RunDir

Stage = Literal["files", "weights", "comparisons"]
STAGES: dict[Stage, str] = {
    "files": "recipe, files and prompts",
    "weights": "the models on samples",
    "comparisons": "student against teacher",
}
"""Stages of checks in their order, and what each looks at."""


@dataclass(frozen=True)
class Check:
    """A row of the table.

    title      what is checked, for the list that is printed
    stage      it runs only if no earlier stage found an error: a run that is refused anyway loads no weights
    exit_code  of `run` when it finds an error: 2 for a mistake in the recipe or its data, which is reported alone in one sentence
               and also for a finished run, that preflight does not examine otherwise
    of_machine it depends on what the machine, or a server, can do now: a resumed run repeats it
    """

    title: str
    run: Callable[[DoctorContext], Iterator[Finding]]
    stage: Stage = "files"
    exit_code: Literal[2, 3] = 3
    of_machine: bool = False


def plan_can_be_made(context: DoctorContext) -> Iterator[Finding]:
    """Report a plan that cannot be made for a reason without a finding of its own."""
    yield from try_each(lambda: context.inputs.device, lambda: context.plan)


CHECKS = (
    Check("model folders, configs, tokenizers", models.models_are_readable),
    Check("weights that can be trained", models.trainable_weights),
    Check("token ids of probe strings and problems", models.token_ids, exit_code=2),
    Check("aligned tokenizers", tokenizer_checks.alignment, exit_code=2),
    Check("vocabulary width", models.vocabulary),
    Check("stop ids of student and teacher", models.stop_sets),
    Check("EOS, padding, turn end", models.end_tokens),
    Check("sampling defaults", models.sampling_defaults),
    Check("generation configs", models.generation_configs),
    Check("data files", data.data_is_readable),
    Check("chat templates", prompts.templates, exit_code=2),
    Check("thinking mode and system prompt", prompts.fields_without_effect),
    Check("problems in their prompts", prompts.whole_problems),
    Check("prompts that contain a chat template", prompts.spelt_templates),
    Check("ends of prompts", prompts.prompt_ends),
    Check("clock of chat templates", prompts.clock),
    Check("prompt lengths", prompts.prompt_lengths, exit_code=2),
    Check("positions", prompts.context_length),
    Check("positions that change with length", prompts.length_rules, exit_code=2),
    Check("characters of the problems", prompts.unknown_tokens),
    Check("control tokens in the problems", prompts.control_tokens),
    Check("columns next to the problems", data.columns, exit_code=2),
    Check("an answer for every label", data.answers),
    Check("protections of the machine", data.sandbox_layers),
    Check("labels against their grader", data.golds),
    Check("contamination by evaluation problems", data.contamination, exit_code=2),
    Check("duplicates and contradictions", data.repeats, exit_code=2),
    Check("evaluation sets", data.evaluations),
    Check("label budget and halves", data.halves),
    Check("pool sizes", data.pool_sizes, exit_code=2),
    Check("what teachers can do", teachers.teacher_form, exit_code=2),
    Check("tags of problems", teachers.teacher_tags, exit_code=2),
    Check("one tokenizer of teachers by tag", teachers.one_tokenizer, exit_code=2),
    Check("tags of a normalized loss", teachers.normalized_tags, exit_code=2),
    Check("device and plan", plan_can_be_made, exit_code=2),
    Check("sampling engine", teachers.engine),
    Check("teacher servers' tokens", teachers.server_tokens, exit_code=2, of_machine=True),
    Check("teacher servers", teachers.servers, of_machine=True),
    Check("tokens that the student chooses", teachers.candidates, exit_code=2, of_machine=True),
    Check("adapters", models.adapters),
    Check("memory", resources.memory, of_machine=True),
    Check("disk", resources.disk, of_machine=True),
    Check("experts per token", resources.experts),
    Check("teachers that are distilled untrained", signal_checks.distillation_first),
    Check("a student taught by its own start", signal_checks.own_start),
    Check("chance that a stage is stopped for lack of signal", signal_checks.early_stop),
    Check("settings that a stage does not read", training_checks.settings_without_effect),
    Check("a stage that samples ahead", training_checks.sampling_ahead, exit_code=2),
    Check("width of the measured overlap", training_checks.overlap_width),
    Check("speed of the compute dtype", resources.compute_dtype),
    Check("finite log-probs", weights.finite, "weights"),
    Check("attention and cache", weights.forward_paths, "weights"),
    Check("lengths of completions", training_checks.lengths, "weights"),
    Check("answers in completions", signal_checks.answers_found, "weights"),
    Check("learning rates", training_checks.learning_rates, "weights"),
    Check("sampler against trainer", weights.sampler_against_trainer, "comparisons"),
    Check("replicas of teacher servers", teachers.replicas, "comparisons"),
    Check("student taught by itself", weights.self_distillation, "comparisons"),
    Check("teacher against student", signal_checks.teacher_is_student, "comparisons"),
    Check("saving and loading again", saving_checks.saving, "comparisons"),
    Check("teacher scored twice", weights.teacher_agrees_with_itself, "comparisons"),
)
MACHINE_CHECKS = tuple(check for check in CHECKS if check.of_machine)


@dataclass(frozen=True)
class Examination:
    """Findings, titles of the checks that ran, and of those that could not run."""

    findings: tuple[Finding, ...]
    checked: tuple[str, ...]
    unchecked: tuple[str, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == "error")

    def as_json(self) -> dict[str, Any]:
        return {
            "ok": not self.errors,
            "findings": [vars(finding) for finding in self.findings],
            "checked": list(self.checked),
            "unchecked": list(self.unchecked),
        }

    def text(self, verbose: bool = False) -> str:
        """Every finding and how many checks ran, errors last: nearest to the prompt. `verbose` lists the checks by title."""

        def counted(titles: Sequence[str], what: str) -> str:
            listed = f": {', '.join(titles)}" if verbose else ""
            return f"{len(titles)} check{'s' if len(titles) != 1 else ''} {what}{listed}"

        notes, warnings, errors = (
            texts(finding for finding in self.findings if finding.severity == severity)
            for severity in ("note", "warning", "error")
        )
        lines = [*notes, *warnings, counted(self.checked, "done") + ("" if verbose else " (--verbose lists them)")]
        if self.unchecked:
            lines.append(counted(self.unchecked, "not done, because of the errors below"))
        return "\n".join([*lines, *(errors or ["no errors"])])

    @property
    def error_names(self) -> str:
        return ", ".join(dict.fromkeys(finding.name for finding in self.errors))


Tell = Callable[[str, str], None]
"""Called with what a check's stage looks at, and the check's title, when it begins."""


def _tell_nobody(group: str, title: str) -> None:
    pass


def examine(context: DoctorContext, checks: Sequence[Check] = CHECKS, tell: Tell = _tell_nobody) -> Examination:
    """Run every check that can be run. An input that cannot be read is one finding, whatever checks need it."""
    findings: dict[Finding, None] = {}
    checked, unchecked = [], []
    for stage, group in STAGES.items():
        refused = any(finding.severity == "error" for finding in findings)
        for check in (check for check in checks if check.stage == stage):
            if refused:
                unchecked.append(check.title)
                continue
            tell(group, check.title)
            try:
                for finding in check.run(context):
                    findings[finding] = None  # those before an input that cannot be read count too
                checked.append(check.title)
            except InputError as error:
                findings[unreadable(error)] = None
                unchecked.append(check.title)
    # A plan that cannot be made is the consequence of any error with a name of its own.
    named = any(finding.severity == "error" and finding.name != "cannot-run" for finding in findings)
    reported = [finding for finding in findings if not (named and finding.name == "cannot-run")]
    return Examination(told_once(reported), tuple(checked), tuple(unchecked))


def diagnose(
    recipe: Recipe, arms: Sequence[str], seeds: Sequence[int], out: Path, tell: Tell = _tell_nobody
) -> Examination:
    """Check all of a recipe and some of its arms; nothing is written. Raises UserError for an unknown arm."""
    with (
        RunInputs(recipe, need_answers=False, day=prompt_day(RunDir(out))) as inputs,
        closing(DoctorContext(inputs, tuple(arms), tuple(seeds), out)) as context,
    ):
        return examine(context, tell=tell)


def _refuse_user_errors(context: DoctorContext, checks: Sequence[Check]) -> list[Finding]:
    """Run the checks of exit code 2; returns their other findings. Raises UserError for the first error."""
    findings = []
    for check in checks:
        for finding in check.run(context) if check.exit_code == 2 else ():
            if finding.severity == "error":
                raise UserError(finding.evidence)
            findings.append(finding)
    return findings


def _say_warnings(findings: Sequence[Finding], say: Callable[[str], None]) -> None:
    for finding in findings:
        if finding.severity == "warning":
            say(finding.text())


def preflight(
    plan: Plan,
    inputs: RunInputs,
    out: Path | None = None,
    say: Callable[[str], None] = lambda message: None,
    tell: Tell = _tell_nobody,
    checks: Sequence[Check] = CHECKS,
) -> None:
    """Refuse what would spoil a run before anything is written, and report warnings.

    out     the run's folder. None (dry run, probe, point of a sweep), like a folder whose nodes are all finished, runs only the
            checks of exit code 2, which load no weights
    checks  MACHINE_CHECKS where the others have passed for the same inputs

    Raises UserError for a mistake in the recipe or its data, RefusedError with the name, evidence and remedy of other errors.
    """
    with closing(DoctorContext.of(plan, inputs, out or Path())) as context:
        _say_warnings(_refuse_user_errors(context, checks), say)
        if out is None or not context.pending:
            return
        examination = examine(context, [check for check in checks if check.exit_code == 3], tell)
    _say_warnings(examination.findings, say)
    if examination.errors:
        errors = "\n".join(finding.text() for finding in examination.errors)
        raise RefusedError(
            f"refused by preflight: {examination.error_names} (`headwater doctor` shows every check)\n{errors}"
        )
