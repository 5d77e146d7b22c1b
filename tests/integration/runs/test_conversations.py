"""Conversations through a whole run: every model is prompted with all turns, and graded on the right gold answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from headwater.types import conversation_id, problem_id
from runs import load_json, node, nodes, rows, tiny
from tiny import tiny_folder
from tools.pretrain.pocket import make_tokenizer

TURNS = "{% for m in messages %}{{ '<|user|>' if m.role == 'user' else '<|assistant|>' if m.role == 'assistant' else '(+)' }}"
TEMPLATE = TURNS + "{{ m.content }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"


def talk(n: int) -> list[dict[str, str]]:
    """Four turns; the last is the same in all of them."""
    texts = (("system", "%"), ("user", f"{n}+{n}"), ("assistant", f"={2 * n}"), ("user", "=?"))
    return [{"role": role, "content": text} for role, text in texts]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("conversations")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    models = []
    for seed, role in enumerate(("student", "teacher")):
        models.append(f"models.{role}={tiny_folder(root / role, seed=seed)}")
        tokenizer.save_pretrained(root / role)
    files = {
        "data.labeled": [{"prompt": talk(n), "reward_model": {"ground_truth": str(n)}} for n in range(10, 26)],
        "data.unlabeled": [{"messages": talk(n)} for n in range(30, 36)],
        "data.evals.sums": [
            {"messages": [*talk(n), {"role": "assistant", "content": f"#### {n}"}]} for n in range(50, 54)
        ],
    }
    changes = [*models, "labels.budget=16", "conditions.problems=2"]
    for field, content in files.items():
        path = root / f"{field}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
        changes.append(f"{field}={{path: {path}}}")
    assert (result := tiny("run", root / "out", "--arm", "bridge_rl", changes=changes)).code == 0, result.err
    return root / "out"


def ids_of(n: int) -> str:
    return conversation_id([(turn["role"], turn["content"]) for turn in talk(n)])


def test_conversations_with_same_last_turn_are_all_kept(finished: Path) -> None:
    listed = {row["id"]: row["text"] for row in rows(finished / "problems.jsonl")}
    wanted = [*range(10, 26), *range(30, 36), *range(50, 54)]
    assert listed.keys() == {ids_of(n) for n in wanted} and problem_id("=?") not in listed
    assert listed[ids_of(10)] == "system: %\n\nuser: 10+10\n\nassistant: =20\n\nuser: =?"
    assert rows(finished / "left_out.jsonl") == []


def test_teacher_cache_prompts_equal_transformers(finished: Path) -> None:
    cached: dict[str, Any] = {}
    for path in nodes(finished, "bridge_rl"):
        if (path / "cache" / "rollouts.jsonl").exists():
            cached |= {row["problem_id"]: row["prompt_ids"] for row in rows(path / "cache" / "rollouts.jsonl")}
    tokenizer = AutoTokenizer.from_pretrained(node(finished, "bridge_rl", "opd") / "model")
    wanted = {
        ids_of(n): tokenizer.apply_chat_template(talk(n), add_generation_prompt=True, return_dict=False)
        for n in (*range(10, 26), *range(30, 36))
    }
    assert len(cached) > 6 and cached == {name: wanted[name] for name in cached}
    assert cached.keys() & {ids_of(n) for n in range(30, 36)}


def test_evaluations_and_labels_belong_to_whole_conversations(finished: Path) -> None:
    last = node(finished, "bridge_rl", "student_rl")
    graded = {row["problem_id"] for row in rows(last / "evals" / "final" / "sums.jsonl")}
    assert graded == {ids_of(n) for n in range(50, 54)}
    used = {name for row in rows(finished / "ledger.jsonl") if row["purpose"] == "train" for name in row["labels"]}
    assert used and used <= {ids_of(n) for n in range(10, 26)}
    assert load_json(finished / "report.json")["recipe"] == "pocket"
