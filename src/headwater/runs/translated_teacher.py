"""Wrap a supervising model that has its own prompt or tokenizer; the tokenizers of a run's models, as bytes of tokens."""

from __future__ import annotations

from functools import cache

from headwater.config.dense import Dense
from headwater.models.prompts import with_context
from headwater.models.token_bytes import TokenBytes, TokenPair, same_tokens
from headwater.runs.inputs import RunInputs
from headwater.runs.read_once import InputError
from headwater.teachers.build import TaggedTeachers, Teacher
from headwater.teachers.server_client import is_served
from headwater.teachers.translated import Supervisor, TranslatedTeacher, form_of


def translated_teacher(model: Teacher, roles: tuple[str, str], dense: Dense, inputs: RunInputs) -> Supervisor:
    """The model behind the prompts and token ids that it reads itself, where the recipe gives it some; else the model.

    Several teachers by tag have one tokenizer, and each its own chat template.

    roles  of the learner and of the teacher in the recipe
    """
    learner, role = roles
    own_prompt, aligns = inputs.recipe.prompt.teacher is not None and learner == "student", dense.tokenizers != "same"
    if not (own_prompt or aligns):
        return model
    first_teacher = next(iter(inputs.recipe.models.by_role(role)))
    pair = token_pair(inputs, learner, first_teacher) if aligns else None
    problems = {p.id: p for p in inputs.all_problems}
    contexts = inputs.contexts if learner == "student" else {}

    def prompt_ids(name: str) -> tuple[int, ...]:
        reader = model.teachers[model.tags[name]] if isinstance(model, TaggedTeachers) else model
        prompter = inputs.prompter(reader.tokenizer, "teacher")
        return with_context(prompter, inputs.recipe.prompt, contexts.get(name)).ids(problems[name])

    width = int(inputs.config(learner).get_text_config().vocab_size)
    return TranslatedTeacher(
        model=model,
        prompt_ids=cache(prompt_ids),
        pair=pair,
        form=form_of(dense),
        tokenizer=inputs.tokenizer(learner),
        vocabulary=model.vocabulary if pair is None else width,
        make_sampler=inputs.sampler,
    )


def token_bytes(inputs: RunInputs, role: str) -> TokenBytes:
    """The bytes of each token of a role's tokenizer, and its end. Raises InputError for a server whose tokenizer is not here."""
    field, name = inputs.field_and_name(role)
    if not is_served(name):
        return TokenBytes.of(inputs.tokenizer(role), inputs.stop_ids(role))
    folder = inputs.served_tokenizer
    if folder is None:
        raise InputError(
            "tokenizer",
            f"{field}: is a server ({name}), and tokenizers are aligned by the bytes of each token; name a folder with its tokenizer "
            "as models.teacher_tokenizer",
        )
    return TokenBytes.of(folder.tokenizer, folder.stop_ids)


def token_pair(inputs: RunInputs, learner: str, teacher: str) -> TokenPair | None:
    """The tokenizers of a learner and its teacher; None where they are the same."""
    own, other = token_bytes(inputs, learner), token_bytes(inputs, teacher)
    return None if same_tokens(own, other) else TokenPair(own, other)
