"""Doctor checks of chat templates, thinking modes, prompt lengths, unknown characters and control tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from html import unescape
from typing import Any, Literal

from headwater.doctor.context import DoctorContext
from headwater.doctor.finding import Finding, error, note, warning
from headwater.errors import shortened
from headwater.models.prompts import Prompter, reads_clock, special_tokens, spelt_template
from headwater.models.rope import mixed_lengths, positions
from headwater.sampling.vllm_sampler import max_sequence_tokens
from headwater.tasks.thinking import after_thinking
from headwater.types import Problem, letters_and_digits

_BRACKETED = re.compile(r"[<\[◁]\S+[>\]▷]")
ThinkingState = Literal["open", "closed", "none"]


def thinking_state(prompt: str) -> ThinkingState:
    """Whether a prompt opens a thinking block for the model to write, closes an empty one, or has none.

    Example: `thinking_state("…<think>\\n")` is "open", `thinking_state("…<think>\\n\\n</think>\\n\\n")` is "closed".
    """
    opened, closed = prompt.rfind("<think>"), prompt.rfind("</think>")
    return "open" if opened > closed else "closed" if closed >= 0 else "none"


def templates(context: DoctorContext) -> Iterator[Finding]:
    """A template mismatch does not fail, it biases every token of the distillation (tinker #796: +0.287 nats)."""
    problems, student = context.compared_problems, context.prompter("student")
    for role in context.roles[1:] if problems else ():
        teacher, fields = context.prompter(role), f"models.student and models.{role}"
        prompts = student.text(problems[0]), teacher.text(problems[0])
        states = [thinking_state(prompt) for prompt in prompts]
        if role in context.aligned_roles or context.recipe.prompt.teacher is not None:
            yield from own_prompt(fields, *prompts)
            continue
        shown = f"{prompts[0][-40:]!r} and {prompts[1][-40:]!r}, prompt.thinking {str(context.recipe.prompt.thinking).lower()}"
        if states[0] != states[1]:
            yield error(
                "thinking-differs",
                f"{fields}: the thinking block is {states[0]} in the first's prompt and {states[1]} in the other's ({shown})",
                "give both the same chat template (chat_template.jinja), or set prompt.thinking to what both understand",
            )
        elif any(student.ids(problem) != teacher.ids(problem) for problem in problems):
            yield error(
                "prompts-differ",
                f"{fields}: their chat templates give different ids for the same problem ({shown})",
                "copy the student's chat_template.jinja into the teacher's folder, or the other way round",
            )
        elif knows_thinking(student, context) != knows_thinking(teacher, context):
            yield warning(
                "thinking-known-to-one",
                f"{fields}: their prompts agree, but only one template knows enable_thinking, so one model may think where the "
                f"other answers ({shown})",
                "set prompt.thinking=false, or pair two models of one kind",
            )


def own_prompt(fields: str, student: str, teacher: str) -> Iterator[Finding]:
    """Prompts of a teacher that is meant to read other words, or another template, than the student."""
    if student != teacher:
        yield note(
            "prompts-differ",
            f"{fields}: read different prompts ({student[-40:]!r} and {teacher[-40:]!r}), as the recipe asks for; only their "
            "completions are compared",
            "nothing",
        )
    states = thinking_state(student), thinking_state(teacher)
    if states[0] != states[1]:
        yield warning(
            "thinking-differs",
            f"{fields}: the thinking block is {states[0]} in the first's prompt and {states[1]} in the other's, so one may think "
            "where the other answers",
            "set prompt.teacher.thinking to what fits the student's completions",
        )


def knows_thinking(prompter: Prompter, context: DoctorContext) -> bool:
    """Whether `prompt.thinking` changes the prompt."""
    problem, prompt = context.compared_problems[0], prompter.prompt
    texts = {
        replace(prompter, prompt=prompt.model_copy(update={"thinking": thinking})).text(problem)
        for thinking in (False, True)
    }
    return len(texts) > 1


def fields_without_effect(context: DoctorContext) -> Iterator[Finding]:
    """Prompt fields that a chat template ignores."""
    for role in context.roles if context.compared_problems else ():
        prompter = context.prompter(role)
        prompt = prompter.prompt
        text = prompter.text(context.compared_problems[0])
        if prompt.thinking and not knows_thinking(prompter, context):
            yield warning(
                "thinking-without-effect",
                f"models.{role}: prompt.thinking is true, but its chat template gives the same prompt either way",
                "set prompt.thinking=false, or use a model whose template knows enable_thinking",
            )
        if not prompt.thinking and thinking_state(text) == "open":
            yield warning(
                "thinking-always-on",
                f"models.{role}: prompt.thinking is false, but its chat template opens a thinking block ({text[-40:]!r})",
                "set prompt.thinking=true and a larger sampling.max_tokens, or change the template",
            )
        if prompt.system is not None and prompt.system.strip() not in text:
            yield warning(
                "system-without-effect",
                f"models.{role}: prompt.system does not appear in the prompt; its chat template leaves it out",
                "put the instruction into prompt.template instead",
            )


def prompt_lengths(context: DoctorContext) -> Iterator[Finding]:
    """Prompts against `prompt.max_tokens`."""
    limit = context.recipe.prompt.max_tokens
    for role in context.roles:
        lengths = context.lengths_of(role)
        if role != "student" and lengths is context.prompt_lengths:
            continue
        over = sum(tokens > limit for tokens, _ in lengths)
        if over:
            tokens, problem = lengths[0]
            owner = "" if role == "student" else f" of models.{role}"
            yield error(
                "prompt-too-long",
                f"{over} of {len(lengths)} prompts{owner} are over prompt.max_tokens {limit}; the longest, {problem.name} "
                f"({problem.text[:40]!r}…), has {tokens} tokens",
                "raise prompt.max_tokens, or remove those problems from the data",
            )


def context_length(context: DoctorContext) -> Iterator[Finding]:
    """The longest prompt and completion together against the positions of each model."""
    if not context.prompt_lengths:
        return
    completion, field = longest_completion(context)
    for role in context.roles:
        prompt = context.lengths_of(role)[0][0]
        known = positions(context.inputs.config(role))
        if known is not None and prompt + completion > known:
            room = known - prompt
            yield error(
                "context-too-short",
                f"models.{role}: the longest prompt ({prompt} tokens) and completion ({field} {completion}) are "
                f"{prompt + completion} together, over its {known} positions",
                (
                    f"lower {field} (every sampling.max_tokens that is larger) to at most {room}"
                    if room > 0
                    else "remove the longest problems from the data"
                )
                + ", or take a model with more positions",
            )


def longest_completion(context: DoctorContext) -> tuple[int, str]:
    """The largest `sampling.max_tokens` of the stages and the evaluations, and the field that sets it."""
    limits = {
        f"stages.{context.recipe_stage(node)}.sampling.max_tokens": stage.sampling.max_tokens
        for node, stage in context.training
    }
    if context.recipe.data.evals:
        limits["evaluate.sampling.max_tokens"] = context.recipe.evaluate.sampling.max_tokens
    field = max(limits, key=limits.__getitem__)
    return limits[field], field


def length_rules(context: DoctorContext) -> Iterator[Finding]:
    """Positions whose rule depends on the length of the sequence (longrope, dynamic NTK) must not change within a run."""
    lengths, recipe = context.prompt_lengths, context.recipe
    for role in context.roles if lengths else ():
        config = context.inputs.config(role)
        shortest, prompt, completion = lengths[-1][0], lengths[0][0], longest_completion(context)[0]
        if recipe.compute.sampler == "vllm":  # its engine follows the rule of the longest sequence that it has room for
            prompt = max_sequence_tokens(recipe) - completion
        problem = mixed_lengths(config, shortest, prompt, completion)
        if problem is not None:
            yield error(
                "positions-change",
                f"models.{role}: {problem}",
                "keep all sequences on one side of that length; see the message",
            )


def unknown_tokens(context: DoctorContext) -> Iterator[Finding]:
    """Problems with text that the tokenizer can only read as its unknown token."""
    tokenizer = context.inputs.tokenizer("student")
    unknown = getattr(tokenizer, "unk_token_id", None)
    lost = [problem for problem, ids in context.problem_ids if unknown is not None and unknown in ids]
    if lost:
        yield warning(
            "unknown-tokens",
            f"models.student: {len(lost)} of {len(context.problem_ids)} problems hold text that its tokenizer reads as "
            f"{tokenizer.unk_token} (the first: {lost[0].name})",
            "choose a model whose tokenizer covers these problems",
        )


def control_tokens(context: DoctorContext) -> Iterator[Finding]:
    """Problems that spell a control token: the tokenizer reads the token, and a turn ends in the middle of the problem."""
    names = control_tokens_of(context.inputs.tokenizer("student"))
    spelt = {problem: names.keys() & ids for problem, ids in context.problem_ids if not names.keys().isdisjoint(ids)}
    if spelt:
        shown = shortened([f"{names[min(ids)]} in {problem.name}" for problem, ids in spelt.items()], separator="; ")
        yield warning(
            "control-tokens-in-problems",
            f"models.student: {len(spelt)} of {len(context.problem_ids)} problems contain control tokens, which its tokenizer does "
            f"not read as text ({shown})",
            "remove these problems, or change the spelling in the data (a space within the token)",
        )


def control_tokens_of(tokenizer: Any) -> dict[int, str]:
    """Id -> spelling of the tokens that steer a model: special ones, and added ones in brackets (`<think>`, `[INST]`)."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    bracketed = {id_: token.content for id_, token in added.items() if _BRACKETED.fullmatch(token.content)}
    tokens = bracketed | special_tokens(tokenizer)
    return {id_: content for id_, content in tokens.items() if id_ != tokenizer.unk_token_id}


def whole_problems(context: DoctorContext) -> Iterator[Finding]:
    """Problems must be in their prompts, with every turn of a conversation; of an assistant's turn, what follows the thinking."""
    problems = [*context.compared_problems, *(problem for problem in context.inputs.all_problems if problem.turns)]
    for role in context.roles if problems else ():
        prompter = context.prompter(role)
        cut = [(problem, turn) for problem in problems for turn in turns_left_out(prompter, problem)[:1]]
        if cut:
            problem, turn = cut[0]
            part = f"turn {turn + 1}, {problem.turns[turn][0]}, of {problem.name}" if problem.turns else problem.name
            yield error(
                "turns-left-out",
                f"models.{role}: its chat template leaves {len({problem.id for problem, _ in cut})} problems, or turns of them, out of "
                f"the prompt (the first: {part})",
                "use a model whose chat template takes such turns, or write them into the user's turn",
            )


def turns_left_out(prompter: Prompter, problem: Problem) -> list[int]:
    """Positions of the turns whose text is not in the prompt."""
    prompt = unescape(prompter.text(problem))  # some templates escape for HTML
    contents = [after_thinking(content).strip() for content in problem.contents]
    missing = [index for index, content in enumerate(contents) if unescape(content) not in prompt]
    if not missing:
        return []
    letters = letters_and_digits(prompt)  # a template may escape or rearrange what lies between
    return [index for index in missing if letters_and_digits(unescape(contents[index])) not in letters]


def spelt_templates(context: DoctorContext) -> Iterator[Finding]:
    """Problems that are whole prompts already get a second chat template around them."""
    templated = [role for role in context.roles if context.prompter(role).has_template]
    for name in context.inputs.data_fields if templated else ():
        problems = context.inputs.source(name).problems
        marks = [(mark, problem) for problem in problems if (mark := spelt_template(problem)) is not None]
        if marks:
            mark, problem = marks[0]
            yield Finding(
                "chat-template-twice",
                "error" if 2 * len(marks) > len(problems) else "warning",
                f"{name}: {len(marks)} of {len(problems)} problems contain a chat template (the first: {mark} in {problem.name}), and "
                f"that of models.{templated[0]} is applied around them",
                "set prompt.chat=false to give them to the models as they are, or write them as messages (role and content)",
            )


def prompt_ends(context: DoctorContext) -> Iterator[Finding]:
    """A prompt begins with one BOS at most, and does not end with an id that ends a completion."""
    for role in context.roles if context.compared_problems else ():
        tokenizer, problem = context.inputs.tokenizer(role), context.compared_problems[0]
        ids = context.prompter(role).ids(problem)
        bos = getattr(tokenizer, "bos_token_id", None)
        if bos is not None and ids[:2] == (bos, bos):
            yield warning(
                "bos-twice",
                f"models.{role}: its prompts begin with {tokenizer.bos_token} twice (id {bos}), as the tokenizer or the chat template "
                "adds one and the other, or prompt.template, writes it too",
                "remove it from prompt.template or from the chat template",
            )
        if ids[-1] in context.inputs.stop_ids(role):
            yield warning(
                "prompt-ends-with-stop",
                f"models.{role}: its prompts end with {tokenizer.convert_ids_to_tokens(ids[-1])} (id {ids[-1]}), which ends a "
                f"completion; the model continues after an end ({problem.name})",
                "give the chat template a generation prompt (add_generation_prompt), or remove that token from it",
            )


def clock(context: DoctorContext) -> Iterator[Finding]:
    """A template that reads the clock gives other prompts on another day."""
    day = context.inputs.day
    for role in context.roles:
        if not reads_clock(context.inputs.tokenizer(role)):
            continue
        if day is None:
            yield warning(
                "clock-not-recorded",
                f"models.{role}: its chat template reads the clock, and {context.out} was begun by a version that recorded no day, so "
                "its prompts change from day to day",
                "nothing, or use a new folder, which records its day",
            )
        else:
            yield note(
                "template-reads-clock",
                f"models.{role}: its chat template reads the clock; in this run it reads {day}, 00:00, also when resumed",
                "nothing; runs begun on other days have other prompts and share no nodes, unless --reuse names this one",
            )
