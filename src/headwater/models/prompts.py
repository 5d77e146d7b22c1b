"""Render problems to token ids with a model's chat template, and decode completions to text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from headwater.config.recipe import Prompt
from headwater.errors import UserError
from headwater.models.resource_limits import OutOfTimeError, resource_limits
from headwater.models.untrusted_files import as_user_error
from headwater.types import Problem

TEMPLATE_SECONDS, TEMPLATE_MB = 5.0, 256
"""Limits of a chat template for one problem; those that ship with models take a tenth of a millisecond."""
MAX_CHARACTERS = 500_000
"""A tokenizer's native code needs memory in proportion, aborts the process without it, and cannot be interrupted."""


@dataclass(frozen=True)
class Prompter:
    """Renders problems with a model's own chat template (or as plain text if it has none)."""

    tokenizer: Any
    prompt: Prompt

    @property
    def has_template(self) -> bool:
        return getattr(self.tokenizer, "chat_template", None) is not None

    def text(self, problem: Problem) -> str:
        """The prompt as text, special tokens included."""
        messages = self.messages(problem)
        if not self.has_template:
            return "\n\n".join(message["content"] for message in messages)
        where = f"problem {problem.id} of {problem.source}"
        return render_chat(
            self.tokenizer, messages, where, add_generation_prompt=True, enable_thinking=self.prompt.thinking
        )

    def messages(self, problem: Problem) -> list[dict[str, str]]:
        """The problem as chat messages."""
        user = {"role": "user", "content": self.prompt.template.replace("{problem}", problem.text)}
        return [user] if self.prompt.system is None else [{"role": "system", "content": self.prompt.system}, user]

    def ids(self, problem: Problem) -> tuple[int, ...]:
        """The prompt as token ids. Raises UserError that names the problem if it is empty or over `prompt.max_tokens`."""
        text, where = self.text(problem), f"problem {problem.id} of {problem.source}"
        if len(text) > MAX_CHARACTERS:
            raise UserError(
                f"{where}: its prompt has {len(text):,} characters under {_named(self.tokenizer, 'chat template')}, over the "
                f"{MAX_CHARACTERS:,} that a tokenizer is given"
            )
        with as_user_error(f"{_named(self.tokenizer, 'tokenizer')} cannot be used on {where}"):
            # A chat template writes its own special tokens; plain text gets the tokenizer's (a BOS, if it has one).
            ids = tuple(self.tokenizer(text, add_special_tokens=not self.has_template)["input_ids"])
        if not ids:
            raise UserError(f"{where}: its prompt has no tokens")
        if len(ids) > self.prompt.max_tokens:
            raise UserError(
                f"{where} ({problem.text[:40]!r}…): its prompt has {len(ids)} tokens, over prompt.max_tokens "
                f"{self.prompt.max_tokens}"
            )
        return ids

    def completion(self, ids: Sequence[int]) -> str:
        """A completion as text, without special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def render_chat(tokenizer: Any, messages: list[dict[str, str]], where: str, **options: bool) -> str:
    """Render messages with the model's chat template, which is untrusted code.

    transformers runs it in Jinja's sandbox; time and memory are limited here. Raises UserError for any failure; `where` names
    what is rendered.
    """
    template = _named(tokenizer, "chat template")
    try:
        with resource_limits(TEMPLATE_SECONDS, TEMPLATE_MB):
            text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
            if not isinstance(text, str):
                raise TypeError(f"it gives {type(text).__name__}")
    except OutOfTimeError:
        raise UserError(f"{template} takes more than {TEMPLATE_SECONDS:g} seconds on {where}") from None
    except MemoryError:
        raise UserError(f"{template} takes more than {TEMPLATE_MB} MiB on {where}") from None
    except Exception as error:
        detail = " ".join(str(error).split())[:200]
        raise UserError(f"{template} cannot be used on {where} ({type(error).__name__}: {detail})") from None
    return text


def _named(tokenizer: Any, part: str) -> str:
    return f"the {part} of {getattr(tokenizer, 'name_or_path', '') or 'the model'}"
