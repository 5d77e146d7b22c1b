"""The house rules that a machine can check: layers, light imports, one home for file names, short files, no eval."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import headwater

SOURCE = Path(headwater.__file__).parent
MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(SOURCE.rglob("*.py"))
    if path != SOURCE / "__init__.py"
}

NOUNS = {
    "data",
    "labels",
    "faults",
    "files",
    "ledger",
    "rundir",
    "sweepdir",
    "config",
    "settings",
    "plateau",
    "recipes",
    "prompts",
    "seeds",
    "errors",
    "plan",
    "guards",
    "bounded",
    "plain_yaml",
    "model_files",
    "foreign",
    "known",
}
PURE = {
    "batch", "packing", "tokens", "token_ids", "logprobs", "fused", "advantages", "losses", "distributions",
    "native",
}  # fmt: skip
MACHINES = {
    "attention",
    "model",
    "shape",
    "folders",
    "lora",
    "memory_use",
    "sampler",
    "sampler_vllm",
    "samplers",
    "served",
    "slots",
    "draws",
    "decoder",
    "decoder_cache",
    "decoder_fast",
    "decoder_weights",
    "teacher",
    "teachers",
    "objective",
    "train",
    "checkpoint",
    "evaluate",
    "conditions",
    "memory",
    "ranks",
    "sharded",
    "shards",
    "checkpoint_shards",
    "signals",
}
HEAVY = ("torch", "transformers", "safetensors", "datasets")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imported(path: Path) -> frozenset[str]:
    """Dotted names of what a file imports, also within functions."""
    found: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in names if name.removeprefix("headwater.") in MODULES}
            # `from package import module` imports the module; anything else, what the package itself holds.
            found |= names | ({node.module} if names - modules else set())
    return frozenset(found)


def own(path: Path) -> set[str]:
    """Names of our own modules that a file imports."""
    return {
        name.removeprefix("headwater.") for name in imported(path) if name.startswith("headwater.")
    } & MODULES.keys()


def reached(name: str) -> set[str]:
    """A module and all of ours that importing it brings in."""
    seen: set[str] = set()
    todo = [name]
    while todo:
        one = todo.pop()
        if one not in seen:
            seen.add(one)
            todo += own(MODULES[one])
    return seen


def test_the_layers_named_here_are_all_there() -> None:
    assert MODULES.keys() >= (NOUNS | PURE | MACHINES)


@pytest.mark.parametrize("name", sorted(NOUNS))
def test_nouns_import_neither_torch_nor_anything_that_does(name: str) -> None:
    for one in reached(name):
        heavy = {found for found in imported(MODULES[one]) if found.split(".")[0] in HEAVY}
        assert not heavy, f"{name} reaches {one}, which imports {heavy}"


@pytest.mark.parametrize("name", sorted(PURE))
def test_pure_tensor_code_knows_no_config_no_files_and_no_machines(name: str) -> None:
    assert own(MODULES[name]) <= PURE | {"data"}
    outside = {found.split(".")[0] for found in imported(MODULES[name])}
    library = {"ctypes", "functools", "importlib"} if name == "native" else set()  # it calls one
    assert outside <= {"__future__", "collections", "dataclasses", "math", "typing", "torch", "headwater"} | library


@pytest.mark.parametrize("name", sorted(MACHINES))
def test_machines_import_downward_only(name: str) -> None:
    outside = own(MODULES[name]) - NOUNS - PURE - MACHINES
    assert {one for one in outside if not one.startswith("tasks")} <= {"grading"}


def test_nothing_imports_the_command_line_and_there_are_no_cycles() -> None:
    assert not [name for name, path in MODULES.items() if "cli" in own(path) and name != "__main__"]
    for name in MODULES:
        assert not any(name in reached(other) for other in own(MODULES[name])), f"{name} imports itself in a circle"


@pytest.mark.parametrize("name", ["report", "config", "recipes", "labels", "rundir", "prompts"])
def test_importing_it_loads_no_torch(name: str) -> None:
    code = f"import sys, headwater.{name}; print([m for m in {HEAVY!r} if m in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert said.stdout.strip() == "[]"


def strings(path: Path) -> Iterator[str]:
    """String constants of a file that are not docstrings or other bare strings."""
    body = tree(path)
    bare = {id(node.value) for node in ast.walk(body) if isinstance(node, ast.Expr)}
    for node in ast.walk(body):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare:
            yield node.value


RUN_FILES = (
    "recipe.json", "env.json", "plan.json", "node.json", "ledger.jsonl", "metrics.jsonl", "report.json", "report.html",
    "nodes", "evals", "DONE",
)  # fmt: skip
"""Names within a run directory that more than one module would be tempted to spell."""


def test_only_rundir_spells_the_names_of_a_runs_files() -> None:
    # Keys of recipes and reports ("evals", "nodes") are names of fields and not of files.
    fields = {"nodes", "evals"}
    for name, path in MODULES.items():
        if name in ("rundir", "cli") or name.startswith("report"):  # the last two tell users where to look
            continue
        spelt = {text for text in strings(path) if text in RUN_FILES and text not in fields}
        assert not spelt, f"{name} spells {spelt}; rundir knows them"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_file_is_short_enough_to_read(name: str) -> None:
    assert len(MODULES[name].read_text(encoding="utf-8").splitlines()) < 400


@pytest.mark.parametrize("name", sorted(MODULES))
def test_nothing_is_evaluated_executed_or_unpickled(name: str) -> None:
    for node in ast.walk(tree(MODULES[name])):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if name == "tasks.sandbox_child" and called in {"exec", "compile"}:
                continue  # running a model's program is this file's purpose, in a process that shut its own doors
            assert called not in {"eval", "exec", "compile", "__import__", "os.system", "torch.load", "yaml.load"}
            assert not called.startswith(("pickle.", "marshal.", "shelve."))
            assert not any(word.arg == "shell" for word in node.keywords)


def test_the_loop_names_no_objective() -> None:
    for name in ("train", "checkpoint"):
        words = set(strings(MODULES[name]))
        assert not words & {"grpo", "opd", "mixed", "forward_kl", "sft", "teacher_rl", "warmup", "student_rl"}


def test_only_the_labels_module_and_those_that_fill_it_touch_gold_answers() -> None:
    """A stage that read `labels._gold` would make the budget an honour system."""
    for name, path in MODULES.items():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Attribute) and node.attr in {"_gold", "_grade"} and name != "labels":
                assert ast.unparse(node.value) == "self", f"{name} reaches into {ast.unparse(node)}"


def test_problems_and_rollouts_have_no_field_for_an_answer() -> None:
    from dataclasses import fields

    from headwater.data import Problem, Rollout

    for noun in (Problem, Rollout):
        assert not {one.name for one in fields(noun)} & {"answer", "gold", "label", "solution"}


def test_no_module_keeps_a_random_state_of_its_own() -> None:
    """Every draw is named (seeds.py); only the maker of pocket models and the generator of sums seed their own."""
    for name in NOUNS | PURE | MACHINES:
        called = {ast.unparse(n.func) for n in ast.walk(tree(MODULES[name])) if isinstance(n, ast.Call)}
        assert not {c for c in called if c.startswith(("random.", "torch.manual_seed", "torch.rand", "np.random.seed"))}
