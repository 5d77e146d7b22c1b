"""Render problems to token ids with a model's chat template, and decode completions to text."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, time
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from headwater import seeds
from headwater.config.prompt import Prompt
from headwater.errors import UserError, error_text
from headwater.models.resource_limits import OutOfTimeError, resource_limits
from headwater.models.untrusted_files import as_user_error
from headwater.tasks.thinking import is_thinking_mark
from headwater.types import Problem

TEMPLATE_SECONDS, TEMPLATE_MB = 5.0, 256
"""Limits of a chat template for one problem; those that ship with models take a tenth of a millisecond."""
MAX_CHARACTERS = 500_000
"""A tokenizer's native code needs memory in proportion, aborts the process without it, and cannot be interrupted."""
_CHAT_MARK = re.compile(
    r"\s*(?:<s>|<bos>|<\|begin_of_text\|>|<\|endoftext\|>|<\|startoftext\|>|<｜begin▁of▁sentence｜>|\[gMASK\]<sop>)?\s*"
    r"(<\|im_start\|>|<\|start_header_id\|>|<\|header_start\|>|\[INST\]|\[SYSTEM_PROMPT\]|<start_of_turn>|<\|start\|>"
    r"|<\|(?:user|system|im_user|im_system)\|>|<｜User｜>|<\|START_OF_TURN_TOKEN\|>|<\|start_of_role\|>)"
)
_SPEAKERS = re.compile(
    r"(\b(?:Human|User|USER):|### (?:Instruction|Human|User):)[\s\S]*"
    r"(?:\b(?:Assistant|ASSISTANT):|### (?:Response|Assistant):)[^\n]{0,60}\s*(?:<think>)?\s*\Z"
)


@dataclass(frozen=True)
class Prompter:
    """Renders problems with a model's own chat template (or as plain text if it has none).

    day  the date (at midnight) that `strftime_now` gives to a template that reads the clock; None: the time of the call
    """

    tokenizer: Any
    prompt: Prompt
    day: date | None = None
    context: str | None = None
    """Replaces `{context}` in the template."""

    def without_limit(self) -> Prompter:
        """The same prompter, which takes prompts of any length."""
        return replace(self, prompt=self.prompt.model_copy(update={"max_tokens": sys.maxsize}))

    @property
    def has_template(self) -> bool:
        """Whether prompts are rendered with a chat template."""
        return self.prompt.chat and getattr(self.tokenizer, "chat_template", None) is not None

    def text(self, problem: Problem) -> str:
        """The prompt as text, special tokens included."""
        messages = self.messages(problem)
        if not self.has_template:
            return "\n\n".join(message["content"] for message in messages)
        options = {"add_generation_prompt": True, "enable_thinking": self.prompt.thinking}
        return render_chat(self.tokenizer, messages, problem.name, options, self.day)

    def messages(self, problem: Problem) -> list[dict[str, str]]:
        """The problem as chat messages: `prompt.system`, its turns, and the last one in `prompt.template`.

        Raises UserError for a problem with a system turn of its own if the recipe has one too.
        """
        *earlier, (_, question) = problem.turns or (("user", problem.text),)
        if self.prompt.system is not None:
            if any(role == "system" for role, _ in earlier):
                raise UserError(
                    f"{problem.name}: has a system turn of its own, and prompt.system is set; remove prompt.system, or the system "
                    "turns from the data"
                )
            earlier = [("system", self.prompt.system), *earlier]
        texts = {"{problem}": question} | ({} if self.context is None else {"{context}": self.context})
        fields_of_template = "|".join(map(re.escape, texts))
        turns = [*earlier, ("user", re.sub(fields_of_template, lambda field: texts[field[0]], self.prompt.template))]
        return [{"role": role, "content": content} for role, content in turns]

    def ids(self, problem: Problem) -> tuple[int, ...]:
        """The prompt as token ids. Raises UserError that names the problem if it is empty or over `prompt.max_tokens`."""
        text, where = self.text(problem), problem.name
        if len(text) > MAX_CHARACTERS:
            raise UserError(
                f"{where}: its prompt has {len(text):,} characters under {_named(self.tokenizer, 'chat template')}, over the "
                f"{MAX_CHARACTERS:,} that a tokenizer is given"
            )
        with as_user_error(f"{_named(self.tokenizer, 'tokenizer')} cannot be used on {where}"):
            # A chat template writes its own special tokens; plain text gets those that the tokenizer puts before it (a BOS).
            ids = tuple(self.tokenizer(text, add_special_tokens=not self.has_template)["input_ids"])
            ids = ids[: len(ids) - self._ids_after_text]
            bos = getattr(self.tokenizer, "bos_token_id", None)
            if not self.prompt.chat and bos is not None and ids[:2] == (bos, bos):
                ids = ids[1:]  # the text spells its own
        if not ids:
            raise UserError(
                f"{where}: its prompt has no tokens; remove the row, or write text that {_named(self.tokenizer, 'tokenizer')} "
                "knows into prompt.template"
            )
        if len(ids) > self.prompt.max_tokens:
            raise UserError(
                f"{where} ({problem.text[:40]!r}…): its prompt has {len(ids)} tokens, over prompt.max_tokens "
                f"{self.prompt.max_tokens}"
            )
        return ids

    @cached_property
    def _ids_after_text(self) -> int:
        """Number of special ids that the tokenizer appends to plain text (an EOS): a completion would begin after the end."""
        if self.has_template:
            return 0
        framed, plain = (self.tokenizer("1", add_special_tokens=added)["input_ids"] for added in (True, False))
        places = [start for start in range(len(framed)) if framed[start : start + len(plain)] == plain]
        return len(framed) - places[0] - len(plain) if plain and places else 0

    def completion(self, ids: Sequence[int]) -> str:
        """A completion as text, without special tokens except those that begin or end the thinking: graders look for these."""
        thinking, hidden = self._special_ids
        plain = thinking.isdisjoint(ids)
        ids = list(ids) if plain else [token for token in ids if token not in hidden]
        return self.tokenizer.decode(ids, skip_special_tokens=plain, clean_up_tokenization_spaces=False)

    @cached_property
    def _special_ids(self) -> tuple[frozenset[int], frozenset[int]]:
        """(ids of the marks of thinking, other special ids)."""
        special = special_tokens(self.tokenizer)
        thinking = frozenset(id_ for id_, content in special.items() if is_thinking_mark(content))
        return thinking, frozenset(special) - thinking


