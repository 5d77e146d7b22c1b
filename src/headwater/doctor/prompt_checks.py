"""Doctor checks of chat templates, thinking modes, prompt lengths and unknown characters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from headwater.doctor.context import DoctorContext
from headwater.doctor.finding import Finding, error, warning
from headwater.models.prompts import Prompter
from headwater.models.rope import mixed_lengths, positions
from headwater.sampling.vllm_sampler import max_sequence_tokens

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


def knows_thinking(prompter: Prompter, context: DoctorContext) -> bool:
    """Whether `prompt.thinking` changes the prompt."""
    problem, prompt = context.compared_problems[0], context.recipe.prompt
    texts = {
        Prompter(prompter.tokenizer, prompt.model_copy(update={"thinking": thinking})).text(problem)
        for thinking in (False, True)
    }
    return len(texts) > 1


def fields_without_effect(context: DoctorContext) -> Iterator[Finding]:
    """Prompt fields that a chat template ignores."""
    prompt = context.recipe.prompt
    for role in context.roles if context.compared_problems else ():
        prompter = context.prompter(role)
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
    limit, lengths = context.recipe.prompt.max_tokens, context.prompt_lengths
    over = sum(tokens > limit for tokens, _ in lengths)
    if over:
        tokens, problem = lengths[0]
        yield error(
            "prompt-too-long",
            f"{over} of {len(lengths)} prompts are over prompt.max_tokens {limit}; the longest, problem {problem.id} of "
            f"{problem.source} ({problem.text[:40]!r}…), has {tokens} tokens",
            "raise prompt.max_tokens, or remove those problems from the data",
        )


def context_length(context: DoctorContext) -> Iterator[Finding]:
    """The longest prompt and completion together against the positions of each model."""
    if not context.prompt_lengths:
        return
    prompt, completion = context.prompt_lengths[0][0], longest_completion(context)
    for role in context.roles:
        known = positions(context.inputs.config(role))
        if known is not None and prompt + completion > known:
            room = known - prompt
            yield error(
                "context-too-short",
                f"models.{role}: the longest prompt ({prompt} tokens) and completion (sampling.max_tokens {completion}) are "
                f"{prompt + completion} together, over its {known} positions",
                (
                    f"lower sampling.max_tokens to at most {room}"
                    if room > 0
                    else "remove the longest problems from the data"
                )
                + ", or take a model with more positions",
            )


def longest_completion(context: DoctorContext) -> int:
    stages = [node.settings.sampling.max_tokens for node in context.nodes if node.settings is not None]
    return max([*stages, context.recipe.evaluate.sampling.max_tokens])


def length_rules(context: DoctorContext) -> Iterator[Finding]:
    """Positions whose rule depends on the length of the sequence (longrope, dynamic NTK) must not change within a run."""
    lengths, recipe = context.prompt_lengths, context.recipe
    for role in context.roles if lengths else ():
        config = context.inputs.config(role)
        shortest, prompt, completion = lengths[-1][0], lengths[0][0], longest_completion(context)
        if recipe.compute.sampler == "vllm":  # its engine follows the rule of the longest sequence that it has room for
            prompt = max_sequence_tokens(recipe) - completion
        problem = mixed_lengths(config, shortest, prompt, completion)
        if problem is not None:
            yield error(
                "positions-change", f"models.{role}: {problem}", "stay on one side: across it, nothing is exact"
            )


def unknown_tokens(context: DoctorContext) -> Iterator[Finding]:
    """Problems with text that the tokenizer can only read as its unknown token."""
    tokenizer, problems = context.inputs.tokenizer("student"), context.inputs.all_problems
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None or not problems:
        return
    ids = tokenizer([problem.text[:10_000] for problem in problems], add_special_tokens=False)["input_ids"]
    lost = [problem for problem, row in zip(problems, ids, strict=True) if unknown in row]
    if lost:
        yield warning(
            "unknown-tokens",
            f"models.student: {len(lost)} of {len(problems)} problems hold text that its tokenizer reads as {tokenizer.unk_token} "
            f"(the first: problem {lost[0].id} of {lost[0].source})",
            "choose a model whose tokenizer covers these problems",
        )
