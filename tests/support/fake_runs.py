"""Synthetic run directories with numbers derived from names, for tests of the report."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from headwater.report import build as report
from headwater.report.terminal import terminal_table

PROBLEMS, SAMPLES = 60, 4
LABELED = [f"label-{i:03d}" for i in range(128)]
POOLS = {"all": LABELED, "first_half": LABELED[:64], "second_half": LABELED[64:]}


class Made(NamedTuple):
    """A node of a fake run. Arms share their equal first nodes; `times` multiplies the FLOPs of its steps."""

    stage: str
    role: str = "student"
    kind: str = "train"
    pool: str | None = None
    objective: str = ""
    times: float = 1.0


TEACHER, TEACHER_1H = Made("teacher_rl", "teacher", pool="all"), Made("teacher_rl", "teacher", pool="first_half")
TEACHER_2H = Made("teacher_rl", "teacher", pool="second_half")
ROLL = Made("teacher_rollouts", "teacher", "rollouts")
WARM, OPD = Made("warmup"), Made("opd")
BASE_T, BASE_S = Made("base_teacher", "teacher", "evaluate"), Made("base_student", kind="evaluate")


def rl(pool: str, times: float = 1.0) -> Made:
    return Made("student_rl", pool=pool, times=times)


ARMS: dict[str, list[Made]] = {
    "base_student": [BASE_S],
    "base_teacher": [BASE_T],
    "direct_grpo": [BASE_S, rl("all")],
    "raw_teacher": [BASE_S, BASE_T, ROLL, WARM, OPD],
    "bridge": [BASE_S, TEACHER, ROLL, WARM, OPD],
    "bridge_rl": [BASE_S, TEACHER_1H, ROLL, WARM, OPD, rl("second_half")],
    "replay": [BASE_S, TEACHER_1H, ROLL, WARM, OPD, rl("first_half")],
    "warmup_only": [BASE_S, TEACHER, ROLL, WARM],
}
MORE_ARMS: dict[str, list[Made]] = {
    "opd_only": [BASE_S, TEACHER, OPD],
    "teacher_sft": [BASE_S, TEACHER, ROLL, Made("sft")],
    "sft_teacher": [BASE_S, Made("sft", "teacher"), ROLL, WARM, OPD],
    "teacher_2h": [BASE_S, TEACHER_1H, TEACHER_2H, ROLL, WARM, OPD],
    "bridge_1h": [BASE_S, TEACHER_1H, ROLL, WARM, OPD],
    # A bridge takes 3 stages of 12 steps and 2e9 for the cache: 5.6e10 FLOPs, which is 3.11 times a stage's 1.8e10.
    "direct_grpo_compute": [BASE_S, rl("all", times=3.0)],
    "opd_then_rl": [BASE_S, BASE_T, OPD, rl("all")],
    "opd_then_rl_compute": [BASE_S, BASE_T, OPD, rl("all", times=2.0)],
    "forward_kl_on_student": [BASE_S, TEACHER, ROLL, WARM, OPD._replace(times=1.01)],
    "mixed": [BASE_S, TEACHER, ROLL, WARM, Made("opd", pool="all", objective="mixed")],
    "constant_advantage": [BASE_S, Made("opd", objective="constant")],
    "bridge_constant": [BASE_S, TEACHER, ROLL, WARM, Made("opd", objective="constant")],
    "zz_own": [BASE_S, TEACHER, OPD, rl("all")],
}
LEVELS = {
    "base_student": 0.12,
    "base_teacher": 0.35,
    "direct_grpo": 0.25,
    "direct_grpo_compute": 0.28,
    "raw_teacher": 0.18,
    "bridge": 0.42,
    "bridge_1h": 0.44,
    "bridge_rl": 0.52,
    "replay": 0.44,
    "warmup_only": 0.33,
    "opd_only": 0.36,
    "opd_then_rl": 0.38,
    "teacher_sft": 0.3,
    "teacher_2h": 0.5,
    "constant_advantage": 0.1,
}


def draw(*names: object) -> float:
    """A number in [0, 1) that is a hash of its names."""
    return int.from_bytes(hashlib.sha256(":".join(map(str, names)).encode()).digest()[:6]) / 2**48


def fake_run(
    out: Path,
    seeds: tuple[int, ...] = (0, 1, 2),
    arms: dict[str, list[Made]] | None = None,
    evals: tuple[str, ...] = ("sums",),
    problems: int = PROBLEMS,
    steps: int = 12,
    correct: Callable[[str, int, int, int], bool] | None = None,
    text: str = "17+45=62; 62+82=44 #### 44",
    metrics: bool = True,
    levels: dict[str, float] | None = None,
) -> Path:
    """Write a run directory like the pipeline's. `levels` are the approximate accuracies of the arms."""
    arms, levels = ARMS if arms is None else arms, {**LEVELS, **(levels or {})}
    plan: dict[str, Any] = {"recipe": "pocket", "seeds": list(seeds), "arms": {}}
    for arm, nodes in arms.items():
        for seed in seeds:
            parents: list[str] = []
            for place, made in enumerate(nodes):
                key = hashlib.sha256(f"{[tuple(node) for node in nodes[: place + 1]]}".encode()).hexdigest()[:8]
                name = f"{made.stage}.{key}" if made.kind == "evaluate" else f"{made.stage}.s{seed}.{key}"
                folder = out / "nodes" / name
                last = place == len(nodes) - 1
                if not folder.exists():
                    _fake_node(folder, made, seed, parents, steps if metrics else 0)
                if made.role == "student" or made.kind != "rollouts":
                    level = levels.get(arm, 0.4) if last else levels.get(made.stage, 0.3)
                    for eval_name in evals:
                        file = folder / "evals" / "final" / f"{eval_name}.jsonl"
                        if last or not file.exists():
                            _fake_eval(file, name, level, problems, correct, text)
                parents = [name]
                plan["arms"].setdefault(arm, {}).setdefault(str(seed), []).append(name)
    (out / "plan.json").write_text(json.dumps(plan))
    recipe = {"name": "pocket", "seed": seeds[0], "task": "sums", "data": {"evals": {name: {} for name in evals}}}
    (out / "recipe.json").write_text(json.dumps(recipe))
    (out / "env.json").write_text(json.dumps({"python": "3.11.7", "torch": "2.13.0", "threads": 2}))
    return out


