"""`make gpu` on a machine without installs: what its Python has to bring, and what `make gpu-packages` carries there."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tests.unit.test_house import MODULES, imported_at_start

ROOT = Path(__file__).parents[2]
USUAL = {
    "torch", "transformers", "safetensors", "tokenizers", "huggingface_hub", "numpy", "scipy", "yaml", "rich", "typer",
    "jinja2",
    "markupsafe", "matplotlib", "sympy",
}  # fmt: skip
"""Packages that machines for deep learning commonly have; docs/performance.md names them."""


def test_package_needs_only_usual_and_carried_packages() -> None:
    recipe = re.search(
        r"^gpu-packages:.*?\n\n", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    assert recipe is not None
    carried = set(re.findall(r"[\w-]+(?===|\s)", recipe[0]))
    needed = {name.split(".")[0] for path in MODULES.values() for name in imported_at_start(path)}
    needed -= {"headwater", "__future__", *sys.stdlib_module_names}
    assert needed & {"pydantic", "torch"}
    assert {name for name in needed - USUAL if name not in carried and name.replace("_", "-") not in carried} == set()


def test_performance_page_names_needed_packages() -> None:
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    names = {name.replace("yaml", "PyYAML") for name in USUAL}
    assert [name for name in sorted(names) if name.replace("_", "-") not in page] == []
