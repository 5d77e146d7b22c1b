"""Doctor checks of the sampling engine, of teachers behind a server, and of teachers by tag."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import combinations

from headwater.config.samplers import missing_package
from headwater.config.stage import Stage
from headwater.doctor.context import DoctorContext
from headwater.doctor.finding import Finding, error, note
from headwater.doctor.model_checks import compared_texts
from headwater.doctor.weight_checks import mean_gap
from headwater.errors import HeadwaterError, UserError
from headwater.models.tokenizer import PROBES, refuse_different_tokens
from headwater.runs.node import StageNode, TrainNode
from headwater.runs.read_once import InputError
from headwater.runs.translated_teacher import token_bytes, token_pair
from headwater.teachers.build import top_k_of
from headwater.teachers.scoring import logp_of, token_logps
from headwater.teachers.served_teacher import NO_CANDIDATES, ServedTeacher, check_scoring, refuses_candidates
from headwater.teachers.server_client import ServedTokenizer, is_served

SERVER_PROBLEMS = 4
"""Problems on which a server's tokenizer is compared, in addition to the probe strings: each is a request."""
REPLICA_CALLS = 4
"""Times that the same tokens are scored at once, so that a balancer hands them to several replicas."""
LEAST_SIGNAL = 1e-3
"""Nats a token that answers may differ by in any case: rounding in float32."""


def cannot_run(evidence: str) -> Finding:
    return error("cannot-run", evidence, "fix the cause named in the message")


def engine(context: DoctorContext) -> Iterator[Finding]:
    """Whether the sampler that the recipe names is installed; sampling shows whether it takes the model."""
    message = missing_package(context.recipe.compute.sampler)
    if message is not None:
        yield error("engine-unusable", message, "install the extra, or set compute.sampler=torch")


def teacher_form(context: DoctorContext) -> Iterator[Finding]:
    """A teacher behind a server, or a mapping of teachers, cannot do all that a model in one folder can."""
    teacher = context.recipe.models.teacher
    servers = [name for name in context.recipe.models.by_role("teacher").values() if is_served(name)]
    if not servers and not isinstance(teacher, dict):
        return
    form = "a mapping to several models" if isinstance(teacher, dict) else f"a server ({servers[0]})"
    for node in context.nodes:
        if isinstance(node, TrainNode) and node.start == "teacher":
            yield cannot_run(
                f"models.teacher: is {form}, which is not trained here, and stage {node.stage} of this arm would; choose arms that "
                "do not train the teacher (raw_teacher), or name one folder",
            )
        if servers and _queries_base_teacher(node):
            for field, reason in _server_limits(node, node.settings):
                yield cannot_run(
                    f"stages.{context.recipe_stage(node)}.{field}: models.teacher is a server ({servers[0]}), {reason}"
                )


def _queries_base_teacher(node: StageNode) -> bool:
    return node.start == "teacher" or (isinstance(node, TrainNode) and node.teacher == "teacher")


def _server_limits(node: StageNode, stage: Stage) -> Iterator[tuple[str, str]]:
    """(field of the stage, why a server cannot do what it asks for)."""
    scores = isinstance(node, TrainNode) or "teacher" in stage.signals
    if scores and stage.dense.divergence == "uld":
        yield "dense.divergence", "and uld sorts whole distributions; take another divergence, or name a folder"
    elif scores and stage.dense.exact and stage.dense.top_k is None:
        yield (
            "dense.top_k",
            "which gives the top-k log-probs and not the whole distribution; set it (for example 64, with --max-logprobs 64 at the "
            "server)",
        )
    for field in ("teacher_weights", "gain_over"):
        if getattr(stage.dense, field) is not None:
            yield f"dense.{field}", "and several models are combined by their whole distributions; name a folder"
    if stage.sampling.temperature != 1.0:
        yield "sampling.temperature", "which scores at temperature 1 only"


def one_tokenizer(context: DoctorContext) -> Iterator[Finding]:
    """Teachers by tag may have another tokenizer than the student, and have one among themselves."""
    stages = [context.recipe_stage(node) for node, _ in context.training if node.aligns_tokenizers]
    if not stages or not isinstance(context.recipe.models.teacher, dict):
        return
    first, *others = context.recipe.models.by_role("teacher")
    for other in others:
        if token_pair(context.inputs, first, other) is not None:
            yield cannot_run(
                f"models.{first} and models.{other}: have different tokenizers, and stages.{stages[0]}.dense.tokenizers aligns the "
                "student's with one; choose teachers of one family"
            )


def teacher_tags(context: DoctorContext) -> Iterator[Finding]:
    """With a mapping of teachers, every problem needs the tag of one."""
    known = context.recipe.models.teacher
    if not isinstance(known, dict):
        return
    for problem in context.inputs.all_problems:
        if problem.tag not in known:
            tag = f"has the tag {problem.tag!r}" if problem.tag else "has no tag (data.columns.tag names their column)"
            yield cannot_run(
                f"models.teacher: problem {problem.id} of {problem.source} {tag}, and the mapping knows {', '.join(known)}",
            )
            return


def normalized_tags(context: DoctorContext) -> Iterator[Finding]:
    """A loss that is normalized by tag needs problems of several tags."""
    stages = dict.fromkeys(
        context.recipe_stage(node) for node, stage in context.training if stage.dense.normalize == "tags"
    )
    tags = {problem.tag for problem in context.inputs.all_problems} if stages else set()
    for stage in stages if len(tags) == 1 else ():
        tag = next(iter(tags))
        have = f"have the tag {tag!r}" if tag else "have no tag (data.columns.tag names their column)"
        yield cannot_run(f"stages.{stage}.dense.normalize: is tags, and all problems {have}; leave it out")


