"""The doctor's checks of tokenizers, vocabularies, stop ids, chat templates and prompt lengths: nothing here loads weights."""

from __future__ import annotations

from typing import Any, Literal

from headwater.doctor.context import Case, Finding, UnavailableError
from headwater.errors import UserError
from headwater.models.prompts import Prompter, render_chat
from headwater.models.tokenizer import refuse_different_tokens
from headwater.runs.plan import Role

SAMPLED_PROBLEMS = 32
"""Texts held through both tokenizers and templates beside the probe strings; as many as `run` looks at."""


def models_are_readable(case: Case) -> list[Finding]:
    found: dict[Finding, None] = {}
    for role in case.roles:
        for read in (case.config, case.tokenizer):
            try:
                read(role)
            except UnavailableError as error:
                found[error.finding] = None
    return list(found)


def token_ids(case: Case) -> list[Finding]:
    """Equal width is not enough (unsloth-zoo #965): ids of probe strings and of problems are compared."""
    found = []
    for role in case.roles[1:]:
        try:
            refuse_different_tokens(
                case.tokenizer("student"), case.tokenizer(role), ("models.student", f"models.{role}"), _texts(case)
            )
        except UnavailableError:
            raise
        except UserError as error:
            remedy = "take a teacher of the student's own family, or one whose tokenizer files are the same"
            found.append(Finding("token-ids-differ", "error", str(error), remedy))
    return found


def _texts(case: Case) -> list[str]:
    """Some problems' texts; none where the data cannot be read, which other checks say."""
    try:
        return [problem.text[:10_000] for problem in case.problems[:SAMPLED_PROBLEMS]]
    except UnavailableError:
        return []


def vocabulary(case: Case) -> list[Finding]:
    found = []
    widths = {role: int(case.config(role).get_text_config().vocab_size) for role in case.roles}
    for (learner, supervisor), whole in case.pairs.items():
        if whole and widths[learner] != widths[supervisor]:
            found.append(
                Finding(
                    "vocabulary-width",
                    "error",
                    f"models.{learner} and models.{supervisor}: their output layers have {widths[learner]} and "
                    f"{widths[supervisor]} columns, so their distributions cannot be compared",
                    "pad the narrower model to the wider (resize_token_embeddings) and save it; the added columns stand for "
                    "no token",
                )
            )
    for role in case.roles:
        largest = max(case.tokenizer(role).get_vocab().values(), default=-1)
        if largest >= widths[role]:
            found.append(
                Finding(
                    "token-beyond-vocabulary",
                    "error",
                    f"models.{role}: its tokenizer gives ids up to {largest}, its output layer has {widths[role]} columns",
                    "use the tokenizer that the model was made with, or resize_token_embeddings",
                )
            )
    return found


def stop_sets(case: Case) -> list[Finding]:
    """A teacher that ends with an id at which the student does not stop teaches it to run on (ms-swift #9526)."""
    found = []
    for role in case.roles:
        if not case.stop_ids(role):
            remedy = "set eos_token_id in its generation_config.json"
            found.append(Finding("no-stop-id", "error", f"models.{role}: no id ends a completion", remedy))
    for learner, supervisor in case.pairs:
        ours, theirs = set(case.stop_ids(learner)), set(case.stop_ids(supervisor))
        if ours == theirs or not ours or not theirs:
            continue
        evidence = f"models.{learner} ends a completion at {_ids(case, learner)}, models.{supervisor} at {_ids(case, supervisor)}"
        if theirs - ours:
            evidence += f"; after {sorted(theirs - ours)}, as it is taught to write, the {learner} would go on"
        remedy = (
            f"write one list of both, {sorted(ours | theirs)}, as eos_token_id into the generation_config.json of each model, "
            "or take Base with Base, Instruct with Instruct"
        )
        found.append(Finding("stop-sets-differ", "error" if theirs - ours else "warning", evidence, remedy))
    return found


def _ids(case: Case, role: Role) -> str:
    tokenizer = case.tokenizer(role)
    return ", ".join(f"{one} ({tokenizer.convert_ids_to_tokens(one)})" for one in case.stop_ids(role))


