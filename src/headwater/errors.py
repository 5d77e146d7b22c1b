"""The ways a run can end that are not a bug: each carries one sentence for the user and an exit code."""

from __future__ import annotations


class HeadwaterError(Exception):
    """An expected end: the command line prints the sentence, without a traceback, and exits with `exit_code`."""

    exit_code = 1


class UserError(HeadwaterError):
    """The user's mistake: a bad recipe, file, row or option. The sentence names the field, file or row."""

    exit_code = 2


class RefusedError(HeadwaterError):
    """Preflight found something that would spoil the run before any time is spent on it."""

    exit_code = 3


class TrainingStoppedError(HeadwaterError):
    """Training stopped itself: non-finite loss, no informative group. The last good checkpoint is kept."""

    exit_code = 4


class DiskError(HeadwaterError):
    """The disk took no more: full, read-only or broken. The sentence names the file; the last checkpoint is kept."""

    exit_code = 4


class FailedError(HeadwaterError):
    """Some of the work failed and the rest was done: the sentences of what failed, and the first one's exit code."""

    def __init__(self, sentence: str, code: int) -> None:
        super().__init__(sentence)
        self.exit_code = code
