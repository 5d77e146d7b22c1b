"""Untrusted recipes, data, completions and run directories: attacks that must fail."""

from __future__ import annotations

import ast
import json
import os
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

import headwater
from fake_runs import ARMS, fake_run, write_rows
from forked_study import start
from headwater.config import yaml as plain_yaml
from headwater.config.builtin import builtin_text
from headwater.config.recipe import Source
from headwater.data.sources import load as load_data
from headwater.data.validate import validate
from headwater.errors import UserError, one_line
from headwater.report import build as report
from headwater.tasks.registry import find_task, regex
from headwater.tasks.verifier import Verifier
from runs import call, sets, tiny

# Recipes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merge", [False, True])
def test_yaml_bomb_is_refused_before_it_expands(merge: bool, tmp_path: Path) -> None:
    lines = ["a0: &a0 {x: 1}"]
    for n in range(1, 40):
        inner = ",".join([f"*a{n - 1}"] * 10)
        lines.append(f"a{n}: &a{n} " + (f"{{<<: [{inner}]}}" if merge else f"[{inner}]"))
    path = tmp_path / "bomb.yaml"
    path.write_text("\n".join(lines), encoding="utf-8")
    started = time.monotonic()
    result = call("run", path, "--out", tmp_path / "out")
    assert result.code == 2 and "has more than 20,000 values" in result.err and len(result.complaints) == 1
    assert time.monotonic() - started < 5


def test_yaml_with_few_aliases_is_accepted() -> None:
    assert plain_yaml.read("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}\n", "r") == {
        "a": {"x": 1},
        "b": {"x": 1},
        "c": {"x": 1, "y": 2},
    }
    for name in ("pocket", "gsm8k"):
        assert plain_yaml.read(builtin_text(name), name) == yaml.safe_load(builtin_text(name))


@pytest.mark.parametrize(
    "text",
    [
        "x: 2001-13-45",
        f"x: {'9' * 5000}",
        "!!bool maybe",
        "!!timestamp x",
        "!!int ''",
        "[" * 5000,
        "x: &a [*a]",
        "!!python/object/apply:os.system ['true']",
        "x: " + "y" * (1 << 18),
    ],
)
def test_yaml_with_unsupported_values_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(UserError, match=r"^recipe r: "):
        plain_yaml.read(text, "recipe r")


@pytest.mark.parametrize(
    "task", ["timeit:timeit", "os:system", "shutil:move", "builtins:exec", "antigravity:x", "posix:unlink"]
)
def test_standard_library_function_is_refused_as_grader(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("webbrowser.open", lambda *given: pytest.fail("imported"))
    with pytest.raises(UserError, match="the standard library is not allowed"):
        find_task(task)


def test_grader_imported_by_module_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_safe_graders.py").write_text(
        "from shutil import move\nfrom my_safe_parts import other\ndef own(gold, completion): return True\n",
        encoding="utf-8",
    )
    (tmp_path / "my_safe_parts.py").write_text("def other(gold, completion): return True\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_task("my_safe_graders:own").grade("", "") == (True, "equal")
    for name, says in (("move", "shutil"), ("other", "my_safe_parts")):
        with pytest.raises(UserError, match=f"{name} is not defined in my_safe_graders"):
            find_task(f"my_safe_graders:{name}")
        assert says


@pytest.mark.parametrize("field", ["name", "data.evals.NAME"])
@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "..", ".x", "a\n", "", "x" * 65, "é"])
def test_names_used_as_file_names_cannot_leave_folder(field: str, name: str, tmp_path: Path) -> None:
    raw = yaml.safe_load(builtin_text("pocket"))
    if field == "name":
        raw["name"] = name
    else:
        raw["data"]["evals"] = {name: raw["data"]["evals"]["sums"]}
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(raw, allow_unicode=True), encoding="utf-8")
    result = call("run", path, "--dry-run")
    assert result.code == 2 and field.replace("NAME", "") in result.err and len(result.complaints) == 1


def test_error_messages_escape_control_characters() -> None:
    assert one_line("a\nb\x1b[2J\u202e\ud800") == "a b\ufffd[2J\ufffd\ufffd"
    assert str(UserError("x\r\n\n y")) == "x  y"
    assert len(one_line("x" * 10**6)) == 2001