def with_context(prompter: Prompter, prompt: Prompt, context: str | None) -> Prompter:
    """The prompter of a supervising teacher, for a problem with a privileged context; the same for a problem without one."""
    if context is None or prompt.teacher is None or prompt.teacher.privileged is None:
        return prompter
    return replace(
        prompter,
        prompt=prompter.prompt.model_copy(update={"template": prompt.teacher.privileged}),
        context=context,
    )


def spelt_template(problem: Problem) -> str | None:
    """The marker of a chat template in a problem's own text, such as `<|im_start|>` or `Human:`; None without one.

    Example: of `Human: 1+1?\\n\\nAssistant:` it is `Human:`; `Human: 1+1?` alone is a plain text.
    """
    for content in problem.contents:
        match = _CHAT_MARK.match(content) or _SPEAKERS.search(content)
        if match:
            return match[1]
    return None


def reads_clock(tokenizer: Any) -> bool:
    """Whether a chat template asks for the time."""
    return "strftime_now" in str(getattr(tokenizer, "chat_template", None))


def render_chat(
    tokenizer: Any, messages: list[dict[str, str]], where: str, options: Mapping[str, bool], day: date | None = None
) -> str:
    """Render messages with the model's chat template, which is untrusted code.

    transformers runs it in Jinja's sandbox; time and memory are limited here. What a template draws at random depends on the
    messages alone, and the clock stands at midnight of `day`, so that equal messages give equal prompts.

    Raises UserError for any failure; `where` names what is rendered.
    """
    template = _named(tokenizer, "chat template")
    variables: dict[str, Any] = dict(options)
    if day is not None and reads_clock(tokenizer):
        variables["strftime_now"] = datetime.combine(day, time()).strftime
    try:
        with seeds.python_draws("template", repr(messages)), resource_limits(TEMPLATE_SECONDS, TEMPLATE_MB):
            text = tokenizer.apply_chat_template(messages, tokenize=False, **variables)
            if not isinstance(text, str):
                raise TypeError(f"it gives {type(text).__name__}")
    except OutOfTimeError:
        raise UserError(f"{template} takes more than {TEMPLATE_SECONDS:g} seconds on {where}") from None
    except MemoryError:
        raise UserError(f"{template} takes more than {TEMPLATE_MB} MiB on {where}") from None
    except Exception as error:
        detail = error_text(error)
        remedy = "; change these turns, prompt.system or the chat template" if type(error) is TemplateError else ""
        raise UserError(f"{template} cannot be used on {where} ({type(error).__name__}: {detail}){remedy}") from None
    return text


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Id -> spelling of the special tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {id_: token.content for id_, token in added.items() if token.special}
    return special | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


def turn_end(tokenizer: Any) -> int | None:
    """The special token that the chat template writes after an assistant's turn, if there is one."""
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    turns = [{"role": "user", "content": "2+5"}, {"role": "assistant", "content": "=7"}]
    try:
        after = render_chat(tokenizer, turns, "an assistant's turn", {}).rpartition("=7")[2].lstrip()[:1000]
    except UserError:  # not every template takes such a turn; prompts of the problems have a check of their own
        return None
    ids = tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return ids[0] if ids and ids[0] in special else None


def _named(tokenizer: Any, part: str) -> str:
    return f"the {part} of {getattr(tokenizer, 'name_or_path', '') or 'the model'}"
