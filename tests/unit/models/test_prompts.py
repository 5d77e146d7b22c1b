"""Problems become the ids that a chat model expects, and ids become text."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from headwater.config.recipe import Prompt
from headwater.errors import UserError
from headwater.models.prompts import Prompter
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
    chat: str | None = THINKING, tokenizer: PreTrainedTokenizerFast | None = None, **prompt: object
) -> Prompter:
    tokenizer = tokenizer or make_tokenizer()
    tokenizer.chat_template = chat
    return Prompter(tokenizer, Prompt(**prompt))  # type: ignore[arg-type]


def test_thinking_is_a_choice_of_the_recipe() -> None:
    assert prompter(thinking=True).text(PROBLEM) == "<|user|>17+45\n<|assistant|>"
    assert prompter(thinking=False).text(PROBLEM) == "<|user|>17+45\n<|assistant|>(--)\n"
    assert prompter().text(PROBLEM) == prompter(thinking=False).text(PROBLEM)


def test_the_templates_special_tokens_become_their_own_ids_and_none_is_added() -> None:
    prompter_ = prompter(thinking=True)
    vocabulary = prompter_.tokenizer.get_vocab()
    expected = [vocabulary[t] for t in ("<|user|>", "1", "7", "+", "4", "5", "\n", "<|assistant|>")]
    assert list(prompter_.ids(PROBLEM)) == expected == [1, 6, 12, 15, 9, 10, 29, 2]


def test_the_prompt_template_and_the_system_turn_stand_where_they_should() -> None:
    prompter_ = prompter(thinking=True, template="? {problem} =", system="(+)")
    assert prompter_.text(PROBLEM) == "<|system|>(+)\n<|user|>? 17+45 =\n<|assistant|>"


def test_braces_and_template_syntax_in_a_problem_are_only_text() -> None:
    hostile = Problem.of("{{ 1/0 }} {problem} {% endfor %} {0}", "rows")
    assert prompter(thinking=True).text(hostile) == f"<|user|>{hostile.text}\n<|assistant|>"
    assert prompter(None).text(hostile) == hostile.text


def test_without_a_chat_template_the_prompt_is_plain_text() -> None:
    assert prompter(None).text(PROBLEM) == "17+45"
    assert prompter(None, template="{problem} = ", system="(+)").text(PROBLEM) == "(+)\n\n17+45 = "
    assert prompter(None).ids(PROBLEM) == (6, 12, 15, 9, 10)


def test_plain_text_gets_the_tokenizers_beginning_and_a_chat_template_does_not_get_it_twice() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    assert prompter(None, tokenizer).ids(PROBLEM) == (0, 6, 12, 15, 9, 10)
    assert prompter("<|endoftext|>{{ messages[0].content }}", tokenizer).ids(PROBLEM) == (0, 6, 12, 15, 9, 10)


def test_a_prompt_over_the_limit_is_refused_by_the_name_of_its_problem() -> None:
    assert len(prompter(None, max_tokens=5).ids(PROBLEM)) == 5
    with pytest.raises(UserError) as refused:
        prompter(None, max_tokens=4).ids(PROBLEM)
    message = str(refused.value)
    assert PROBLEM.id in message and "sums:test" in message and "5 tokens, over prompt.max_tokens 4" in message
    assert refused.value.exit_code == 2


def test_a_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(UserError, match="its prompt has no tokens"):
        prompter(None).ids(Problem.of("", "rows"))


def test_a_completion_is_read_without_its_special_tokens_and_with_its_spaces() -> None:
    prompter_ = prompter()
    assert prompter_.completion([*prompter_.tokenizer("17 , 45 .")["input_ids"], 3]) == "17 , 45 ."


def test_the_pocket_template_ignores_thinking_and_system_turns() -> None:
    tokenizer = make_tokenizer()
    for prompt in (Prompt(), Prompt(thinking=True), Prompt(system="(+)")):
        assert Prompter(tokenizer, prompt).text(PROBLEM) == "<|user|>17+45<|assistant|>"