@cache
def shared_run() -> Path:
    """The folder of one fake run of ARMS over three seeds, with its report, made once for all test workers."""
    shared = Path(os.environ["HEADWATER_TESTS_SHARED"])
    with (shared / "fake.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first worker makes it, the others wait for it
        if not (shared / "fake" / "report.html").exists():
            report.write(fake_run(shared / "fake"))
    return shared / "fake"


def _fake_node(folder: Path, made: Made, seed: int, parents: list[str], steps: int) -> None:
    folder.mkdir(parents=True)
    pool = made.pool
    teacher = made.role == "student" and made.stage in ("warmup", "opd", "sft") and made.objective != "constant"
    labels = {"pool": pool, "distinct_allowed": len(POOLS[pool])} if pool else None
    info = {"name": folder.name, "kind": made.kind, "stage": made.stage, "role": made.role, "seed": seed}
    settings = {"objective": made.objective} if made.objective else None
    more = {"parents": parents, "fingerprint": folder.name, "labels": labels, "settings": settings}
    (folder / "node.json").write_text(json.dumps({**info, **more}))
    (folder / "DONE").write_text(json.dumps({"fingerprint": folder.name}))
    zero = {"tokens_sampled": 0, "tokens_trained": 0, "tokens_teacher_scored": 0, "flops": 0.0, "seconds": 0.0}
    common = {"node": folder.name, "stage": made.stage, "seed": seed, "labels": [], "checks": 0, **zero}
    rows, measured = [], []
    for step in range(1, steps + 1) if made.kind == "train" else []:
        row = {**common, "step": step, "purpose": "train", "tokens_trained": 640 + step, "seconds": 0.5}
        row["flops"] = 1.5e9 * made.times
        noise, share = draw(folder.name, step), step / steps
        measure: dict[str, Any] = {"loss": 1 / step + 0.1 * noise, "grad_norm": 0.5 + noise, "seconds": 0.5}
        measure |= {"lr": 1e-3, "tokens_trained": 640 + step, "seconds_sample": 0.2, "seconds_update": 0.2}
        if pool:
            start = step * 8 % len(POOLS[pool])
            row |= {"labels": POOLS[pool][start : start + 8], "checks": 64, "tokens_sampled": 2000}
            measure |= {"reward": 0.2 + 0.4 * share + 0.1 * noise, "informative": 0.7 - 0.2 * share + 0.1 * noise}
            measure |= {"entropy": 0.6 - 0.3 * share, "truncated": 0.05 * noise, "sampler_gap": 1e-5 * noise}
            measure |= {"best_of_group": 0.5 + 0.3 * share + 0.1 * noise}
        else:
            row |= {"tokens_sampled": 2000 if made.stage == "opd" else 0, "tokens_teacher_scored": 1900 * teacher}
            measure |= {"entropy": 0.6 - 0.3 * share}
        if teacher:
            measure |= {"kl_teacher_student": 0.9 / step + 0.02 * noise, "overlap": 0.5 + 0.4 * share}
            measure |= {"kl_student_teacher": 0.8 / step + 0.02 * noise}
        rows.append(row)
        measured.append({"step": step, **measure, "note": "text is not plotted", "gap": float("nan")})
    if made.kind == "rollouts":
        rows.append({**common, "step": 0, "purpose": "train", "tokens_sampled": 5000, "flops": 2e9, "seconds": 3.25})
    looked = [f"sums-{i:04d}" for i in range(PROBLEMS)]
    rows.append({**common, "step": steps, "purpose": "eval", "labels": looked, "checks": 240, "tokens_sampled": 7777})
    conditions = []
    for step in [*range(0, steps, 5), steps] if teacher and steps else []:
        noise = draw(folder.name, "c2", step)
        row = {"kl_teacher_student": 1 / (1 + step) + 0.01 * noise, "kl_student_teacher": 2 / (1 + step)}
        row |= {
            "overlap_teacher_prefixes": 0.5 + 0.4 * step / steps,
            "overlap_student_prefixes": 0.4 + 0.4 * step / steps,
        }
        row |= {"entropy_student": 0.7 - 0.4 * step / steps, "entropy_teacher": 0.3, "top_k": 16, "problems": 64}
        conditions.append({"step": step, **row})
        rows.append({**common, "step": step, "purpose": "measure", "tokens_sampled": 500, "flops": 1e8})
    write_rows(folder / "ledger.jsonl", rows)
    if measured:
        write_rows(folder / "metrics.jsonl", measured)
    if conditions:
        write_rows(folder / "conditions.jsonl", conditions)


def _fake_eval(file: Path, node: str, level: float, problems: int, correct: Any, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    seed_effect = 0.03 * (draw("seed", node) - 0.5)
    rows = []
    for problem in range(problems):
        rate = min(max(level + seed_effect + 0.6 * (draw("hard", problem) - 0.5), 0.0), 1.0)
        for sample in range(SAMPLES):
            right = (
                correct(node, problem, sample, SAMPLES)
                if correct is not None
                else draw(file.stem, node, problem, sample) < rate
            )
            wrong = f"{int(3 * draw('wrong', node, problem, sample))}"
            none = not right and draw("none", node, problem, sample) < 0.2
            row = {"problem_id": f"{file.stem}-{problem:04d}", "sample": sample, "correct": right, "text": text}
            row |= {"reason": "equal" if right else "no_answer" if none else "different", "tokens": 20 + sample}
            rows.append({**row, "extracted": "44" if right else None if none else wrong, "finish": "stop"})
    write_rows(file, rows)


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def names(out: Path, arm: str, seed: int = 0) -> list[str]:
    """The nodes of an arm, in order."""
    return json.loads((out / "plan.json").read_text())["arms"][arm][str(seed)]


def graded(out: Path, arm: str, seed: int, eval_name: str = "sums") -> list[dict[str, Any]]:
    """Rows of an arm's final evaluation."""
    file = out / "nodes" / names(out, arm, seed)[-1] / "evals" / "final" / f"{eval_name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def by_problem(rows: list[dict[str, Any]], key: str) -> dict[str, list[Any]]:
    values: dict[str, list[Any]] = {}
    for row in rows:
        values.setdefault(row["problem_id"], []).append(row[key])
    return values


def printed(report: dict[str, Any], width: int) -> str:
    buffer = io.StringIO()
    Console(file=buffer, width=width).print(terminal_table(report, width))
    return buffer.getvalue()


def unfinished_run(out: Path) -> Path:
    """Write a run of `bridge` and `bridge_rl` that stopped in OPD after 12 of 40 steps of 0.5 seconds, with one warning."""
    fake_run(out, seeds=(0,), arms={"bridge": ARMS["bridge"], "bridge_rl": ARMS["bridge_rl"]})
    opd = out / "nodes" / names(out, "bridge")[-1]
    (opd / "DONE").unlink()
    info = json.loads((opd / "node.json").read_text())
    (opd / "node.json").write_text(json.dumps({**info, "steps": 40}))
    alarm = {
        "guard": "truncation",
        "action": "warn",
        "step": 9,
        "sentence": "truncation: 0.62 of the completions ran into the token limit",
    }
    (opd / "warnings.jsonl").write_text(json.dumps(alarm) + "\n")
    for name in names(out, "bridge_rl")[-2:]:
        shutil.rmtree(out / "nodes" / name)
    return out
