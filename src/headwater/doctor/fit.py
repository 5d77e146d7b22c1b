"""Measure a pair of models, a file of problems and the device, and write the recipe that fits them (`headwater init mine`)."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal

import torch

from headwater.config import yaml
from headwater.config.arms import DEFAULT_ARM, OWN_STAGES
from headwater.config.fitted import (
    SLOW_HOURS,
    TEMPLATES,
    DataFacts,
    DeviceFacts,
    Effort,
    ModelFacts,
    duration,
    forms,
)
from headwater.config.fitted_recipe import FittedRecipe
from headwater.config.prompt import Prompt
from headwater.config.recipe import Columns, Recipe, Source, parse_recipe
from headwater.data.describe import describe
from headwater.data.sources import LoadedProblems, content_fraction, load, without_leaks
from headwater.doctor.context import MAX_COMPARED_CHARACTERS
from headwater.doctor.resource_checks import free_memory
from headwater.doctor.tokenizer_checks import far_apart
from headwater.errors import UserError
from headwater.models.folder import ModelFolder
from headwater.models.pair_figures import measure
from headwater.models.prompts import Prompter
from headwater.models.rope import positions
from headwater.models.token_bytes import TokenBytes, TokenPair
from headwater.models.tokenizer import refuse_different_tokens, refuse_different_widths
from headwater.runs.estimate import estimates
from headwater.runs.hardware import DEVICES, UTILISATION, Device
from headwater.runs.inputs import RunInputs
from headwater.runs.node_estimate import total_seconds
from headwater.runs.plan import make_plan
from headwater.runs.read_once import resized
from headwater.tasks.registry import find_task
from headwater.teachers.server_client import is_served
from headwater.types import Problem

USABLE_MEMORY = 0.8
"""Share of the free memory that the estimated peak of a stage may take."""
HELD_OUT, HELD_OUT_SHARE, FEWEST_HELD_OUT = 300, 0.2, 2
"""Problems to hold out of a file that has no evaluation, and the largest share of them."""
MEASURED_PROBLEMS = 1000
"""Problems whose prompts are tokenized, the longest texts among them."""
MEASURED_SECONDS, FEWEST_TRIES = 0.3, 5
SHARES, HALVINGS = (0.002, 64.0), 7
"""Range of the shares of the usual effort that are tried to fit a limit of hours, and how often it is halved (on a log scale)."""
FEWEST_LABELS = 8
"""Below this a half of the labels has too few problems for one step."""
FITTED_ARM = "bridge_rl"
"""Has every stage of the recipe."""


@dataclass(frozen=True)
class FitRequest:
    """What the user names: two models, the labelled problems, and optionally an evaluation, a task, a device, columns and hours."""

    student: str
    teacher: str
    data: str
    evals: str | None = None
    task: str | None = None
    device: str = "auto"
    columns: Columns = field(default_factory=Columns)
    hours: float | None = None


def fitted_recipe(request: FitRequest) -> str:
    """The commented recipe as YAML. Nothing is written, and no weights are loaded.

    Raises UserError that names the option for a model, file or device that cannot be used, for models without a common text, and
    for too few hours.
    """
    device = device_facts(request.device)
    student, teacher = _folder(request.student, "--student"), _folder(request.teacher, "--teacher")
    data, models = data_facts(request, student, teacher), (model_facts(student), model_facts(teacher))
    candidates = [FittedRecipe(*models, data, device, form) for form in forms(device.kind)]
    peaks = []
    with RunInputs(written(candidates[0])) as inputs:
        inputs.source("data.labeled")  # with the grader, which all share and the first of them closes
        for fitted in candidates:
            inputs = resized(inputs, written(fitted))
            peaks.append(peak_bytes(inputs))
            if peaks[-1] <= USABLE_MEMORY * device.memory:
                return within_time(fitted, request.hours, inputs).text()
    raise UserError(
        f"--student and --teacher: need at least {min(peaks) / 2**30:.1f} GiB, with adapters and gradient checkpointing, and "
        f"{device.name} has {device.memory / 2**30:.1f} GiB free; name smaller models or another --device, such as --device h200"
    )


def written(fitted: FittedRecipe) -> Recipe:
    """The recipe as a run would read it."""
    return parse_recipe(yaml.read(fitted.text(), "init mine"), "init mine")


def within_time(fitted: FittedRecipe, hours: float | None, inputs: RunInputs) -> FittedRecipe:
    """The recipe that trains as much as `hours` allow by the estimate, with its stages' times.

    hours  None: SLOW_HOURS on a slow device, and no limit on any other

    Raises UserError where even the smallest recipe takes longer than `hours`.
    """

    def timed(share: float) -> FittedRecipe:
        sized = replace(fitted, effort=Effort.scaled(share))
        return replace(sized, times=stage_times(resized(inputs, written(sized)), fitted.device))

    if hours is None and not fitted.slow:
        return replace(fitted, times=stage_times(inputs, fitted.device))
    limit, (low, high) = 3600 * (SLOW_HOURS if hours is None else hours), SHARES
    best, largest = timed(low), timed(high)
    least = best.times["total"]
    if least > limit and hours is not None:
        raise UserError(
            f"--hours {hours:g}: the smallest recipe for this pair, with 2 steps of 8 completions in a stage, takes {duration(least)} "
            f"on {fitted.device.name}; give --hours {math.ceil(least / 360) / 10:g} or more, a larger --device, or smaller models"
        )
    if largest.times["total"] <= limit:
        return largest
    for _ in range(HALVINGS if least <= limit else 0):
        middle = math.sqrt(low * high)
        candidate = timed(middle)
        if candidate.times["total"] <= limit:
            low, best = middle, candidate
        else:
            high = middle
    return best


def stage_times(inputs: RunInputs, device: DeviceFacts) -> dict[str, float]:
    """Seconds of each stage and, as `total`, of the default arm with its evaluations, as `run --dry-run` estimates them."""
    datasheet = Device(device.flops / UTILISATION, device.memory, device.bandwidth, device.source)
    times: dict[str, float] = {}
    for arm in (FITTED_ARM, DEFAULT_ARM):
        nodes = estimates(make_plan(inputs.recipe, [arm], [inputs.recipe.seed], inputs.content()), inputs)
        times |= {node.name.split(".")[0]: node.seconds(datasheet) for node in nodes}
        times["total"] = total_seconds(nodes, datasheet)
    return times


def peak_bytes(inputs: RunInputs, arm: str = FITTED_ARM) -> float:
    """Memory of the stage that needs most, as `run --dry-run` estimates it."""
    plan = make_plan(inputs.recipe, [arm], [inputs.recipe.seed], inputs.content())
    return max(estimate.peak for estimate in estimates(plan, inputs))


def fitted_stage(read: Callable[[Mapping[str, Any]], Recipe], device_name: str) -> tuple[dict[str, Any], str]:
    """(values by field, what they rest on in words) for the one stage of a recipe, by the rules of `init mine`.

    read  the recipe with such values where the user gives none

    Raises UserError for files that cannot be read, and where the stage does not fit into the device's memory.
    """
    recipe = read({})
    ((stage, settings),) = recipe.stages.named.items()
    field_ = "data.labeled" if settings.needs_labels else "data.unlabeled"
    folders = [
        ModelFolder.open(model, f"models.{name}", recipe.models.trust_remote_code)
        for role in ("student", "teacher")
        for name, model in recipe.models.by_role(role).items()
        if not is_served(model)
    ]
    device, student = device_facts(device_name), folders[0]
    facts = [model_facts(folder) for folder in folders]
    largest = max(facts, key=lambda model: model.parameters)
    given, peaks = recipe.models.lora is not None, []
    with RunInputs(recipe) as inputs:
        source, problems = inputs.data_fields[field_], inputs.decontaminated(field_).problems
        solutions = describe(source, f"{field_}: {source.path}").solutions if source.path is not None else ()
        data = DataFacts(
            field_, field_, recipe.task or "", "", len(problems), 0, None,
            longest_prompt(student, recipe.prompt.template, problems),
            token_lengths(student, solutions) if solutions else None, True,
        )  # fmt: skip
        for form in forms(device.kind):
            if form.adapted == ("teacher",):
                continue  # it does not train here
            form = replace(form, adapted=("teacher", "student")) if given else form
            fitted = FittedRecipe(facts[0], largest, data, device, form)
            values = fitted.stage_values(stage, settings.needs_labels)
            if given:
                del values["models.lora"]
            if not recipe.data.evals:
                del values["evaluate.sampling.max_tokens"]
            peaks.append(peak_bytes(replace(inputs, recipe=read(values)), OWN_STAGES))
            if peaks[-1] <= USABLE_MEMORY * device.memory:
                return values, f"{device.name}, {device.memory / 2**30:.1f} GiB free"
    raise UserError(
        f"models.student: {student.name} needs at least {min(peaks) / 2**30:.1f} GiB with adapters and gradient checkpointing, and "
        f"{device.name} has {device.memory / 2**30:.1f} GiB free; name a smaller model, or use a larger device"
    )


# Models -----------------------------------------------------------------------------------------------------------------


def _folder(name: str, option: str) -> ModelFolder:
    if is_served(name):
        raise UserError(
            f"{option} {name}: the files of the model decide the settings; name its folder or hub id, and write the server's address "
            "into models.teacher of the recipe afterwards"
        )
    return ModelFolder.open(name, option)


def alignment(student: ModelFolder, teacher: ModelFolder, problems: Sequence[Problem]) -> str:
    """How two tokenizers fit each other on the problems, in words; empty where they give the same ids.

    Raises UserError where no text of the problems can be compared, and for equal tokenizers with output layers of unequal width.
    """
    fields = student.field, teacher.field
    texts = [problem.text[:MAX_COMPARED_CHARACTERS] for problem in problems[:MEASURED_PROBLEMS]]
    tokenizers = student.tokenizer, teacher.tokenizer  # one that cannot be read has its own sentence
    try:
        refuse_different_tokens(*tokenizers, fields, texts)
    except UserError as refusal:
        pair = TokenPair(*(TokenBytes.of(folder.tokenizer, folder.stop_ids) for folder in (student, teacher)))
        figures = measure(pair, texts)
        if not figures.aligned:
            raise UserError(f"{refusal}; nor does any text of the data align by bytes: name another teacher") from None
        return "; ".join(filter(None, (figures.sentence(), far_apart(figures))))
    refuse_different_widths(student.shape, teacher.shape, fields)
    return ""


def model_facts(folder: ModelFolder) -> ModelFacts:
    shape, template = folder.shape, str(getattr(folder.tokenizer, "chat_template", None) or "")
    generation = folder.generation_config
    given = {name: getattr(generation, name, None) for name in ("temperature", "top_p", "top_k")}
    return ModelFacts(
        folder.name,
        shape.parameters,
        shape.vocabulary,
        positions(folder.config),
        shape.kv_cache_numbers,
        bool(template),
        "enable_thinking" in template,
        {name: value for name, value in given.items() if value} if generation.do_sample else {},
    )


# Data -------------------------------------------------------------------------------------------------------------------


def data_facts(request: FitRequest, student: ModelFolder, teacher: ModelFolder) -> DataFacts:
    """What the files hold, in the student's tokens. Raises UserError that names the option, the file and the row.

    The longest prompt is the longest of both models where their tokenizers differ.
    """
    source = Source(path=request.data, columns=request.columns)
    description = describe(source, f"--data: {request.data}")
    task = description.task if request.task is None else request.task
    grading_task = find_task(task)
    labeled, share = load(source, "--data", True, grading_task.gold), None
    if request.evals is None:
        labeled, held_out, share = hold_out(labeled, request.data)
    else:
        held_out = load(Source(path=request.evals, columns=request.columns), "--evals", True, grading_task.gold)
    labeled = without_leaks(labeled, {"held_out": held_out})
    if len(labeled.problems) < FEWEST_LABELS:
        raise UserError(
            f"--data: {request.data} has {len(labeled.problems)} problems to train on, outside the evaluation; at least "
            f"{FEWEST_LABELS} are needed"
        )
    asks = sum("boxed" in problem.text for problem in labeled.problems) > len(labeled.problems) / 2
    template = "{problem}" if asks else TEMPLATES.get(task, "{problem}")
    problems = [*labeled.problems, *held_out.problems]
    solutions, aligned = description.solutions, alignment(student, teacher, labeled.problems)
    return DataFacts(
        request.data,
        request.evals or request.data,
        task,
        description.reason if request.task is None else f"{task} as --task says",
        len(labeled.problems),
        len(held_out.problems),
        share,
        max(longest_prompt(model, template, problems) for model in ((student, teacher) if aligned else (student,))),
        token_lengths(student, solutions) if solutions else None,
        asks,
        request.columns.model_dump(exclude_none=True),
        aligned,
    )


def hold_out(every: LoadedProblems, path: str) -> tuple[LoadedProblems, LoadedProblems, float]:
    """(problems to train on, problems held out, share of the content hashes that is held out).

    HELD_OUT problems, at most HELD_OUT_SHARE of them; more of a file so short that chance would leave too few.
    """
    share = float(f"{min(HELD_OUT_SHARE, HELD_OUT / len(every.problems)):.1g}")
    while share < 0.9:
        inside = {problem.id for problem in every.problems if content_fraction(problem.id) < share}
        if len(inside) >= FEWEST_HELD_OUT:
            return _only(every, inside, False), _only(every, inside, True), share
        share = round(share + 0.1, 2)
    raise UserError(f"--data: {path} has too few problems ({len(every.problems)}) to hold some out; give --evals FILE")


def _only(every: LoadedProblems, inside: set[str], keep: bool) -> LoadedProblems:
    return replace(every, problems=[problem for problem in every.problems if (problem.id in inside) == keep])


def longest_prompt(model: ModelFolder, template: str, problems: Sequence[Problem]) -> int:
    """Tokens of the longest prompt among the problems with the longest texts."""
    prompter = Prompter(model.tokenizer, Prompt(template=template)).without_limit()
    longest = sorted(problems, key=lambda problem: -len(problem.text))[:MEASURED_PROBLEMS]
    return max(len(prompter.ids(problem)) for problem in longest)


def token_lengths(student: ModelFolder, texts: Sequence[str]) -> tuple[float, float]:
    """(mean, 95th percentile) of the texts' lengths in tokens; of many, the first MEASURED_PROBLEMS."""
    ids = student.tokenizer(list(texts[:MEASURED_PROBLEMS]), add_special_tokens=False)["input_ids"]
    lengths = sorted(len(row) for row in ids)
    return sum(lengths) / len(lengths), float(lengths[min(len(lengths) - 1, int(0.95 * len(lengths)))])


