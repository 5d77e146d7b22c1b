"""The one place where a problem becomes token ids and ids become text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from headwater.config import Prompt
from headwater.data import Problem
from headwater.errors import UserError


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
        messages = [{"role": "user", "content": turn}]
        if self.prompt.system is not None:
            messages.insert(0, {"role": "system", "content": self.prompt.system})
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=self.prompt.thinking
        )

    def ids(self, problem: Problem) -> tuple[int, ...]:
        """The prompt as token ids. Raises UserError that names the problem when it is empty or over `prompt.max_tokens`."""
        templated = getattr(self.tokenizer, "chat_template", None) is not None
        # A chat template writes its own special tokens; plain text gets the tokenizer's (a BOS, where it has one).
        ids = tuple(self.tokenizer(self.text(problem), add_special_tokens=not templated)["input_ids"])
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
