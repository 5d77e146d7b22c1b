"""Stages of a study: their names, their rows in report.json, and the accuracy of an arm after each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from headwater.config.objectives import OBJECTIVES
from headwater.report.contrasts import accuracy, mean, pass_at, pass_ks, summarize_seeds
from headwater.report.format import percent
from headwater.report.study import EvalCounts, Node, Study, costs, finite_values, is_finite_number, mean_costs, nodes_at
from headwater.tasks.outcomes import Outcomes

STAGE_NAMES = {
    "teacher_rl": "Teacher RL",
    "warmup": "Warm-up",
    "opd": "On-policy distillation",
    "student_rl": "Student RL",
    "sft": "SFT",
}
"""Names of the training stages in the order of the report."""
UNTRAINED_NAMES = {
    "base_student": "Student before",
    "base_teacher": "Teacher before",
    "teacher_rollouts": "Teacher's rollouts",
}
"""Names of the nodes that train nothing."""
SHORT_NAMES = {"teacher_rl": "RL", "sft": "SFT", "warmup": "warm-up", "opd": "OPD", "student_rl": "RL"}
TRAINING_MEASURES = (
    "reward", "informative", "best_of_group", "kl_teacher_student", "kl_student_teacher", "overlap", "entropy", "truncated",
    "validation",
)  # fmt: skip
"""Columns of metrics.jsonl whose curves report.json keeps."""
C2_MEASURES = (
    "kl_teacher_student", "kl_student_teacher", "overlap_teacher_prefixes", "overlap_student_prefixes", "entropy_student",
    "entropy_teacher",
)  # fmt: skip
"""Columns of conditions.jsonl, measured on held-out prompts."""
MAX_CURVE_POINTS = 100

Rows = Sequence[Mapping[str, Any]]


def stage_name(stage: str, objective: str = "", role: str = "") -> str:
    """Display name of a stage, including a replaced objective.

    Example: `stage_name("opd", "mixed")` is `On-policy distillation mixed with reward`; `stage_name("sft", "sft", "teacher")`
    is `SFT of the teacher`.
    """
    name = STAGE_NAMES.get(stage) or UNTRAINED_NAMES.get(stage, stage)
    if stage == "sft" and role:
        name = f"{name} of the {role}"
    title = report_title(objective)
    return title.format(stage=name) if title else name


def report_title(objective: str) -> str:
    """The title that an objective gives its stage; empty for a stage's usual objective and for an unknown one."""
    return OBJECTIVES[objective].report_title if objective in OBJECTIVES else ""


# Rows of report.json --------------------------------------------------------------------------------------------------


def stage_rows(study: Study) -> list[dict[str, Any]]:
    """One row per distinct stage with the arms that share it: accuracy, pass@k, measures, curves and costs.

    `ends` and `conditions` hold {"first", "last"} of each measure; `through` and `conditions_through` hold {"steps", "values"}
    at the steps that every seed reached, thinned to about MAX_CURVE_POINTS. All are means over seeds. `ends` and `through`
    are measured on the training prompts, `conditions` and `conditions_through` on held-out prompts.
    """
    return [_stage_row(arms, by_seed) for arms, by_seed in study.stage_groups()]


def stages_of_arm(rows: Sequence[dict[str, Any]], runs: Mapping[int, Sequence[Node]]) -> list[dict[str, Any]]:
    """The stages of one arm in order, selected from `stage_rows`, without the curves."""
    by_nodes = {tuple(row["nodes"].values()): row for row in rows}
    selected = []
    for index in range(max(len(run) for run in runs.values())):
        row = by_nodes[tuple(node.name for node in nodes_at(runs, index).values())]
        selected.append({key: row[key] for key in row if key not in ("arms", "through", "conditions_through")})
    return selected


def _stage_row(arms: list[str], by_seed: Mapping[int, Node]) -> dict[str, Any]:
    nodes = list(by_seed.values())
    first = nodes[0]
    eval_names = sorted({name for node in nodes for name in node.evals})
    evals = {name: {seed: n.evals[name] for seed, n in by_seed.items() if name in n.evals} for name in eval_names}
    shares = finite_values((row for node in nodes for row in node.metrics), "informative")
    outcomes = Outcomes.of(row for node in nodes for row in (node.training_rows() if shares else ()))
    metrics, conditions = [node.metrics for node in nodes], [node.conditions for node in nodes]
    return {
        "stage": first.stage,
        "role": first.role,
        "pool": first.pool,
        "objective": first.objective,
        "arms": arms,
        "nodes": {str(seed): node.name for seed, node in by_seed.items()},
        "accuracy": {name: summarize_seeds(counts, accuracy) for name, counts in evals.items()},
        "pass_at_k": {name: _pass_at_k([*counts.values()]) for name, counts in evals.items()},
        # Mean over all steps; None for a stage that uses no labels.
        "informative": mean(shares) if shares else None,
        # Shares of right, wrong, … completions; None for a stage that uses no labels.
        "outcomes": outcomes.shares or None,
        "no_signal": _no_signal(first, outcomes) if shares and not any(shares) else None,
        "ends": _ends(metrics, TRAINING_MEASURES),
        "conditions": _ends(conditions, C2_MEASURES),
        "ended": {str(seed): node.ended for seed, node in by_seed.items() if node.ended},
        **mean_costs([costs([node]) for node in nodes]),
        "through": _curves(metrics, TRAINING_MEASURES),
        "conditions_through": _curves(conditions, C2_MEASURES),
    }


