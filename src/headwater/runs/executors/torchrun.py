"""Run every node on several processes together (`torchrun … -m headwater run …`).

Rank 0 is the usual program: it reads, checks, writes the run directory and reports; its executor broadcasts each node. The other
ranks wait for its messages and run the same node, with a scratch folder for what they would write, so a node's code is the same
on every rank. Messages: {"begin": setup}, {"run": NODE}, {"end": exit code}.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from headwater.data.labels import Grade
from headwater.distributed.process_group import ProcessGroup, is_lost_process
from headwater.errors import HeadwaterError, LostProcessError, printable
from headwater.runs.display import NodeProgress
from headwater.runs.executors.base import Failure, Job, start_node
from headwater.runs.executors.remote import Message, Worker
from headwater.runs.inputs import RunInputs
from headwater.runs.node import Node
from headwater.runs.node_context import NodeContext
from headwater.runs.setup import stop_requests
from headwater.storage.node_dir import NodeDir
from headwater.storage.run_dir import RunDir
from headwater.types import Verdict


def run_on_ranks(job: Job, ranks: ProcessGroup) -> dict[str, Failure]:
    """Run one node after the other, each on all ranks: the executor of rank 0.

    Of several nodes it goes on after one that failed on all ranks. Raises LostProcessError when another rank is gone; returns at once
    when only this rank failed, since the others then wait for it in vain.
    """
    failures: dict[str, Failure] = {}
    ranks.broadcast({"begin": job.worker_setup()})
    inputs = share_grading(job.inputs, ranks.duplicate())
    for name in job.runnable(failures):
        ranks.broadcast({"run": name})
        ranks.barrier()  # the others have read the node's logs
        try:
            with job.show(name) as progress:
                progress = replace(progress, should_stop=stopped_on_any(ranks, job.stopped))
                start_node(job.todo[name], NodeContext(job.plan, inputs, job.out, progress, ranks))
        except Exception as error:
            if is_lost_process(error):
                raise LostProcessError from None
            failures[name] = Failure.of(error)
            job.fail(name, failures[name])
        failed = name in failures
        if not ranks.same_outcome(name, failed):
            if not failed:
                raise LostProcessError
            break
        if failed and job.single:
            break
    return failures


def stopped_on_any(ranks: ProcessGroup, stopped: Callable[[], bool]) -> Callable[[], bool]:
    """Whether a stop was requested on any rank; a collective, so all ranks must call it at the same places."""
    return lambda: ranks.any(stopped())


def share_grading(inputs: RunInputs, ranks: ProcessGroup) -> RunInputs:
    """The same inputs, with grading split over the ranks and its results gathered on all of them."""
    return inputs.with_grader(lambda grade: partial(grade_share, ranks, grade))


def grade_share(ranks: ProcessGroup, grade: Grade, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
    """Grade this rank's share of the pairs; the verdicts of all."""
    return [verdict for part in ranks.all_gather(grade(ranks.shard(pairs))) for verdict in part]


def run_worker_rank(ranks: ProcessGroup) -> int:
    """Worker loop for ranks > 0: run each node that rank 0 broadcasts. Returns the exit code."""
    try:
        with stop_requests(aloud=False) as stopped:
            message = ranks.broadcast(Message())
            if "end" in message:
                return int(message["end"])
            with Worker.prepare(message["begin"]) as worker:
                inputs = share_grading(worker.inputs, ranks.duplicate())
                progress = NodeProgress(should_stop=stopped_on_any(ranks, stopped))
                context = NodeContext(worker.plan, inputs, worker.out, progress, ranks)
                while "run" in (message := ranks.broadcast(Message())):
                    if not run_on_worker_rank(worker.node(message["run"]), context):
                        return 1
                return int(message["end"])
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        failure = Failure.of(LostProcessError() if is_lost_process(error) else error)
        _print_error(ranks, failure.sentence)
        return failure.code


def run_on_worker_rank(node: Node, context: NodeContext) -> bool:
    """Run a node on a rank > 0; False where this rank failed and others did not.

    Raises LostProcessError when another rank is gone.
    """
    name = context.plan.names[node]
    failure = None
    with scratch_folder(context.out.node(name), context.ranks) as scratch:
        try:
            start_node(node, replace(context, scratch=scratch))
        except KeyboardInterrupt:
            return True  # all ranks have stopped; rank 0 broadcasts the exit code
        except Exception as error:
            if is_lost_process(error):
                raise LostProcessError from None
            failure = Failure.of(error)
    same_outcome = context.ranks.same_outcome(name, failure is not None)
    if not same_outcome:
        if failure is None:
            raise LostProcessError
        _print_error(context.ranks, failure.sentence)
    return same_outcome


def _print_error(ranks: ProcessGroup, message: str) -> None:
    print(f"headwater: process {ranks.rank} of {ranks.size}: {printable(message)}", file=sys.stderr)


@contextlib.contextmanager
def scratch_folder(node_dir: NodeDir, ranks: ProcessGroup) -> Iterator[NodeDir]:
    """A temporary node folder of this rank, with copies of the logs in the run directory."""
    with tempfile.TemporaryDirectory(prefix=f"headwater-{ranks.rank}-", ignore_cleanup_errors=True) as folder:
        scratch = RunDir(Path(folder)).node(node_dir.name)
        scratch.path.mkdir(parents=True)
        for path in filter(Path.exists, node_dir.logs):
            shutil.copyfile(path, scratch.path / path.name)
        ranks.barrier()
        yield scratch


@contextlib.contextmanager
def broadcast_exit_code(ranks: ProcessGroup) -> Iterator[None]:
    """Around rank 0's program: tell the other ranks how it ends, if they still listen."""
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
        # A launcher terminates rank 0 as soon as another rank has exited with the code that it receives here.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with contextlib.suppress(RuntimeError, LostProcessError):  # the others may be gone
            if not isinstance(sys.exc_info()[1], LostProcessError) and not ranks.diverged():
                ranks.broadcast({"end": code})
