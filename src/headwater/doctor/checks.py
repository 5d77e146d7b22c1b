"""`headwater doctor`: everything that can be wrong before time is spent. `run` and `study` ask it first.

Every check is a function Case -> findings and a row of CHECKS. A new one is a function, a row, a line in docs/doctor.md and a
test that plants the fault.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from headwater.config.recipe import Recipe
from headwater.doctor import data_checks as data
from headwater.doctor import engine_checks as engines
from headwater.doctor import model_checks as weights
from headwater.doctor import tokenizer_checks as tokens
from headwater.doctor.context import Case, Finding, UnavailableError, pending
from headwater.errors import RefusedError, UserError
from headwater.runs.checks import check_plan
from headwater.runs.inputs import RunInputs
from headwater.runs.plan import Plan

Stage = Literal["files", "weights", "comparisons"]
STAGES: tuple[Stage, ...] = ("files", "weights", "comparisons")


@dataclass(frozen=True)
class Check:
    """A row of the table.

    title   what was looked at, for the list that is printed
    finds   the names that its findings may have
    stage   it is made only if no earlier stage found an error: weights are not loaded for a run that is refused anyway
    told    `run` has said or refused the same before it asks the doctor, so it is not looked at twice
    """

    title: str
    look: Callable[[Case], list[Finding]]
    finds: tuple[str, ...]
    stage: Stage = "files"
    told: bool = False


def plan_can_run(case: Case) -> list[Finding]:
    """What `run` itself would refuse, and no other check has a name for."""
    device = case.device  # a GPU that is not there has its own name
    try:
        check_plan(case.plan, case.inputs)
    except UnavailableError:
        raise
    except UserError as error:
        return [Finding("cannot-run", "error", f"{error} (on {device.type})", "mend what the sentence names")]
    return []


CHECKS = (
    Check("model folders, configs, tokenizers", tokens.models_are_readable, ("model-unreadable",)),
    Check("token ids of probe strings and problems", tokens.token_ids, ("token-ids-differ",), told=True),
    Check("vocabulary width", tokens.vocabulary, ("vocabulary-width", "token-beyond-vocabulary")),
    Check("stop ids of student and teacher", tokens.stop_sets, ("stop-sets-differ", "no-stop-id")),
    Check(
        "EOS, padding, turn end", tokens.ends, ("eos-not-in-generation-config", "turn-end-does-not-stop", "pad-is-eos")
    ),
    Check("sampling defaults", tokens.sampling_defaults, ("sampling-defaults-ignored",)),
    Check("data files", data.data_is_readable, ("data-unreadable",)),
    Check("chat templates", tokens.templates, ("thinking-differs", "prompts-differ", "thinking-known-to-one")),
    Check(
        "thinking mode and system prompt",
        tokens.fields_without_effect,
        ("thinking-without-effect", "thinking-always-on", "system-without-effect"),
    ),
    Check("prompt lengths and positions", tokens.lengths, ("prompt-too-long", "context-too-short")),
    Check("characters of the problems", tokens.unknown_tokens, ("unknown-tokens",)),
    Check("an answer for every label", data.answers, ("label-without-answer",)),
    Check("gold answers against their grader", data.golds, ("task-unusable", "gold-fails-grader")),
    Check("contamination by evaluation problems", data.contamination, ("evaluation-leak",), told=True),
    Check("duplicates and contradictions", data.repeats, ("duplicates", "contradicting-answers"), told=True),
    Check("evaluation sets", data.evaluations, ("evaluation-empty", "evaluations-overlap")),
    Check(
        "label budget and halves",
        data.split,
        ("label-budget-over-pool", "halves-overlap", "halves-unbalanced", "pool-too-small"),
    ),
    Check("device and plan", plan_can_run, ("device-missing", "cannot-run"), told=True),
    Check("sampling engine", engines.engine, ("engine-unusable",)),
    Check(
        "teacher servers",
        engines.servers,
        ("server-unusable", "server-disagrees", "server-context-too-short"),
    ),
    Check("memory", data.memory, ("memory-too-small", "memory-tight")),
    Check("disk", data.disk, ("disk-too-small", "disk-tight", "cache-over-limit")),
    Check("finite log-probs", weights.finite, ("not-finite",), stage="weights"),
    Check("truncation", weights.truncation, ("truncated",), stage="weights"),
    Check("sampler against trainer", weights.sampler_against_trainer, ("sampler-trainer-gap",), stage="comparisons"),
    Check("student taught by itself", weights.self_distillation, ("self-kl",), stage="comparisons"),
    Check(
        "teacher scored twice",
        weights.teacher_agrees_with_itself,
        ("teacher-disagrees-with-itself",),
        stage="comparisons",
    ),
)


@dataclass(frozen=True)
class Examination:
    """What was found, what was looked at, and what could not be."""

    findings: tuple[Finding, ...]
    checked: tuple[str, ...]
    unchecked: tuple[str, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        return tuple(one for one in self.findings if one.severity == "error")

    def written(self) -> dict[str, Any]:
        return {
            "ok": not self.errors,
            "findings": [vars(one) for one in self.findings],
            "checked": list(self.checked),
            "unchecked": list(self.unchecked),
        }

    def text(self) -> str:
        """Every finding, errors first, then what was looked at."""
        order = ("error", "warning", "note")
        lines = [one.text() for one in sorted(self.findings, key=lambda one: order.index(one.severity))]
        lines.append(f"checked: {', '.join(self.checked)}")
        if self.unchecked:
            lines.append(f"not checked, because of the errors above: {', '.join(self.unchecked)}")
        if not self.errors:
            lines.append("nothing is wrong that would spoil a run")
        return "\n".join(lines)

    def refusal(self, shown: bool) -> RefusedError:
        """shown: the findings stand above already, so their names are enough."""
        names = ", ".join(dict.fromkeys(one.name for one in self.errors))
        if shown:
            return RefusedError(f"refused: {names}")
        errors = "\n".join(one.text() for one in self.errors)
        return RefusedError(f"refused by preflight: {names} (`headwater doctor` shows every check)\n{errors}")


def examine(case: Case, checks: Sequence[Check] = CHECKS) -> Examination:
    """Make every check that can be made. One that fails for want of something says so once, under that thing's name."""
    found: dict[Finding, None] = {}
    checked, unchecked = [], []
    for stage in STAGES:
        refused = any(one.severity == "error" for one in found)
        for check in (one for one in checks if one.stage == stage):
            if refused:
                unchecked.append(check.title)
                continue
            try:
                found.update(dict.fromkeys(check.look(case)))
                checked.append(check.title)
            except UnavailableError as error:
                found[error.finding] = None
                unchecked.append(check.title)
    named = [one for one in found if one.severity == "error" and one.name != "cannot-run"]
    # A plan that cannot be made is the consequence of what is named already.
    findings = tuple(one for one in found if not (named and one.name == "cannot-run"))
    return Examination(findings, tuple(checked), tuple(unchecked))


def diagnose(recipe: Recipe, arms: Sequence[str], seeds: Sequence[int], out: Path) -> Examination:
    """Everything about a recipe and some of its arms; nothing is written. Raises UserError for an unknown arm."""
    case = Case(recipe, tuple(arms), tuple(seeds), out)
    try:
        return examine(case)
    finally:
        case.close()


def preflight(plan: Plan, inputs: RunInputs, out: Path, say: Callable[[str], None]) -> None:
    """What `run` and `study` do first: refuse errors, say warnings. A finished run is not looked at again.

    Raises RefusedError with every error's name, evidence and remedy.
    """
    if not pending(plan, out):
        return
    arms = tuple(arm for arm in plan.arms if not arm.startswith("base_"))
    case = Case(plan.recipe, arms, plan.seeds, out, (plan, inputs), every=False)
    try:
        found = examine(case, [check for check in CHECKS if not check.told])
    finally:
        case.close()
    for one in found.findings:
        if one.severity == "warning":
            say(one.text())
    if found.errors:
        raise found.refusal(shown=False)
