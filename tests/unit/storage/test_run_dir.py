"""Run directory: atomic files, truncation to a step, and refusal of another recipe's folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headwater.errors import UserError
from headwater.storage import fault_points
from headwater.storage.files import (
    append_jsonl,
    atomic_folder,
    file_sums,
    first_difference,
    keep_rows,
    read_json,
    read_jsonl,
    write_atomic,
    write_json,
)
from headwater.storage.node_dir import DISTRIBUTIONS, NodeDir
from headwater.storage.run_dir import RunDir


class Unwritable:
    """Not JSON."""


def test_file_is_replaced_whole_and_failed_write_keeps_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "state.json"
    write_json(path, {"step": 1, "name": "αβ"})
    assert read_json(path) == {"step": 1, "name": "αβ"}
    with pytest.raises(TypeError):
        write_json(path, {"step": Unwritable()})

    def full(fd: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("headwater.storage.files.os.fsync", full)
    with pytest.raises(OSError, match="no space left"):
        write_atomic(path, "half a fi")
    assert read_json(path) == {"step": 1, "name": "αβ"}
    assert [file.name for file in path.parent.iterdir()] == ["state.json"]


def test_missing_or_broken_json_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.json: no such file"):
        read_json(tmp_path / "none.json")
    for broken in (b'{"a": ', b"\xff\xfe", b""):
        (tmp_path / "broken.json").write_bytes(broken)
        with pytest.raises(UserError, match=r"broken\.json: cannot be read as JSON"):
            read_json(tmp_path / "broken.json")


def test_rows_are_appended_and_read_in_order_for_any_text(tmp_path: Path) -> None:
    path = tmp_path / "node" / "rows.jsonl"
    rows = [{"step": 1, "text": "a\nb"}, {"step": 2, "text": "数学 🙂 \u2028 \x85 \r"}, {"step": 3, "text": '"\\'}]
    append_jsonl(path, rows[:1])
    append_jsonl(path, rows[1:])
    assert list(read_jsonl(path)) == rows
    assert list(read_jsonl(tmp_path / "none.jsonl")) == []


def test_truncated_last_line_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, [{"step": 1}])
    whole = json.dumps({"step": 2, "text": "数学"}, ensure_ascii=False).encode()
    before = path.read_bytes()
    for length in range(1, len(whole)):  # also within a character of several bytes
        path.write_bytes(before + whole[:length])
        assert list(read_jsonl(path)) == [{"step": 1}]
    path.write_bytes(before + whole)  # complete but for its line end
    assert list(read_jsonl(path)) == [{"step": 1}, {"step": 2, "text": "数学"}]


def test_broken_row_before_last_is_refused_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl: row 2 is not JSON"):
        list(read_jsonl(path))


def test_truncate_rows_drops_later_rows_and_repairs_cut_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, [{"step": step, "text": "é"} for step in (1, 2, 3)])
    with path.open("ab") as file:
        file.write('{"step": 4, "text": "é'.encode()[:-1])
    keep_rows(path, lambda row: row["step"] <= 2)
    append_jsonl(path, [{"step": 3, "text": "again"}])
    assert [(row["step"], row["text"]) for row in read_jsonl(path)] == [(1, "é"), (2, "é"), (3, "again")]
    keep_rows(tmp_path / "none.jsonl", lambda row: True)
    assert not (tmp_path / "none.jsonl").exists()


def test_atomic_folder_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint" / "000003"
    with atomic_folder(target) as aside:
        (aside / "weights").write_text("new")
        assert not target.exists()
    assert file_sums(target).keys() == {"weights"}

    def killed() -> None:
        with atomic_folder(target) as aside:
            (aside / "weights").write_text("newer")
            raise RuntimeError("killed in between")

    with pytest.raises(RuntimeError, match="killed in between"):
        killed()
    assert (target / "weights").read_text() == "new"
    with atomic_folder(target) as aside:
        (aside / "other").write_text("x")
    assert [path.name for path in target.iterdir()] == ["other"]
    assert [path.name for path in target.parent.iterdir()] == ["000003"]


def test_incomplete_checkpoint_folder_is_ignored(tmp_path: Path) -> None:
    node = NodeDir(tmp_path / "nodes" / "opd")
    left = node.checkpoint(3).with_name(".000003.tmp")
    left.mkdir(parents=True)
    (left / "sums.json").write_text("{}")
    assert node.checkpoints() == []
    with atomic_folder(node.checkpoint(3)) as aside:
        (aside / "sums.json").write_text("{}")
    assert node.checkpoints() == [node.checkpoint(3)]
    assert not left.exists()


def test_checkpoints_are_listed_newest_first_beyond_million_steps(tmp_path: Path) -> None:
    node = NodeDir(tmp_path)
    for step in (2, 10, 9):
        write_json(node.checkpoint(step) / "sums.json", {})
    assert [path.name for path in node.checkpoints()] == ["000010", "000009", "000002"]


def test_checksums_cover_every_file_and_byte(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"abc")
    # sha256 of "abc", as published with the standard.
    assert file_sums(tmp_path) == {"a/b": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}


def test_node_truncated_to_step_drops_only_later_rows(tmp_path: Path) -> None:
    node = NodeDir(tmp_path / "nodes" / "opd")
    for step in range(1, 7):
        append_jsonl(node.metrics, [{"step": step}])
        append_jsonl(node.ledger, [{"step": step, "purpose": "train"}])
        append_jsonl(node.rollouts(step), [{"sample": 0}])
    for when in ("step-000002", "step-000004", "step-000006", "final"):
        append_jsonl(node.evaluation(when, "test"), [{"correct": True}])
    node.cut_back_to(4)
    assert [row["step"] for row in read_jsonl(node.metrics)] == [1, 2, 3, 4]
    assert [row["step"] for row in read_jsonl(node.ledger)] == [1, 2, 3, 4]
    assert [node.rollouts(step).exists() for step in range(1, 7)] == [True] * 4 + [False] * 2
    assert sorted(path.name for path in (node.path / "evals").iterdir()) == ["step-000002", "step-000004"]


def test_node_is_done_only_for_its_own_fingerprint(tmp_path: Path) -> None:
    node = NodeDir(tmp_path)
    assert not node.is_done("abc")
    write_json(node.done, {"fingerprint": "abc"})
    assert node.is_done("abc") and not node.is_done("abd")


def test_cache_losing_its_distributions_is_never_damaged(tmp_path: Path) -> None:
    node = NodeDir(tmp_path)
    node.cache.mkdir()
    for name in ("rollouts.jsonl", DISTRIBUTIONS):
        (node.cache / name).write_text(name)
    node.finish({"fingerprint": "abc", "scored": 9})
    assert (node.scored_rollouts, node.damage()) == (9, None)

    def stop(point: str) -> None:
        if point == "cache.released":
            raise KeyboardInterrupt

    fault_points.arm(stop)
    with pytest.raises(KeyboardInterrupt):
        node.remove_distributions()
    fault_points.arm(None)
    for left in ([DISTRIBUTIONS, "rollouts.jsonl"], ["rollouts.jsonl"]):
        assert sorted(path.name for path in node.cache.iterdir()) == left
        assert (node.scored_rollouts, node.damage(), node.is_done("abc")) == (0, None, True)
        node.remove_distributions()


RECIPE = {"name": "r", "seed": 0, "stages": {"opd": {"steps": 5, "optim": {"lr": 1e-6}}}, "evals": ["a", "b"]}


def test_claiming_folder_of_other_recipe_names_first_difference(tmp_path: Path) -> None:
    folder = RunDir(tmp_path / "out")
    folder.claim(RECIPE)
    folder.claim(RECIPE)
    changed = {**RECIPE, "stages": {"opd": {"steps": 5, "optim": {"lr": 2e-6}}}}
    with pytest.raises(
        UserError, match=r"--out .*out: holds a run of another recipe \(they differ in stages\.opd\.optim\.lr\)"
    ):
        folder.claim(changed)
    assert read_json(folder.recipe) == RECIPE


def test_settings_without_effect_on_nodes_may_change_and_are_rewritten(
    tmp_path: Path,
) -> None:
    folder = RunDir(tmp_path / "out")
    folder.claim({**RECIPE, "compute": {"threads": 1}, "guards": {"patience": 3}})
    later = {**RECIPE, "seed": 3, "compute": {"threads": 2}, "guards": {"patience": 9}}
    folder.claim(later)  # a study adds seeds to its folder; another machine goes on with it
    assert read_json(folder.recipe) == later


def test_claiming_refuses_foreign_files_and_accepts_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"--out .*mine: the folder is not empty and holds no run of Headwater"):
        RunDir(tmp_path / "mine").claim(RECIPE)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    (tmp_path / "empty").mkdir()
    RunDir(tmp_path / "empty").claim(RECIPE)
    assert read_json(tmp_path / "empty" / "recipe.json") == RECIPE


def test_first_difference_is_dotted_path() -> None:
    assert first_difference(RECIPE, json.loads(json.dumps(RECIPE))) is None
    assert first_difference(RECIPE, {**RECIPE, "evals": ["a"]}) == "evals"
    assert first_difference({"a": {"b": 1}}, {"a": {"b": 1, "c": 2}}) == "a.c"
    # Written before the field was known, and it is not used: the same recipe.
    assert first_difference({"a": {"b": 1}}, {"a": {"b": 1, "c": None}}) is None
    assert first_difference({"a": {"b": 1}}, {"a": 1}) == "a"


def test_joined_ledger_has_node_ledgers_in_name_order(tmp_path: Path) -> None:
    folder = RunDir(tmp_path)
    for name in ("b", "a"):
        append_jsonl(folder.node(name).ledger, [{"node": name, "checks": 1}])
    (tmp_path / "nodes" / "c").mkdir()
    folder.join_ledgers()
    folder.join_ledgers()  # rebuilt, not appended
    assert [row["node"] for row in read_jsonl(folder.ledger)] == ["a", "b"]


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ("/a/data/train.jsonl", None),  # the same file from another working directory
        ("../data/train.jsonl", None),
        ("train.jsonl", None),
        ("data/test.jsonl", "data.labeled.path"),
        ("other/train.jsonl", "data.labeled.path"),
    ],
)
def test_paths_from_other_working_directory_are_no_difference(other: str, difference: str | None) -> None:
    first, second = ({"data": {"labeled": {"path": path, "split": "train"}}} for path in ("data/train.jsonl", other))
    assert first_difference(first, second) == difference


def test_texts_other_than_paths_must_be_equal() -> None:
    templates = [{"prompt": {"template": text}} for text in ("a/b", "b")]
    assert first_difference(*templates) == "prompt.template"
