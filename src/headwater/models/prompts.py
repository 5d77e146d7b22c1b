"""The one place where a problem becomes token ids and ids become text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from headwater.config.recipe import Prompt
from headwater.errors import UserError
from headwater.models.time_limit import OutOfTimeError, within
from headwater.models.untrusted_files import reading
from headwater.types import Problem

TEMPLATE_SECONDS, TEMPLATE_MB = 5.0, 256
"""What a chat template may take for one problem; those that ship with models take a tenth of a millisecond."""
LONGEST_TEXT = 500_000
"""Characters; a tokenizer's native code takes memory in proportion, ends the process where there is none, and hears no alarm."""


@dataclass(frozen=True)
class Prompter:
    """Renders problems with a model's own chat template (or as plain text where it has none)."""

    tokenizer: Any
    prompt: Prompt

    def text(self, problem: Problem) -> str:
        """The prompt as text, special tokens spelt out."""
        turn = self.prompt.template.replace("{problem}", problem.text)
        if getattr(self.tokenizer, "chat_template", None) is None:
            return turn if self.prompt.system is None else f"{self.prompt.system}\n\n{turn}"
        messages = self.messages(problem)
        where = f"problem {problem.id} of {problem.source}"
        return rendered(
            self.tokenizer, messages, where, add_generation_prompt=True, enable_thinking=self.prompt.thinking
        )

    def messages(self, problem: Problem) -> list[dict[str, str]]:
        """The problem as the turns that a chat template is given."""
        turn = {"role": "user", "content": self.prompt.template.replace("{problem}", problem.text)}
        return [turn] if self.prompt.system is None else [{"role": "system", "content": self.prompt.system}, turn]

    def ids(self, problem: Problem) -> tuple[int, ...]:
        """The prompt as token ids. Raises UserError that names the problem when it is empty or over `prompt.max_tokens`."""
        templated = getattr(self.tokenizer, "chat_template", None) is not None
        # A chat template writes its own special tokens; plain text gets the tokenizer's (a BOS, where it has one).
        text = self.text(problem)
        if len(text) > LONGEST_TEXT:
            raise UserError(
                f"problem {problem.id} of {problem.source}: its prompt has {len(text):,} characters under "
                f"{whose(self.tokenizer, 'chat template')}, over the {LONGEST_TEXT:,} that a tokenizer is given"
            )
        with reading(
            f"{whose(self.tokenizer, 'tokenizer')} cannot be used on problem {problem.id} of {problem.source}"
        ):
            ids = tuple(self.tokenizer(text, add_special_tokens=not templated)["input_ids"])
        if not ids:
            raise UserError(f"problem {problem.id} of {problem.source}: its prompt has no tokens")
        if len(ids) > self.prompt.max_tokens:
            raise UserError(
                f"problem {problem.id} of {problem.source} ({problem.text[:40]!r}…): its prompt has {len(ids)} tokens, "
                f"over prompt.max_tokens {self.prompt.max_tokens}"
            )
        return ids

    def completion(self, ids: Sequence[int]) -> str:
        """What the model wrote, without special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def rendered(tokenizer: Any, messages: list[dict[str, str]], where: str, **options: bool) -> str:
    """Messages under a chat template, which is a program that came with the model: all it can do else is be refused.

    transformers runs it in Jinja's sandbox, which lets it reach nothing; time and memory are bounded here. Raises UserError.
    """
    what = whose(tokenizer, "chat template")
    try:
        with within(TEMPLATE_SECONDS, TEMPLATE_MB):
            text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
            if not isinstance(text, str):
                raise TypeError(f"it gives {type(text).__name__}")
    except OutOfTimeError:
        raise UserError(f"{what} takes more than {TEMPLATE_SECONDS:g} seconds on {where}") from None
    except MemoryError:
        raise UserError(f"{what} takes more than {TEMPLATE_MB} MiB on {where}") from None
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(f"{what} cannot be used on {where} ({type(error).__name__}: {said})") from None
    return text


def whose(tokenizer: Any, part: str) -> str:
    return f"the {part} of {getattr(tokenizer, 'name_or_path', '') or 'the model'}"


def refuse_different_prompts(student: Prompter, teacher: Prompter, problems: Sequence[Problem]) -> None:
    """Refuse a teacher whose chat template renders a problem to other ids than the student's.

    A template mismatch does not fail: it biases every token of the distillation. Raises UserError.
    """
    for problem in problems:
        ours, theirs = student.ids(problem), teacher.ids(problem)
        if ours != theirs:
            raise UserError(
                f"models.student and models.teacher: their chat templates give different ids for the same problem "
                f"({student.text(problem)[-60:]!r} and {teacher.text(problem)[-60:]!r}, prompt.thinking {student.prompt.thinking})"
            )
