"""Multiple choice: choices in columns of their own, and which of them an answer names."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from string import ascii_uppercase
from typing import Any, Literal

from headwater.data.conversations import Conversation
from headwater.errors import UserError
from headwater.types import letters_and_digits

CHOICE_COLUMNS = ("choices", "options", "endings")
_LABELLED = re.compile(r"\(?([A-Ja-j])[).:]\s*")
_LETTER = re.compile(r"\(?([A-Za-z0-9])[).:]?")
_SEVERAL = re.compile(r"\s*[,;]\s*(?=[A-Za-z0-9]\s*(?:[,;]|$))")
_OWN_COLUMN = re.compile(r"((?:option|choice|op|)[ _]?)([a-j])")
Naming = Literal["label", "text", "from 0", "from 1"]


@dataclass(frozen=True)
class Choices:
    """The choices of a row.

    column  where they stand; for choices in columns of their own (`A`, `B`, …) the names of all
    fields  what a template of columns writes for them
    """

    column: str
    fields: str
    labels: tuple[str, ...]
    texts: tuple[str, ...]

    @property
    def text(self) -> str:
        """Lines for the problem. Example: `A. Rome` and `B. Paris`."""
        return "\n".join(f"{label}. {text}" for label, text in zip(self.labels, self.texts, strict=True))

    def are_shown(self, problem: str, labelled: bool = False) -> bool:
        """Whether a problem holds all of them: a single one may stand there by chance, such as the 2 in "What is 2+2?"."""
        shown, labels = letters_and_digits(problem), self.labels if labelled else [""] * len(self.labels)
        pairs = zip(labels, self.texts, strict=True)
        return all(letters_and_digits(label + text) in shown for label, text in pairs)

    def label_of(self, answer: Any, naming: Naming) -> str | None:
        """The label of the choice that an answer names in this way; None if it names none.

        An answer may list several labels: `A, C`, or a list of them.
        """
        if isinstance(answer, list) or (naming == "label" and _SEVERAL.search(str(answer))):
            parts = answer if isinstance(answer, list) else _SEVERAL.split(str(answer).strip())
            labels = [None if isinstance(part, list) else self.label_of(part, naming) for part in parts]
            return ", ".join(map(str, labels)) if labels and None not in labels else None
        given = str(answer).strip()
        if naming == "text":
            places = [place for place, text in enumerate(self.texts) if text == given]
        elif naming == "label":
            folded, letter = [label.upper() for label in self.labels], _LETTER.fullmatch(given)
            head, tail = _LABELLED.match(given), _LABELLED.sub("", given, count=1)
            named = letter or (head if head and tail in self.texts else None)
            places = [folded.index(named[1].upper())] if named and named[1].upper() in folded else []
        else:
            whole = given.isdecimal() and not isinstance(answer, bool)
            places = [int(given) - (naming == "from 1")] if whole else []
        return self.labels[places[0]] if places and 0 <= places[0] < len(self.labels) else None

    def namings(self, answer: Any) -> set[Naming]:
        """The ways in which an answer can be read as one of the choices."""
        ways: tuple[Naming, ...] = ("label", "text", "from 0", "from 1")
        return {way for way in ways if self.label_of(answer, way) is not None}


def read_choices(column: str, cell: Any) -> Choices | None:
    """The choices in a cell of this column; None if it holds none.

    A list of texts (MMLU, AQuA), an object of labels and texts (ARC: `{"text": […], "label": […]}`), texts by label (MedQA), or a
    list of objects with a label and a text; any of them also as JSON text. A list without labels gets A, B, C, …
    """
    if isinstance(cell, str) and cell.lstrip()[:1] in ("[", "{"):
        try:
            cell = json.loads(cell)
        except (ValueError, RecursionError):
            return None
    if (
        isinstance(cell, list)
        and cell
        and all(isinstance(part, Mapping) and {"label", "text"} <= set(part) for part in cell)
    ):
        cell = {name: [part[name] for part in cell] for name in ("label", "text")}
    if isinstance(cell, Mapping) and isinstance(cell.get("text"), list) and isinstance(cell.get("label"), list):
        labels, texts = cell["label"], cell["text"]
    elif column.rpartition(".")[2].lower() not in CHOICE_COLUMNS:
        return None
    elif isinstance(cell, Mapping):
        labels, texts = list(cell), list(cell.values())
    elif isinstance(cell, list) and len(cell) <= len(ascii_uppercase):
        labels, texts = list(ascii_uppercase[: len(cell)]), cell
    else:
        return None
    if len(texts) < 2 or len(texts) != len(labels) or not all(isinstance(text, (str, int, float)) for text in texts):
        return None
    stripped = [str(text).strip() for text in texts]
    heads = [_LABELLED.match(text) for text in stripped]
    if all(head and head[1].upper() == label for head, label in zip(heads, labels, strict=True)):  # AQuA: "A)21"
        stripped = [_LABELLED.sub("", text, count=1) for text in stripped]
    return Choices(column, f"{{{column}}}", tuple(map(str, labels)), tuple(stripped))


def choices_of(row: Mapping[str, Any]) -> Choices | None:
    """The choices of a row: in one column, or in columns `A`, `B`, … (C-Eval), `option_a`, … or `opa`, … (MedMCQA)."""
    for name in row:
        if name.lower() in CHOICE_COLUMNS:
            choices = read_choices(name, row[name])
            if choices is not None:
                return choices
    series: dict[str, list[str]] = {}
    for name in row:
        match = _OWN_COLUMN.fullmatch(name.lower())
        if match:
            series.setdefault(match[1], []).append(name)
    for names in series.values():
        labels = [name[-1].upper() for name in names]
        texts = [row[name] for name in names]
        if (
            len(names) > 1
            and labels == list(ascii_uppercase[: len(names)])
            and all(isinstance(text, str) for text in texts)
        ):
            shown = [
                (name, label, text.strip())
                for name, label, text in zip(names, labels, texts, strict=True)
                if text.strip()
            ]
            fields = "\n".join(f"{label}. {{{name}}}" for name, label, _ in shown)
            return Choices(", ".join(names), fields, tuple(row[1] for row in shown), tuple(row[2] for row in shown))
    return None


def naming_of(answers: Sequence[tuple[str, Any, Choices]]) -> Naming | None:
    """How all answers of a file name their choices; None if they are no choices.

    answers  (place, answer, choices) of every row that has an answer and choices that the problem does not show

    A single row may leave open what a file decides: 1 among four choices may be the second or the first, 0 is the first.
    Raises UserError where that stays open, and for a row that names its choice in another way than the others.
    """
    possible = [choices.namings(answer) for _, answer, choices in answers]
    if not possible:
        return None
    common = set.intersection(*possible)
    if "text" in common and (common == {"text"} or all(isinstance(answer, str) for _, answer, _ in answers)):
        return "text"
    if "label" in common or len(common) == 1:
        return "label" if "label" in common else common.pop()
    for (place, answer, choices), ways in zip(answers, possible, strict=True):
        if common or (ways and "text" not in ways):
            open_ = " (it is not certain whether it counts from 0 or from 1, or is a choice itself)" if common else ""
            raise UserError(
                f"{place}: the answer {answer!r} is one of {choices.column!r}, which the problem does not show{open_}; write the "
                "choices into the problem (A. …, B. …), and the letter as the answer"
            )
    return None


@dataclass(frozen=True)
class ReadRow:
    """A row as it is read: its number, conversation, answer, and what other columns hold.

    answer   the gold answer; of a row with choices the cell with it, until `with_choices` knows how the file names them
    choices  in columns next to the problem
    tag      selects the problem's teacher
    context  text for the teacher alone
    """

    number: int
    conversation: Conversation
    answer: Any
    choices: Choices | None = None
    tag: str = ""
    context: str = ""

    def shows_choices(self, labelled: bool) -> bool:
        return self.choices is None or self.choices.are_shown(self.conversation.turns[-1][1], labelled)

    def with_label(self, naming: Naming) -> ReadRow:
        """The row with its choices in the last turn, and the label of its choice as the answer."""
        if self.choices is None:
            return self
        conversation, answer = self.conversation, self.choices.label_of(self.answer, naming) or self.answer
        if not self.shows_choices(labelled=True):
            *earlier, (role, text) = conversation.turns
            conversation = replace(conversation, turns=(*earlier, (role, f"{text}\n\n{self.choices.text}")))
        return replace(self, conversation=conversation, answer=answer)


def with_choices(rows: list[ReadRow], template: Collection[str], where: str) -> tuple[list[ReadRow], list[Choices]]:
    """Rows that show the choices which their answers name, and the choices that no row shows and no answer names.

    template  columns of the template that makes the problems, which shows them already
    where     names the file in errors

    Raises UserError as `naming_of` does.
    """
    named = []
    for row in rows:
        if row.choices is not None:
            in_template = set(row.choices.column.split(", ")) <= set(template)
            if in_template or not row.shows_choices(labelled=False):
                named.append((row, row.choices, in_template))
    hidden = [choices for _, choices, in_template in named if not in_template]
    naming = naming_of(
        [(f"{where}, row {row.number}", row.answer, choices) for row, choices, _ in named if row.answer is not None]
    )
    if naming is None or (naming == "text" and hidden):
        return rows, hidden
    return [row.with_label(naming) for row in rows], []
