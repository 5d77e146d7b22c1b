"""A finished model to the hub, with a card that says how it was made, what it cost in labels, and what it scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from headwater.errors import UserError
from headwater.report import build as report
from headwater.storage.run_dir import NodeDir, RunDir, read_json
from headwater.storage.untrusted import read_plan


class Api(Protocol):
    """What is asked of `huggingface_hub.HfApi`."""

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> Any: ...

    def create_commit(self, repo_id: str, operations: Any, *, commit_message: str) -> Any: ...


@dataclass(frozen=True)
class Finished:
    """A trained node of a run: its folder, the run's, and the arm that it is shown as the end of."""

    run: RunDir
    node: NodeDir
    arm: str
    seed: int


def find(folder: Path, arm: str | None) -> Finished:
    """What a user means by DIR: a node's model folder, or a run of which an arm's student is meant.

    Raises UserError where there is no such run, arm or finished node.
    """
    inside = folder.parent.parent.parent if folder.name == "model" else folder
    run = RunDir(inside)
    if not run.plan.exists():
        raise UserError(f"push {folder}: is neither a run directory nor the model folder of one of its nodes")
    arms: Mapping[str, Mapping[str, Sequence[str]]] = read_plan(run.plan)["arms"]
    if folder.name == "model":
        node = NodeDir(folder.parent)
        ends = [
            (name, int(seed)) for name, seeds in arms.items() for seed, names in seeds.items() if names[-1] == node.name
        ]
        held = [
            (name, int(seed)) for name, seeds in arms.items() for seed, names in seeds.items() if node.name in names
        ]
        if not held:
            raise UserError(f"push {folder}: no arm of the run holds it")
        found = Finished(run, node, *(ends or held)[0])
    else:
        own = [name for name in arms if not name.startswith("base_")]
        chosen = arm or (own[0] if len(own) == 1 else None)
        if chosen not in own:
            which = "say which arm's student with --arm" if arm is None else f"--arm {arm} is not among its arms"
            raise UserError(f"push {folder}: {which}: {', '.join(own)}")
        seed = min(arms[chosen], key=int)
        found = Finished(run, run.node(arms[chosen][seed][-1]), chosen, int(seed))
    if not found.node.done.exists() or not found.node.model.is_dir():
        raise UserError(f"push {folder}: {found.node.name} is not finished; run it to its end first")
    return found


def card(found: Finished) -> str:
    """The model card: README.md as the hub shows it."""
    recipe, made = read_json(found.run.recipe), report.build([found.run.path])
    info, arm = read_json(found.node.info), made["arms"].get(found.arm)
    adapter = not (found.node.model / "config.json").exists()
    base = recipe["models"][info["role"]]
    head = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["headwater", "grpo", "on-policy-distillation"],
        **({} if ":" in base or base.startswith(("/", ".")) else {"base_model": base}),
    }
    lines = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {recipe['name']}: {info['role']} after {info['stage']}",
        f"Post-trained from `{base}` with [Headwater](https://arxiv.org/abs/2605.12483): arm `{found.arm}`, seed {found.seed}. The "
        f"teacher was `{recipe['models']['teacher']}`.",
    ]
    if arm is not None:
        lines += ["## Results", results(made, found.arm), "## Cost", costs(arm)]
    shown = {key: recipe[key] for key in ("name", "task", "models", "prompt", "labels", "stages", "evaluate")}
    lines += ["## Recipe", f"```yaml\n{yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)}```"]
    return "\n\n".join(lines) + "\n"


def results(made: Mapping[str, Any], arm: str) -> str:
    """A table: this model and where it and its teacher began, with 95 % intervals."""
    rows = ["| evaluation | model | accuracy, % | 95 % interval |", "|---|---|---|---|"]
    names = {arm: "this model", "base_student": "the student before", "base_teacher": "the teacher before"}
    for name, said in names.items():
        for evaluation, one in made["arms"].get(name, {}).get("accuracy", {}).items():
            if one.get("mean") is not None:
                low, high = 100 * one["low"], 100 * one["high"]
                rows.append(f"| {evaluation} | {said} | {100 * one['mean']:.1f} | {low:.1f} to {high:.1f} |")
    return "\n".join(rows)


def costs(arm: Mapping[str, Any]) -> str:
    labels, tokens = arm["labels"], arm["tokens"]
    return (
        f"Labels: {labels['distinct']:,.0f} distinct problems whose answer training looked at, {labels['checks']:,.0f} looks. Tokens: "
        f"{tokens['sampled']:,.0f} sampled, {tokens['trained']:,.0f} trained on, {tokens['teacher_scored']:,.0f} scored by the "
        f"teacher. {arm['flops']:.3g} FLOPs."
    )


def push(found: Finished, to: str, private: bool, api: Api) -> str:
    """Upload the model folder with its card in one commit; the repository's address. Raises UserError when the hub refuses."""
    from huggingface_hub import CommitOperationAdd

    found.node.refuse_damage(f"{found.node.model.name}/")
    files = [path for path in sorted(found.node.model.iterdir()) if path.is_file() and path.name != "README.md"]
    operations = [CommitOperationAdd(path.name, path) for path in files]
    operations.append(CommitOperationAdd("README.md", card(found).encode()))
    try:
        address = api.create_repo(to, private=private, exist_ok=True)
        api.create_commit(to, operations, commit_message=f"{found.node.name}, made with Headwater")
    except Exception as error:
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"push --to {to}: the hub refuses ({said})") from None
    return str(address)