# Device -----------------------------------------------------------------------------------------------------------------


def device_facts(name: str) -> DeviceFacts:
    """The device here (`auto`, `cpu`, `cuda`), or one of the datasheets of `runs.hardware.DEVICES`. Raises UserError."""
    kind: Literal["cpu", "cuda"] = "cpu" if name == "cpu" or not torch.cuda.is_available() else "cuda"
    if name in DEVICES:
        kind, title, device = "cuda", name, DEVICES[name]
        source = f"from its datasheet ({device.source})"
    elif name not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {name}: must be auto, cpu, cuda or one of {', '.join(DEVICES)}")
    elif name == "cuda" and kind == "cpu":
        raise UserError("--device cuda: no CUDA device is here; name the device that will train, such as --device h100")
    else:
        here = torch.device(kind)
        title = torch.cuda.get_device_name(here) if kind == "cuda" else f"cpu with {len(os.sched_getaffinity(0))} cores"
        device = device_here(here, torch.bfloat16 if kind == "cuda" else torch.float32)
        source = f"{device.flops / 1e9:,.0f} GFLOP/s measured in a matrix product"
    return DeviceFacts(kind, title, device.memory, UTILISATION * device.flops, source, device.bandwidth)


def _best_seconds(work: Callable[[], object]) -> float:
    """The shortest time of some work that waits for the device, over MEASURED_SECONDS: other load only slows it."""
    times: list[float] = []
    begun = time.perf_counter()
    while time.perf_counter() - begun < MEASURED_SECONDS or len(times) < FEWEST_TRIES:
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def device_here(device: torch.device, dtype: torch.dtype) -> Device:
    """The device of this process as `runs.hardware.Device`: its measured rates, and the memory that is free."""
    flops, bandwidth = _rates(device, dtype, torch.get_num_threads())
    return Device(flops, free_memory(device) or 0.0, bandwidth, "measured")


@cache
def _rates(device: torch.device, dtype: torch.dtype, threads: int) -> tuple[float, float]:
    """(FLOP/s, bytes/s) of a device, measured for MEASURED_SECONDS each, once per process and number of torch's threads.

    `dtype` is that of the matrix products: bfloat16 is four times faster than float32 on some CPUs and ten times slower on others.
    """
    numbers = torch.ones(1 << 22, device=device)
    copied = torch.empty_like(numbers)
    bandwidth = 2.0 * 4 * len(numbers) / _best_seconds(lambda: copied.copy_(numbers)[0].item())
    size = 4096 if device.type == "cuda" else 384
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    return 2.0 * size**3 / _best_seconds(lambda: (matrix @ matrix)[0, 0].item()), bandwidth
