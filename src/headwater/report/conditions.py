"""What the stages measured on their way: each stage once, and the paper's two conditions from them.

C1, the teacher is near its optimum: its accuracy beside its own best-of-k before and after RL, and on the way the reward beside the
share of groups with at least one right completion. C2, the student is near its teacher: KL both ways and the overlap of their
likeliest tokens on held-out prompts, at the boundaries of the stages and between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from headwater.report.contrasts import accuracy, ks, mean, number, pass_at, scored
from headwater.report.read import Graded, Node, Study, costs, is_number, mean_costs

C2 = (
    "kl_teacher_student",
    "kl_student_teacher",
    "overlap_teacher_prefixes",
    "overlap_student_prefixes",
    "entropy_student",
    "entropy_teacher",
)
MEASURES = (
    "reward",
    "informative",
    "best_of_group",
    "kl_teacher_student",
    "kl_student_teacher",
    "overlap",
    "entropy",
    "truncated",
    "validation",
)
"""What report.json keeps of metrics.jsonl, step by step; the rest stays in the runs' files."""
MOST_STEPS = 100

Rows = Sequence[Mapping[str, Any]]


def stages(study: Study) -> list[dict[str, Any]]:
    """Every stage once, with the arms that share it: accuracy, pass@k, measures at its ends and along its way, costs.

    `ends` and `conditions` hold {"first", "last"} of each measure, `through` and `conditions_through` {"steps", "values"}
    at the steps that every seed reached (of many, about every n-th); all are means over seeds. `ends` and `through` are of
    the prompts that were trained on, `conditions` and `conditions_through` of held-out ones.
    """
    return [_stage(arms, list(by_seed.values()), by_seed) for arms, _, by_seed in study.groups()]


def of_arm(rows: Sequence[dict[str, Any]], nodes: Mapping[int, Sequence[Node]]) -> list[dict[str, Any]]:
    """The stages of one arm in order, out of `stages`, without the curves."""
    by_names = {tuple(row["nodes"].values()): row for row in rows}
    found = []
    for place in range(max(len(run) for run in nodes.values())):
        names = tuple(run[place].name for _, run in sorted(nodes.items()) if place < len(run))
        row = by_names[names]
        found.append({key: row[key] for key in row if key not in ("arms", "through", "conditions_through")})
    return found


def _stage(arms: list[str], nodes: Sequence[Node], by_seed: Mapping[int, Node]) -> dict[str, Any]:
    first = nodes[0]
    evals = sorted({name for node in nodes for name in node.evals})
    graded = {name: {seed: n.evals[name] for seed, n in by_seed.items() if name in n.evals} for name in evals}
    shares = [row["informative"] for node in nodes for row in node.metrics if is_number(row.get("informative"))]
    metrics, measured = [node.metrics for node in nodes], [node.conditions for node in nodes]
    return {
        "stage": first.stage,
        "role": first.role,
        "pool": first.pool,
        "objective": first.objective,
        "arms": arms,
        "nodes": {str(seed): node.name for seed, node in by_seed.items()},
        "accuracy": {name: scored(found, accuracy) for name, found in graded.items()},
        "pass_at_k": {name: _pass_at_k([*found.values()]) for name, found in graded.items()},
        # Over all steps; None for a stage that looks at no label.
        "informative": mean(shares) if shares else None,
        "ends": _ends(metrics, MEASURES),
        "conditions": _ends(measured, C2),
        "ended": {str(seed): node.ended for seed, node in by_seed.items() if node.ended},
        **mean_costs([costs([node]) for node in nodes]),
        "through": _through(metrics, MEASURES),
        "conditions_through": _through(measured, C2),
    }


def _pass_at_k(graded: Sequence[Graded]) -> dict[str, float]:
    return {str(k): mean(float(pass_at(k)(one).mean()) for one in graded) for k in ks(graded)}


def _ends(series: Sequence[Rows], keys: Sequence[str]) -> dict[str, Any]:
    """The first and the last value of each measure that a seed has, as means over those seeds."""
    found = {}
    for key in keys:
        held = [[row[key] for row in rows if is_number(row.get(key))] for rows in series]
        held = [values for values in held if values]
        if held:
            found[key] = {"first": mean(v[0] for v in held), "last": mean(v[-1] for v in held)}
    return found


def _through(series: Sequence[Rows], keys: Sequence[str]) -> dict[str, Any]:
    found = {}
    for key in keys:
        held = [{row["step"]: row[key] for row in rows if is_number(row.get(key))} for rows in series]
        held = [values for values in held if values]
        steps = sorted(set(held[0]).intersection(*held[1:])) if held else []
        if steps:
            stride = -(-len(steps) // MOST_STEPS)
            steps = [step for place, step in enumerate(steps) if place % stride == 0 or place == len(steps) - 1]
            found[key] = {"steps": steps, "values": [mean(values[step] for values in held) for step in steps]}
    return found


def c1(study: Study, rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """C1: has RL brought the teacher's accuracy to the best that it could already reach in k tries?

    For each evaluation the teacher before, and after each stage that trained it: accuracy beside best-of-k (pass@k at the
    largest k), and `reached`, the accuracy after as a share of the best-of-k before. `training` has the reward and the best
    of the group at the first and the last step. None where no teacher was evaluated.
    """
    found: dict[str, Any] = {}
    before_nodes = {s: nodes[-1] for s, nodes in study.arms.get("base_teacher", {}).items() if nodes[-1].done}
    trained = [
        (row, [node for node in by_seed.values() if node.done])
        for row, (_, _, by_seed) in zip(rows, study.groups(), strict=True)
        if all(node.role == "teacher" and node.trained for node in by_seed.values())
    ]
    for name in sorted({key for node in before_nodes.values() for key in node.evals} | set(study.evals)):
        before = _own_best([n.evals[name] for n in before_nodes.values() if name in n.evals])
        after = []
        for row, nodes in trained:
            own = _own_best([node.evals[name] for node in nodes if name in node.evals])
            if own is not None:
                reached = own["accuracy"] / before["best_of_k"] if before and before["best_of_k"] else None
                training = {key: row["ends"][key] for key in ("reward", "best_of_group") if key in row["ends"]}
                brief = {"stage": row["stage"], "pool": row["pool"], "arms": row["arms"], **own, "training": training}
                after.append({**brief, "reached": None if reached is None else number(reached)})
        if before or after:
            found[name] = {"before": before, "after": after}
    return found or None


def _own_best(graded: Sequence[Graded]) -> dict[str, Any] | None:
    if not graded:
        return None
    k = min(one.samples for one in graded)
    best = mean(float(pass_at(k)(one).mean()) for one in graded)
    return {"accuracy": mean(float(accuracy(one).mean()) for one in graded), "best_of_k": best, "k": k}


def c2(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """C2: how far the student stood from its teacher at the beginning and at the end of each stage that has one.

    arm -> stage -> measure -> {"first", "last"}, means over seeds; divergences and entropies in nats a token. `prompts` says
    on which: "held out" at the stages' boundaries, or, of runs that measured no conditions, "training" at their first and
    last step. None where neither was measured.
    """
    found: dict[str, Any] = {}
    for row in rows:
        ends = {key: row["ends"][key] for key in ("kl_teacher_student", "kl_student_teacher") if key in row["ends"]}
        if row["role"] != "student" or not (row["conditions"] or ends):
            continue
        prompts = {"prompts": "held out", **row["conditions"]} if row["conditions"] else {"prompts": "training", **ends}
        for arm in row["arms"]:
            found.setdefault(arm, {})[row["stage"]] = prompts
    return found or None
