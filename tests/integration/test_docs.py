"""Documentation: its commands parse, the names and files that it mentions exist, and the examples run."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import get_args

import click
import pytest
import typer
import yaml

import headwater
from headwater.cli.main import app
from headwater.config.arms import ARMS, DEFAULT_STUDY
from headwater.config.builtin import builtin_names, find_recipe
from headwater.plugins import Kind
from headwater.runs.hardware import DEVICES
from headwater.storage.fault_points import POINTS
from runs import call
from tools.arms_table import with_table

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *DOCS]}
EXAMPLES = ROOT / "examples"


def commands() -> list[tuple[str, str]]:
    """(page, arguments of `headwater`) of every command in code blocks and in inline code."""
    result = []
    for page, text in PAGES.items():
        text = re.sub(r"\\\n\s*", " ", text)
        lines = re.findall(
            r"^(?:    )?(?:[\w./-]*/)?(?:\.venv/bin/)?(?:[A-Z_]+=\S+ )?headwater ([a-z]+.*?)$", text, flags=re.MULTILINE
        )
        spans = re.findall(r"`headwater ([a-z]+[^`]*)`", text.replace("\n", " "))
        result += [(page, re.sub(r"\s+#\s.*", "", command).strip()) for command in lines + spans]
    return sorted(set(result))


def words(command: str) -> list[str]:
    """Split a command into words; of a synopsis, include the optional parts and replace placeholders in capitals."""
    text = command.split(" > ")[0].replace("\\|", "|")
    text = re.sub(r"[\[\]]", " ", text).replace("…", "")
    text = re.sub(r"(?<=[a-z])\|\S+", "", text)  # the first of several choices
    return [re.sub(r"^[A-Z]$", "2", word) for word in shlex.split(text)]


@cache
def verbs() -> dict[str, click.Command]:
    return typer.main.get_command(app).commands  # type: ignore[attr-defined, no-any-return]


def parse_error(command: str) -> str | None:
    """Error message of parsing a command line; None if it is valid."""
    verb, *rest = words(command)
    if verb not in verbs():
        return "no such verb"
    if not rest and verb not in ("init", "demo"):
        return None  # a verb named in a sentence
    try:
        verbs()[verb].make_context(verb, rest)
    except click.exceptions.Exit:
        pass
    except Exception as error:
        if "Missing" not in str(error):  # a sentence may name an option without its argument
            return str(error)
    return None


def test_docs_commands_parse() -> None:
    """tests/integration/test_commands.py runs them."""
    listed = commands()
    assert len(listed) > 60
    assert [(page, command, message) for page, command in listed if (message := parse_error(command)) is not None] == []


def test_help_of_each_verb_has_examples_of_valid_commands() -> None:
    for verb, command in verbs().items():
        shown = [line.strip() for line in (command.epilog or "").splitlines() if line.strip().startswith("headwater ")]
        assert shown and all(line.startswith(f"headwater {verb}") and len(line) < 80 for line in shown), verb
        for line in shown:
            assert parse_error(line.removeprefix("headwater ")) is None, line


def test_help_lists_arms_recipes_and_default_study() -> None:
    text = " ".join(call("study", "--help").out.replace("│", " ").split())
    assert all(name in text for name in [*ARMS, *builtin_names()])
    assert f"Without --arms: {', '.join(DEFAULT_STUDY[:-1])} and {DEFAULT_STUDY[-1]}." in text


def test_safety_page_names_existing_tests() -> None:
    """Each promise names the tests that hold it, after the name of their file."""
    rows = [line for line in PAGES["docs/safety.md"].splitlines() if line.startswith("|") and "`tests/" in line]
    missing, number = [], 0
    for row in rows:
        path = ""
        for name in re.findall(r"`(tests/[\w/]+\.py|test_\w+)`", row):
            if name.endswith(".py"):
                path = name
                continue
            number += 1
            if f"def {name}(" not in (ROOT / path).read_text(encoding="utf-8"):
                missing.append((path, name))
    assert missing == [] and number > 60, number


def test_version_option_prints_package_version() -> None:
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert version is not None and call("--version").out == f"headwater {version[1]}\n"


def test_theory_page_names_existing_functions() -> None:
    named = set(re.findall(r"`(headwater(?:\.\w+)+)`", PAGES["docs/stages.md"]))
    assert len(named) > 20
    for name in named | set(re.findall(r"^::: (headwater[.\w]+)", PAGES["docs/python-api.md"], flags=re.MULTILINE)):
        resolve(name)
    for module, members in re.findall(
        r"^::: (headwater[.\w]+)\n    options: \{members: \[(.*?)\]", PAGES["docs/python-api.md"], flags=re.MULTILINE
    ):
        for member in members.split(", "):
            resolve(f"{module}.{member}")


WRITTEN_BY_THE_READER = {"make_problems.py", "my_graders.py", "mine.py", "train.py", "check.py"}
"""Files that a page asks its reader to write."""
ENTRY_POINTS = {f"headwater.{kind}s" for kind in get_args(Kind)}


def test_docs_pages_name_existing_modules_and_files() -> None:
    """docs/extending.md names files that its diffs add; tests/integration/test_extending.py applies them."""
    pages = {page: text for page, text in PAGES.items() if page != "docs/extending.md"}
    dotted = {name for text in pages.values() for name in re.findall(r"(?<!\w)headwater(?:\.[a-zA-Z_]\w*)+", text)}
    assert len(dotted) > 40
    for name in sorted(dotted):
        if name not in ENTRY_POINTS:
            resolve(name)
    roots = [ROOT, *(ROOT / part for part in ("src/headwater", "tests/integration/engines", "examples", "docs"))]
    missing = [
        (page, path)
        for page, text in pages.items()
        for path in set(re.findall(r"(?<![\w/.*-])[\w./-]+\.(?:py|c)(?!\w)", text)) - WRITTEN_BY_THE_READER
        if not any((root / path).exists() for root in [*roots, (ROOT / page).parent])
    ]
    assert missing == []


def test_reliability_page_lists_fault_points() -> None:
    listed = re.search(r"```\n(file\.begun .*?)```", PAGES["docs/reliability.md"], flags=re.DOTALL)
    assert listed is not None
    assert dict(line.split(maxsplit=1) for line in listed[1].splitlines()) == POINTS


def test_architecture_page_names_existing_folders() -> None:
    folders = set(re.findall(r"`([a-z_/]+/)`", PAGES["docs/architecture.md"]))
    assert len(folders) > 10
    assert [folder for folder in folders if not (ROOT / "src/headwater" / folder).is_dir()] == []


def resolve(name: str) -> object:
    """Import a dotted name."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            value: object = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            value = getattr(value, part)
        return value
    raise AssertionError(f"{name}: no such module")


