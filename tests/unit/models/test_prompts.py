"""Prompts: problems to the token ids of a chat model, and ids to text."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import date

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from headwater.config.prompt import Prompt
from headwater.errors import UserError
from headwater.models.prompts import Prompter, reads_clock, spelt_template
from headwater.tasks import maths
from headwater.tasks.thinking import after_thinking
from headwater.types import Problem
from tools.pretrain.pocket import make_tokenizer

# As Qwen3's: without thinking the assistant's turn begins with an empty thought.
THINKING = (
    "{%- for message in messages -%}{{ '<|' + message.role + '|>' + message.content + '\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}{{ '(--)\n' }}{%- endif -%}{%- endif -%}"
)
PROBLEM = Problem.of("17+45", "sums:test")


def prompter(
    chat_template: str | None = THINKING, tokenizer: PreTrainedTokenizerFast | None = None, **prompt: object
) -> Prompter:
    tokenizer = tokenizer or make_tokenizer()
    tokenizer.chat_template = chat_template
    return Prompter(tokenizer, Prompt(**prompt))  # type: ignore[arg-type]


def test_thinking_mode_follows_recipe() -> None:
    assert prompter(thinking=True).text(PROBLEM) == "<|user|>17+45\n<|assistant|>"
    assert prompter(thinking=False).text(PROBLEM) == "<|user|>17+45\n<|assistant|>(--)\n"
    assert prompter().text(PROBLEM) == prompter(thinking=False).text(PROBLEM)


def test_template_special_tokens_become_ids_and_none_is_added() -> None:
    prompter_ = prompter(thinking=True)
    vocabulary = prompter_.tokenizer.get_vocab()
    expected = [vocabulary[t] for t in ("<|user|>", "1", "7", "+", "4", "5", "\n", "<|assistant|>")]
    assert list(prompter_.ids(PROBLEM)) == expected == [1, 6, 12, 15, 9, 10, 29, 2]


def test_prompt_template_and_system_turn_are_placed_correctly() -> None:
    prompter_ = prompter(thinking=True, template="? {problem} =", system="(+)")
    assert prompter_.text(PROBLEM) == "<|system|>(+)\n<|user|>? 17+45 =\n<|assistant|>"


def test_braces_and_template_syntax_in_problem_stay_text() -> None:
    hostile = Problem.of("{{ 1/0 }} {problem} {% endfor %} {0}", "rows")
    assert prompter(thinking=True).text(hostile) == f"<|user|>{hostile.text}\n<|assistant|>"
    assert prompter(None).text(hostile) == hostile.text


def test_prompt_without_chat_template_is_plain_text() -> None:
    assert prompter(None).text(PROBLEM) == "17+45"
    assert prompter(None, template="{problem} = ", system="(+)").text(PROBLEM) == "(+)\n\n17+45 = "
    assert prompter(None).ids(PROBLEM) == (6, 12, 15, 9, 10)


def test_bos_is_added_to_plain_text_and_once_with_chat_template() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    assert prompter(None, tokenizer).ids(PROBLEM) == (0, 6, 12, 15, 9, 10)
    assert prompter("<|endoftext|>{{ messages[0].content }}", tokenizer).ids(PROBLEM) == (0, 6, 12, 15, 9, 10)


def test_prompt_over_limit_is_refused_by_problem() -> None:
    assert len(prompter(None, max_tokens=5).ids(PROBLEM)) == 5
    with pytest.raises(UserError) as refused:
        prompter(None, max_tokens=4).ids(PROBLEM)
    message = str(refused.value)
    assert PROBLEM.id in message and "sums:test" in message and "5 tokens, over prompt.max_tokens 4" in message
    assert refused.value.exit_code == 2


def test_empty_prompt_is_refused_with_remedy() -> None:
    with pytest.raises(
        UserError, match=r"its prompt has no tokens; remove the row, or write text .* into prompt.template"
    ):
        prompter(None).ids(Problem.of("", "rows"))


def test_prompt_without_chat_is_text_with_one_bos() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.bos_token = "<|endoftext|>"
    for text in ("17+45", "<|endoftext|>17+45"):
        assert prompter(THINKING, tokenizer, chat=False).ids(Problem.of(text, "rows")) == (0, 6, 12, 15, 9, 10)
    system = prompter(chat=False, system="(+)", template="? {problem}")
    assert system.text(PROBLEM) == "(+)\n\n? 17+45" and not system.has_template


@pytest.mark.parametrize(
    ("text", "mark"),
    [
        (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n",
            "<|im_start|>",
        ),
        ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n1+1?<|eot_id|>", "<|start_header_id|>"),
        ("<s> [INST] 1+1? [/INST]", "[INST]"),
        ("<bos><start_of_turn>user\n1+1?<end_of_turn>\n<start_of_turn>model\n", "<start_of_turn>"),
        ("<｜begin▁of▁sentence｜><｜User｜>1+1?<｜Assistant｜>", "<｜User｜>"),
        ("\n\nHuman: 1+1?\n\nAssistant:", "Human:"),
        ("A conversation between User and Assistant. User: 1+1? Assistant: <think>", "User:"),
        ("User: 1+1?\nAssistant: Let me solve this step by step.\n<think>", "User:"),
        ("Below is a task.\n\n### Instruction:\n1+1?\n\n### Response:\n", "### Instruction:"),
        ("What does <|im_start|> mean in ChatML?", None),
        ("Human: an animal. How many legs has one?", None),
        ("Ann is an Assistant: she earns 5. User: how much in 2 days?", None),
        ("A User: Assistant: ratio of 3 holds.\nThere are 8 in all.\nHow many of each?", None),
        ("[1, 2]: what is the sum?", None),
    ],
)
def test_spelt_chat_template_is_recognised(text: str, mark: str | None) -> None:
    assert spelt_template(Problem.of(text, "rows")) == mark
    turns = (("system", "Be brief."), ("user", text))
    assert spelt_template(Problem.of_turns(turns, "rows")) == mark


def test_completion_text_omits_special_tokens_and_keeps_spaces() -> None:
    prompter_ = prompter()
    assert prompter_.completion([*prompter_.tokenizer("17 , 45 .")["input_ids"], 3]) == "17 , 45 ."


def test_pocket_template_ignores_thinking_and_system_turns() -> None:
    tokenizer = make_tokenizer()
    for prompt in (Prompt(), Prompt(thinking=True), Prompt(system="(+)")):
        assert Prompter(tokenizer, prompt).text(PROBLEM) == "<|user|>17+45<|assistant|>"


# Conversations ----------------------------------------------------------------------------------------------------------

TALK = (("system", "(+)"), ("user", "17+4"), ("assistant", "=21"), ("user", "17+45"))
STRICT = (
    "{%- for m in messages -%}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{%- endif -%}"
    "{{ '<|' + m.role + '|>' + m.content }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)


def test_conversation_prompt_equals_transformers_rendering() -> None:
    prompts = prompter(thinking=True, template="? {problem} =")
    wanted = [{"role": role, "content": content} for role, content in TALK]
    wanted[-1]["content"] = "? 17+45 ="
    ids = prompts.tokenizer.apply_chat_template(
        wanted, add_generation_prompt=True, enable_thinking=True, return_dict=False
    )
    assert prompts.ids(Problem.of_turns(TALK, "rows")) == tuple(ids)
    assert prompts.text(Problem.of_turns(TALK, "rows")) == (
        "<|system|>(+)\n<|user|>17+4\n<|assistant|>=21\n<|user|>? 17+45 =\n<|assistant|>"
    )


def test_conversation_without_chat_template_joins_turns() -> None:
    prompts = prompter(None, template="{problem} =")
    assert prompts.text(Problem.of_turns(TALK, "rows")) == "(+)\n\n17+4\n\n=21\n\n17+45 ="


def test_system_turns_of_data_and_recipe_are_exclusive() -> None:
    problem = replace(Problem.of_turns(TALK, "d.jsonl"), row=3)
    with pytest.raises(
        UserError, match=rf"problem {problem.id} of d.jsonl, row 3: has a system turn of its own, and prompt"
    ):
        prompter(system="Be brief.").ids(problem)
    text = prompter(thinking=True, system="(+)").text(Problem.of_turns(TALK[1:], "d.jsonl"))
    assert text == prompter(thinking=True).text(problem)


def test_template_error_is_one_sentence_with_row() -> None:
    problem = replace(Problem.of_turns(TALK, "d.jsonl"), row=3)
    assert (
        prompter(STRICT).text(Problem.of_turns(TALK[1:], "d.jsonl"))
        == "<|user|>17+4<|assistant|>=21<|user|>17+45<|assistant|>"
    )
    with pytest.raises(
        UserError,
        match=r"problem \w{16} of d.jsonl, row 3 \(TemplateError: Conversation roles must alternate.*\); change",
    ):
        prompter(STRICT).ids(problem)


# Special tokens of the tokenizer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("single", "before"),
    [
        ("$A <|endoftext|>", ()),
        ("<|pad|> $A <|endoftext|>", (1,)),
        ("<|pad|> $A <|endoftext|> <|pad|>", (1,)),
        ("<|pad|> $A", (1,)),
    ],
)
def test_plain_text_prompt_has_no_suffix(single: str, before: tuple[int, ...]) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=[("<|endoftext|>", 0), ("<|pad|>", 1)]
    )
    assert prompter(None, tokenizer).ids(PROBLEM) == (*before, 6, 12, 15, 9, 10)


def characters(*special: str) -> PreTrainedTokenizerFast:
    """A token per printable character, and special tokens."""
    letters = [*map(chr, range(32, 127)), "◁", "▷", "\n"]
    backend = Tokenizer(
        models.WordLevel({letter: n for n, letter in enumerate(["<unk>", *letters])}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


@pytest.mark.parametrize(
    ("marks", "spelt", "shown"),
    [
        ("<think> </think> <|im_end|>", "<think>{}</think>{}<|im_end|>", "<think>{}</think>{}"),
        ("</think> <|im_end|>", "{}</think>{}<|im_end|>", "{}</think>{}"),  # the prompt has opened the thought
        ("[THINK] [/THINK] </s>", "[THINK]{}[/THINK]{}</s>", "[THINK]{}[/THINK]{}"),
        (
            "<|begin_of_thought|> <|end_of_thought|> <s>",
            "<s><|begin_of_thought|>{}<|end_of_thought|>{}",
            "<|begin_of_thought|>{}<|end_of_thought|>{}",
        ),
        ("<seed:think> </seed:think>", "<seed:think>{}</seed:think>{}", "<seed:think>{}</seed:think>{}"),
        ("<|START_THINKING|> <|END_THINKING|>", "<|START_THINKING|>{}<|END_THINKING|>{}", "<|START_THINKING|>{}<|END_THINKING|>{}"),
        ("<think_fast> </think_fast>", "<think_fast>{}</think_fast>{}", "<think_fast>{}</think_fast>{}"),
        ("<reasoning> </reasoning>", "<reasoning>{}</reasoning>{}", "<reasoning>{}</reasoning>{}"),
        ("</reflection> <pad>", "{}</reflection>{}<pad>", "{}</reflection>{}"),
        ("◁think▷ ◁/think▷", "◁think▷{}◁/think▷{}", "◁think▷{}◁/think▷{}"),
        (
            "<|channel|> <|message|> <|start|> <|end|> <|return|>",
            "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>{}<|return|>",
            "<|channel|>analysis<|message|>{}assistant<|channel|>final<|message|>{}",
        ),
    ],
)  # fmt: skip
def test_only_thinking_marks_among_special_tokens_reach_grader(marks: str, spelt: str, shown: str) -> None:
    tokenizer, thought, answer = characters(*marks.split()), r"so \boxed{6}? no.", "The answer is 5."
    ids = tokenizer(spelt.format(thought, answer), add_special_tokens=False)["input_ids"]
    assert len(ids) < len(spelt.format(thought, answer)) - 10  # every mark is one token
    text = Prompter(tokenizer, Prompt()).completion(ids)
    assert text == shown.format(thought, answer)
    assert after_thinking(text) == answer
    assert maths.grade("5", text) == (True, "equal") and maths.grade("6", text) == (False, "different")


def test_plain_token_thinking_marks_are_read_unchanged() -> None:
    tokenizer = characters("<|im_end|>")
    tokenizer.add_tokens(["<think>", "</think>"])
    ids = tokenizer("<think>6?</think> 5 <|im_end|>", add_special_tokens=False)["input_ids"]
    text = Prompter(tokenizer, Prompt()).completion(ids)
    assert text == tokenizer.decode(ids, skip_special_tokens=True) == "<think>6?</think> 5 "


# Clock and chance -----------------------------------------------------------------------------------------------------------

DATED = "{{ strftime_now('%d %b %Y %H:%M') }}{{ messages[0].content }}"
LLAMA = (  # as Llama 3.2's
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}{%- set date_string = strftime_now('%d %b %Y') %}"
    "{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}{{ date_string + messages[0].content }}"
)
MACRO = "{%- macro today() -%}{{ strftime_now('%Y-%m-%d') }}{%- endmacro -%}{{ today() + messages[0].content }}"


@pytest.mark.parametrize(
    ("template", "text"),
    [(DATED, "05 Mar 2024 00:0017+45"), (LLAMA, "05 Mar 202417+45"), (MACRO, "2024-03-0517+45")],
)
def test_template_clock_stands_at_run_day(template: str, text: str) -> None:
    tokenizer = prompter(template).tokenizer
    assert reads_clock(tokenizer)
    assert Prompter(tokenizer, Prompt(), date(2024, 3, 5)).text(PROBLEM) == text
    assert Prompter(tokenizer, Prompt()).text(PROBLEM) != text  # without a day, the time of the call


def test_random_template_gives_same_prompt_each_time() -> None:
    prompts = prompter(
        "{{ ['a', 'b', 'c', 'd', 'e', 'f', 'g', 'h'] | random }}{{ lipsum(1, false) }}{{ messages[0].content }}"
    )
    problems = [Problem.of(f"{n}+1", "rows") for n in range(40)]
    random.seed(7)
    expected = random.random()
    random.seed(7)
    first = [prompts.text(problem) for problem in problems]
    assert random.random() == expected  # the generator of others is where it was
    assert [prompts.text(problem) for problem in reversed(problems)] == first[::-1]
    assert {text[0] for text in first} == set("abcdefgh")