def ends(case: Case) -> list[Finding]:
    """Whether tokenizer, generation config and chat template agree on how a turn ends, and whether padding is told from it."""
    found = []
    for role in case.roles:
        tokenizer, stops = case.tokenizer(role), case.stop_ids(role)
        named = case.generation(role).eos_token_id
        listed = named if isinstance(named, (list, tuple)) else [] if named is None else [named]
        if listed and tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in listed:
            found.append(
                Finding(
                    "eos-not-in-generation-config",
                    "warning",
                    f"models.{role}: the tokenizer's EOS is {tokenizer.eos_token_id} ({tokenizer.eos_token}), "
                    f"generation_config.json names {list(listed)}; both stop here, elsewhere the first may not",
                    "write both ids as eos_token_id into generation_config.json, so that every engine stops alike",
                )
            )
        end = turn_end(tokenizer)
        if end is not None and end not in stops:
            found.append(
                Finding(
                    "turn-end-does-not-stop",
                    "warning",
                    f"models.{role}: its chat template ends a turn with {end} ({tokenizer.convert_ids_to_tokens(end)}), "
                    f"which is not among its stop ids {list(stops)}",
                    "add that id to eos_token_id in generation_config.json, or use the model's own template",
                )
            )
        if tokenizer.pad_token_id is not None and tokenizer.pad_token_id in stops:
            found.append(
                Finding(
                    "pad-is-eos",
                    "note",
                    f"models.{role}: id {tokenizer.pad_token_id} ({tokenizer.pad_token}) both pads and ends a completion",
                    "nothing: padding is never recognised by its id here and EOS is trained on; trainers that mask the pad id "
                    "would unlearn stopping",
                )
            )
    return found


def turn_end(tokenizer: Any) -> int | None:
    """The special token that the chat template writes after an assistant's words, if it writes one."""
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    turns = [{"role": "user", "content": "2+5"}, {"role": "assistant", "content": "=7"}]
    try:
        after = render_chat(tokenizer, turns, "an assistant's turn").rpartition("=7")[2].lstrip()[:1000]
    except UserError:  # not every template takes such a turn; what it makes of the problems is checked by another name
        return None
    ids = tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return ids[0] if ids and ids[0] in special else None


def sampling_defaults(case: Case) -> list[Finding]:
    """A model's own sampling defaults are never used; who expects them should know."""
    found = []
    for role in case.roles:
        held = case.generation(role)
        usual = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
        wanted = case.recipe.evaluate.sampling.model_dump()
        named = {name: getattr(held, name, None) for name in usual}
        other = {name: value for name, value in named.items() if value is not None and value != wanted[name]}
        # transformers' own fallback is top_k 50; where no file names it, it says nothing about this model.
        if other.get("top_k") == 50 and len(other) == 1:
            other = {}
        if other:
            found.append(
                Finding(
                    "sampling-defaults-ignored",
                    "note",
                    f"models.{role}: generation_config.json names {_named(other)}; this recipe trains at temperature, top-p "
                    f"and top-k of its stages and evaluates at {_named({name: wanted[name] for name in usual})}",
                    "nothing, or set evaluate.sampling to the model's own values to compare with published numbers",
                )
            )
    return found


def _named(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in values.items())


Thought = Literal["open", "closed", "none"]


def thought(prompt: str) -> Thought:
    """Whether a prompt leaves a thought open for the model to write, closes an empty one, or has none.

    Example: `thought("…<think>\\n")` is "open", `thought("…<think>\\n\\n</think>\\n\\n")` is "closed".
    """
    opened, closed = prompt.rfind("<think>"), prompt.rfind("</think>")
    return "open" if opened > closed else "closed" if closed >= 0 else "none"


def templates(case: Case) -> list[Finding]:
    """A template mismatch does not fail, it biases every token of the distillation (tinker #796: +0.287 nats)."""
    problems = case.problems[:SAMPLED_PROBLEMS]
    if not problems:
        return []
    found, student = [], case.prompter("student")
    for role in case.roles[1:]:
        other, fields = case.prompter(role), f"models.student and models.{role}"
        ours, theirs = student.text(problems[0]), other.text(problems[0])
        shown = f"{ours[-40:]!r} and {theirs[-40:]!r}, prompt.thinking {str(case.recipe.prompt.thinking).lower()}"
        if thought(ours) != thought(theirs):
            found.append(
                Finding(
                    "thinking-differs",
                    "error",
                    f"{fields}: one prompt's thought is {thought(ours)}, the other's {thought(theirs)} ({shown})",
                    "give both the same chat template (chat_template.jinja), or set prompt.thinking to what both understand",
                )
            )
        elif any(student.ids(problem) != other.ids(problem) for problem in problems):
            found.append(
                Finding(
                    "prompts-differ",
                    "error",
                    f"{fields}: their chat templates give different ids for the same problem ({shown})",
                    "copy the student's chat_template.jinja into the teacher's folder, or the other way round",
                )
            )
        elif switches(student, case) != switches(other, case):
            found.append(
                Finding(
                    "thinking-known-to-one",
                    "warning",
                    f"{fields}: their prompts agree, but only one template knows enable_thinking, so one model may think "
                    f"where the other answers ({shown})",
                    "set prompt.thinking=false, or pair two models of one kind",
                )
            )
    return found


