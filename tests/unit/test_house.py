"""Rules of the code base that a machine can check: import order, light imports, file names, file length, no eval."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import headwater

SOURCE = Path(headwater.__file__).parent
TESTS = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(SOURCE.rglob("*.py"))
    if path != SOURCE / "__init__.py"
}

ORDER = (
    "errors", "printing", "plugins", "types", "seeds", "stats", "kernels", "devices",
    "config", "storage", "tasks", "data", "distributed", "losses", "models", "sampling", "teachers", "training",
    "runs", "runs.executors", "doctor", "report", "pipeline", "sweeps", "evaluation", "evaluation_files", "api", "cli", "__main__",
)  # fmt: skip
"""Folders and top-level modules, lowest first. A module imports from its own folder and from those before it."""
TORCH_FREE = {"errors", "printing", "plugins", "types", "seeds", "config", "storage", "tasks", "data", "report"}
PURE = {"losses", "kernels", "devices"}
"""Tensor code without files, settings (but for the table of objectives) or models."""
HEAVY = ("torch", "transformers", "safetensors", "datasets")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imported(path: Path) -> frozenset[str]:
    """Dotted names of what a file imports, also within functions."""
    imports: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            imports |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in names if name.removeprefix("headwater.") in MODULES}
            # `from package import module` imports the module; anything else, what the package itself holds.
            imports |= names | ({node.module} if names - modules else set())
    return frozenset(imports)


@cache
def imported_at_start(path: Path) -> frozenset[str]:
    """The same without imports within functions, which wait until they are called."""
    inner = {
        id(node)
        for function in ast.walk(tree(path))
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    names: set[str] = set()
    for node in ast.walk(tree(path)):
        if id(node) in inner:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(names)


def own(path: Path, names: frozenset[str] | None = None) -> set[str]:
    """Names of our own modules that a file imports."""
    every = imported(path) if names is None else names
    return {name.removeprefix("headwater.") for name in every if name.startswith("headwater.")} & MODULES.keys()


def folder(module: str) -> str:
    """The entry of ORDER that a module belongs to. Example: `runs.executors.ray` belongs to `runs.executors`."""
    return max((entry for entry in ORDER if module == entry or module.startswith(f"{entry}.")), key=len)


@cache
def reached(name: str) -> set[str]:
    """A module and all of ours that importing it brings in."""
    seen: set[str] = set()
    todo = [name]
    while todo:
        module = todo.pop()
        if module not in seen:
            seen.add(module)
            todo += own(MODULES[module])
    return seen


def test_order_lists_every_module() -> None:
    places = {folder(name) for name in MODULES}
    assert places == set(ORDER)
    assert {path.stem for path in SOURCE.glob("*.py")} - {"__init__"} <= set(ORDER)


def test_imports_follow_order() -> None:
    place = {name: ORDER.index(folder(name)) for name in MODULES}
    upward = {(name, above) for name in MODULES for above in own(MODULES[name]) if place[above] > place[name]}
    assert upward == set()


def test_imports_have_no_circles() -> None:
    assert [name for name in MODULES if any(name in reached(other) for other in own(MODULES[name]))] == []


def test_init_files_are_empty() -> None:
    """An empty `__init__.py` keeps a torch-free module torch-free whatever stands beside it."""
    full = {str(path.relative_to(SOURCE)) for path in SOURCE.glob("*/**/__init__.py") if path.read_text().strip()}
    assert not full


def test_torch_free_folders_reach_no_import_of_torch() -> None:
    seen: dict[str, str] = {}
    todo = [(name, name) for name in MODULES if folder(name) in TORCH_FREE]
    while todo:
        module, origin = todo.pop()
        if module not in seen:
            seen[module] = origin
            todo += [(other, origin) for other in own(MODULES[module], imported_at_start(MODULES[module]))]
    heavy = [
        f"{origin} reaches {module}, which imports {dependency}"
        for module, origin in seen.items()
        for dependency in imported_at_start(MODULES[module])
        if dependency.split(".")[0] in HEAVY
    ]
    assert heavy == []


def test_pure_folders_import_no_files_and_no_models() -> None:
    pure = [name for name in MODULES if folder(name) in PURE]
    assert len(pure) > 5
    for name in pure:
        settings = {"config"} if name == "losses.objectives" else set()
        assert {folder(module) for module in own(MODULES[name])} <= PURE | {"types"} | settings, name
        outside = {dependency.split(".")[0] for dependency in imported(MODULES[name])}
        library = {"ctypes", "functools", "importlib"} if name == "kernels" else {"functools"}
        usual = {
            "__future__",
            "collections",
            "dataclasses",
            "inspect",
            "itertools",
            "math",
            "typing",
            "torch",
            "headwater",
        }
        assert outside <= usual | library, name


def test_report_imports_only_nodes_plan_and_sweep_from_runs() -> None:
    for name in MODULES:
        if folder(name) == "report":
            from_runs = {module for module in own(MODULES[name]) if folder(module).startswith("runs")}
            assert from_runs <= {"runs.node", "runs.plan", "runs.sweep"}, name


LIGHT = (
    "config.recipe", "config.arms", "data.labels", "storage.run_dir", "stats", "runs.sweep", "report.sweep_page", "report.build",
    "report.audit", "models.prompts", "cli.main",
)  # fmt: skip


def test_import_of_light_modules_loads_no_torch() -> None:
    code = f"""
