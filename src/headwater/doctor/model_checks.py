"""Doctor checks of model folders, tokenizers, vocabularies, stop ids and adapters; no weights are loaded."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from headwater.doctor.context import MAX_COMPARED_CHARACTERS, DoctorContext
from headwater.doctor.finding import Finding, error, note, try_each, warning
from headwater.errors import UserError, shortened
from headwater.models.adapter_coverage import coverage
from headwater.models.prompts import turn_end
from headwater.models.tokenizer import refuse_different_tokens
from headwater.runs.node import base_of
from headwater.runs.read_once import InputError

MIN_SHARE = 0.9
"""Share of the layers' weights below which `all-linear` does not mean what it says."""


def models_are_readable(context: DoctorContext) -> Iterator[Finding]:
    inputs = context.inputs
    reads = (inputs.weights_path, inputs.config, inputs.tokenizer)
    yield from try_each(*(partial(read, role) for role in context.roles for read in reads))


def trainable_weights(context: DoctorContext) -> Iterator[Finding]:
    for role, adapted in context.trained_roles.items():
        context.inputs.config(role)
        try:
            context.inputs.model_folder(role).require_trainable(adapted)
        except UserError as refusal:
            remedy = "quantized models can only be teachers that do not train"
            yield error("model-unsupported", str(refusal), remedy)


def adapters(context: DoctorContext) -> Iterator[Finding]:
    """Whether adapters can be attached, saved and loaded again, and what share of the layers' weights they cover."""
    used = dict.fromkeys((base_of(node.start), node.lora(context.recipe)) for node, _ in context.training)
    trained = [(role, lora) for role in context.roles for base, lora in used if lora and base == role.partition(".")[0]]
    for role, lora in trained:
        try:
            covered = coverage(context.inputs.model_folder(role), lora)
        except UserError as refusal:
            remedy = "name linear layers of the model in models.lora.targets, or train all weights (no models.lora)"
            yield error("adapters-impossible", f"models.{role}: {refusal}", remedy)
            continue
        if covered is None or not covered.others:
            continue
        everything = lora.targets == "all-linear"
        partial = covered.share < MIN_SHARE if everything else any("expert" in name for name in covered.others)
        targets = (
            "the layers that should train, or train all weights" if everything else "all-linear, or name these too"
        )
        yield Finding(
            "adapters-cover-part",
            "warning" if partial else "note",
            f"models.{role}: adapters cover {covered.share:.0%} of the layers' weights; not adapted: {shortened(list(covered.others))}",
            f"nothing, if that is intended; otherwise set models.lora.targets to {targets}",
        )


def compared_texts(context: DoctorContext) -> list[str]:
    """Some problems' texts; none if the data cannot be read, which has its own finding."""
    try:
        return [problem.text[:MAX_COMPARED_CHARACTERS] for problem in context.compared_problems]
    except InputError:
        return []


def token_ids(context: DoctorContext) -> Iterator[Finding]:
    """Equal width is not enough (unsloth-zoo #965): ids of probe strings and of problems are compared."""
    student, texts = context.inputs.tokenizer("student"), compared_texts(context)
    for role in context.roles[1:]:
        if role in context.aligned_roles:
            continue
        teacher = context.inputs.tokenizer(role)
        try:
            refuse_different_tokens(student, teacher, ("models.student", f"models.{role}"), texts)
        except UserError as refusal:
            stages = dict.fromkeys(
                context.recipe_stage(node)
                for node, stage in context.training
                if stage.needs_teacher and not node.aligns_tokenizers
            )
            aligned = " and ".join(f"stages.{stage}.dense.tokenizers=prefix" for stage in stages)
            yield error(
                "token-ids-differ",
                f"{refusal} in {' and '.join(stages)}; {aligned} would align the two (docs/teachers.md)"
                if stages
                else str(refusal),
                f"choose a teacher with the student's tokenizer{f', or set {aligned}' if stages else ''}",
            )


def vocabulary(context: DoctorContext) -> Iterator[Finding]:
    widths = {role: int(context.inputs.config(role).get_text_config().vocab_size) for role in context.roles}
    for (learner, teacher), whole in context.distillations.items():
        if whole and widths[learner] != widths[teacher] and (learner, teacher) not in context.aligned_pairs:
            yield error(
                "vocabulary-width",
                f"models.{learner} and models.{teacher}: their output layers have {widths[learner]} and {widths[teacher]} columns, "
                "so their distributions cannot be compared",
                "pad the narrower model to the wider (resize_token_embeddings) and save it; the added columns stand for no token",
            )
    for role, width in widths.items():
        largest = max(context.inputs.tokenizer(role).get_vocab().values(), default=-1)
        if largest >= width:
            yield error(
                "token-beyond-vocabulary",
                f"models.{role}: its tokenizer gives ids up to {largest}, its output layer has {width} columns",
                "use the tokenizer that the model was trained with, or resize_token_embeddings",
            )


