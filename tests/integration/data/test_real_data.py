"""GSM8K and MATH-500 in their published form, from the command line to the report, with a tiny model folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from forked_runs import Place, warm_runs
from headwater.config.prompt import Prompt
from headwater.models.prompts import Prompter
from headwater.types import Problem
from runs import WHOLE_ARM, CommandResult, call, load_json, node, nodes, rows, temporary

DATA = Path(__file__).parents[4] / "shared" / "data"
GSM8K, MATH500 = DATA / "gsm8k" / "train.jsonl", DATA / "math500" / "test.jsonl"
pytestmark = pytest.mark.skipif(
    not (GSM8K.is_file() and MATH500.is_file()), reason=f"the real data is not there: {GSM8K} and {MATH500}"
)

# Qwen3's: without thinking the assistant's turn begins with an empty thought.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def questions(count: int) -> Iterator[str]:
    with GSM8K.open(encoding="utf-8") as file:
        for line in islice(file, count):
            yield json.loads(line)["question"]


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and what GSM8K often puts together: every text has ids, none is unknown."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        questions(500), trainers.BpeTrainer(vocab_size=700, special_tokens=special, initial_alphabet=alphabet)
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    wrapped.chat_template = TEMPLATE
    return wrapped


@cache
def folder(name: str, width: int, seed: int) -> Path:
    """A small Qwen3 that knows nothing, as a plain model folder."""
    words, path = tokenizer(), temporary() / name
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(words), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id)
    model.save_pretrained(path)
    words.save_pretrained(path)
    return path


def student() -> Path:
    return folder("student", 32, 0)


def recipe(path: Path, **more: object) -> Path:
    """What a user would write to run on GSM8K with folders of their own."""
    sparse: dict[str, object] = {
        "objective": "grpo",
        "steps": 2,
        "batch_size": 8,
        "group_size": 4,
        "sampling": {"max_tokens": 12},
    }
    sparse["sparse"] = {"kl_coef": 0.0}  # without a pull to the start, a step without signal is none
    dense = {"steps": 2, "batch_size": 8, "group_size": 1, "sampling": {"max_tokens": 12}}
    wanted = {
        "name": "mine",
        "task": "maths",
        "models": {"student": str(student()), "teacher": str(folder("teacher", 48, 1))},
        "data": {"labeled": str(GSM8K), "evals": {"math500": {"path": str(MATH500), "limit": 4}}},
        "labels": {"budget": 32},
        "stages": {
            "teacher_rl": sparse,
            "warmup": {**dense, "objective": "forward_kl"},
            "opd": {**dense, "objective": "opd"},
            "student_rl": sparse,
        },
        "evaluate": {"samples": 2, "sampling": {"max_tokens": 12}},
        "compute": {"threads": 1, "grader_workers": 1},
    }
    path.write_text(yaml.safe_dump(wanted | more), encoding="utf-8")
    return path


def sentence(result: CommandResult) -> str:
    """The one line in which the program says why it ended."""
    (line,) = [line for line in result.err.splitlines() if line.startswith("headwater: ")]
    return line


@pytest.mark.usefixtures("undrawn")
def test_gsm8k_run_without_signal_stops_and_counts_wasted_labels(tmp_path: Path) -> None:
    path, out = recipe(tmp_path / "mine.yaml"), tmp_path / "out"
    result = call("run", path, *WHOLE_ARM, "--out", out, "--set", "guards.patience=2")
    assert result.code == 4, result.err
    why = sentence(result)
    assert "teacher_rl, step 2 of 2: no informative group in 2 steps, so reward gives no gradient: " in why
    assert "% of the completions were cut at max_tokens = " in why
    assert "4 labels were used; raise stages.teacher_rl" in why  # it was the last step
    assert "set guards.no_signal=continue to train on" in why
    assert "Traceback" not in result.err
    assert not list(out.glob("nodes/teacher_rl*/DONE")) and list(out.glob("nodes/base_teacher*/DONE"))
    # What the sentence advises works in the same folder. The teacher has random weights and is near uniform.
    result = call(
        "run",
        path,
        *WHOLE_ARM,
        "--out",
        out,
        "--set",
        "guards.no_signal=continue",
        "--set",
        "guards.teacher_uniform=warn",
        "--json",
    )
    assert result.code == 0, result.err
    assert [path_.name.split(".")[0] for path_ in nodes(out, "bridge_rl")] == [
        "teacher_rl", "teacher_rollouts", "warmup", "opd", "student_rl",
    ]  # fmt: skip
    report = json.loads(result.out)
    assert report == load_json(out / "report.json")
    # Labels were spent and had no effect: no group was informative, no token was trained on them.
    arm = report["arms"]["bridge_rl"]
    assert arm["labels"] == {"distinct": 8, "checks": 32}
    for stage in ("teacher_rl", "student_rl"):
        for row in rows(node(out, "bridge_rl", stage) / "metrics.jsonl"):
            assert (row["informative"], row["tokens_trained"], row["updates"]) == (0.0, 0, 0)
    for stage in ("warmup", "opd"):
        assert all(row["tokens_trained"] > 0 for row in rows(node(out, "bridge_rl", stage) / "metrics.jsonl"))
    assert "Labels had no effect in bridge_rl (8 labels): rewards were equal within every group." in report["verdict"]
    assert "In bridge_rl the student was distilled from the teacher as it was before teacher_rl" in report["verdict"]
    assert "Labels had no effect" in (out / "report.html").read_text(encoding="utf-8")
    # Half of the budget each, and none of the evaluation's problems.
    spent = {
        row["stage"]: set(row["labels"])
        for row in rows(out / "ledger.jsonl")
        if row["labels"] and row["purpose"] == "train"
    }
    assert not spent["teacher_rl"] & spent["student_rl"]


def test_math500_evaluation_has_avg_pass_and_intervals(tmp_path: Path) -> None:
    graded = tmp_path / "graded.jsonl"
    options = ["--limit", "20", "--samples", "2", "--max-tokens", "12", "--out", graded]
    result = call("eval", student(), "--data", MATH500, *options)
    assert result.code == 0, result.err
    assert result.out.startswith("20 problems, 40 completions")
    for measure in ("avg@2", "pass@2", "95% interval", "verdicts", "cut at the token limit"):
        assert measure in result.out
    assert len(rows(graded)) == 40
    first = json.loads(MATH500.read_text(encoding="utf-8").splitlines()[0])["problem"]
    assert rows(graded)[0]["problem_id"] == Problem.of(first, "").id
    answer = json.loads(call("eval", student(), "--data", MATH500, *options, "--json").out)
    assert answer["measures"]["avg@2"]["mean"] == sum(row["correct"] for row in rows(graded)) / 40
    assert sum(answer["reasons"].values()) == 40


def test_user_grader_and_files_work_from_current_directory(tmp_path: Path) -> None:
    (tmp_path / "my_graders.py").write_text(
        "def short(gold, completion):\n    return len(completion) % 2 == 0, 'by length'\n", encoding="utf-8"
    )
    with GSM8K.open(encoding="utf-8") as file:
        (tmp_path / "mine.jsonl").write_text("".join(islice(file, 40)), encoding="utf-8")
    recipe(
        tmp_path / "mine.yaml",
        task="my_graders:short",
        data={"labeled": "mine.jsonl", "evals": {"math500": {"path": str(MATH500), "limit": 4}}},
    )
    words = ("run", "mine.yaml", "--out", "out", "--arm", "direct_grpo")
    done = warm_runs().run(*words, whole=True, undrawn=True, place=Place(tmp_path))
    assert done.code == 0, done.err
    texts = rows(node(tmp_path / "out", "direct_grpo", "student_rl") / "rollouts/000001.jsonl")
    assert [row["correct"] for row in texts] == [len(row["completion"]) % 2 == 0 for row in texts]
    assert {row["reason"] for row in texts} == {"by length"}
    assert 0 < sum(row["correct"] for row in texts) < len(texts)


@pytest.mark.usefixtures("undrawn")
def test_thinking_template_follows_prompt_thinking_setting(tmp_path: Path) -> None:
    words = AutoTokenizer.from_pretrained(student())
    problem = Problem.of("What is 1 + 1?", "here")
    on, off = (Prompter(words, Prompt(thinking=value)) for value in (True, False))
    assert on.text(problem).endswith("<|im_start|>assistant\n")
    assert off.text(problem) == on.text(problem) + "<think>\n\n</think>\n\n"
    assert words.decode(off.ids(problem)) == off.text(problem)
    ends = {}
    for thinking in ("true", "false"):
        out = tmp_path / thinking
        path = recipe(tmp_path / "mine.yaml", guards={"no_signal": "continue"}, labels={"budget": 8})
        changes = ["--set", f"prompt.thinking={thinking}", "--set", "data.labeled.limit=40"]
        result = call("run", path, "--out", out, "--arm", "warmup_only", *changes)
        assert result.code == 0, result.err
        first = rows(node(out, "warmup_only", "teacher_rollouts") / "cache/rollouts.jsonl")[0]
        ends[thinking] = words.decode(first["prompt_ids"])
    assert ends["true"].endswith("<|im_start|>assistant\n")
    assert ends["false"].endswith("</think>\n\n")
