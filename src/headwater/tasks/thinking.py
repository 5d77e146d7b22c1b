"""Marks around a model's thinking, as chat models spell them, and the text of a completion after it."""

from __future__ import annotations

import re

_TAG = r"(?:\w{1,20}[:_])?(?:think(?:ing)?|thoughts?)"
_WORD = r"(?:think(?:ing)?|thoughts?|reason(?:ing)?)"
_END = (
    rf"</{_TAG}>"  # </think> (DeepSeek-R1, Qwen3), </seed:think>, </thought> (EXAONE); </reasoning> is often part of an answer
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
_TOKEN = re.compile(f"{_END}|{_BEGIN}", re.IGNORECASE)


def is_thinking_mark(token: str) -> bool:
    """Whether a token's text begins or ends a model's thinking, or names a channel.

    Example: true of `<think>`, `[/THINK]` and `<|channel|>`, false of `<|im_end|>`.
    """
    return _TOKEN.fullmatch(token) is not None


def after_thinking(completion: str) -> str:
    """Text after the last mark that ends the thinking, or all of it if there is none. Linear time.

    Example: `after_thinking("<think>2 or 3?</think>3")` is `"3"`.
    """
    end = 0
    for mark in _ENDS.finditer(completion):
        end = mark.end()
    return completion[end:]
