"""Real checkpoints in vLLM and lm-evaluation-harness: the same texts and verdicts as here (`make real`, in the bench environment)."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from headwater.models.folder import ModelFolder
from headwater.models.load import LoadOptions, load_policy
from headwater.models.save import save_policy
from headwater.tasks.answer_forms import hashes
from headwater.teachers.scoring import logp_of
from headwater.types import problem_id
from runs import call, rows
from tiny import CPU, MODELS, rollout_of
from tools.real.__main__ import CACHE

if importlib.util.find_spec("vllm") is not None:
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # compiling takes minutes on a CPU
MODEL = (CACHE / "SmolLM2-135M-Instruct").resolve()
GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "test.jsonl"
PROBLEMS = int(os.environ.get("HEADWATER_REAL_PROBLEMS", "100"))
"""Each takes 5 to 7 seconds of processor time, on both sides together."""
MAX_TOKENS = 160
TEMPLATE = "{problem}\nThink step by step, briefly. End with a line that says #### and then the number alone."

pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(
        not (MODEL / "config.json").is_file(), reason=f"{MODEL} is not there: `make real` fetches it; NOT tested"
    ),
]
needs_problems = pytest.mark.skipif(not GSM8K.is_file(), reason=f"{GSM8K} is not there; NOT tested")


def needs(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed here: `make real` tests it in .venv-bench")


# Filters and metric are those of the harness's own task gsm8k.
TASK = r"""
task: gsm8k_chat
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["<|im_end|>"], do_sample: false, max_gen_toks: MAX_TOKENS}
filter_list:
  - name: strict-match
    filter: [{function: regex, regex_pattern: '#### (\-?[0-9\.\,]+)'}, {function: take_first}]
  - name: flexible-extract
    filter:
      - {function: regex, group_select: -1, regex_pattern: '(-?[$0-9.,]{2,})|(-?[0-9]+)'}
      - {function: take_first}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
    ignore_punctuation: false
    regexes_to_ignore: [',', '\$', '(?s).*#### ', '\.$']
metadata: {version: 1}
"""


def harness_samples(data: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """By problem: the harness's greedy text, and its verdict under each filter."""
    import lm_eval

    folder.mkdir()
    (folder / "task.yaml").write_text(TASK.replace("DATA", str(data)).replace("MAX_TOKENS", str(MAX_TOKENS)))
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={MODEL},dtype=float32",
        tasks=["gsm8k_chat"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(folder)),
        apply_chat_template=True,
        device="cpu",
        batch_size=10,
        bootstrap_iters=0,
    )
    samples: dict[str, dict[str, Any]] = {}
    for sample in results["samples"]["gsm8k_chat"]:
        entry = samples.setdefault(problem_id(sample["doc"]["question"]), {"text": sample["resps"][0][0]})
        entry[sample["filter"]] = bool(sample["exact_match"])
    return samples


@needs("lm_eval")
@needs_problems
def test_greedy_gsm8k_evaluation_agrees_with_harness_on_every_problem(tmp_path: Path) -> None:
    with GSM8K.open(encoding="utf-8") as file:
        problems = [json.loads(line) for line in islice(file, PROBLEMS)]
    data = tmp_path / "gsm8k.jsonl"
    data.write_text(
        "".join(
            json.dumps({**row, "prompt": TEMPLATE.replace("{problem}", row["question"])}) + "\n" for row in problems
        )
    )
    started = time.perf_counter()
    options = ("--temperature", "0", "--max-tokens", str(MAX_TOKENS), "--batch", "10", "--template", TEMPLATE)
    columns = ("--problem", "question", "--answer", "answer")
    result = call("eval", MODEL, "--data", data, *options, *columns, "--out", tmp_path / "rows.jsonl")
    assert result.code == 0, result.err
    middle = time.perf_counter()
    harness, ours = (
        harness_samples(data, tmp_path / "tasks"),
        {row["problem_id"]: row for row in rows(tmp_path / "rows.jsonl")},
    )
    print(result.out)
    print(
        f"seconds a problem: {(middle - started) / PROBLEMS:.2f} here, {(time.perf_counter() - middle) / PROBLEMS:.2f} by the harness"
    )
    assert harness.keys() == ours.keys() and len(ours) == PROBLEMS
    same = [problem for problem, row in ours.items() if row["text"].strip() == harness[problem]["text"].strip()]
    strict = [problem for problem in same if ours[problem]["strict"] != harness[problem]["strict-match"]]
    lenient = [problem for problem in same if ours[problem]["correct"] != harness[problem]["flexible-extract"]]
    print(
        f"{len(same)} of {PROBLEMS} texts are equal; verdicts differ on {len(strict)} (strict) and {len(lenient)} (lenient)"
    )
    assert len(same) >= 0.98 * PROBLEMS  # rounding may change a token whose two best logits are equal
    assert strict == []
    assert len(lenient) <= 0.1 * PROBLEMS  # the harness takes the last number of a text, whatever is said of it


