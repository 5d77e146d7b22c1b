"""`headwater push`: upload a finished model to the hub with a model card (recipe, labels used, results)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from headwater.config.arms import BASE_MODELS
from headwater.errors import UserError, error_text
from headwater.report import build as report
from headwater.storage.files import read_json
from headwater.storage.node_dir import NodeDir
from headwater.storage.run_dir import RunDir
from headwater.storage.untrusted import read_plan

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@dataclass(frozen=True)
class Finished:
    """A trained node of a run, and the arm under which its results are reported."""

    run: RunDir
    node: NodeDir
    arm: str
    seed: int


def find(folder: Path, arm: str | None) -> Finished:
    """Resolve DIR, a node's model folder or a run directory, to a finished node; in a run, the last one of the arm.

    Raises UserError where there is no such run, arm or finished node.
    """
    run = RunDir(folder.parent.parent.parent if folder.name == "model" else folder)
    if not run.plan.exists():
        raise UserError(f"push {folder}: is neither a run directory nor the model folder of one of its nodes")
    arms: Mapping[str, Mapping[str, Sequence[str]]] = read_plan(run.plan)["arms"]
    if folder.name == "model":
        node = NodeDir(folder.parent)
        paths = [(name, int(seed), names) for name, seeds in arms.items() for seed, names in seeds.items()]
        with_node = [(name, seed) for name, seed, names in paths if node.name in names]
        ending_in_it = [(name, seed) for name, seed, names in paths if names[-1] == node.name]
        if not with_node:
            raise UserError(f"push {folder}: no arm of the run contains it")
        finished = Finished(run, node, *(ending_in_it or with_node)[0])
    else:
        trained = [name for name in arms if name not in BASE_MODELS]
        chosen = arm or (trained[0] if len(trained) == 1 else None)
        if chosen not in trained:
            reason = "choose an arm with --arm" if arm is None else f"--arm {arm} is not among its arms"
            raise UserError(f"push {folder}: {reason}: {', '.join(trained)}")
        seed = min(arms[chosen], key=int)
        finished = Finished(run, run.node(arms[chosen][seed][-1]), chosen, int(seed))
    if not finished.node.done.exists() or not finished.node.model.is_dir():
        raise UserError(f"push {folder}: {finished.node.name} is not finished; finish the run first")
    return finished


def card(finished: Finished) -> str:
    """The model card: README.md as the hub shows it."""
    recipe, summary = read_json(finished.run.recipe), report.build([finished.run.path])
    info, arm = read_json(finished.node.info), summary["arms"].get(finished.arm)
    adapter = not (finished.node.model / "config.json").exists()
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
        f"Post-trained from `{base}` with [Headwater](https://arxiv.org/abs/2605.12483): arm `{finished.arm}`, seed "
        f"{finished.seed}. The teacher was `{recipe['models']['teacher']}`.",
    ]
    if arm is not None:
        lines += ["## Results", results(summary, finished.arm), "## Cost", costs(arm)]
    settings = {key: recipe[key] for key in ("name", "task", "models", "prompt", "labels", "stages", "evaluate")}
    lines += ["## Recipe", f"```yaml\n{yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)}```"]
    return "\n\n".join(lines) + "\n"


def results(summary: Mapping[str, Any], arm: str) -> str:
    """Accuracy table: this model and the untrained student and teacher, with 95 % intervals."""
    rows = ["| evaluation | model | accuracy, % | 95 % interval |", "|---|---|---|---|"]
    labels = {arm: "this model", "base_student": "the student before", "base_teacher": "the teacher before"}
    for name, label in labels.items():
        for evaluation, accuracy in summary["arms"].get(name, {}).get("accuracy", {}).items():
            if accuracy.get("mean") is not None:
                mean, low, high = (100 * accuracy[key] for key in ("mean", "low", "high"))
                rows.append(f"| {evaluation} | {label} | {mean:.1f} | {low:.1f} to {high:.1f} |")
    return "\n".join(rows)


def costs(arm: Mapping[str, Any]) -> str:
    labels, tokens = arm["labels"], arm["tokens"]
    return (
        f"Labels: {labels['distinct']:,.0f} distinct problems whose answer training used, {labels['checks']:,.0f} checks. Tokens: "
        f"{tokens['sampled']:,.0f} sampled, {tokens['trained']:,.0f} trained on, {tokens['teacher_scored']:,.0f} scored by the "
        f"teacher. {arm['flops']:.3g} FLOPs."
    )


def push(finished: Finished, to: str, private: bool, api: HfApi) -> str:
    """Upload the model folder with its card in one commit; returns the repository's address. Raises UserError."""
    from huggingface_hub import CommitOperationAdd

    finished.node.refuse_damage(f"{finished.node.model.name}/")
    files = [path for path in sorted(finished.node.model.iterdir()) if path.is_file() and path.name != "README.md"]
    operations = [CommitOperationAdd(path.name, path) for path in files]
    operations.append(CommitOperationAdd("README.md", card(finished).encode()))
    try:
        address = api.create_repo(to, private=private, exist_ok=True)
        api.create_commit(to, operations, commit_message=f"{finished.node.name}, made with Headwater")
    except Exception as error:
        raise UserError(f"push --to {to}: the hub refuses ({error_text(error, 300)})") from None
    return str(address)
