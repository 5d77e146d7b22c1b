"""Marks around a model's thinking, as chat models spell them, and the text of a completion after it."""

from __future__ import annotations

import re

_TAG = r"(?:\w{1,20}[:_])?(?:think(?:ing)?|thoughts?)(?:_\w{1,20})?"
_WORD = r"(?:think(?:ing)?|thoughts?|reason(?:ing)?)"
_END = (
    rf"</{_TAG}>"  # </think> (DeepSeek-R1, Qwen3), </seed:think>, </think_fast>; </reasoning> is often part of an answer
    rf"|\[/{_WORD}\]"  # [/THINK] (Magistral)
    rf"|<\|(?:/|end_?(?:of_?)?){_WORD}\|>"  # <|end_of_thought|>, <|END_THINKING|> (Command A)
    rf"|<\|{_WORD}_?end\|>"
    r"|◁/think▷"  # Kimi
    r"|<\|inner_suffix\|>"  # Apertus
    r"|<channel\|>"  # Gemma 4
    r"|<\|channel\|>final[^<|]{0,80}(?:<\|constrain\|>[^<|]{0,80})?<\|message\|>"  # GPT-OSS
)
_BEGIN = (
    rf"<{_TAG}>|\[{_WORD}\]|<\|(?:(?:begin|start)_?(?:of_?)?)?{_WORD}(?:_?(?:begin|start))?\|>"
    r"|◁think▷|<\|inner_prefix\|>|<\|channel>|<\|(?:channel|message|constrain)\|>"
)
_ENDS = re.compile(_END, re.IGNORECASE)
_REASONING = re.compile(r"<(/?)(?:reasoning|reflection|scratchpad|inner_monologue)>", re.IGNORECASE)
# Special tokens that may be thinking marks of models not named above: </reasoning>, </reflection>, <seed:cot_budget_reflect>.
# Nobody writes a special token by accident, so these words are enough there.
_NAMED = (
    r"[<\[◁【{][^\s<>\[\]◁▷【】{}]{0,40}"
    r"(?:think|thought|reason|reflect|scratchpad|monologue|(?<![a-z])cot(?![a-z]))"
    r"[^\s<>\[\]◁▷【】{}]{0,40}[>\]▷】}]"
)
_TOKEN = re.compile(f"{_END}|{_BEGIN}|{_NAMED}", re.IGNORECASE)


def is_thinking_mark(token: str) -> bool:
    """Whether the text of a special token begins or ends a model's thinking, reasoning or reflection, or names a channel.

    Example: true of `<think>`, `[/THINK]`, `</reflection>` and `<|channel|>`, false of `<|im_end|>`.
    """
    return _TOKEN.fullmatch(token) is not None


def after_thinking(completion: str) -> str:
    """Text after the last mark that ends the thinking, or all of it if there is none. Linear time.

    `</reasoning>` and `</reflection>` end the thinking only where it began with the completion or in the prompt, and text follows: an
    answer may give its reasons between such marks too.

    Example: `after_thinking("<think>2 or 3?</think>3")` is `"3"`.
    """
    end = 0
    for mark in _ENDS.finditer(completion):
        end = mark.end()
    text = completion[end:]
    marks = list(_REASONING.finditer(text))
    closing = [mark for mark in marks if mark[1]]
    if closing and (marks[0][1] or not text[: marks[0].start()].strip()) and text[closing[-1].end() :].strip():
        return text[closing[-1].end() :]
    return text
