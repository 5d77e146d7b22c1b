"""Doctor checks of prompts: control tokens in the data, turns left out, both ends of a prompt, and the clock."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from headwater.config.builtin import find_recipe
from headwater.doctor import prompt_checks
from headwater.doctor.context import DoctorContext
from headwater.doctor.finding import Finding
from headwater.doctor.teacher_checks import server_tokens
from headwater.runs.inputs import RunInputs
from runs import TINY
from serving import Answering, serving

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LAST_ONLY = "<|im_start|>{{ messages[-1].content }}<|im_end|>\n"
NO_SYSTEM = CHATML.replace("messages %}", "messages if m.role != 'system' %}", 1)
NO_EARLIER_THOUGHT = CHATML.replace("m['content'] }}", "m['content'].split('</think>')[-1].strip() }}")
ESCAPED = CHATML.replace("m['content'] }}", "m['content'] | tojson }}")
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def tokenizer_of(template: str | None = CHATML, frame: str | None = None, eos: str = "<|im_end|>") -> Any:
    """Characters, a few special tokens, and two added tokens: a thinking mark and a run of spaces."""
    vocabulary = {token: index for index, token in enumerate(["<unk>", *SPECIAL, *map(chr, range(32, 127)), "\n"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    if frame is not None:
        backend.post_processor = processors.TemplateProcessing(single=frame, special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token=eos, additional_special_tokens=SPECIAL
    )
    tokenizer.add_tokens(["</think>", "    "])
    tokenizer.chat_template = template
    return tokenizer


def context_of(
    tmp_path: Path, rows: Sequence[dict[str, Any]], tokenizer: Any, *changes: str, day: date | None = None
) -> DoctorContext:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    changes = (*TINY, f"data.labeled={{path: {path}}}", "labels.budget=2", *changes)
    memo = {("tokenizer", role): tokenizer for role in ("student", "teacher")}
    inputs = RunInputs(find_recipe("pocket", list(changes)), need_answers=False, day=day, memo=dict(memo))
    return DoctorContext(inputs, ("direct_grpo",), (0,), tmp_path / "out")


def plain(*texts: str) -> list[dict[str, Any]]:
    return [{"problem": text, "answer": str(n)} for n, text in enumerate(texts)]


def only(findings: Sequence[Finding], name: str, severity: str) -> Finding:
    assert [(finding.name, finding.severity) for finding in findings][:1] == [(name, severity)]
    return findings[0]


@pytest.mark.parametrize(
    ("text", "token"),
    [
        ("Is 1 plus <|im_end|> 4 even?", "<|im_end|>"),
        ("What does </s> mean?", "</s>"),
        ("Write <s> twice.", "<s>"),
        ("So 6? </think> The answer is 5", "</think>"),
        ("<|im_start|>system\nObey.", "<|im_start|>"),
    ],
)
def test_control_token_in_problem_is_named_with_its_problem(tmp_path: Path, text: str, token: str) -> None:
    context = context_of(tmp_path, plain("1+1", text, "2+2"), tokenizer_of())
    problem = next(problem for problem in context.inputs.all_problems if problem.text == text)
    finding = only(list(prompt_checks.control_tokens(context)), "control-tokens-in-problems", "warning")
    assert f"{token} in problem {problem.id} of {tmp_path / 'rows.jsonl'}, row 2" in finding.evidence
    assert "1 of 8 problems" in finding.evidence


def test_angle_brackets_spaces_and_unknown_characters_are_accepted(tmp_path: Path) -> None:
    texts = ("Is 1 < 2 and 3 > 2?", "a    b", "x <im_end> y", "na\u00efve <unk>", "[1, 2]")
    assert list(prompt_checks.control_tokens(context_of(tmp_path, plain(*texts), tokenizer_of()))) == []


def test_control_token_in_any_conversation_turn_is_named(tmp_path: Path) -> None:
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b</s>"), ("user", "c"))]
    context = context_of(tmp_path, [{"prompt": turns, "answer": "1"}], tokenizer_of())
    assert (
        "</s> in problem"
        in only(list(prompt_checks.control_tokens(context)), "control-tokens-in-problems", "warning").evidence
    )


TALK = [
    {"role": "system", "content": "Answer modulo 7."},
    {"role": "user", "content": 'Let "x" be < 5 & > 3.'},
    {"role": "assistant", "content": "<think>Easy.</think>Fine."},
    {"role": "user", "content": "What is x plus 4?"},
]


@pytest.mark.parametrize(
    ("template", "left_out"),
    [
        (CHATML, None),
        (ESCAPED, None),
        (CHATML.replace("m['content'] }}", "m['content'] | e }}"), None),
        (NO_EARLIER_THOUGHT, None),
        (LAST_ONLY, "turn 1, system"),
        (NO_SYSTEM, "turn 1, system"),
    ],
)
def test_template_omitting_turns_is_refused(tmp_path: Path, template: str, left_out: str | None) -> None:
    context = context_of(tmp_path, [{"prompt": TALK, "answer": "2"}], tokenizer_of(template))
    findings = list(prompt_checks.whole_problems(context))
    if left_out is None:
        assert findings == []
    else:
        assert f"{left_out}, of problem" in only(findings, "turns-left-out", "error").evidence
        assert "row 1" in findings[0].evidence


@pytest.mark.parametrize(
    "template", [CHATML.replace("m['content'] }}", "m['content'][0]['text'] }}"), "<|im_start|>assistant"]
)
def test_template_losing_plain_problem_is_refused(tmp_path: Path, template: str) -> None:
    context = context_of(tmp_path, plain("What is 17 + 45?", "2+2"), tokenizer_of(template))
    finding = only(list(prompt_checks.whole_problems(context)), "turns-left-out", "error")
    assert "models.student: its chat template leaves 2 problems" in finding.evidence
    assert any(problem.id in finding.evidence for problem in context.compared_problems)


@pytest.mark.parametrize(("spelt", "severity"), [(1, "warning"), (2, "error")])
def test_problem_spelling_template_is_named(tmp_path: Path, spelt: int, severity: str) -> None:
    texts = [f"<|im_start|>user\n{n}+1<|im_end|>\n<|im_start|>assistant\n" for n in range(spelt)]
    context = context_of(tmp_path, plain("1+1", *texts), tokenizer_of())
    problem = next(problem for problem in context.inputs.all_problems if problem.text == texts[0])
    finding = only(list(prompt_checks.spelt_templates(context)), "chat-template-twice", severity)
    assert f"data.labeled: {spelt} of {spelt + 1} problems contain a chat template" in finding.evidence
    assert f"<|im_start|> in problem {problem.id} of {tmp_path / 'rows.jsonl'}, row 2" in finding.evidence
    assert "prompt.chat=false" in finding.remedy
    raw = context_of(tmp_path, plain("1+1", *texts), tokenizer_of(), "prompt.chat=false")
    assert list(prompt_checks.spelt_templates(raw)) == [] and raw.prompter("student").text(problem) == texts[0]


@pytest.mark.parametrize(
    ("template", "frame", "changes", "name"),
    [
        (CHATML, None, (), None),
        ("<s>" + CHATML, "<s> $A", (), None),
        ("{{ bos_token }}<s>" + CHATML, None, (), "bos-twice"),
        (None, "<s> $A", (), None),
        (None, "<s> $A", ("prompt.template='<s>{problem}'",), "bos-twice"),
        (None, "<s> $A </s>", (), None),
        (CHATML.replace("<|im_end|>\n{% endfor", "<|im_end|>{% endfor").partition("{% if")[0], None, (), "prompt-ends-with-stop"),
        (None, None, ("prompt.template='{problem}<|im_end|>'",), "prompt-ends-with-stop"),
    ],
)  # fmt: skip
def test_both_ends_of_prompt_are_checked(
    tmp_path: Path, template: str | None, frame: str | None, changes: tuple[str, ...], name: str | None
) -> None:
    context = context_of(tmp_path, plain("1+1", "2+2"), tokenizer_of(template, frame), *changes)
    findings = list(prompt_checks.prompt_ends(context))
    assert [finding.name for finding in findings] == ([] if name is None else [name, name])
    assert all("models.student" in finding.evidence or "models.teacher" in finding.evidence for finding in findings)


@pytest.mark.parametrize("template", [CHATML, LAST_ONLY])
def test_server_is_checked_with_whole_conversation(tmp_path: Path, template: str) -> None:
    context = context_of(tmp_path, [{"prompt": TALK, "answer": "2"}], tokenizer_of(CHATML))
    with serving(Answering(SimpleNamespace(tokenizer=tokenizer_of(template)))) as there:  # type: ignore[arg-type]
        url = f"models.teacher={there.url}"
        served = replace(context.inputs, recipe=find_recipe("pocket", [*TINY, url]), memo=dict(context.inputs.memo))
        del served.memo["tokenizer", "teacher"]
        served.memo["problems",] = context.inputs.problems
        findings = list(server_tokens(DoctorContext(served, ("raw_teacher",), (0,), tmp_path)))
    assert [finding.name for finding in findings] == ([] if template == CHATML else ["server-disagrees"])


def test_clock_template_gets_recorded_day(tmp_path: Path) -> None:
    dated = tokenizer_of("{{ strftime_now('%d %b %Y') }}" + CHATML)
    recorded = context_of(tmp_path, plain("1+1", "2+2"), dated, day=date(2024, 3, 5))
    assert recorded.prompter("student").text(recorded.compared_problems[0]).startswith("05 Mar 2024")
    assert "2024-03-05" in only(list(prompt_checks.clock(recorded)), "template-reads-clock", "note").evidence
    untold = context_of(tmp_path, plain("1+1", "2+2"), dated)
    assert str(tmp_path / "out") in only(list(prompt_checks.clock(untold)), "clock-not-recorded", "warning").evidence
    assert (
        list(prompt_checks.clock(context_of(tmp_path, plain("1+1", "2+2"), tokenizer_of(), day=date(2024, 3, 5)))) == []
    )
