"""A run whose every node is run by several processes together (`torchrun … -m headwater run …`).

The first process is the program as it always is: it reads, checks, writes the folder, reports, and its executor announces each
node. The others wait for its word and run the same node beside it; what they would write goes to a folder of their own that
nobody keeps, so a node's code is the same on every rank. Words: {"begin": …} the plan, {"run": NODE}, {"end": exit code}.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from headwater.config.recipe import Recipe
from headwater.data.labels import Grade
from headwater.distributed.process_group import ProcessGroup, is_lost_process
from headwater.errors import HeadwaterError, LostProcessError
from headwater.runs.executors.base import Failure, Job, run_marked
from headwater.runs.inputs import RunInputs
from headwater.runs.node_context import NodeContext, NodeProgress
from headwater.runs.plan import Node
from headwater.runs.setup import prepared, stop_requests
from headwater.storage.run_dir import NodeDir, RunDir
from headwater.types import Verdict

Word = dict[str, Any]


@dataclass(frozen=True)
class Together:
    """The executor of the first rank: one node after the other, each on all ranks.

    Of several nodes it goes on after one that all ranks agree has failed. Raises LostProcessError when another rank is gone, and
    the failure itself when it befell this rank alone, since the others then wait for it in vain.
    """

    ranks: ProcessGroup

    def __call__(self, job: Job) -> dict[str, Failure]:
        failures: dict[str, Failure] = {}
        self.ranks.broadcast({"begin": {**job.told, "out": str(job.out.path.resolve())}})
        inputs = graded_together(job.inputs, self.ranks.duplicate())
        for name in job.due(failures):
            self.ranks.broadcast({"run": name})
            self.ranks.barrier()  # the others have read the node's logs
            failure = None
            try:
                with job.shown(name) as watch:
                    heard = replace(watch, should_stop=agreed(self.ranks, job.stopped), say=job.progress_display.say)
                    run_marked(job.todo[name], NodeContext(job.plan, inputs, job.out, heard, self.ranks))
            except Exception as error:
                if is_lost_process(error):
                    raise LostProcessError from None
                failure = Failure.of(error)
                failures[name] = failure
                job.fail(name, failure)
            if not self.ranks.same_outcome(name, failure is not None):
                if failure is None:
                    raise LostProcessError
                return failures
            if failure is not None and job.alone:
                break
        return failures


def agreed(ranks: ProcessGroup, stopped: Callable[[], bool]) -> Callable[[], bool]:
    """Whether a stop was asked for on any rank; all of them must ask at the same places."""
    return lambda: ranks.any(stopped())


def graded_together(inputs: RunInputs, ranks: ProcessGroup) -> RunInputs:
    """The same answers, of which each rank grades its share and is told the rest."""

    def shared(grade: Grade) -> Grade:
        def graded(pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
            return [one for part in ranks.all_gather(grade(ranks.shard(pairs))) for one in part]

        return graded

    return inputs.with_grader(shared)


def follow(ranks: ProcessGroup) -> int:
    """The life of any other rank: run beside the first one what it announces; its exit code."""
    try:
        with stop_requests(aloud=False) as stopped:
            word = ranks.broadcast(Word())
            if "end" in word:
                return int(word["end"])
            begun = word["begin"]
            recipe = Recipe.model_validate(begun["recipe"])
            with prepared(recipe, begun["arms"], begun["seeds"]) as (plan, inputs):
                nodes = {plan.names[node]: node for node in plan.order()}
                shared = graded_together(inputs, ranks.duplicate())
                watch = NodeProgress(
                    lambda done, total, unit: None, lambda count, metrics: None, agreed(ranks, stopped)
                )
                context = NodeContext(plan, shared, RunDir(Path(begun["out"])), watch, ranks)
                while "run" in (word := ranks.broadcast(Word())):
                    if not beside(nodes[word["run"]], context):
                        return 1
                return int(word["end"])
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        loss = is_lost_process(error)
        said = str(LostProcessError()) if loss else Failure.of(error).sentence
        print(f"headwater: process {ranks.rank} of {ranks.size}: {said}", file=sys.stderr)
        return LostProcessError.exit_code if loss else error.exit_code if isinstance(error, HeadwaterError) else 1


def beside(node: Node, context: NodeContext) -> bool:
    """Run a node beside the first rank; False where this rank failed and the others did not.

    Raises LostProcessError when another one is gone.
    """
    name = context.plan.names[node]
    failure = None
    with scratch(context.out.node(name), context.ranks) as aside:
        try:
            run_marked(node, replace(context, scratch=aside))
        except KeyboardInterrupt:
            return True  # all were asked to stop, and all have; the first one says how it ends
        except Exception as error:
            if is_lost_process(error):
                raise LostProcessError from None
            failure = Failure.of(error)
    settled = context.ranks.same_outcome(name, failure is not None)
    if not settled:
        if failure is None:
            raise LostProcessError
        print(f"headwater: process {context.ranks.rank} of {context.ranks.size}: {failure.sentence}", file=sys.stderr)
    return settled


@contextlib.contextmanager
def scratch(held: NodeDir, ranks: ProcessGroup) -> Iterator[NodeDir]:
    """A node folder of this rank's own that begins with the logs of the run's."""
    with tempfile.TemporaryDirectory(prefix=f"headwater-{ranks.rank}-", ignore_cleanup_errors=True) as folder:
        aside = RunDir(Path(folder)).node(held.name)
        aside.path.mkdir(parents=True)
        for path in filter(Path.exists, held.logs):
            shutil.copyfile(path, aside.path / path.name)
        ranks.barrier()
        yield aside


@contextlib.contextmanager
def led(ranks: ProcessGroup) -> Iterator[None]:
    """The others are told how the first rank ends, if they still listen."""
    code: Any = 1
    try:
        yield
        code = 0
    except SystemExit as end:
        code = end.code
        raise
    except HeadwaterError as error:
        code = error.exit_code
        raise
    except KeyboardInterrupt:
        code = 130
        raise
    finally:
        # A launcher ends the first process as soon as another one has ended with the code that it is told here.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with contextlib.suppress(RuntimeError, LostProcessError):  # they may be gone
            if not isinstance(sys.exc_info()[1], LostProcessError) and not ranks.diverged():
                ranks.broadcast({"end": code})