def test_tutorial_script_writes_problems_fitting_its_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    script, data = (
        re.search(rf"```{kind}\n(.*?)```", PAGES["docs/tutorial.md"], flags=re.DOTALL)[1]  # type: ignore[index]
        for kind in ("python", "yaml")
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    recipe_text = re.sub(r"^data:\n(?:  .*\n)+", data, call("init", "pocket").out, flags=re.MULTILINE)
    Path("my.yaml").write_text(recipe_text)
    recipe = find_recipe("my.yaml", [])
    assert recipe.data.labeled.path == "problems.jsonl" and list(recipe.data.evals) == ["held_out"]
    for name, count in (("problems.jsonl", 400), ("held-out.jsonl", 200)):
        result = call("validate", name, "--task", recipe.task)
        assert result.code == 0 and f"{count} labels, 0 fail; 0 repeated rows" in result.out


def test_arms_page_agrees_with_table_of_arms() -> None:
    assert PAGES["docs/arms.md"] == with_table(PAGES["docs/arms.md"]), "python -m tools.arms_table"


@pytest.mark.parametrize(
    ("device", "text"),
    [
        ("rtx4090", "RTX 4090: {hours} hours and {memory} GB"),
        ("h100", "H100: {hours} hours and {memory} GB"),
        ("16xh100", "16 × H100: {hours} hours, {memory} GB on each"),
    ],
)
def test_devices_page_agrees_with_dry_run(device: str, text: str) -> None:
    output = " ".join(call("run", "gsm8k", "--dry-run", "--on", device).out.split())
    line = re.search(r"GPU-hours, ([\d.]+) hours if .*?at most ([\d.]+) GB on a device", output)
    assert line is not None, output
    assert text.format(hours=line[1], memory=round(float(line[2]), 1)) in PAGES["docs/devices.md"]


def test_docs_navigation_and_links_lead_to_existing_pages() -> None:
    nav = set(re.findall(r": ([\w/.-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert len(nav) == 26 and nav == {str(path.relative_to(ROOT / "docs")) for path in DOCS}
    for page, text in PAGES.items():
        links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
        assert [link for link in links if link and not ((ROOT / page).parent / link).exists()] == [], page


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_examples_are_valid_recipes_with_existing_files(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES)
    recipe = find_recipe(path.name, [])
    sources = [recipe.data.labeled, recipe.data.unlabeled, *recipe.data.evals.values()]
    for source in sources:
        if source is not None and source.path is not None and not source.path.startswith("gsm8k/"):
            result = call("validate", source.path, "--task", recipe.task)
            assert result.code == 0, result.out + result.err
    assert path.name in PAGES["docs/tutorial.md"]


def test_lora_example_fits_its_named_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES)
    command = re.search(r"headwater (run .* --dry-run --on \w+)", Path("gsm8k_lora.yaml").read_text(encoding="utf-8"))
    assert command is not None and command[1].endswith("rtx4090")
    result = call(*shlex.split(command[1]), "--json")
    assert result.code == 0, result.err
    estimates = json.loads(result.out)
    assert {row["node"].split(".")[0] for row in estimates} >= {"teacher_rl", "warmup", "opd"}
    assert max(row["peak_bytes"] for row in estimates) < 0.95 * DEVICES["rtx4090"].memory


def test_two_gpu_example_command_parses() -> None:
    command = re.search(
        r"-m headwater (run .*)$", (EXAMPLES / "two_gpus.sh").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    assert command is not None
    assert parse_error(command[1]) is None


@pytest.mark.usefixtures("undrawn")
def test_own_grader_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    result = call(
        "run", "own_grader.yaml", "--arm", "direct_grpo", "--out", tmp_path / "out", "--set", "compute.workers=1"
    )
    assert result.code == 0, result.err
    labels = json.loads((tmp_path / "out/report.json").read_text())["arms"]["direct_grpo"]["labels"]
    assert labels["checks"] == 32 and 4 <= labels["distinct"] <= 8  # two steps of 4 problems × 4 samples


def test_notebook_was_executed_and_agrees_with_study() -> None:
    book = json.loads((EXAMPLES / "pocket_study.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 5 and [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    text = "".join("".join(output.get("text", output.get("data", {}).get("text/plain", []))) for output in outputs)
    assert "bridge" in text and any("image/png" in output.get("data", {}) for output in outputs)
    for cell in cells:
        compile(re.sub(r"^[!%].*$", "pass", "".join(cell["source"]), flags=re.MULTILINE), "cell", "exec")


def test_citation_has_package_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "title", "authors", "message"} <= cited.keys()
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert version is not None and cited["version"] == version[1]
    assert Path(headwater.__file__).parent.name == "headwater"
