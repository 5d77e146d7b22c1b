"""Turn pydantic's errors into one sentence per field, with the spelling that was probably meant."""

from __future__ import annotations

import difflib
from itertools import takewhile
from typing import Any

from pydantic import BaseModel, ValidationError

from headwater.config.fields import ANY_NAME, path_of, walk
from headwater.errors import did_you_mean

Keys = tuple[str, ...]
"""Path of a field, such as `("stages", "opd", "steps")`."""

OTHER_NAMES = {
    "learning_rate": "lr",
    "max_new_tokens": "max_tokens",
    "max_completion_length": "max_tokens",
    "num_generations": "group_size",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "max_grad_norm": "grad_clip",
    "warmup_ratio": "warmup",
    "lr_scheduler_type": "schedule",
    "system_prompt": "system",
    "train": "labeled",
    "train_files": "labeled",
    "train_dataset": "labeled",
    "prompts": "unlabeled",
    "eval": "evals",
    "test": "evals",
    "val_files": "evals",
    "eval_dataset": "evals",
}
"""Names of settings in transformers, TRL and verl, and the fields that they are here."""
STARTS: dict[Keys, str] = {
    ("data",): (
        ", such as {labeled: train.jsonl} (problems with answers) or {unlabeled: prompts.jsonl}; `headwater init mine --student S "
        "--teacher T --data FILE` writes a whole recipe"
    ),
    ("models",): ", such as {student: FOLDER, teacher: FOLDER}: folders or hub ids",
    ("stages",): ", such as {opd: {steps: 100}}; `headwater explain stages` lists them",
}
"""What to write where a section is missing."""
QUOTING: dict[type, str] = {
    dict: ", but YAML reads what begins with { as a mapping: put the text in double quotes (--set 'FIELD=\"{…}\"')",
    list: ", but YAML reads what begins with [ as a list: put the text in double quotes (--set 'FIELD=\"[…]\"')",
}
"""Why a text was not read as text."""


def complaints(error: ValidationError, model: type[BaseModel]) -> list[tuple[Keys, str]]:
    """(field, sentence) of every fault that a validation found, each field once."""
    faults = [(path_of(model, fault["loc"]), fault) for fault in error.errors(include_url=False)]
    paths = [keys for keys, _ in faults]
    by_field: dict[Keys, list[Any]] = {}
    for keys, fault in faults:
        # One member of a union fails below the field, the others at the field itself: the deeper fault tells more.
        if not any(len(other) > len(keys) and other[: len(keys)] == keys for other in paths):
            by_field.setdefault(keys, []).append(fault)
    return [(keys, _sentence(keys, same, model)) for keys, same in by_field.items()]


def _sentence(keys: Keys, faults: list[Any], model: type[BaseModel]) -> str:
    fault = faults[0]
    if fault["type"] == "extra_forbidden":
        return f"unknown field {_dotted(keys)}{intended_field(keys, model)}"
    messages = dict.fromkeys(fault["msg"].removeprefix("Value error, ") for fault in faults)
    message = " or ".join(text[:1].lower() + text[1:] for text in messages)
    given = fault.get("input")
    if isinstance(given, (dict, list, BaseModel)) or fault["type"] == "missing":
        quoting = QUOTING.get(type(given), "") if fault["type"] == "string_type" else ""
        return f"{_dotted(keys)}: {message}{quoting or STARTS.get(keys, '')}" if keys else message
    choices = next((field.choices for field in walk(model) if _matches(field.path, keys)), ())
    return f"{_dotted(keys)}: {message} (given: {given!r:.80}){did_you_mean(str(given), choices)}"


def _dotted(keys: Keys) -> str:
    return " ".join(".".join(keys).split())


def intended_field(keys: Keys, model: type[BaseModel]) -> str:
    """The field of that name within its section, one of nearly the same name next to it, or that name's nearest in the schema."""
    *section, name = keys
    name = OTHER_NAMES.get(name, name)
    paths = [tuple(field.path.split(".")) for field in walk(model)]
    siblings = [path[-1] for path in paths if len(path) == len(keys) and _matches(".".join(path[:-1]), tuple(section))]
    if name in siblings:
        return f"; did you mean {name}?"
    elsewhere = [path for path in paths if path[-1] == name]
    within = [path for path in elsewhere if section and path[: len(section)] == tuple(section)]
    if not within and (close := did_you_mean(name, siblings)):
        return close
    if not elsewhere:
        close_names = difflib.get_close_matches(name, {path[-1] for path in paths}, n=1, cutoff=0.8)
        elsewhere = [path for path in paths if path[-1] in close_names]
    if not elsewhere:
        return ""
    nearest = max(elsewhere, key=lambda path: _shared(path, keys))
    return f"; did you mean {'.'.join(nearest)}?"


def _shared(path: Keys, keys: Keys) -> tuple[int, int]:
    """Length of the common beginning; of equal ones the shorter path counts more."""
    common = takewhile(lambda pair: pair[0] == pair[1], zip(path, keys, strict=False))
    return len(list(common)), -len(path)


def _matches(path: str, keys: Keys) -> bool:
    """Whether keys lead to a path of the schema, in which NAME stands for any key."""
    parts = path.split(".") if path else []
    return len(parts) == len(keys) and all(part in (key, ANY_NAME) for part, key in zip(parts, keys, strict=True))
