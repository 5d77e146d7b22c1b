"""Schema of prompts: what student and teacher read before a completion. Frozen; unknown keys are rejected."""

from __future__ import annotations

from pydantic import model_validator

from headwater.config.schema import Strict, Tokens


class TeacherPrompt(Strict):
    """The teacher's prompt, where it is not the student's (docs/teachers.md). A field that is left out is as the student's."""

    system: str | None = None
    """System message; an empty text sends none."""
    template: str | None = None
    """The user's message; `{problem}` is replaced by the problem's text."""
    thinking: bool | None = None
    """Passed to chat templates that have `enable_thinking`."""
    privileged: str | None = None
    """The user's message where the teacher supervises the student, for problems with a context of their own: `{context}` is replaced by
    the text of `data.….columns.context`, which the student never reads. A context that states the answer counts as a label."""

    @model_validator(mode="after")
    def _names_the_problem(self) -> TeacherPrompt:
        for name in ("template", "privileged"):
            value = getattr(self, name)
            if value is not None and "{problem}" not in value:
                raise ValueError(f"{name} must contain {{problem}}")
        if self.privileged is not None and "{context}" not in self.privileged:
            raise ValueError("privileged must contain {context}")
        return self


class Prompt(Strict):
    """How a problem becomes a chat prompt."""

    system: str | None = None
    """System message; None sends none."""
    template: str = "{problem}"
    """The user's message; `{problem}` is replaced by the problem's text."""
    thinking: bool = False
    """Passed to chat templates that have `enable_thinking` (Qwen3)."""
    chat: bool = True
    """Apply the model's chat template; false gives the model the texts as they are (problems that contain a template, base models)."""
    max_tokens: Tokens = 2048
    """Longest prompt; a longer one is refused."""
    teacher: TeacherPrompt | None = None
    """The teacher's prompt in its training, its evaluations and where it supervises the student. None: the student's prompt."""

    @property
    def of_teacher(self) -> Prompt:
        """What the teacher reads."""
        if self.teacher is None:
            return self
        given = {name: value for name, value in self.teacher.model_dump().items() if value is not None}
        system = given.pop("system", self.system) or None
        given.pop("privileged", None)
        return self.model_copy(update={**given, "system": system, "teacher": None})

    @model_validator(mode="after")
    def _names_the_problem(self) -> Prompt:
        if "{problem}" not in self.template:
            raise ValueError("template must contain {problem}")
        return self

    LATER = frozenset({"chat", "teacher"})
