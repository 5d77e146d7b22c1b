"""`headwater probe` as a command: ledger, labels, pass rates, advice."""

from __future__ import annotations

import json
import shutil
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from headwater.config.builtin import find_recipe
from headwater.data.labels import Labels
from headwater.runs.setup import prepared
from headwater.types import Verdict
from runs import TINY, call, load_json, rows, sets, temporary, tiny
from tiny import tiny_folder
from tools.pretrain.pocket import make_tokenizer


def probed(*options: str | Path, changes: tuple[str, ...] = ()) -> dict[str, Any]:
    result = call("probe", "pocket", *sets(*changes), "--json", *options)
    assert result.code == 0, result.err
    return dict(json.loads(result.out))


@cache
def kept() -> tuple[Path, dict[str, Any], list[tuple[str, bool]]]:
    """A probe with --out of eight problems × four samples: its folder, its answer, and every verdict that was given."""
    given: list[tuple[str, bool]] = []
    plain = Labels.check

    def watched(self: Labels, answers: Any) -> list[Verdict]:
        verdicts = plain(self, answers)
        given.extend((name, verdict.correct) for (name, _), verdict in zip(answers, verdicts, strict=True))
        return verdicts

    out = temporary() / "probed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Labels, "check", watched)
        answer = probed("--out", out, "--problems", "8", "--samples", "4")
    return out, answer, given


def test_probe_charges_every_label_to_its_ledger() -> None:
    out, answer, given = kept()
    ledger = rows(out / "probe" / "ledger.jsonl")
    assert {row["purpose"] for row in ledger} == {"probe"}
    looked_at = {label for row in ledger for label in row["labels"]}
    assert looked_at == {name for name, _ in given}
    assert answer["labels"] == {"looked_at": 8, "checks": sum(row["checks"] for row in ledger), "budget": 16}
    assert len(looked_at) == 8 and sum(row["checks"] for row in ledger) == len(given)


def test_probe_uses_same_labels_as_training() -> None:
    _, _, given = kept()
    with prepared(find_recipe("pocket", list(TINY)), ["bridge"], [0]) as (_, inputs):
        assert {name for name, _ in given} < set(inputs.pools.all)


def test_probe_pass_rates_equal_verdict_counts() -> None:
    _, answer, given = kept()
    count = 8 * 4  # the student's samples are graded first, then the teacher's, then what both made of its beginnings
    for role, part in (("student", given[:count]), ("teacher", given[count : 2 * count])):
        report = answer["models"][role]
        assert report["pass_rate"]["mean"] == pytest.approx(sum(right for _, right in part) / count)
        by_problem: dict[str, list[bool]] = {}
        for name, right in part:
            by_problem.setdefault(name, []).append(right)
        assert report["pass_at"]["4"] == pytest.approx(np.mean([any(verdicts) for verdicts in by_problem.values()]))
        assert report["informative"]["mean"] == pytest.approx(
            np.mean([len(set(verdicts)) == 2 for verdicts in by_problem.values()])
        )
        assert report["truncated"] + report["ended"] == pytest.approx(1.0)
    finish = answer["finish"]
    ends = [right for _, right in given[2 * count :]]
    assert finish["problems"] == len({name for name, right in given[count : 2 * count] if right}) > 0
    half = len(ends) // 2
    assert finish["student"]["mean"] == pytest.approx(sum(ends[:half]) / half)
    assert finish["teacher"]["mean"] == pytest.approx(sum(ends[half:]) / half)


def test_probe_json_equals_output_and_is_deterministic() -> None:
    out, answer, _ = kept()
    again = probed("--problems", "8", "--samples", "4")
    assert {**again, "seconds": 0} == {**answer, "seconds": 0} == {**load_json(out / "probe.json"), "seconds": 0}


def test_run_in_probed_folder_keeps_its_ledger_apart(tmp_path: Path) -> None:
    out = tmp_path / "run"
    probed("--out", out, "--problems", "2", "--samples", "4")
    assert tiny("run", out, "--arm", "direct_grpo").code == 0
    assert {row["purpose"] for row in rows(out / "ledger.jsonl")} <= {"train", "eval"}
    result = call("probe", "pocket", *sets("labels.budget=8"), "--out", out)
    assert result.code == 2 and "labels.budget" in result.err


def test_probe_of_equal_models_finds_no_divergence_and_no_lead() -> None:
    answer = probed("--problems", "8", changes=("models.student=pocket:qwen3-teacher",))
    assert answer["models"]["student"]["pass_rate"] == answer["models"]["teacher"]["pass_rate"]
    c2 = answer["conditions"]["C2"]
    assert c2["kl_student_teacher"] == c2["kl_teacher_student"] == 0.0
    assert c2["overlap_student_prefixes"] == c2["overlap_teacher_prefixes"] == 1.0
    assert answer["finish"]["lead"] == 0.0
    assert (answer["advice"]["labels"]["where"], answer["advice"]["warmup"]["needed"]) == ("student", False)
    assert "student and teacher are the same weights" in answer["advice"]["teacher"]


