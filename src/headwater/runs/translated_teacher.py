"""Wrap a supervising model that has its own prompt or tokenizer."""

from __future__ import annotations

from functools import cache

from headwater.config.dense import Dense
from headwater.models.prompts import with_context
from headwater.runs.inputs import RunInputs
from headwater.runs.tokenizers import token_pair
from headwater.teachers.build import TaggedTeachers, Teacher
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
    field = next(iter(inputs.recipe.models.named(role))).removeprefix("models.")
    pair = token_pair(inputs, learner, field) if aligns else None
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
