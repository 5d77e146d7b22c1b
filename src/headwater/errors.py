"""Expected errors: each carries a one-line message for the user and an exit code."""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from collections.abc import Iterable, Sequence

MAX_MESSAGE_CHARS = 2000
CONTROL_CHARACTERS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

BACKTRACE = re.compile(
    r"\n\s*(?:Exception raised from |C\+\+ CapturedTraceback|frame #0|stack backtrace|Traceback \(most)"
)
"""Begin of what native code and other interpreters append to a message."""


def one_line(text: str) -> str:
    """Make text safe for a terminal: line breaks become spaces; control characters, bidi marks and lone surrogates U+FFFD.

    Example: `one_line("a\\nb\\x1b[2J")` is `a b\ufffd[2J`.
    """
    shown = text if len(text) <= MAX_MESSAGE_CHARS else f"{text[:MAX_MESSAGE_CHARS]}…"
    return CONTROL_CHARACTERS.sub("\ufffd", re.sub("[\r\n\u2028\u2029]+", " ", shown))


def printable(text: str) -> str:
    """Text of one or more lines without control characters except line breaks and tabs."""
    return CONTROL_CHARACTERS.sub(lambda match: match[0] if match[0] in "\n\t" else "\ufffd", text)


def error_text(error: BaseException | str, most: int = 200) -> str:
    """A library's message in one line: without the backtrace of its native code, cut at a word where it is long.

    Example: `error_text("no  such file\nException raised from f (most recent call first)")` is `no such file`.
    """
    text = " ".join(one_line(BACKTRACE.split(str(error), maxsplit=1)[0]).split())
    if len(text) > most:
        text = f"{text[:most].rpartition(' ')[0] or text[:most]} …"
    return text or type(error).__name__


def shortened(names: Sequence[str], most: int = 3, separator: str = ", ") -> str:
    """The first names, and the number of the others. Example: `shortened(["a", "b", "c", "d", "e"])` is `a, b, c and 2 more`."""
    return separator.join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """`; did you mean NAME?` with the known name closest to a misspelt one; empty if none is close.

    Example: `did_you_mean("brigde", ["bridge", "replay"])` is `"; did you mean bridge?"`.
    """
    close = difflib.get_close_matches(given, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def similar_file(path: str, files: Iterable[str]) -> str:
    """As `did_you_mean` for the path of a file; folders and endings, which many files share, do not count as likeness.

    Example: `similar_file("data/trian.jsonl", ["data/train.jsonl", "data/test.jsonl"])` is `"; did you mean data/train.jsonl?"`.
    """
    stems = {os.path.basename(file).partition(".")[0]: file for file in files}
    close = difflib.get_close_matches(os.path.basename(path).partition(".")[0], stems, n=1)
    return f"; did you mean {stems[close[0]]}?" if close else ""


class StopRequested(KeyboardInterrupt):
    """The first signal to stop, noticed between two parts of the work; a second one interrupts at once."""


class HeadwaterError(Exception):
    """An expected error: the CLI prints its message without a traceback and exits with `exit_code`."""

    exit_code = 1


class UserError(HeadwaterError):
    """A bad recipe, file, row or option. The message names the field, file or row.

    It may quote user input, so `one_line` is applied to it.
    """

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class RecipeError(UserError):
    """The faults of one recipe: one alone in one sentence, several with their number in the first line and a line each.

    where   names the recipe
    faults  (place or None, sentence) of each; a place is `line 12` or an option such as `--set labels.budget=-1`
    """

    def __init__(self, where: str, faults: Sequence[tuple[str | None, str]]) -> None:
        if len(faults) == 1:
            place, sentence = faults[0]
            option = place is not None and place.startswith("--")
            super().__init__(": ".join([place or "" if option else ", ".join(filter(None, (where, place))), sentence]))
            return
        super().__init__(f"{where}: {len(faults)} errors")
        lines = [one_line(f"{place}: {sentence}" if place else sentence) for place, sentence in faults]
        self.args = ("\n  ".join([*self.args, *lines]),)


def require_package(field: str, package: str, extra: str) -> None:
    """Raises UserError if a package of one of Headwater's extras is not installed."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{field}: needs {package}, which is not installed; pip install 'headwater[{extra}]'")


class UnsupportedModelError(UserError):
    """A model of a kind that cannot be trained or sampled here, however intact its files are."""


class RefusedError(HeadwaterError):
    """Preflight found a problem that would spoil the run, before any compute is spent on it."""

    exit_code = 3


class TrainingStoppedError(HeadwaterError):
    """Training stopped itself: non-finite loss, no informative group. The last good checkpoint is kept."""

    exit_code = 4


class DiskError(HeadwaterError):
    """A write failed: the disk is full, read-only or broken. The message names the file; the last checkpoint is kept."""

    exit_code = 4


class LostProcessError(HeadwaterError):
    """Another rank of the node has died, and its shards of the weights with it."""

    exit_code = 4

    def __init__(self) -> None:
        super().__init__(
            "another process of this run was lost; run the same command again to resume from the last checkpoint"
        )


class FailedError(HeadwaterError):
    """Some nodes failed and the others finished: the messages of the failures, and the exit code of the first."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code