def switches(prompter: Prompter, case: Case) -> bool:
    """Whether `prompt.thinking` changes the prompt."""
    problem, prompt = case.problems[0], case.recipe.prompt
    texts = {
        Prompter(prompter.tokenizer, prompt.model_copy(update={"thinking": thinking})).text(problem)
        for thinking in (False, True)
    }
    return len(texts) > 1


def fields_without_effect(case: Case) -> list[Finding]:
    """Prompt fields that a template passes over in silence."""
    found = []
    for role in case.roles:
        prompter, prompt = case.prompter(role), case.recipe.prompt
        text = prompter.text(case.problems[0])
        if prompt.thinking and not switches(prompter, case):
            found.append(
                Finding(
                    "thinking-without-effect",
                    "warning",
                    f"models.{role}: prompt.thinking is true, but its chat template gives the same prompt either way",
                    "set prompt.thinking=false, or use a model whose template knows enable_thinking",
                )
            )
        if not prompt.thinking and thought(text) == "open":
            found.append(
                Finding(
                    "thinking-always-on",
                    "warning",
                    f"models.{role}: prompt.thinking is false, but its chat template opens a thought ({text[-40:]!r})",
                    "set prompt.thinking=true and give sampling.max_tokens room for thoughts, or change the template",
                )
            )
        if prompt.system is not None and prompt.system.strip() not in text:
            found.append(
                Finding(
                    "system-without-effect",
                    "warning",
                    f"models.{role}: prompt.system does not appear in the prompt; its chat template leaves it out",
                    "put the instruction into prompt.template instead",
                )
            )
    return found


def lengths(case: Case) -> list[Finding]:
    """Prompts against their limit, and prompt with completion against the positions that a model knows."""
    measured = case.prompt_lengths
    if not measured:
        return []
    found, limit = [], case.recipe.prompt.max_tokens
    over = [one for one in measured if one[0] > limit]
    if over:
        tokens, problem = over[0]
        found.append(
            Finding(
                "prompt-too-long",
                "error",
                f"{len(over)} of {len(measured)} prompts are over prompt.max_tokens {limit}; the longest, problem {problem.id} "
                f"of {problem.source}, has {tokens}",
                "raise prompt.max_tokens, or take those problems out of the data",
            )
        )
    completions = [node.settings.sampling.max_tokens for node in case.nodes if node.settings is not None]
    longest = max([*completions, case.recipe.evaluate.sampling.max_tokens])
    for role in case.roles:
        known = positions(case.config(role))
        room = 0 if known is None else known - measured[0][0]
        if known is not None and longest > room:
            found.append(
                Finding(
                    "context-too-short",
                    "error",
                    f"models.{role}: the longest prompt ({measured[0][0]} tokens) and completion (sampling.max_tokens "
                    f"{longest}) are {measured[0][0] + longest} together, over its {known} positions",
                    (
                        f"lower sampling.max_tokens to at most {room}"
                        if room > 0
                        else "take the longest problems out of the data"
                    )
                    + ", or take a model of more positions",
                )
            )
    return found


def positions(config: Any) -> int | None:
    """How many positions a model knows, with the factor of a RoPE scaling where its config keeps the original number."""
    held = config.get_text_config()
    known = getattr(held, "max_position_embeddings", None)
    rope = getattr(held, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings")
    if known is None or original is None:
        return known
    return max(known, int(original * rope.get("factor", 1.0)))


def unknown_tokens(case: Case) -> list[Finding]:
    """A tokenizer that lacks the problems' characters asks the model something else."""
    tokenizer, problems = case.tokenizer("student"), case.problems
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None or not problems:
        return []
    ids = tokenizer([problem.text[:10_000] for problem in problems], add_special_tokens=False)["input_ids"]
    lost = [problem for problem, one in zip(problems, ids, strict=True) if unknown in one]
    if not lost:
        return []
    return [
        Finding(
            "unknown-tokens",
            "warning",
            f"models.student: {len(lost)} of {len(problems)} problems hold text that its tokenizer does not know and reads as "
            f"{tokenizer.unk_token} (the first: problem {lost[0].id} of {lost[0].source})",
            "take a model whose tokenizer covers these problems",
        )
    ]
