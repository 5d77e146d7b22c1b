"""lm-evaluation-harness takes a student's folder as it is, and counts what we count."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runs import call

pytestmark = pytest.mark.engines
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
      - {{function: regex, regex_pattern: "=(\\\\d+);", group_select: -1}}
      - {{function: take_first}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1}}
"""


def test_the_harness_evaluates_a_model_folder_with_its_own_template(tmp_path: Path, pocket_folder: Path) -> None:
    harness = pytest.importorskip("lm_eval")
    problems = [(f"{a}+{b}", f"{(a + b) % 100:02d}") for a in range(11, 51, 5) for b in range(23, 63, 5)]
    data = tmp_path / "test.jsonl"
    data.write_text("\n".join(json.dumps({"problem": text, "answer": answer}) for text, answer in problems))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "sums.yaml").write_text(TASK.format(data=data))
    model = pocket_folder / "qwen3-teacher-large"
    found = harness.simple_evaluate(
        model="hf",
        model_args=f"pretrained={model},dtype=float32",
        tasks=["chained_sums"],
        task_manager=harness.tasks.TaskManager(include_path=str(tmp_path / "tasks")),
        apply_chat_template=True,
        device="cpu",
        batch_size=16,
        bootstrap_iters=0,
    )
    theirs = found["results"]["chained_sums"]["exact_match,last"]
    # Greedy on both sides: a temperature so low that only the likeliest token is left.
    options = ("--task", "sums", "--temperature", "0.001", "--max-tokens", "48", "--json")
    ours = json.loads(call("eval", model, "--data", data, *options).out)
    assert theirs > 0.1
    assert abs(theirs - ours["measures"]["avg@1"]["mean"]) <= 0.1  # what reads an answer differs a little
