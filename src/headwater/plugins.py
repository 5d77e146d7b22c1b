"""Find a user's own task, objective, sampler or tracker: `package.module:function`, or the name of an installed entry point.

An installed package names its functions in the entry-point groups `headwater.tasks`, `.objectives`, `.samplers` and `.trackers`. Only
the one that a recipe names is imported. docs/python-api.md has an example of each.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import os
import sys
from collections.abc import Callable, Collection
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import FunctionType
from typing import Any, Literal, TypeVar

from headwater.errors import UserError

Kind = Literal["task", "objective", "sampler", "tracker"]
Function = TypeVar("Function", bound=Callable[..., Any])


def names(kind: Kind) -> list[str]:
    """Names that installed packages give to their functions of this kind."""
    return sorted(entry_points(group=f"headwater.{kind}s").names)


def find(kind: Kind, name: str) -> FunctionType | None:
    """The function of that name; None if the name has no colon and no entry point has it.

    Raises UserError if it cannot be imported, is no function, or is not defined in the package that it is named by.
    """
    entry: EntryPoint | None = next(iter(entry_points(group=f"headwater.{kind}s", name=name)), None)
    if entry is None and ":" not in name:
        return None
    module_name, _, function_name = (name if entry is None else entry.value).partition(":")
    where = f"{kind} {name}"
    if not (module_name and function_name):
        raise UserError(f"{where}: is unknown; write it as package.module:function")
    top = module_name.partition(".")[0]
    if top in {*sys.stdlib_module_names, *sys.builtin_module_names}:
        # Security: a recipe with timeit:timeit would run a gold answer as a program.
        raise UserError(
            f"{where}: {module_name} has no function {function_name} to use; the standard library is not allowed"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the user's module may fail in any way
        raise UserError(f"{where}: {module_name} does not import ({type(error).__name__}: {error})") from None
    function = getattr(module, function_name, None)
    if not isinstance(function, FunctionType):
        raise UserError(f"{where}: {module_name} has no function {function_name}")
    if function.__module__.partition(".")[0] != top:
        raise UserError(f"{where}: {function_name} is not defined in {top}, only imported there")
    return function


def declare(kind: Kind, facts: Any) -> Callable[[Function], Function]:
    """Decorator that attaches facts about a function of this kind, which `find_declared` returns."""

    def attach(function: Function) -> Function:
        function.declared = kind, facts  # type: ignore[attr-defined]
        return function

    return attach


def find_declared(kind: Kind, name: str, known: Collection[str]) -> tuple[FunctionType, Any]:
    """The function of that name and the facts that it is declared with.

    known  names of the package's own functions, for messages

    Raises ValueError, from which pydantic makes a fault of the field, if there is no such function or it is not declared.
    """
    try:
        function = find(kind, name)
    except UserError as error:
        raise ValueError(str(error)) from None
    if function is None:
        raise ValueError(f"input should be {', '.join(map(repr, known))}, or package.module:function")
    declared, facts = getattr(function, "declared", (None, None))
    if declared != kind:
        raise ValueError(f"{name} is not declared with @headwater.config.{kind}s.{kind}")
    return function, facts


def name_of(function: Callable[..., Any], kind: str) -> str:
    """The name `module:function` by which worker processes find a function that was passed to the Python API.

    A function of the script that is running is named by the script's file. Raises UserError for one that no other process can import:
    a lambda, a function within another, or one that was typed into a notebook.
    """
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if module == "__main__":
        file = getattr(sys.modules["__main__"], "__file__", None)
        module = Path(file).stem if file and Path(file).suffix == ".py" else None
    if module is None or not isinstance(function, FunctionType) or not name.isidentifier():
        raise UserError(
            f"{kind} {name or function!r}: other processes cannot import it; define it with `def` at the top of a file, such as "
            "mine.py, and pass mine.function"
        )
    return f"{module}:{name}"


def code_fingerprint(module: str) -> str:
    """Fingerprint (sha256) of an imported module and the local modules that it imports, recursively.

    Local modules are those in the folder of its top-level package or module; for an installed package, those of the package.
    Data files that it reads are not included.
    """
    file = Path(str(sys.modules[module].__file__)).resolve()
    root = file.parents[module.count(".") + (file.name == "__init__.py")]
    installed = root.name in ("site-packages", "dist-packages")
    digest, seen, queue = hashlib.sha256(), set[Path](), [module]
    while queue:
        dotted = queue.pop(0)
        for path in (
            root.joinpath(*dotted.split(".")).with_suffix(".py"),
            root.joinpath(*dotted.split("."), "__init__.py"),
        ):
            if path.is_file() and path not in seen:
                seen.add(path)
                content = path.read_bytes()
                digest.update(f"{path.relative_to(root)}:{len(content)}\n".encode() + content)
                imported = _imported_modules(content, dotted, path.name == "__init__.py")
                queue += [name for name in imported if not installed or name.split(".")[0] == module.split(".")[0]]
    return digest.hexdigest()[:16]


def _imported_modules(content: bytes, module: str, is_package: bool) -> list[str]:
    """Dotted names of the modules that a source file may import, with all parent packages."""
    parents = module.split(".")
    names = [".".join(parents[:end]) for end in range(1, len(parents))]
    for node in ast.walk(ast.parse(content)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            up = parents[: len(parents) - node.level + is_package] if node.level else []
            base = ".".join([*up, *([node.module] if node.module else [])])
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return [".".join(name.split(".")[:end]) for name in names for end in range(1, name.count(".") + 2)]
