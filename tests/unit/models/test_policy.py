"""Loading, saving, fingerprinting, refusing; and the shapes that costs are computed from."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers import models as tokenizer_models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from headwater.errors import UserError
from headwater.losses.objectives import objective_of
from headwater.models import folder as folder_module
from headwater.models.folder import ModelFolder, content_hash
from headwater.models.load import LoadOptions, load_policy
from headwater.models.policy import Policy
from headwater.models.save import save_policy
from headwater.models.shape import Shape
from headwater.models.tokenizer import refuse_different_tokens, refuse_different_widths
from headwater.teachers.scoring import logp_of
from headwater.training.update import make_optimizer, update
from tiny import (
    CPU,
    MODELS,
    same_bits,
    sampled_rows,
    stage_of,
    tiny_folder,
    tiny_model,
    tiny_policy,
    weights_of,
)
from tools.pretrain.pocket import ALPHABET, SPECIAL, UNKNOWN, make_tokenizer

FIELD = "models.student"


def loaded(folder: Path, frozen: bool = False, **settings: Any) -> Policy:
    return load_policy(
        ModelFolder.open(str(folder), FIELD), LoadOptions(MODELS.model_copy(update=settings), CPU, frozen)
    )


def test_save_policy_keeps_log_probs(tmp_path: Path, architecture: str) -> None:
    for tied in (True, False):
        policy = tiny_policy(architecture, seed=3, tied=tied)
        rollouts = [row.rollout for row in sampled_rows(policy)]
        save_policy(policy, tmp_path / str(tied), torch.float32)
        again = loaded(tmp_path / str(tied))
        assert again.model.config.tie_word_embeddings is tied
        assert same_bits(weights_of(again), weights_of(policy))
        for ours, expected in zip(logp_of(again, rollouts, 4096), logp_of(policy, rollouts, 4096), strict=True):
            # Not to the bit: weights read from a file lie at other offsets, and matrix products care about those.
            torch.testing.assert_close(ours, expected, rtol=0.0, atol=1e-5)
        # An untied head that is not the embedding is really there.
        same = torch.equal(again.model.lm_head.weight, again.model.get_input_embeddings().weight)
        assert same is tied


def test_saved_folder_loads_with_auto_classes(tmp_path: Path) -> None:
    policy = tiny_policy("qwen3", seed=3)
    save_policy(policy, tmp_path / "model", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = torch.tensor([[1, 6, 15, 7, 2]])
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, policy.model(input_ids=ids).logits)
    assert tokenizer("17+45")["input_ids"] == policy.tokenizer("17+45")["input_ids"]
    assert tokenizer.chat_template == policy.tokenizer.chat_template
    assert not [path for path in (tmp_path / "model").iterdir() if path.suffix in (".bin", ".pt", ".pkl")]


def test_save_in_bfloat16_rounds_file_and_not_policy(tmp_path: Path) -> None:
    policy = tiny_policy(seed=3)
    before = weights_of(policy)
    save_policy(policy, tmp_path / "model", torch.bfloat16)
    assert all(
        torch.equal(tensor, before[name]) and tensor.dtype == torch.float32
        for name, tensor in weights_of(policy).items()
    )
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    again = weights_of(loaded(tmp_path / "model"))
    for name, tensor in before.items():
        assert torch.equal(again[name], tensor.to(torch.bfloat16).float())


def test_bfloat16_recipe_trains_float32_weights(qwen3_folder: Path) -> None:
    policy = loaded(qwen3_folder, dtype="bfloat16")
    assert {parameter.dtype for parameter in policy.model.parameters()} == {torch.float32}
    assert policy.compute_dtype == torch.bfloat16
    ids, mask = torch.tensor([[1, 6, 2]]), torch.ones(1, 3, dtype=torch.long)
    assert policy.logits(policy.hidden(ids, mask)).dtype == torch.bfloat16
    before = weights_of(policy)["model.layers.0.mlp.down_proj.weight"]
    stage = stage_of("grpo", optim={"lr": 1e-6})
    update(policy, make_optimizer(policy, stage.optim), sampled_rows(policy), objective_of(stage), 4096)
    after = weights_of(policy)["model.layers.0.mlp.down_proj.weight"]
    # Adam's first step has the size of the rate, 1e-6: visible in float32, nothing in bfloat16 for nearly every weight.
    assert (after - before).abs().median().item() == pytest.approx(1e-6, rel=0.2)
    assert (after.bfloat16() == before.bfloat16()).float().mean().item() > 0.99


def test_frozen_model_has_compute_dtype_and_no_gradient(qwen3_folder: Path) -> None:
    policy = loaded(qwen3_folder, frozen=True, dtype="bfloat16")
    assert {(parameter.dtype, parameter.requires_grad) for parameter in policy.model.parameters()} == {
        (torch.bfloat16, False)
    }


def test_dropout_is_off_with_gradient_checkpointing(tmp_path: Path) -> None:
    """With dropout the trainer's log-probs would not be the sampler's."""
    folder = tiny_folder(tmp_path / "model", "qwen3", attention_dropout=0.5)
    policy = loaded(folder, gradient_checkpointing=True)
    assert policy.model.training
    ids, mask = torch.tensor([[1, 6, 15, 7, 2]]), torch.ones(1, 5, dtype=torch.long)
    assert torch.equal(policy.hidden(ids, mask), policy.hidden(ids, mask))


def test_gradient_checkpointing_keeps_gradient(qwen3_folder: Path) -> None:
    grads = []
    for saving in (False, True):
        policy = loaded(qwen3_folder, gradient_checkpointing=saving)
        stage = stage_of("sft")
        rows = sampled_rows(tiny_policy(seed=1))
        update(policy, torch.optim.SGD(policy.model.parameters(), lr=0.0), rows, objective_of(stage), 4096)
        grads.append({name: parameter.grad for name, parameter in policy.model.named_parameters()})
    for name, gradient in grads[0].items():
        torch.testing.assert_close(grads[1][name], gradient, rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------------------------------------------------ refusals


def test_missing_model_is_refused_by_field(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^models\.student: /nowhere/at/all is no folder here$"):
        ModelFolder.open("/nowhere/at/all", FIELD)
    with pytest.raises(
        UserError, match=r"^models\.teacher: no pocket model 'pocket:qwen9'; there are .*pocket:qwen3-student"
    ):
        ModelFolder.open("pocket:qwen9", "models.teacher")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"^models\.student: the folder .*empty holds no config\.json"):
        ModelFolder.open(str(tmp_path / "empty"), FIELD)


def test_every_pocket_name_resolves_to_its_folder(pocket_folder: Path) -> None:
    names = sorted(path.name for path in pocket_folder.iterdir() if path.is_dir())
    assert "qwen3-student" in names
    assert [ModelFolder.open(f"pocket:{name}", FIELD).path for name in names] == [
        str(pocket_folder / name) for name in names
    ]


def test_pickled_weights_are_never_read(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    torch.save(tiny_model().state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"models\.student: .* holds no \*\.safetensors; other weight formats are not read"
    ):
        loaded(folder)


@pytest.mark.parametrize("damage", ["weights cut short", "config is not JSON", "no tokenizer"])
def test_damaged_folder_is_refused_by_field_and_folder(tmp_path: Path, damage: str) -> None:
    folder = tiny_folder(tmp_path / "model")
    if damage == "weights cut short":
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    elif damage == "config is not JSON":
        (folder / "config.json").write_text('{"model_type": ')
    else:
        for path in folder.glob("tokenizer*"):
            path.unlink()
    with pytest.raises(UserError) as refused:
        loaded(folder)
    message = str(refused.value)
    assert (
        message.startswith(
            f"models.student: {'the tokenizer of ' * (damage == 'no tokenizer')}{folder} cannot be loaded ("
        )
        and "\n" not in message
        and len(message) < 500
    )


def words(first: str) -> PreTrainedTokenizerFast:
    """The pocket tokenizer with two digits swapped: the same width, other ids."""
    letters = ALPHABET.replace("0", "?").replace(first, "0").replace("?", first, 1)
    backend = Tokenizer(
        tokenizer_models.BPE(
            vocab={t: i for i, t in enumerate(dict.fromkeys((*SPECIAL, *letters)))}, merges=[], unk_token=UNKNOWN
        )
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", unk_token=UNKNOWN)


def test_teacher_with_other_ids_of_equal_width_is_refused() -> None:
    ours, other = make_tokenizer(), words("7")
    fields = (FIELD, "models.teacher")
    refuse_different_tokens(ours, make_tokenizer(), fields, ["17+45"])
    with pytest.raises(
        UserError, match=r"models\.student and models\.teacher: .* different ids for the same text '17\+45\+82\+03'"
    ):
        refuse_different_tokens(ours, other, fields)


def test_tokenizer_difference_in_user_problems_is_detected() -> None:
    ours, other = make_tokenizer(), make_tokenizer()
    other.add_tokens(["9/9"])
    fields = (FIELD, "models.teacher")
    refuse_different_tokens(ours, other, fields)
    with pytest.raises(UserError, match=r"different ids for the same text '9/9\+1'"):
        refuse_different_tokens(ours, other, fields, ["1+1", "9/9+1"])


def test_output_layers_of_different_width_are_refused_with_remedy() -> None:
    wide = tiny_policy(vocab_size=40)
    refuse_different_widths(tiny_policy(), tiny_policy("llama"), (FIELD, "models.teacher"))
    with pytest.raises(
        UserError, match=r"models\.teacher: their output layers have 30 and 40 columns.*resize_token_embeddings"
    ):
        refuse_different_widths(tiny_policy(), wide, (FIELD, "models.teacher"))


# --------------------------------------------------------------------------------------------------------- fingerprints


def test_fingerprint_depends_on_content_not_path(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "one")
    shutil.copytree(folder, tmp_path / "two")
    assert (
        ModelFolder.open(str(folder), "models.student").fingerprint
        == ModelFolder.open(str(tmp_path / "two"), "models.student").fingerprint
        == loaded(folder).fingerprint
    )
    (tmp_path / "two" / "README.md").write_text("A card changes no outcome.")
    assert (
        ModelFolder.open(str(tmp_path / "two"), "models.student").fingerprint
        == ModelFolder.open(str(folder), "models.student").fingerprint
    )


@pytest.mark.parametrize("what", ["model.safetensors", "config.json", "generation_config.json", "chat_template.jinja"])
def test_fingerprint_depends_on_every_file_affecting_results(tmp_path: Path, what: str) -> None:
    folder = tiny_folder(tmp_path / "model")
    before = ModelFolder.open(str(folder), "models.student").fingerprint
    content = bytearray((folder / what).read_bytes())
    content[-3] ^= 1
    (folder / what).write_bytes(bytes(content))
    assert ModelFolder.open(str(folder), "models.student").fingerprint != before


def test_fingerprint_depends_on_weights(tmp_path: Path) -> None:
    fingerprints = {
        ModelFolder.open(str(tiny_folder(tmp_path / str(seed), seed=seed)), "models.student").fingerprint
        for seed in range(3)
    }
    assert len(fingerprints) == 3
    assert (
        ModelFolder.open("Qwen/Qwen3-1.7B", "models.student").fingerprint
        != ModelFolder.open("Qwen/Qwen3-8B", "models.student").fingerprint
    )


def test_training_node_may_name_fingerprint(qwen3_folder: Path) -> None:
    assert (
        load_policy(
            ModelFolder.open(str(qwen3_folder), FIELD), LoadOptions(MODELS, CPU, frozen=True, fingerprint="node-abc")
        ).fingerprint
        == "node-abc"
    )


def test_stop_ids_join_generation_config_config_and_tokenizer(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    assert loaded(folder).stop_ids == (3,)
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": [3, 8]}))
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"eos_token_id": 9}))
    assert loaded(folder).stop_ids == (3, 8, 9)


def test_tokenizer_without_padding_pads_with_valid_id() -> None:
    policy = tiny_policy()
    policy.tokenizer.pad_token = None
    assert replace(policy).pad_id == 0


@pytest.mark.parametrize(
    ("settings", "frozen", "named"),
    [
        ({}, False, ["models.dtype=bfloat16", "models.gradient_checkpointing=true", "models.lora={r: 16}"]),
        ({"gradient_checkpointing": True}, False, ["models.dtype=bfloat16", "models.lora={r: 16}"]),
        ({"dtype": "bfloat16"}, False, ["models.gradient_checkpointing=true", "models.lora={r: 16}"]),
        ({}, True, ["models.dtype=bfloat16"]),
        ({"dtype": "bfloat16"}, True, []),
    ],
)
def test_memory_advice_lists_settings_not_yet_on(
    settings: dict[str, Any], frozen: bool, named: list[str], pocket_folder: Path
) -> None:
    models = MODELS.model_copy(update=settings)
    folder = ModelFolder.open(str(pocket_folder / "qwen3-student"), FIELD)
    assert load_policy(folder, LoadOptions(models, CPU, frozen)).memory_settings == named


# --------------------------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "settings", [{}, {"num_key_value_heads": 4}, {"head_dim": 16}, {"hidden_size": 64, "vocab_size": 200}]
)
def test_parameter_count_from_config_is_within_one_percent(
    architecture: str, tied: bool, settings: dict[str, int]
) -> None:
    model = tiny_model(architecture, tied=tied, **settings)
    counted = sum(weight.numel() for weight in model.parameters())
    assert Shape.from_config(model.config).parameters == pytest.approx(counted, rel=0.01)


def test_shipped_model_sizes_equal_their_configs(pocket_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(pocket_folder / "qwen3-student")
    counted = sum(weight.numel() for weight in model.parameters())
    assert ModelFolder.open(str(pocket_folder / "qwen3-student"), "models.student").shape.parameters == pytest.approx(
        counted, rel=0.01
    )


def test_weights_file_fingerprint_covers_all_bytes_or_spread_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    content = bytes(range(1, 256)) * (12 << 10)  # 3 MiB

    def named(place: int, many: int = 1) -> str:
        path.write_bytes(content[:place] + bytes(many) + content[place + many :])
        return content_hash(tmp_path)

    assert named(1_500_001) != named(0, 0)
    monkeypatch.setattr(folder_module, "FULL_HASH_BYTES", 1 << 20)
    monkeypatch.setattr(folder_module, "BLOCK_BYTES", 1 << 8)
    assert all(named(place) != named(0, 0) for place in (1, len(content) - 2))
    assert all(named(place, 1 << 13) != named(0, 0) for place in range(1 << 20, 2 << 20, 100_003))  # as a tensor would
    path.write_bytes(content + b"x")
    longer = content_hash(tmp_path)
    assert longer != named(0, 0)
