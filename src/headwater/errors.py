"""Expected errors: each carries a one-line message for the user and an exit code."""

from __future__ import annotations

import re

MAX_MESSAGE_CHARS = 2000
CONTROL_CHARACTERS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def one_line(text: str) -> str:
    """Make text safe for a terminal: line breaks become spaces; control characters, bidi marks and lone surrogates U+FFFD.

    Example: `one_line("a\\nb\\x1b[2J")` is `a b\ufffd[2J`.
    """
    shown = text if len(text) <= MAX_MESSAGE_CHARS else f"{text[:MAX_MESSAGE_CHARS]}…"
    return CONTROL_CHARACTERS.sub("\ufffd", re.sub("[\r\n\u2028\u2029]+", " ", shown))


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