def renamed(folder: Path) -> str:
    """The shipped teacher with the ids of its characters in reverse order."""
    path = Path(str(files("headwater"))) / "pocket" / "qwen3-teacher"
    shutil.copytree(path, folder)
    old = make_tokenizer().get_vocab()
    ids = sorted(id_ for token, id_ in old.items() if len(token) == 1)
    new = dict(zip(ids, reversed(ids), strict=True))
    state = json.loads((path / "tokenizer.json").read_text())
    state["model"]["vocab"] = {token: new.get(id_, id_) for token, id_ in old.items()}
    (folder / "tokenizer.json").write_text(json.dumps(state))
    weights = load_file(path / "model.safetensors")
    rows = [
        new.get(id_, id_) for id_ in range(len(weights["model.embed_tokens.weight"]))
    ]  # reversing is its own inverse
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & weights.keys():
        weights[name] = weights[name][rows]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return f"models.teacher={folder}"


def test_probe_across_tokenizers_compares_groups(tmp_path: Path) -> None:
    """A model and its copy with other ids: no divergence, although the two draw other samples."""
    aligned = [f"stages.{stage}.dense.tokenizers=prefix" for stage in ("warmup", "opd")]
    changes = ("models.student=pocket:qwen3-teacher", renamed(tmp_path / "renamed"), *aligned)
    answer = probed("--problems", "8", changes=changes)
    c2 = answer["conditions"]["C2"]
    assert max(c2["kl_student_teacher"], c2["kl_teacher_student"]) < 1e-4 < 0.1 < c2["entropy_student"]
    assert c2["overlap_student_prefixes"] > 0.99
    assert answer["finish"]["student"]["mean"] > 0.0 and answer["finish"]["teacher"]["mean"] > 0.0
    assert abs(answer["finish"]["kl"]) < 1e-4
    assert min(model["pass_rate"]["mean"] for model in answer["models"].values()) > 0.05


def test_probe_reads_words_of_teacher() -> None:
    """The teacher's own prompt takes its skill at this task, and its divergence from itself shows it."""
    same = "models.student=pocket:qwen3-teacher"
    answer = probed("--problems", "8", changes=(same, 'prompt.teacher={template: "0+{problem}"}'))
    assert answer["conditions"]["C2"]["kl_student_teacher"] > 1e-3
    assert answer["models"]["teacher"]["pass_rate"] != answer["models"]["student"]["pass_rate"]


def test_probe_of_untrained_models_advises_no_labels(
    tmp_path: Path,
) -> None:
    noise = [
        f"models.{role}={tiny_folder(tmp_path / role, seed=seed)}" for seed, role in enumerate(("student", "teacher"))
    ]
    answer = probed("--problems", "8", changes=tuple(noise))
    assert answer["advice"]["labels"]["where"] == "nowhere" and answer["advice"]["labels"]["arm"] is None
    assert answer["finish"] is None and answer["conditions"]["C1"]["teacher"]["ratio"] is None
    for role in ("student", "teacher"):  # nothing is right, so what was cut is all that is truncated
        model = answer["models"][role]
        assert model["outcomes"]["cut"] == model["truncated"] and sum(model["outcomes"].values()) == pytest.approx(1.0)
        assert f"stages.{role}_rl" in answer["advice"]["outcomes"][role] or model["truncated"] < 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--problems", "17"), "--problems 17: the recipe's label budget buys 16 problems"),
        (("--samples", "3"), "--samples 3: fewer than the group size 4"),
        (("--set", "models.teacher=/nowhere"), "models.teacher: /nowhere is no folder here"),
    ],
)
def test_probe_refuses_invalid_options_in_one_sentence(options: tuple[str, ...], message: str) -> None:
    result = call("probe", "pocket", *sets(), *options)
    assert result.code == 2 and message in result.err and "Traceback" not in result.err


def test_probe_refuses_continuations_across_change_of_positions(tmp_path: Path) -> None:
    """The longest prompt has 19 tokens: a run fits under the limit of 51, answers that are continued do not."""
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 51,
        "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
    }  # fmt: skip
    folder = tiny_folder(tmp_path / "model", rope_parameters=rope, max_position_embeddings=512)
    models = [f"models.student={folder}", f"models.teacher={folder}"]
    most = [f"stages.{stage}.sampling.max_tokens=32" for stage in ("teacher_rl", "warmup", "student_rl")]
    result = call("probe", "pocket", *sets(*models, *most), "--problems", "2", "--samples", "4")
    assert result.code == 2 and "completions of up to 40 can cross this" in result.err and "Traceback" not in result.err
    shorter = [f"stages.{stage}.sampling.max_tokens=25" for stage in ("teacher_rl", "warmup", "student_rl")]
    assert call("probe", "pocket", *sets(*models, *shorter), "--problems", "2", "--samples", "4").code == 0


def test_probe_table_shows_both_models_and_advice() -> None:
    result = call("probe", "pocket", *sets(), "--problems", "8", "--samples", "4", "--seed", "0")
    _, answer, _ = kept()
    assert result.code == 0 and "8 of the 16 labels of the budget were used" in result.out
    words = " ".join(result.out.split())
    for head in ("Labels:", "Warm-up:", "From OPD to student RL:"):
        assert head in words
    assert answer["advice"]["labels"]["because"] in words
    assert f"{100 * answer['models']['teacher']['pass_at']['4']:.1f}" in words