import importlib, sys
for name in {LIGHT!r}:
    importlib.import_module("headwater." + name)
    print(name, [module for module in {HEAVY!r} if module in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.splitlines() == [f"{name} []" for name in LIGHT]


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


def test_only_run_dir_names_files_of_run() -> None:
    # Keys of recipes and reports ("evals", "nodes") are names of fields and not of files.
    fields = {"nodes", "evals"}
    for name, path in MODULES.items():
        # The last two folders tell users where to look.
        if name in ("storage.run_dir", "storage.node_dir") or folder(name) in ("cli", "report"):
            continue
        spelt = {text for text in strings(path) if text in RUN_FILES and text not in fields}
        assert not spelt, f"{name} spells {spelt}; storage.run_dir and storage.node_dir know them"


def test_modules_are_shorter_than_400_lines() -> None:
    lines = {name: path.read_text(encoding="utf-8").count("\n") for name, path in MODULES.items()}
    assert {name: count for name, count in lines.items() if count >= 400} == {}


def test_no_module_calls_eval_exec_or_pickle() -> None:
    for name, path in MODULES.items():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if name == "tasks.sandbox_child" and called in {"exec", "compile"}:
                    continue  # running a model's program is this file's purpose, in a process that shut its own doors
                call = f"{name}: {called}"
                banned = {"eval", "exec", "compile", "__import__", "os.system", "torch.load", "yaml.load"}
                assert called not in banned, call
                assert not called.startswith(("pickle.", "marshal.", "shelve.")), call
                assert not any(word.arg == "shell" for word in node.keywords), call


def test_training_loop_names_no_objective() -> None:
    for name in ("training.loop", "training.update", "training.checkpoint"):
        words = set(strings(MODULES[name]))
        assert not words & {"grpo", "opd", "mixed", "forward_kl", "sft", "teacher_rl", "warmup", "student_rl"}


def test_only_data_labels_reads_private_gold_answers() -> None:
    """A stage that read `labels._gold` would make the budget an honour system."""
    for name, path in MODULES.items():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Attribute) and node.attr in {"_gold", "_grade"} and name != "data.labels":
                assert ast.unparse(node.value) == "self", f"{name} reaches into {ast.unparse(node)}"


def test_only_data_readers_and_checks_read_gold_answers() -> None:
    """`RunInputs` keeps what it has read; the nodes that it is handed to look at answers through `Labels` alone."""
    readers = {"runs.inputs", "runs.read_once", "doctor.data_checks", "doctor.context", "evaluation"}
    for name, path in MODULES.items():
        if folder(name) in ("tasks", "data") or name in readers:
            continue
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Attribute) and node.attr in {"gold", "memo"}:
                assert ast.unparse(node.value).endswith("task"), f"{name} reads {ast.unparse(node)}"


def test_problems_and_rollouts_have_no_field_for_answers() -> None:
    from dataclasses import fields

    from headwater.types import Problem, Rollout

    for noun in (Problem, Rollout):
        assert not {field.name for field in fields(noun)} & {"answer", "gold", "label", "solution"}


def test_no_module_has_its_own_random_state() -> None:
    """Every draw is named (seeds.py); only the generators of problems seed their own."""
    for name in MODULES:
        if folder(name) in ("tasks", "data", "doctor", "report") or name == "seeds":
            continue
        called = {ast.unparse(n.func) for n in ast.walk(tree(MODULES[name])) if isinstance(n, ast.Call)}
        drawn = {c for c in called if c.startswith(("random.", "torch.manual_seed", "torch.rand", "np.random.seed"))}
        assert not drawn, f"{name} draws by {drawn}"


def test_no_function_takes_more_than_eight_parameters_or_two_callables() -> None:
    aliases = {
        target.id
        for path in MODULES.values()
        for node in tree(path).body
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("Callable[")
        for target in node.targets
        if isinstance(target, ast.Name)
    }

    def is_callable(parameter: ast.arg) -> bool:
        annotation = "" if parameter.annotation is None else ast.unparse(parameter.annotation)
        return annotation.startswith("Callable[") or annotation.split(" |")[0] in aliases

    long = set()
    for name, path in MODULES.items():
        for node in ast.walk(tree(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                parameters = [parameter for parameter in given if parameter.arg not in ("self", "cls")]
                if len(parameters) > 8 or sum(map(is_callable, parameters)) > 2:
                    long.add(f"{name}.{node.name}")
    assert not long, "bundle parameters that belong together in a frozen dataclass"


def test_test_names_are_short_and_plain() -> None:
    """A test is named `test_<unit>_<behaviour>`: at most 70 characters, no articles and no relative clauses."""
    words = re.compile(r"_(a|an|the|that|what|which|who|whom|whose|whatever|whoever)(?=_|$)")
    unsuitable = [
        f"{path.name}: {node.name}"
        for path in sorted(TESTS.rglob("test_*.py"))
        for node in ast.walk(tree(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("test_")
        if len(node.name) > 70 or words.search(node.name)
    ]
    assert unsuitable == [], "rename, such as test_save_policy_keeps_log_probs"


def test_local_names_state_their_content() -> None:
    """No local or parameter is named by a word that hides its content."""
    vague = {"found", "one", "said", "held", "told", "asked", "theirs"}
    unsuitable = {
        f"{path.name}: {name}"
        for path in (*MODULES.values(), *sorted(TESTS.rglob("*.py")))
        for node in ast.walk(tree(path))
        if isinstance(node, ast.arg) or (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))
        if (name := node.arg if isinstance(node, ast.arg) else node.id) in vague
    }
    assert unsuitable == set(), "rename, such as `rows`, `weights`, `config` or `message`"
