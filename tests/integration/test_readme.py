"""README: its commands run in order, its links and verbs, and the architecture page's package tree, match the repository."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from runs import call

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHORT = [
    *("stages.teacher_rl.steps=2", "stages.warmup.steps=1", "stages.opd.steps=1", "stages.student_rl.steps=1"),
    *("data.evals.held_out.limit=4", "evaluate.samples=1", "conditions.problems=2", "guards.no_signal=continue"),
    *(f"stages.{stage}.sampling.max_tokens=16" for stage in ("teacher_rl", "warmup", "opd", "student_rl")),
    "evaluate.sampling.max_tokens=16",
]


def commands() -> list[str]:
    return re.findall(r"^    \.venv/bin/headwater (.*?)(?:\s+#.*)?$", README, flags=re.MULTILINE)


@pytest.mark.usefixtures("undrawn")
def test_readme_commands_for_own_problems_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"What is {n} + {n}?", "answer": f"{n} and {n} are {2 * n}.\n#### {2 * n}"} for n in range(20)]
    (tmp_path / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines = commands()
    assert [line.split()[0] for line in lines] == ["init", "validate", "doctor", "probe", "run"]
    for command in lines:
        line, _, target = command.partition(" > ")
        words = line.replace("STUDENT", "pocket:qwen3-student").replace("TEACHER", "pocket:qwen3-teacher").split()
        if words[0] in ("doctor", "probe", "run"):
            words += [word for change in SHORT for word in ("--set", change)]
        done = call(*words)
        assert done.code == 0, (command, done.err)
        if target:
            (tmp_path / target.strip()).write_text(done.out)
    report = json.loads((tmp_path / "runs/my/report.json").read_text())
    assert report["arms"]["bridge"]["labels"]["distinct"] > 0


def _leads_somewhere(link: str) -> bool:
    """Whether a relative link names a file that exists and, after `#`, one of its headings."""
    name, _, anchor = link.partition("#")
    path = ROOT / name
    if not anchor:
        return path.exists()
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return anchor in {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_links_and_verbs_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert len(links) > 5
    assert [link for link in links if not _leads_somewhere(link)] == []
    commands_page = (ROOT / "docs/commands.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `headwater ([a-z]+)", commands_page, flags=re.MULTILINE))
    result = subprocess.run([sys.executable, "-m", "headwater", "--help"], capture_output=True, text=True).stdout
    assert listed == set(re.findall(r"^│ ([a-z]+) ", result, flags=re.MULTILINE))


def test_architecture_tree_lists_every_folder_and_top_level_module() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    tree = re.search(r"^    src/headwater/\n((?:      .*\n)+)", page, flags=re.MULTILINE)
    assert tree is not None
    listed = [line.split()[0] for line in tree[1].splitlines()]
    package = ROOT / "src/headwater"
    folders = {f"{path.name}/" for path in package.iterdir() if path.is_dir() and path.name != "__pycache__"}
    folders.add("runs/executors/")
    modules = {path.name for path in package.glob("*.py") if not path.name.startswith("__")}
    assert sorted(listed) == sorted(folders | modules)
    assert all(len(line.split()) >= 3 for line in tree[1].splitlines()), "each entry has a description"


@pytest.mark.parametrize("target", ["demo", "install"])
def test_readme_make_commands_are_makefile_targets(target: str) -> None:
    assert f"    make {target} " in README
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
