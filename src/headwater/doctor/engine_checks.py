"""The doctor's checks of what is not ours: the engine that samples, and servers that teach."""

from __future__ import annotations

from headwater.doctor.context import Case, Finding, UnavailableError
from headwater.errors import HeadwaterError, UserError
from headwater.models.prompts import Prompter
from headwater.models.tokenizer import PROBES, refuse_different_tokens
from headwater.runs.checks import FEW, refuse_other_chats
from headwater.runs.plan import Node
from headwater.sampling import vllm_sampler
from headwater.teachers import server_client
from headwater.teachers.build import top_k_of
from headwater.teachers.served_teacher import ServedTeacher, check_scoring
from headwater.teachers.server_client import ServedModel, ServedTokenizer


def engine(case: Case) -> list[Finding]:
    """Whether the sampler that the recipe names is installed; that it takes the model shows when it samples."""
    if case.recipe.compute.sampler == "torch" or vllm_sampler.installed():
        return []
    return [
        Finding("engine-unusable", "error", vllm_sampler.MISSING, "install the extra, or set compute.sampler=torch")
    ]


def servers(case: Case) -> list[Finding]:
    """Every teacher behind a server: that it answers, reads the same ids, takes sequences as long, and can score as asked."""
    found: list[Finding] = []
    for field, name in case.recipe.models.named("teacher").items():
        if server_client.is_served(name):
            found += _server(case, field, name)
    return found


def _server(case: Case, field: str, name: str) -> list[Finding]:
    see = f"see that `vllm serve` runs at {name} and has finished loading"
    try:
        met = server_client.connect(name, field, case.recipe.compute.server)
    except UserError as error:
        return [Finding("server-unusable", "error", str(error), see)]
    student = Prompter(case.tokenizer("student"), case.recipe.prompt)
    try:
        problems = case.problems[:FEW]
    except UnavailableError:  # the data have a finding of their own
        problems = []
    theirs = ServedTokenizer(met)
    try:
        texts = [problem.text[:10_000] for problem in problems]
        refuse_different_tokens(student.tokenizer, theirs, ("models.student", field), texts)
        refuse_other_chats(student, theirs, field, problems)
    except HeadwaterError as error:
        remedy = "serve a model of the student's own family with the student's chat template (--chat-template)"
        return [Finding("server-disagrees", "error", str(error), remedy)]
    return [*_long_enough(case, field, met), *_can_score(case, field, met)]


def _asking(case: Case) -> list[Node]:
    """The nodes that ask the base teacher."""
    return [node for node in case.nodes if node.settings is not None and "teacher" in (node.teacher, node.start)]


def _long_enough(case: Case, field: str, met: ServedModel) -> list[Finding]:
    settings = [node.settings for node in _asking(case) if node.settings is not None]
    if met.max_tokens is None or not settings or not case.prompt_lengths:
        return []
    # A server makes one token more than it scores.
    needed = case.prompt_lengths[0][0] + max(one.sampling.max_tokens for one in settings) + 1
    if needed <= met.max_tokens:
        return []
    return [
        Finding(
            "server-context-too-short",
            "error",
            f"{field}: the server takes sequences of {met.max_tokens} tokens; the longest prompt and completion, and one token more, "
            f"are {needed}",
            f"start it with --max-model-len {needed}, or lower sampling.max_tokens",
        )
    ]


def _can_score(case: Case, field: str, met: ServedModel) -> list[Finding]:
    """A few tokens scored as each stage would."""
    found: dict[Finding, None] = {}
    width, stops = int(case.config("student").get_text_config().vocab_size), case.stop_ids("student")
    for node in _asking(case):
        k = top_k_of(node.settings) or 0
        teacher = ServedTeacher(met, case.tokenizer("student"), width, stops, case.device, k)
        try:
            check_scoring(teacher, case.tokenizer("student")(PROBES[0], add_special_tokens=False)["input_ids"])
        except HeadwaterError as error:
            remedy = (
                f"start the server with --max-logprobs {k}, or lower dense.top_k" if k else "serve the model with vLLM"
            )
            found[Finding("server-unusable", "error", str(error), remedy)] = None
    return list(found)
