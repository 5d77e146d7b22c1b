"""lm-evaluation-harness on a trained student: the same accuracy as `headwater eval` and the same log-probs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from headwater.tasks.sums import generate
from headwater.teachers.scoring import logp_of
from runs import call
from students import FAMILIES, loaded, student, texts

pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None,
        reason="lm-evaluation-harness is not installed here: `make test-engines` runs these",
    ),
]
TASK = """
task: chained_sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{problem}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["<|end|>"], do_sample: false, max_gen_toks: 48}}
filter_list:
  - name: last
    filter:
      - {{function: regex, regex_pattern: "=(\\\\d+)", group_select: -1}}
      - {{function: take_first}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1}}
"""


@pytest.mark.parametrize("family", FAMILIES)
def test_lm_eval_scores_trained_student_like_headwater_eval(family: str, tmp_path: Path) -> None:
    import lm_eval

    problems = generate(128, "eval", seed=0)
    data, folder = tmp_path / "test.jsonl", student(family, "whole")
    data.write_text("\n".join(json.dumps({"problem": text, "answer": answer}) for text, answer in problems))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "sums.yaml").write_text(TASK.format(data=data))
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={folder},dtype=float32",
        tasks=["chained_sums"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path / "tasks")),
        apply_chat_template=True,
        device="cpu",
        batch_size=16,
        bootstrap_iters=0,
    )
    harness_score = results["results"]["chained_sums"]["exact_match,last"]
    # Greedy on both sides: at this temperature only the most probable token is drawn.
    options = ("--task", "sums", "--temperature", "0.001", "--max-tokens", "48", "--json")
    ours = json.loads(call("eval", folder, "--data", data, *options).out)["measures"]["avg@1"]["mean"]
    print(f"{family}: {harness_score:.3f} by the harness, {ours:.3f} here")
    assert harness_score > 0.05
    assert abs(harness_score - ours) <= 0.1  # answers are extracted in slightly different ways


@pytest.mark.parametrize("family", FAMILIES)
def test_lm_eval_loglikelihood_equals_our_log_prob(family: str) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    folder = student(family, "whole")
    policy = loaded(folder)
    rollouts = [text for text in texts(policy) if len(text.completion_ids) > 1]
    pairs = [
        tuple(policy.tokenizer.decode(ids) for ids in (rollout.prompt_ids, rollout.completion_ids))
        for rollout in rollouts
    ]
    again: list[Any] = [policy.tokenizer("".join(pair), add_special_tokens=False)["input_ids"] for pair in pairs]
    assert again == [
        list(rollout.prompt_ids + rollout.completion_ids) for rollout in rollouts
    ]  # so both score the same ids
    harness = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=16)
    instances = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    harness_logp = torch.tensor([logp for logp, _ in harness.loglikelihood(instances, disable_tqdm=True)])
    ours = torch.stack([logp.sum() for logp in logp_of(policy, rollouts, 4096)])
    lengths = torch.tensor([len(rollout.completion_ids) for rollout in rollouts])
    print(f"{family}: {((harness_logp - ours).abs() / lengths).mean():.1e} a token apart")
    assert ((harness_logp - ours).abs() / lengths).max() < 1e-4  # the promise is 0.01