# Data -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["device", "pipe", "folder"])
def test_special_files_are_not_read(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path = Path("/dev/zero")
    with pytest.raises(UserError, match=r"is not a file|is not a folder saved by datasets"):
        load_data(Source(path=str(path)), "data.labeled", need_answers=True)


@pytest.mark.parametrize("kind", ["rows", "repeats"])
def test_parquet_bomb_is_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr("headwater.data.rows.MOST_BYTES", 50 << 20)
    monkeypatch.setattr("headwater.data.rows.MOST_ROWS", 100_000)
    rows = 200_000 if kind == "rows" else 5000
    table = pyarrow.table({"problem": ["a" if kind == "rows" else "a" * 20_000] * rows, "answer": ["1"] * rows})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    assert (tmp_path / "d.parquet").stat().st_size < 1 << 20
    with pytest.raises(UserError, match=r"d\.parquet: unpacks to .* that is no file of problems"):
        load_data(Source(path=str(tmp_path / "d.parquet")), "data.labeled", need_answers=True)


def test_huge_problem_text_is_refused_before_tokenizing(tmp_path: Path) -> None:
    good = [{"problem": f"{n:02d}+07+11+90", "answer": f"{(n + 8) % 100:02d}"} for n in range(20)]
    write_rows(tmp_path / "d.jsonl", [*good, {"problem": "7" * 10_000_000, "answer": "1"}])
    started = time.monotonic()
    result = tiny("run", tmp_path / "out", changes=(f"data.labeled={tmp_path / 'd.jsonl'}",))
    assert result.code == 2 and "10,000,0" in result.err and "d.jsonl" in result.err and len(result.complaints) == 1
    assert time.monotonic() - started < 120


def test_nested_repeats_in_pattern_are_not_expanded(tmp_path: Path) -> None:
    started = time.monotonic()
    for gold in (
        "(a{9999}){9999}",
        "((((a{99}){99}){99}){99}){99}",
        "(" * 500 + "a" + ")" * 500,
        "[" * 1000,
        "(?:a|" * 2000,
    ):
        made = regex.as_completion(gold)
        assert made is None or len(made) <= regex.LONGEST_EXAMPLE
    assert regex.as_completion("(ab{2}){3}") == "abbabbabb"
    assert time.monotonic() - started < 2
    path = tmp_path / "d.jsonl"
    write_rows(path, [{"problem": "p", "answer": r"(a+)+b"}, {"problem": "q", "answer": "(a{9999}){9999}"}])
    assert validate(Source(path=str(path)), "regex", seconds=1.0, workers=1).total == 2


def test_catastrophic_pattern_is_stopped_at_its_time_limit() -> None:
    with Verifier("regex", workers=1, seconds=0.5) as verifier:
        started = time.monotonic()
        verdicts = verifier([(r"(a+)+b", "a" * 60), (r"(.*)*x\1y", "z" * 60), ("a+", "aaa")])
    assert verdicts[0].reason == "timeout" and verdicts[2].correct
    assert time.monotonic() - started < 20


# Run directories ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../outside", "/etc", "a/b", "..", "", "a\n", 7, None])
def test_plan_with_node_outside_folder_is_refused(name: Any, tmp_path: Path) -> None:
    out = fake_run(tmp_path / "run", seeds=(0,), arms={"bridge": ARMS["bridge"]}, problems=4, steps=2)
    plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    plan["arms"]["bridge"]["0"][-1] = name
    (out / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    result = call("report", out)
    assert (
        result.code == 2
        and f"{out / 'plan.json'}: " in result.err
        and "not a valid node name" in result.err
        and len(result.complaints) == 1
    )
    assert not (out / "report.json").exists()


@pytest.mark.parametrize("where", ["report.json", "nodes/x", "nodes/opd/metrics.jsonl", ".lock"])
@pytest.mark.parametrize("verb", ["report", "run", "reuse", "probe"])
def test_symlink_in_run_directory_is_refused_and_not_followed(verb: str, where: str, tmp_path: Path) -> None:
    out, victim = tmp_path / "run", tmp_path / "victim"
    fake_run(out, seeds=(0,), arms={"bridge": ARMS["bridge"]}, problems=4, steps=2)
    victim.write_text("precious", encoding="utf-8")
    (out / where).parent.mkdir(parents=True, exist_ok=True)
    (out / where).symlink_to(victim)
    result = {
        "report": lambda: call("report", out),
        "run": lambda: tiny("run", out),
        "reuse": lambda: tiny("run", tmp_path / "new", "--reuse", out),
        "probe": lambda: tiny("probe", out),
    }[verb]()
    assert result.code == 2 and f"{where} is a symbolic link" in result.err and len(result.complaints) == 1, result
    assert victim.read_text(encoding="utf-8") == "precious" and not (tmp_path / "new").exists()


def test_output_folder_may_be_symlink(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    assert tiny("run", tmp_path / "out", "--arm", "direct_grpo").code == 0
    assert (tmp_path / "disk" / "report.json").is_file()


# The page -------------------------------------------------------------------------------------------------------------

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script src=https://evil.example/x.js></script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg onload=alert(1)>",
    "<a href='javascript:alert(1)'>x</a>",
    "</pre></details><iframe src=//evil.example>",
    "]]><!--",
    "--><b>",
    "&lt;script&gt;",
    "\x00<scr\x00ipt>",
    "</title><script>1</script>",
    "</style><script>2</script>",
    "{{7*7}}",
    "\u202e<script>",
]


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_text_of_run_directory_cannot_become_markup(tmp_path: Path) -> None:
    text = " ".join(HOSTILE)
    arms = {**{name: ARMS[name] for name in ("base_student", "bridge", "direct_grpo")}, HOSTILE[1]: ARMS["raw_teacher"]}
    out = fake_run(tmp_path / "run", seeds=(0,), arms=arms, problems=6, steps=12, text=text)
    clean = fake_run(tmp_path / "clean", seeds=(0,), arms={**arms}, problems=6, steps=12)
    recipe = json.loads((out / "recipe.json").read_text(encoding="utf-8"))
    recipe |= {"name": text, "task": text, "models": {"student": text}}
    (out / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
    (out / "env.json").write_text(json.dumps({text: text}), encoding="utf-8")
    for path in sorted(out.glob("nodes/*")):
        info = json.loads((path / "node.json").read_text(encoding="utf-8"))
        if info["kind"] == "train":
            (path / "node.json").write_text(json.dumps({**info, "stage": text, "role": "student"}), encoding="utf-8")
            alarm = {
                "guard": text,
                "step": 3,
                "figure": 1.0,
                "bound": 0.5,
                "window": 2,
                "action": "stop",
                "sentence": text,
            }
            write_rows(path / "warnings.jsonl", [alarm])
        for file in path.glob("evals/final/*.jsonl"):
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            write_rows(file, [{**row, "problem_id": row["problem_id"] + text, "extracted": text, "reason": text, "finish": text}
                              for row in rows])  # fmt: skip
    last = json.loads((out / "plan.json").read_text(encoding="utf-8"))["arms"]["direct_grpo"]["0"][-1]
    (out / "nodes" / last / "DONE").unlink()
    (out / "nodes" / last / "FAILED").write_text(json.dumps({"sentence": text, "code": 4}), encoding="utf-8")
    report.write(out)
    report.write(clean)
    page, plain = Page(), Page()
    page.feed((out / "report.html").read_text(encoding="utf-8"))
    plain.feed((clean / "report.html").read_text(encoding="utf-8"))
    assert len(page.tags) > 200 and {tag for tag, _ in page.tags} <= {tag for tag, _ in plain.tags} | {
        "span",
        "ul",
        "li",
    }
    # What the page itself has: one script of its own, and links within the page and to its figures.
    for tag in ("script", "style", "b", "template", "form"):
        assert [tag for tag, _ in page.tags].count(tag) <= [tag for tag, _ in plain.tags].count(tag), tag
    assert sorted({tag for tag, _ in page.tags} & {"iframe", "img", "link", "object", "embed", "base"}) == []
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "srcdoc", "action")], tag
        assert (attributes.get("href") or "#").startswith(("#", "figures/")), (tag, attributes)
        assert not any("javascript:" in (value or "") and name != "aria-label" for name, value in attributes.items())
    html = (out / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in html
    # The hostile texts are there to be read, as text.
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html and "&amp;lt;script&amp;gt;" in html


# Secrets, shells ------------------------------------------------------------------------------------------------------

SECRETS = {
    "HF_TOKEN": "hf_XyZzy0123456789secret",
    "AWS_SECRET_ACCESS_KEY": "AKIAplugh/0123456789secret",
    "OPENAI_API_KEY": "sk-secret-xyzzy",
    "WANDB_API_KEY": "wandb-secret-xyzzy",
    "MY_PASSWORD": "correct-horse-secret",
}


def test_environment_secrets_are_in_no_file_of_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "out"
    words = ("study", "pocket", "--arms", "direct_grpo,warmup_only", "--out", out, *sets("compute.workers=2"))
    study = start(tmp_path / "process", *words, whole=True, environment=SECRETS)
    assert study.wait(250) == 0, study.err()

    def explode(*given: Any) -> None:
        raise RuntimeError("something nobody expected")

    monkeypatch.setattr("headwater.runs.cache_node.write_rollouts", explode)
    broken = tiny("run", tmp_path / "broken", "--arm", "warmup_only")
    assert broken.code == 1 and list((tmp_path / "broken").glob("nodes/*/FAILED"))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 60
    for path in files:
        data = path.read_bytes()
        for name, value in SECRETS.items():
            assert value.encode() not in data and name.encode() not in data, path
    assert not any(value in study.out() + study.err() + broken.err for value in SECRETS.values())


def test_no_module_starts_shell() -> None:
    """`subprocess` with a list alone; no os.system, popen, shell=, eval of any library."""
    source = Path(headwater.__file__).parent
    started = 0
    for path in sorted(source.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called not in {
                "os.system",
                "os.popen",
                "subprocess.getoutput",
                "subprocess.getstatusoutput",
                "pty.spawn",
            }, path
            assert not any(word.arg in ("shell", "preexec_fn") for word in node.keywords), path
            if called.startswith("subprocess.") and called.rpartition(".")[2] in (
                "Popen",
                "run",
                "call",
                "check_output",
            ):
                started += 1
                assert isinstance(node.args[0], ast.List) or ast.unparse(node.args[0]).startswith("list("), (
                    path,
                    ast.unparse(node),
                )
    assert started >= 3