def server_tokens(context: DoctorContext) -> Iterator[Finding]:
    """A server must give the student's ids for the same text and for the same chat."""
    for role in context.served_teachers:
        student = replace(context.prompter("student"), day=None)  # a server's clock runs
        served = context.inputs.tokenizer(role)
        field, texts = f"models.{role}", compared_texts(context)[:SERVER_PROBLEMS]
        local = context.inputs.served_tokenizer
        try:
            if local is not None:  # the server's ids are its own; they must be those of the files named here
                server = ServedTokenizer(context.inputs.server(role))
                refuse_different_tokens(local.tokenizer, server, ("models.teacher_tokenizer", field), texts)
                continue
            if role in context.aligned_roles:
                token_bytes(context.inputs, role)  # its tokenizer's files are needed
            refuse_different_tokens(student.tokenizer, served, ("models.student", field), texts)
            for problem in context.compared_problems[:SERVER_PROBLEMS] if student.has_template and texts else ():
                served_ids = served.chat(student.messages(problem), student.prompt.thinking)
                student_ids = student.ids(problem)
                if served_ids is not None and tuple(served_ids) != student_ids:
                    raise UserError(
                        f"models.student and {field}: their chat templates give different ids for the same problem "
                        f"({list(student_ids[-6:])} and {served_ids[-6:]} at its end, prompt.thinking {student.prompt.thinking})"
                    )
        except InputError:
            raise
        except HeadwaterError as refusal:
            remedy = "serve a model of the student's family with the student's chat template (--chat-template)"
            yield error("server-disagrees", str(refusal), remedy)


def replicas(context: DoctorContext) -> Iterator[Finding]:
    """A server must give the same scores for the same tokens, also if several replicas answer.

    The signal is what distillation learns from, the mean ∣log T − log S∣ over tokens that the student sampled, in the answer that
    is closest to the student. Answers that were requested at once may differ by less than that.
    """
    if "student" not in context.sampled_roles:
        return
    for role in context.served_teachers:
        if role in context.aligned_roles:
            continue
        teacher, tokens = served_teacher(context, role, 0), context.recipe.compute.microbatch_tokens
        sample = context.sample("student")
        try:
            with ThreadPoolExecutor(REPLICA_CALLS) as threads:
                calls = [threads.submit(token_logps, teacher, sample.rollouts, tokens) for _ in range(REPLICA_CALLS)]
            answers = [call.result() for call in calls]
        except HeadwaterError as refusal:
            yield error("server-unusable", str(refusal), "serve the model with vLLM")
            continue
        apart = max(mean_gap(first, second) for first, second in combinations(answers, 2))
        student = logp_of(sample.policy, sample.rollouts, tokens)
        signal = max(min(mean_gap(answer, student) for answer in answers), LEAST_SIGNAL)
        if apart > signal:
            count = sum(len(rollout.completion_ids) for rollout in sample.rollouts)
            yield error(
                "server-replicas-differ",
                f"models.{role}: {REPLICA_CALLS} answers for the same {count} tokens, requested at once, differ by up to {apart:.3g} "
                f"nats a token, and student and teacher by {signal:.3g}: the student would learn which replica answers",
                "serve the same weights in the same dtype on every replica, or name one replica",
            )


def candidates(context: DoctorContext) -> Iterator[Finding]:
    """Tokens that the student chooses are scored by servers, and not by every server."""
    stages = [node.stage for node, stage in context.training if stage.dense.candidates != "teacher"]
    if stages and not context.served_teachers:
        yield cannot_run(
            f"stages.{stages[0]}.dense.candidates: models.teacher is not behind a server, and its whole distribution is "
            "compared; leave it out"
        )
    for role in context.served_teachers if stages else ():
        reason = refuses_candidates(context.inputs.server(role))
        if reason is not None:
            yield note("server-without-candidates", f"models.{role}: {reason}", NO_CANDIDATES)


def served_teacher(context: DoctorContext, role: str, top_k: int) -> ServedTeacher:
    inputs = context.inputs
    folder = inputs.served_tokenizer or inputs.model_folder("student")
    width = int(folder.config.get_text_config().vocab_size)
    return ServedTeacher(inputs.server(role), folder.tokenizer, width, folder.stop_ids, inputs.device, top_k)


def servers(context: DoctorContext) -> Iterator[Finding]:
    """A server must take the longest sequence, and score a few tokens as each stage would."""
    inputs = context.inputs
    stages = [node.settings for node in context.nodes if _queries_base_teacher(node)]
    for role in context.served_teachers:
        longest = inputs.server(role).max_tokens
        if longest is not None and stages and context.prompt_lengths:
            completion = max(stage.sampling.max_tokens for stage in stages)
            needed = context.prompt_lengths[0][0] + completion + 1  # a server samples one token more than it scores
            if needed > longest:
                yield error(
                    "server-context-too-short",
                    f"models.{role}: the server takes sequences of {longest} tokens; the longest prompt and completion, and one token "
                    f"more, are {needed}",
                    f"start it with --max-model-len {needed}, or lower sampling.max_tokens",
                )
        for top_k in dict.fromkeys(top_k_of(stage) for stage in stages):
            teacher = served_teacher(context, role, top_k)
            try:
                check_scoring(teacher, teacher.tokenizer(PROBES[0], add_special_tokens=False)["input_ids"])
            except HeadwaterError as refusal:
                more = f"start the server with --max-logprobs {top_k}, or lower dense.top_k"
                yield error("server-unusable", str(refusal), more if top_k else "serve the model with vLLM")