def stop_sets(context: DoctorContext) -> Iterator[Finding]:
    """A teacher that ends with an id at which the student does not stop teaches it to run on (ms-swift #9526)."""
    inputs = context.inputs
    for role in context.roles:
        if not inputs.stop_ids(role):
            remedy = "set eos_token_id in its generation_config.json"
            yield error("no-stop-id", f"models.{role}: no id ends a completion", remedy)

    def named(role: str) -> str:
        tokenizer = inputs.tokenizer(role)
        return ", ".join(f"{id_} ({tokenizer.convert_ids_to_tokens(id_)})" for id_ in inputs.stop_ids(role))

    for learner, teacher in context.distillations:
        learner_ids, teacher_ids = set(inputs.stop_ids(learner)), set(inputs.stop_ids(teacher))
        if (
            learner_ids == teacher_ids
            or not learner_ids
            or not teacher_ids
            or (learner, teacher) in context.aligned_pairs
        ):
            continue
        evidence = f"models.{learner} ends a completion at {named(learner)}, models.{teacher} at {named(teacher)}"
        unknown = sorted(teacher_ids - learner_ids)
        if unknown:
            evidence += f"; after {unknown}, which the teacher ends with, the {learner} would continue"
        yield Finding(
            "stop-sets-differ",
            "error" if unknown else "warning",
            evidence,
            f"write the union {sorted(learner_ids | teacher_ids)} as eos_token_id into each model's generation_config.json, or pair "
            "Base with Base, Instruct with Instruct",
        )


def end_tokens(context: DoctorContext) -> Iterator[Finding]:
    """Whether tokenizer, generation config and chat template agree on the end of a turn, and whether padding differs from it."""
    for role in context.roles:
        tokenizer, stops = context.inputs.tokenizer(role), context.inputs.stop_ids(role)
        named = context.inputs.generation_config(role).eos_token_id
        listed = named if isinstance(named, (list, tuple)) else [] if named is None else [named]
        if listed and tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in listed:
            yield warning(
                "eos-not-in-generation-config",
                f"models.{role}: the tokenizer's EOS is {tokenizer.eos_token_id} ({tokenizer.eos_token}), "
                f"generation_config.json names {list(listed)}; both stop here, elsewhere the first may not",
                "write both ids as eos_token_id into generation_config.json, so that every engine stops at both",
            )
        end = turn_end(tokenizer)
        if end is not None and end not in stops:
            yield warning(
                "turn-end-does-not-stop",
                f"models.{role}: its chat template ends a turn with {end} ({tokenizer.convert_ids_to_tokens(end)}), which is not "
                f"among its stop ids {list(stops)}",
                "add that id to eos_token_id in generation_config.json, or use the model's own template",
            )
        if tokenizer.pad_token_id is not None and tokenizer.pad_token_id in stops:
            yield note(
                "pad-is-eos",
                f"models.{role}: id {tokenizer.pad_token_id} ({tokenizer.pad_token}) both pads and ends a completion",
                "nothing: padding is never recognised by its id here and EOS is trained on; trainers that mask the pad id would "
                "unlearn stopping",
            )


def generation_configs(context: DoctorContext) -> Iterator[Finding]:
    """Entries that transformers reads and refuses to write; a trained model's folder gets a generation config without them."""
    for role in context.roles:
        context.inputs.generation_config(role)
        changes = context.inputs.model_folder(role).generation_changes
        if changes:
            yield note(
                "generation-config-corrected",
                f"models.{role}: transformers refuses to save its generation_config.json as it is; in the folder of a trained model, "
                f"{', '.join(changes)}",
                "nothing, or correct the file if those settings were meant otherwise",
            )


def sampling_defaults(context: DoctorContext) -> Iterator[Finding]:
    """A model's own sampling defaults are never used, which a user may not expect."""
    if not context.recipe.data.evals:
        return
    used = context.recipe.evaluate.sampling.model_dump(include={"temperature", "top_p", "top_k"})
    for role in context.roles:
        config = context.inputs.generation_config(role)
        defaults = {name: getattr(config, name, None) for name in used}
        other = {name: value for name, value in defaults.items() if value is not None and value != used[name]}
        # transformers' own default is top_k 50; where no file names it, it says nothing about this model.
        if other and other != {"top_k": 50}:
            yield note(
                "sampling-defaults-ignored",
                f"models.{role}: generation_config.json names {_named(other)}; this recipe trains at temperature, top-p and top-k "
                f"of its stages and evaluates at {_named(used)}",
                "nothing, or set evaluate.sampling to the model's own values to compare with published numbers",
            )


def _named(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, (int, float)) else f"{name} {value!r:.40}"
        for name, value in values.items()
    )
