"""Pocket models: shipped folders load with the auto classes, and pretraining reproduces them."""

from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from headwater.tasks import countdown
from headwater.tasks.pools import pool_of
from headwater.tasks.sums import SumsDials
from tools.pretrain.pocket import (
    ALPHABET,
    ASSISTANT,
    END,
    IGNORE_INDEX,
    PAD,
    POCKET,
    SPECIAL,
    USER,
    PretrainSpec,
    batches,
    encode,
    make_tokenizer,
    measure,
    pretrain,
    pretrain_pocket,
)
from tools.pretrain.solutions import countdown_short, countdown_worked, sums_short, sums_worked

SHIPPED = Path(str(resources.files("headwater"))) / "pocket"
TINY = PretrainSpec(
    "qwen3", hidden=32, layers=1, worked_steps=24, mixture_steps=6, batch=16, lr=1e-2, dials=SumsDials(10, 3, 4)
)


@pytest.fixture(autouse=True)
def one_thread():  # type: ignore[no-untyped-def]
    """Bit-reproducible sums need a fixed number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_pocket_models_ship_as_safetensors_with_cards_under_11_megabytes() -> None:
    files = [file for file in SHIPPED.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 11_000_000
    assert {folder.name for folder in SHIPPED.iterdir() if folder.is_dir()} == set(POCKET)
    for name in POCKET:
        shipped = {file.name for file in (SHIPPED / name).iterdir()}
        assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= shipped
        assert not {file for file in shipped if file.endswith((".bin", ".pt", ".pth", ".pkl"))}


@pytest.mark.parametrize("name", POCKET)
def test_shipped_folder_loads_with_auto_classes_and_ends_with_its_eos(name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(SHIPPED / name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED / name)
    spec = POCKET[name]
    assert type(model).__name__ == {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}[spec.architecture]
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (spec.hidden, spec.layers)
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()  # teachers and students must give the same ids
    assert tokenizer.eos_token == END and tokenizer.pad_token == PAD
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "17+45+82+03"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**prompt, do_sample=False, max_new_tokens=64)
    text = tokenizer.decode(out[0])
    assert text.startswith(f"{USER}17+45+82+03{ASSISTANT}") and text.endswith(END)


@pytest.mark.parametrize("name", POCKET)
def test_card_pass_rate_is_measured_from_shipped_weights(name: str) -> None:
    row = (SHIPPED / name / "README.md").read_text().split("|---|---|---|---|---|\n")[1].splitlines()[0]
    written = float(row.split("|")[1].strip(" %")) / 100
    # On sums both have much to learn; on Countdown the student is half right and the teacher nearly done.
    bands = {
        "sums": {"student": (0.05, 0.25), "teacher": (0.15, 0.60)},
        "countdown": {"student": (0.25, 0.60), "teacher": (0.75, 0.97)},
        "skills": {"student": (0.20, 0.28), "teacher": (0.20, 0.28)},  # one method of four is right
    }
    low, high = bands[POCKET[name].task]["student" if "student" in name else "teacher"]
    assert low <= written <= high
    # 150 fresh samples: four standard errors of the difference to the card's 500.
    error = (written * (1 - written) * (1 / 150 + 1 / 500)) ** 0.5
    again = measure(SHIPPED / name, POCKET[name].dials, problems=150, seed=1, task=POCKET[name].task)
    assert abs(again.pass_rate - written) < 4 * error


def test_pocket_tokenizer_round_trips_text() -> None:
    tokenizer = make_tokenizer()
    for text in (ALPHABET, ALPHABET[::-1], "17 + 45 = 62 ; ? .", "  \n\n 7", "17+45=62+82=44", ""):
        ids = tokenizer.encode(text)
        assert len(ids) == len(text)
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("17€4") == tokenizer.encode("17<|unk|>4")


def test_chat_template_gives_short_prompt_and_closes_answer() -> None:
    tokenizer = make_tokenizer()
    user, answer = {"role": "user", "content": "17+45"}, {"role": "assistant", "content": "=62"}
    prompt = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|user|>17+45<|assistant|>"
    quiet = [{"role": "system", "content": "Be brief."}, user]
    assert prompt == tokenizer.apply_chat_template(
        quiet, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert tokenizer.apply_chat_template([user], tokenize=False) == "<|user|>17+45"
    assert tokenizer.apply_chat_template([user, answer], tokenize=False) == f"{prompt}=62{END}"


def test_training_text_equals_chat_template_with_loss_on_completion_only() -> None:
    tokenizer = make_tokenizer()
    solutions = [("17+45+82", "=44"), ("17+45+82", "17+45=62+82=44")]
    ids, labels = encode(tokenizer, solutions)
    for row, target, (problem, completion) in zip(ids, labels, solutions, strict=True):
        chat = [{"role": "user", "content": problem}, {"role": "assistant", "content": completion}]
        expected = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
        assert row[: len(expected)].tolist() == expected
        assert set(row[len(expected) :].tolist()) <= {tokenizer.pad_token_id}
        assert tokenizer.decode(target[target != IGNORE_INDEX]) == completion + END
        assert (target[: len(problem) + 2] == IGNORE_INDEX).all()


def test_training_reads_pretraining_pool_only_and_worked_solutions_first() -> None:
    seen = list(batches(TINY, seed=0))
    assert len(seen) == TINY.steps
    for step, batch in enumerate(seen):
        for problem, completion in batch:
            assert pool_of("sums", problem) == "pretrain"
            forms = {sums_worked(problem, TINY.dials)} | ({sums_short(problem, TINY.dials)} if step >= 24 else set())
            assert completion in forms
    mixture = [text.startswith("=") for batch in seen[24:] for _, text in batch]
    assert 0.5 < sum(mixture) / len(mixture) < 1.0  # 1 - p_cot = 0.78 of 96


def test_countdown_models_read_countdown_pretraining_pool_in_both_forms() -> None:
    spec = PretrainSpec(
        **{**_fields(TINY), "task": "countdown", "dials": countdown.DIALS, "p_cot": 0.5, "worked_steps": 2}
    )
    seen = list(batches(spec, seed=0))
    forms = [
        "worked"
        if completion == countdown_worked(problem)
        else "short"
        if completion == countdown_short(problem)
        else ""
        for batch in seen
        for problem, completion in batch
    ]
    assert {countdown.pool_of(problem) for batch in seen for problem, _ in batch} == {"pretrain"}
    assert set(forms[:32]) == {"worked"} and {"worked", "short"} == set(forms[32:])


def test_pocket_pretraining_lowers_loss_and_is_reproducible(tmp_path: Path) -> None:
    spec = PretrainSpec(**{**_fields(TINY), "mixture_steps": 0, "worked_steps": 30})
    torch.manual_seed(5)
    first = pretrain(spec, tmp_path / "a", seed=1)
    torch.manual_seed(6)  # the caller's random state must not matter
    again = pretrain(spec, tmp_path / "b", seed=1)
    pretrain(spec, tmp_path / "c", seed=2)
    assert sum(first[-5:]) < 0.75 * sum(first[:5])
    assert first == again
    digest = {run: hashlib.sha256((tmp_path / run / "model.safetensors").read_bytes()).hexdigest() for run in "abc"}
    assert digest["a"] == digest["b"] != digest["c"]
    assert SPECIAL[0] in AutoTokenizer.from_pretrained(tmp_path / "a").get_vocab()


def _fields(spec: PretrainSpec) -> dict:  # type: ignore[type-arg]
    return {name: getattr(spec, name) for name in spec.__slots__}


def test_pretrained_model_is_measured_and_has_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POCKET, "tiny", TINY)
    steps: list[int] = []
    measured = pretrain_pocket("tiny", tmp_path, progress=lambda done, total, loss: steps.append(done))
    assert steps == list(range(1, 31))
    assert measured.problems > 0
    assert f"| {measured.pass_rate:.1%} |" in (tmp_path / "tiny" / "README.md").read_text()