@needs("lm_eval")
def test_strict_reading_equals_filter_of_harness() -> None:
    from lm_eval.filters.extraction import RegexFilter

    texts = [
        "6 * 3 = 18\n#### 18",
        "so it is 18.",
        "#### 1,080",
        "#### -5",
        "**18** ###18",
        "####\n18",
        "The answer is #### 7 ",
    ]
    strict = RegexFilter(regex_pattern=r"#### (\-?[0-9\.\,]+)")
    expected = [group[0] for group in strict.apply([[text] for text in texts], [{}] * len(texts))]
    ours = [hashes(text) for text in texts]
    assert ["[invalid]" if answer is None else answer.removeprefix("#### ").strip() for answer in ours] == expected


@needs("vllm")
def test_saved_student_has_equal_log_probs_in_vllm(tmp_path: Path) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import vllm

    policy = load_policy(ModelFolder.open(str(MODEL), "models.student"), LoadOptions(MODELS, CPU, frozen=False))
    with torch.no_grad():
        policy.model.get_input_embeddings().weight.mul_(1.01)  # a student that differs from its start
    save_policy(policy, tmp_path / "student", torch.float32)
    ids = [
        tuple(policy.tokenizer(text)["input_ids"])
        for text in ("The sum of 12 and 30 is 42.", "A train drives 60 km in an hour.")
    ]
    ours = torch.cat(logp_of(policy, [rollout_of(text[:3], text[3:]) for text in ids], 4096))
    engine = vllm.LLM(
        str(tmp_path / "student"), dtype="float32", max_model_len=64, enforce_eager=True, kv_cache_memory_bytes=1 << 27
    )
    outputs = engine.generate(
        [{"prompt_token_ids": list(text)} for text in ids],
        vllm.SamplingParams(max_tokens=1, prompt_logprobs=0),
        use_tqdm=False,
    )
    logps = [
        known[token].logprob
        for output in outputs
        for token, known in list(zip(output.prompt_token_ids, output.prompt_logprobs, strict=True))[3:]
    ]
    gap = (ours - torch.tensor(logps)).abs().max().item()
    print(f"largest difference {gap:.1e}")
    assert gap < 1e-3


@needs("vllm")
def test_greedy_evaluation_by_vllm_writes_texts_of_embedded_sampler(tmp_path: Path) -> None:
    data, texts = tmp_path / "data.jsonl", []
    data.write_text(
        "".join(
            json.dumps({"problem": f"What is {n} plus {n + 3}?", "answer": str(2 * n + 3)}) + "\n" for n in (4, 20, 31)
        )
    )
    for sampler in ("torch", "vllm"):
        out = tmp_path / f"{sampler}.jsonl"
        result = call(
            "eval",
            MODEL,
            "--data",
            data,
            "--temperature",
            "0",
            "--max-tokens",
            "24",
            "--sampler",
            sampler,
            "--out",
            out,
        )
        assert result.code == 0, result.err
        texts.append([row["text"] for row in rows(out)])
    assert texts[0] == texts[1] and len(set(texts[0])) == 3
