"""The ways a run can end that are not a bug: each carries one sentence for the user and an exit code."""

from __future__ import annotations

import re

LONGEST = 2000
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def one_line(text: str) -> str:
    """Line breaks become spaces; control characters, direction marks and lone surrogates the replacement character.

    Example: `one_line("a\\nb\\x1b[2J")` is `a b\ufffd[2J`.
    """
    shown = text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
    return CONTROL.sub("\ufffd", re.sub("[\r\n\u2028\u2029]+", " ", shown))


class HeadwaterError(Exception):
    """An expected end: the command line prints the sentence, without a traceback, and exits with `exit_code`."""

    exit_code = 1


class UserError(HeadwaterError):
    """The user's mistake: a bad recipe, file, row or option. The sentence names the field, file or row.

    It may quote what it found, so it is made one line without characters that a terminal would act on.
    """

    exit_code = 2

    def __init__(self, sentence: str) -> None:
        super().__init__(one_line(sentence))


class RefusedError(HeadwaterError):
    """Preflight found something that would spoil the run before any time is spent on it."""

    exit_code = 3


class TrainingStoppedError(HeadwaterError):
    """Training stopped itself: non-finite loss, no informative group. The last good checkpoint is kept."""

    exit_code = 4


class DiskError(HeadwaterError):
    """The disk took no more: full, read-only or broken. The sentence names the file; the last checkpoint is kept."""

    exit_code = 4


class LostProcessError(HeadwaterError):
    """One of the processes that run a node together is gone, and with it its part of the weights."""

    exit_code = 4

    def __init__(self) -> None:
        super().__init__("another process of this run is gone; the same command goes on from the last checkpoint")


class FailedError(HeadwaterError):
    """Some of the work failed and the rest was done: the sentences of what failed, and the first one's exit code."""

    def __init__(self, sentence: str, code: int) -> None:
        super().__init__(sentence)
        self.exit_code = code
