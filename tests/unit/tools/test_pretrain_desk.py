"""Desk models: tokenizer, packed pretraining with resume, model folders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

import runs
from headwater.config.builtin import builtin_text
from headwater.config.recipe import parse_recipe
from headwater.errors import UserError
from headwater.models.folder import ModelFolder
from headwater.storage.node_dir import NodeDir
from headwater.tasks.pools import pool_of
from tiny import CPU
from tiny_desk import TINY, TOKENIZER, use_tiny_desk
from tools.pretrain import desk
from tools.pretrain.__main__ import main
from tools.pretrain.desk import CombinedOptimizer, batches, pack, pretrain_desk, train
from tools.pretrain.desk_models import (
    DESK,
    SHIPPED,
    make_tokenizer,
    model_config,
    with_steps,
)
from tools.pretrain.pocket import ASSISTANT, END, IGNORE_INDEX, SPECIAL, USER, make_optimizers


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return use_tiny_desk(tmp_path, monkeypatch)


# What ships -----------------------------------------------------------------------------------------------------------


def test_configs_and_tokenizer_ship_without_weights_below_one_megabyte() -> None:
    files = [file for file in SHIPPED.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 1_000_000
    assert {file.suffix for file in files} == {".json", ".jinja"}
    assert {folder.name for folder in SHIPPED.iterdir() if folder.is_dir()} == set(DESK)
    for what in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert len({(SHIPPED / name / what).read_bytes() for name in DESK}) == 1


def test_shipped_shapes_equal_specs_and_stated_sizes() -> None:
    parameters = {name: ModelFolder.open(f"desk:{name}", "models.student").shape.parameters for name in DESK}
    # A layer of the student: 384·64·(2·6 + 2·2) for attention, 3·384·1152 for the MLP, 2·384 + 2·64 for norms; 8 layers, the last
    # norm, and 384·4096 tied.
    layer = 384 * 64 * 16 + 3 * 384 * 1152 + 2 * 384 + 2 * 64
    assert parameters["student"] == 8 * layer + 384 + 384 * 4096 == 15_342_976
    assert 10e6 < parameters["student"] < 30e6
    assert all(30e6 < parameters[name] < 150e6 for name in DESK if name != "student")
    for name, spec in DESK.items():
        config = AutoModelForCausalLM.from_config(model_config(replace(spec, layers=1), TOKENIZER)).config
        shipped = AutoConfig.from_pretrained(SHIPPED / name)
        assert (config.hidden_size, config.head_dim, config.vocab_size) == (shipped.hidden_size, 64, 4096)
        assert shipped.num_hidden_layers == spec.layers and shipped.eos_token_id == TOKENIZER.eos_token_id


def test_desk_tokenizer_is_reproducible() -> None:
    made = make_tokenizer()
    assert made.backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()
    assert len(made) == 4096


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=60))
def test_desk_tokenizer_round_trips_any_text(text: str) -> None:
    ids = TOKENIZER(text)["input_ids"]
    assert TOKENIZER.decode(ids, clean_up_tokenization_spaces=False) == text
    assert TOKENIZER.unk_token_id not in ids


def test_tokenizer_splits_digits_and_keeps_problem_words_whole() -> None:
    tokens = TOKENIZER.convert_ids_to_tokens(TOKENIZER("Mia picked 3*14=42 apples.")["input_ids"])
    assert tokens == ["Mia", "Ġpicked", "Ġ", "3", "*", "1", "4", "=", "4", "2", "Ġapples", "."]
    assert [TOKENIZER.convert_tokens_to_ids(token) for token in SPECIAL] == [0, 1, 2, 3, 4]
    # General English costs fewer than half as many tokens as it has letters.
    prose = "Labelled problems are scarce, so they are spent where exploration is most productive."
    assert len(TOKENIZER(prose)["input_ids"]) < len(prose) / 2


# Pretraining ----------------------------------------------------------------------------------------------------------


def test_packed_rows_equal_chat_template_with_loss_on_completions_only() -> None:
    pairs = [("Mia had 3 beads.", "The answer is 3."), ("Tom?", "Tom had 2*2=4 beads. The answer is 4."), ("x", "y")]
    wanted = []
    for problem, completion in pairs:
        chat = [{"role": "user", "content": problem}, {"role": "assistant", "content": completion}]
        wanted.append(TOKENIZER.apply_chat_template(chat, return_dict=True)["input_ids"])
    width = len(wanted[0]) + len(wanted[1]) + 1  # the third does not fit beside them
    ids, labels, positions = pack(TOKENIZER, pairs, width)
    assert ids.shape == labels.shape == positions.shape == (2, width)
    assert ids[0].tolist() == [*wanted[0], *wanted[1], TOKENIZER.pad_token_id]
    assert ids[1, : len(wanted[2])].tolist() == wanted[2]
    assert positions[0].tolist() == [*range(len(wanted[0])), *range(len(wanted[1])), 0]
    assert TOKENIZER.decode(labels[0][labels[0] != IGNORE_INDEX]) == "".join(f"{text}{END}" for _, text in pairs[:2])
    assert TOKENIZER.decode(labels[1][labels[1] != IGNORE_INDEX]) == f"y{END}"
    with pytest.raises(ValueError, match="does not fit into rows of 5"):
        pack(TOKENIZER, pairs, 5)


def test_packed_solution_is_scored_as_if_alone() -> None:
    pairs = next(batches(TINY, seed=0))
    ids, _, positions = pack(TOKENIZER, pairs, TINY.width)
    assert len(ids) < len(pairs)  # so that some do share a row
    torch.manual_seed(1)
    learner = AutoModelForCausalLM.from_config(model_config(replace(TINY, layers=2), TOKENIZER), dtype=torch.float32)
    learner.requires_grad_(False)
    for parameter in learner.parameters():  # at the usual scale all logits are near 0, and a leak would hardly show
        parameter.mul_(5.0)
    together = learner(input_ids=ids, position_ids=positions, use_cache=False).logits
    starts = (positions == 0).nonzero().tolist()
    ends = [column for row, column in starts[1:] if column] + [TINY.width]
    row, begin, end = starts[1][0], starts[1][1], ends[1]
    assert row == 0 and begin > 0
    alone = learner(input_ids=ids[row : row + 1, begin:end], use_cache=False).logits[0]
    assert (together[row, begin:end] - alone).abs().max() < 1e-4 * alone.abs().max()


def test_step_problems_depend_on_seed_and_step_only_even_with_workers() -> None:
    here = list(batches(TINY, seed=5))
    assert len(here) == 6 and len({text for pairs in here for text, _ in pairs}) == 24
    assert list(batches(TINY, seed=5, first=2)) == here[2:]
    assert list(batches(TINY, seed=5, workers=2)) == here
    assert {pool_of("words", text) for pairs in here for text, _ in pairs} == {"pretrain"}
    assert all("=" in completion for pairs in here[:4] for _, completion in pairs)  # worked ones come first


def test_shortened_training_keeps_proportion_of_worked_steps() -> None:
    spec = with_steps(DESK["student"], 12)  # 4000 worked of 4800
    assert (spec.worked_steps, spec.mixture_steps, spec.hidden) == (10, 2, 384)


def test_interrupted_pretraining_resumes_to_same_weights(tmp_path: Path) -> None:
    whole, losses = train(TINY, NodeDir(tmp_path / "whole"), CPU, seed=101)

    def stop(step: int, steps: int, loss: float) -> None:
        if step == 5:
            raise KeyboardInterrupt

    node = NodeDir(tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        train(TINY, node, CPU, 101, stop, checkpoint_every=2)
    assert [path.name for path in node.checkpoints()] == ["000004", "000002"]
    resumed, rest = train(TINY, node, CPU, 101, checkpoint_every=2)
    assert rest == losses[4:]
    again = dict(resumed.named_parameters())
    assert all(torch.equal(weight, again[name]) for name, weight in whole.named_parameters())


def test_gradient_accumulation_weighs_rows_equally(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(TINY, worked_steps=1, mixture_steps=0, batch=8)
    together = train(spec, NodeDir(tmp_path), CPU, seed=101)[1]
    monkeypatch.setattr(desk, "MICROBATCH_ROWS", 1)
    assert len(pack(TOKENIZER, next(batches(spec, 101)), spec.width)[0]) > 1
    assert train(spec, NodeDir(tmp_path), CPU, seed=101)[1] == pytest.approx(together, rel=1e-3)


def test_combined_optimizer_state_keeps_its_parts_apart() -> None:
    learner = torch.nn.ModuleDict({"layer": torch.nn.Linear(3, 2), "embed": torch.nn.Embedding(4, 3)})
    parts = make_optimizers(learner, 0.1)  # type: ignore[arg-type]
    learner["layer"](learner["embed"](torch.tensor([1, 2]))).sum().backward()
    for part in parts:
        part.step()
    config = CombinedOptimizer(parts).state_dict()
    # Muon's one matrix is number 0; AdamW's bias and embedding follow.
    assert {index: sorted(state) for index, state in config["state"].items()} == {
        0: ["momentum_buffer"],
        1: ["exp_avg", "exp_avg_sq", "step"],
        2: ["exp_avg", "exp_avg_sq", "step"],
    }


def test_desk_pretraining_lowers_loss(tmp_path: Path) -> None:
    spec = replace(TINY, worked_steps=24, mixture_steps=0, batch=8)
    _, losses = train(spec, NodeDir(tmp_path), CPU, seed=101)
    # ln 4096 = 8.3 at first. The sentences' form alone, with names and numbers drawn at random, leaves far less.
    assert losses[0] > 8.0 and sum(losses[-5:]) / 5 < 5.0


# The recipe -----------------------------------------------------------------------------------------------------------


def test_desk_name_resolves_to_local_folder_with_weights(elsewhere: Path) -> None:
    assert ModelFolder.open("desk:teacher", "models.teacher").path == str(SHIPPED / "teacher")
    with pytest.raises(UserError, match="desk:teacher has no weights yet"):
        ModelFolder.open("desk:teacher", "models.teacher").require_weights()
    (elsewhere / "desk" / "teacher").mkdir(parents=True)
    assert ModelFolder.open("desk:teacher", "models.teacher").path == str(SHIPPED / "teacher")
    (elsewhere / "desk" / "teacher" / "model.safetensors").touch()
    assert ModelFolder.open("desk:teacher", "models.teacher").path == str(Path("desk/teacher"))
    with pytest.raises(
        UserError, match="no desk model 'desk:giant'; there are desk:student, desk:teacher, desk:teacher-large"
    ):
        ModelFolder.open("desk:giant", "models.teacher")


def test_existing_model_is_kept_and_changed_spec_rebuilds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk, "MEASURED_PROBLEMS", 3)
    monkeypatch.setattr(desk, "MEASURED_TOKENS", 8)
    spec, steps = with_steps(TINY, 2), []

    def seen(step: int, total: int, loss: float) -> None:
        steps.append((step, total))

    first = pretrain_desk("student", tmp_path, spec, CPU, progress=seen)
    assert pretrain_desk("student", tmp_path, spec, CPU, progress=seen) == first
    assert steps == [(1, 2), (2, 2)]
    pretrain_desk("student", tmp_path, with_steps(TINY, 3), CPU, progress=seen)
    assert steps[2:] == [(1, 3), (2, 3), (3, 3)]
    assert first["its own difficulty"].problems == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("house",), "No such command 'house'"),
        (("desk", "--models", "giant"), "--models giant: no such desk model; there are student,"),
        (
            ("pocket", "--models", "qwen3-student,qwen9"),
            "--models qwen9: no such pocket model; there are qwen3-student,",
        ),
        (("pocket", "--steps", "9"), "No such option: --steps"),
    ],
)
def test_pretraining_refuses_invalid_options_in_one_sentence(
    words: tuple[str, ...], message: str, elsewhere: Path
) -> None:
    refused = runs.call(*words, entry=main)
    assert refused.code == 2 and message in refused.err
    assert not any(elsewhere.iterdir())


def test_recipe_evaluates_at_its_own_difficulty_and_beyond() -> None:
    recipe = parse_recipe(yaml.safe_load(builtin_text("desk")), "desk")
    dials = {name: source.generate.dials for name, source in recipe.data.evals.items() if source.generate}
    assert dials == {"in_distribution": {"min_ops": 2, "max_ops": 6}, "harder": {"min_ops": 7, "max_ops": 10}}
    assert recipe.labels.budget == 1000 and recipe.models.dtype == "bfloat16"
    grouped = [getattr(recipe.stages, stage).group_size for stage in ("teacher_rl", "warmup", "opd", "student_rl")]
    assert grouped == [8, 8, 8, 8]
    prompt = TOKENIZER.apply_chat_template(
        [{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == f"{USER}x{ASSISTANT}"