def _no_signal(node: Node, outcomes: Outcomes) -> str:
    """Why no group of a stage was informative, with the remedy."""
    limit = (node.info.get("settings") or {}).get("sampling", {}).get("max_tokens", "?")
    return f"{outcomes.because(limit)}: {outcomes.remedy(f'stages.{node.stage}')}" if outcomes.total else ""


def _pass_at_k(evals: Sequence[EvalCounts]) -> dict[str, float]:
    return {str(k): mean(float(pass_at(k)(counts).mean()) for counts in evals) for k in pass_ks(evals)}


def _ends(seeds: Sequence[Rows], measures: Sequence[str]) -> dict[str, Any]:
    """First and last value of each measure, averaged over the seeds that have it."""
    ends = {}
    for measure in measures:
        values = [seed for rows in seeds if (seed := finite_values(rows, measure))]
        if values:
            ends[measure] = {"first": mean(seed[0] for seed in values), "last": mean(seed[-1] for seed in values)}
    return ends


def _curves(seeds: Sequence[Rows], measures: Sequence[str]) -> dict[str, Any]:
    """Mean of each measure at the steps that every seed reached."""
    curves = {}
    for measure in measures:
        steps, values = values_at_common_steps(seeds, measure, MAX_CURVE_POINTS)
        if steps:
            curves[measure] = {"steps": steps, "values": [mean(at_step) for at_step in values]}
    return curves


def values_at_common_steps(seeds: Sequence[Rows], key: str, most: int) -> tuple[list[int], list[list[float]]]:
    """Steps that every seed with values reached, about `most` of them and the last one included; the seeds' values at each."""
    by_step = [{row["step"]: row[key] for row in rows if is_finite_number(row.get(key))} for rows in seeds]
    by_step = [seed for seed in by_step if seed]
    steps = sorted(set(by_step[0]).intersection(*by_step[1:])) if by_step else []
    stride = -(-len(steps) // most) or 1
    steps = [step for index, step in enumerate(steps) if index % stride == 0 or index == len(steps) - 1]
    return steps, [[seed[step] for seed in by_step] for step in steps]


# Accuracy after each stage of an arm ----------------------------------------------------------------------------------


def accuracy_steps(report: dict[str, Any], arm: dict[str, Any], role: str) -> list[tuple[str, dict[str, Any]]]:
    """The untrained model and the stages that trained it, as (short name, row of report.json).

    Example: `[("before", {"accuracy": …}), ("warm-up", …), ("OPD", …)]`.
    """
    steps = [("before", report["arms"].get(f"base_{role}", {}))]
    for stage in arm["stages"]:
        if stage["role"] == role and stage["stage"] in SHORT_NAMES:
            objective = stage.get("objective", "")
            steps.append((objective if report_title(objective) else SHORT_NAMES[stage["stage"]], stage))
    return steps


def accuracies(arms: Mapping[str, Any], eval_name: str) -> dict[str, Any]:
    """Accuracy of each of these arms of report.json that has a result on this evaluation."""
    return {name: arm["accuracy"][eval_name] for name, arm in arms.items() if eval_name in arm["accuracy"]}


def accuracy_and_best(row: Mapping[str, Any], eval_name: str) -> dict[str, Any] | None:
    """Accuracy and pass@k at the largest k of an arm or a stage of report.json; None without a result on this evaluation.

    Example: `{"accuracy": 0.42, "best_of_k": 0.71, "k": 4}`.
    """
    if eval_name not in row.get("accuracy", {}):
        return None
    k, best = list(row["pass_at_k"][eval_name].items())[-1]
    best = best["mean"] if isinstance(best, dict) else best  # of an arm a mean with its interval, of a stage a number
    return {"accuracy": row["accuracy"][eval_name]["mean"], "best_of_k": best, "k": int(k)}


def largest_k(report: Mapping[str, Any]) -> str:
    """The k of pass@k in tables: `k` if arms or evaluations differ in it, `1` if no problem was sampled more than once."""
    largest = {list(by_k)[-1] for arm in report["arms"].values() for by_k in arm["pass_at_k"].values()} or {"1"}
    return largest.pop() if len(largest) == 1 else "k"


def accuracy_paths(report: dict[str, Any], eval_name: str) -> list[tuple[str, str, str]]:
    """(arm, the teacher's accuracies, the student's) in percent for each trained arm; `?` where no evaluation exists yet.

    Example: `("bridge", "22.1 → RL 96.3", "8.9 → warm-up 53.2 → OPD 67.5")`.
    """
    return [
        (name, _path(report, arm, "teacher", eval_name), _path(report, arm, "student", eval_name))
        for name, arm in report["arms"].items()
        if not name.startswith("base_")
    ]


def _path(report: dict[str, Any], arm: dict[str, Any], role: str, eval_name: str) -> str:
    steps = accuracy_steps(report, arm, role)
    uses_teacher = any(row["stage"] == "teacher_rollouts" or row["tokens"]["teacher_scored"] for row in arm["stages"])
    if role == "teacher" and len(steps) == 1 and not uses_teacher:
        return "–"
    (_, before), *trained = steps
    parts = [_percent(before, eval_name), *(f"{name} {_percent(row, eval_name)}" for name, row in trained)]
    return " → ".join(parts)


def _percent(row: dict[str, Any], eval_name: str) -> str:
    value = row.get("accuracy", {}).get(eval_name)
    return "?" if value is None else percent(value["mean"])
