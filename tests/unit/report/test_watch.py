"""Status of a run from its files: terminal table, JSON, and the locally served page."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from fake_runs import names, unfinished_run
from headwater.config.arms import arm_of
from headwater.config.builtin import find_recipe
from headwater.errors import UserError
from headwater.report import serve, watch
from headwater.runs.node import Node
from headwater.runs.plan import last_node
from headwater.storage.files import is_locked, lock


@pytest.fixture
def half(tmp_path: Path) -> Path:
    return unfinished_run(tmp_path / "out")


def test_status_has_step_rate_time_left_and_key_metrics(half: Path) -> None:
    status = watch.read_status(half)
    by_node = {node.node: node for node in status.nodes}
    opd = by_node[names(half, "bridge")[-1]]
    assert (opd.state, opd.step, opd.steps, opd.steps_a_minute, opd.seconds_left) == ("stopped", 12, 40, 120.0, 14.0)
    assert list(opd.numbers) == ["kl_student_teacher", "kl_teacher_student", "entropy"]
    assert opd.warnings == ("truncation: 0.62 of the completions ran into the token limit",)
    waiting = by_node[names(half, "bridge_rl")[-2]]
    assert waiting.state == "waiting" and waiting.seconds_left is None  # no finished OPD node to estimate from
    assert status.running is False and status.seconds_left is None
    assert {node.state for node in status.nodes} == {"done", "stopped", "waiting"}


def test_waiting_node_is_estimated_from_finished_nodes_of_its_stage(half: Path) -> None:
    (half / "nodes" / names(half, "bridge")[-1] / "DONE").write_text('{"fingerprint": "x"}')
    waiting = next(node for node in watch.read_status(half).nodes if node.node == names(half, "bridge_rl")[-2])
    assert waiting.seconds_left == pytest.approx(6.0)  # twelve steps of half a second


def test_waiting_node_is_estimated_by_flops_at_rate_so_far(half: Path) -> None:
    plan = json.loads((half / "plan.json").read_text())
    flops = {"teacher_rl": 20, "teacher_rollouts": 6.5, "warmup": 4, "opd": 40, "student_rl": 100}
    every = [*names(half, "bridge")[1:], *names(half, "bridge_rl")[1:]]
    (half / "plan.json").write_text(json.dumps({**plan, "flops": {name: flops[name.split(".")[0]] for name in every}}))
    status = watch.read_status(half)
    left = {node.node: node.seconds_left for node in status.nodes}
    # Done: two teachers, caches and warm-ups of 6, 3.25 and 6 s; of OPD 12 of 40 steps, or 12 FLOPs, in 6 s. That is
    # 2 · (6 + 3.25 + 6) + 6 = 36.5 s for 2 · (20 + 6.5 + 4) + 12 = 73 FLOPs: half a second each.
    assert [left[name] for name in names(half, "bridge_rl")[-2:]] == pytest.approx([20.0, 50.0])
    assert status.seconds_left == pytest.approx(14.0 + 20.0 + 50.0)


def working(half: Path, name: str, **now: object) -> watch.NodeStatus:
    """The status of a node that a process runs in, and whose file says what it does."""
    folder = half / "nodes" / name
    folder.mkdir(exist_ok=True)
    (folder / "DONE").unlink(missing_ok=True)
    if not (folder / "node.json").exists():
        (folder / "node.json").write_text(
            json.dumps({"stage": name.split(".")[0], "role": "student", "seed": 0, "kind": "evaluate"})
        )
    (half / "attempts").mkdir(exist_ok=True)
    times = {"started": 100.0, "at": 130.0, "first": 0, "part": ""}
    (half / "attempts" / f"{name}.now.json").write_text(json.dumps({**times, **now}))
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock(half / ".lock", 0.0))
        return next(node for node in watch.read_status(half).nodes if node.node == name)


def test_watch_shows_progress_of_evaluation_with_time_left(half: Path) -> None:
    """12 of 40 completions in 30 s: 28 more take 70 s."""
    opd = working(half, names(half, "bridge")[-1], done=12, total=40, unit="completions evaluated")
    assert (opd.work, opd.seconds_left, opd.step, opd.steps) == ("evaluating 12 of 40 completions", 70.0, 12, 40)
    table = Console(file=io.StringIO(), width=160)
    table.print(watch.status_table(watch.RunStatus("run", True, (opd,)), width=160))
    assert "evaluating 12 of 40 completions" in table.file.getvalue()  # type: ignore[attr-defined]
    cache = working(half, names(half, "bridge")[1], done=8, total=64, unit="rollouts", first=4)
    assert (cache.work, cache.seconds_left) == ("making 8 of 64 rollouts", 420.0)


def test_watch_names_measurement_between_steps(half: Path) -> None:
    opd = working(half, names(half, "bridge")[-1], done=12, total=40, unit="steps", part="measuring C2")
    assert (opd.work, opd.seconds_left) == ("measuring C2", 14.0)  # 28 steps of half a second
    (half / "attempts" / f"{opd.node}.now.json").write_text('{"part": "meas')
    with lock(half / ".lock", 0.0):
        assert next(node for node in watch.read_status(half).nodes if node.node == opd.node).work == ""


def test_plan_with_malformed_flops_is_refused(half: Path) -> None:
    plan = json.loads((half / "plan.json").read_text())
    for flops in ([1.0], {names(half, "bridge")[0]: "1e9"}):
        (half / "plan.json").write_text(json.dumps({**plan, "flops": flops}))
        with pytest.raises(UserError, match=r"plan\.json: is not a plan written by this program"):
            watch.read_status(half)


@pytest.fixture
def planned(tmp_path: Path) -> Path:
    """A run of the pocket recipe that has not begun a node: `bridge` and `bridge_rl`."""
    recipe, names_of = find_recipe("pocket", []), dict[Node, str]()
    arms: dict[str, dict[str, list[str]]] = {}
    for arm in ("bridge", "bridge_rl"):
        for node in last_node(arm_of(arm, recipe), recipe, 0).lineage():
            name = names_of.setdefault(node, f"{node.stage}.s0.{len(names_of):08d}")
            arms.setdefault(arm, {}).setdefault("0", []).append(name)
    (tmp_path / "plan.json").write_text(json.dumps({"recipe": "pocket", "seeds": [0], "arms": arms}))
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.model_dump(mode="json")))
    return tmp_path


def test_status_names_pool_and_arms_of_waiting_nodes(planned: Path) -> None:
    nodes = [(node.node.split(".")[0], node.pool, node.arms) for node in watch.read_status(planned).nodes]
    assert nodes == [
        ("teacher_rl", "all labels", ("bridge",)),
        ("teacher_rollouts", "all prompts", ("bridge",)),
        ("warmup", "all prompts", ("bridge",)),
        ("opd", "all prompts", ("bridge",)),
        ("teacher_rl", "first half", ("bridge_rl",)),
        ("teacher_rollouts", "first half", ("bridge_rl",)),
        ("warmup", "first half", ("bridge_rl",)),
        ("opd", "first half", ("bridge_rl",)),
        ("student_rl", "second half", ("bridge_rl",)),
    ]


@pytest.mark.parametrize("width", [80, 110, 150])
def test_status_table_shows_pool_arm_and_unknown_time(planned: Path, width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    console.print(watch.status_table(watch.read_status(planned), width=width))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text
    rows = [line.split() for line in text.splitlines()]
    assert ["·", "Teacher", "RL", "first", "half", "bridge_rl", "0", "–", "unknown", "yet"] in rows
    assert "0 of 9 nodes done, time left: unknown yet" in text


def test_status_table_of_one_arm_names_it_in_its_title(half: Path) -> None:
    plan = json.loads((half / "plan.json").read_text())
    del plan["arms"]["bridge_rl"]
    (half / "plan.json").write_text(json.dumps(plan))
    console = Console(file=io.StringIO(), width=80)
    console.print(watch.status_table(watch.read_status(half), width=80))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.splitlines()[0].rstrip() == "pocket · not running · arm bridge"
    assert "(stopped)  KL(S‖T)" in text
    assert "4 of 5 nodes done, time left: 14 s" in text


def test_status_table_of_failed_run_says_why_without_time_left(half: Path) -> None:
    plan = json.loads((half / "plan.json").read_text())
    del plan["arms"]["bridge_rl"]
    (half / "plan.json").write_text(json.dumps(plan))
    failure = {"sentence": "opd, step 12 of 40: the loss is not finite", "code": 4}
    (half / "nodes" / names(half, "bridge")[-1] / "FAILED").write_text(json.dumps(failure))
    console = Console(file=io.StringIO(), width=110)
    console.print(watch.status_table(watch.read_status(half), width=110))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "4 of 5 nodes done, 1 failed\n" in text and "time left" not in text
    assert failure["sentence"] in text


def test_time_left_of_parallel_nodes_is_shared() -> None:
    states: list[tuple[watch.State, float]] = [("at work", 10.0), ("at work", 20.0), ("waiting", 30.0), ("done", 0.0)]
    nodes = tuple(
        watch.NodeStatus(f"n{place}", "Warm-up", "", 0, state, 3, 8, None, left, {}, ())
        for place, (state, left) in enumerate(states)
    )
    status = watch.RunStatus("pocket", True, nodes)
    assert status.seconds_left == 30.0
    console = Console(file=io.StringIO(), width=100)
    console.print(watch.status_table(status))
    assert "1 of 4 nodes done, time left: 30 s with 2 nodes at once" in console.file.getvalue()  # type: ignore[attr-defined]


def test_running_process_is_detected_by_its_lock_without_taking_it(half: Path) -> None:
    assert not is_locked(half / ".lock")
    with lock(half / ".lock", 0.0) as free:
        assert free
        status = watch.read_status(half)
        assert status.running and "at work" in {node.state for node in status.nodes}
    assert not watch.read_status(half).running


def test_status_table_limited_in_height_shows_running_nodes_first() -> None:
    states: list[watch.State] = [*(["done"] * 40), "at work", *(["waiting"] * 40), "failed", *(["waiting"] * 18)]
    nodes = tuple(
        watch.NodeStatus(f"n{place}", f"stage{place}", "", 0, state, 3, 8, None, 1.0, {}, (f"loud{place}",))
        for place, state in enumerate(states)
    )
    console = Console(file=io.StringIO(), width=100)
    console.print(watch.status_table(watch.RunStatus("pocket", True, nodes), 30))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert len(text.splitlines()) <= 30
    listed = re.findall(r"stage(\d+) ", text)
    assert len(listed) == 20 and {"40", "81", "41"} <= set(listed) and "0" not in listed
    assert "40 of 100 nodes done" in text and "80 nodes are not listed here; 98 warnings" in text


@pytest.fixture
def address(half: Path) -> Iterator[str]:
    """The page served from a thread of this process."""
    addresses: list[str] = []
    ready = threading.Event()
    servers: list[object] = []

    def started(where: str) -> None:
        addresses.append(where)
        ready.set()

    made = serve.PageServer

    class Kept(made):  # type: ignore[valid-type, misc]
        def __init__(self, *given: object) -> None:
            super().__init__(*given)
            servers.append(self)

    serve.PageServer = Kept  # type: ignore[misc]
    try:
        thread = threading.Thread(target=serve.serve, args=([half], 0, started), daemon=True)
        thread.start()
        assert ready.wait(10)
        yield addresses[0]
    finally:
        serve.PageServer = made  # type: ignore[misc]
        servers[0].shutdown()  # type: ignore[attr-defined]
        thread.join(10)


def _get(address: str, path: str = "", host: str | None = None) -> str:
    request = urllib.request.Request(address + path, headers={} if host is None else {"Host": host})
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.read().decode()


@pytest.mark.usefixtures("undrawn")
def test_served_page_follows_run_and_writes_nothing(half: Path, address: str) -> None:
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
    before = {path: path.stat().st_mtime_ns for path in half.rglob("*")}
    with lock(half / ".lock", 0.0):
        before[half / ".lock"] = (half / ".lock").stat().st_mtime_ns
        text = _get(address)
        assert "12 of 40" in text and "truncation: 0.62" in text and '<meta http-equiv="refresh"' in text
        opd = half / "nodes" / names(half, "bridge")[-1]
        rows = (opd / "metrics.jsonl").read_text()
        (opd / "metrics.jsonl").write_text(rows + json.dumps({**json.loads(rows.splitlines()[-1]), "step": 13}) + "\n")
        assert "13 of 40" in _get(address)
    before[opd / "metrics.jsonl"] = (opd / "metrics.jsonl").stat().st_mtime_ns
    assert {path: path.stat().st_mtime_ns for path in half.rglob("*") if path != half / ".lock"} == {
        path: at for path, at in before.items() if path != half / ".lock"
    }


def test_served_page_is_rebuilt_in_background_when_files_change(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builds: list[int] = []
    go_on = threading.Event()
    go_on.set()

    def slow(outs: object) -> str:
        assert go_on.wait(20)
        builds.append(len(builds))
        return f"<title>report {len(builds)}</title><main></main>"

    monkeypatch.setattr(serve.report, "page", slow)
    monkeypatch.setattr(serve, "REST_FACTOR", 0.0)
    page = serve.LivePage([half])
    assert all("report 1" in page.render() for _ in range(5)) and len(builds) == 1
    go_on.clear()
    opd = half / "nodes" / names(half, "bridge")[-1]
    with (opd / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "seconds": 1.0}\n')
    stale = page.render()  # returned without waiting for the build, and reloads itself
    assert "report 1" in stale and "13 of 40" not in stale and '<meta http-equiv="refresh"' in stale
    go_on.set()
    assert page.builder is not None
    page.builder.join()
    assert "report 2" in page.render() and len(builds) == 2
    assert '<meta http-equiv="refresh"' not in page.render() and len(builds) == 2


def test_served_page_survives_missing_file(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def vanished(outs: object) -> str:
        raise FileNotFoundError(2, "No such file or directory", "metrics.jsonl")

    monkeypatch.setattr(serve.report, "page", vanished)
    monkeypatch.setattr(serve, "REST_FACTOR", 0.0)
    page = serve.LivePage([half])
    assert "metrics.jsonl" in page.render() and '<meta http-equiv="refresh"' in page.render()
    monkeypatch.setattr(serve.report, "page", lambda outs: "<title>report</title><main></main>")
    page.render()
    assert page.builder is not None
    page.builder.join()
    assert "<title>report</title>" in page.render()


def test_served_runs_of_different_recipes_are_side_by_side(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = half.parent / "other"
    shutil.copytree(half, other)
    recipe = json.loads((other / "recipe.json").read_text())
    (other / "recipe.json").write_text(json.dumps({**recipe, "task": "words"}))
    monkeypatch.setattr(serve.side_by_side, "current_page", lambda outs: f"<main>{[out.name for out in outs]}</main>")
    text = serve.LivePage([half, other]).render()
    assert "['out', 'other']</main>" in text
    assert "<strong>out: 7 of 10 nodes" in text and "<strong>other: 7 of 10 nodes" in text


def test_served_status_has_pool_and_arms_of_running_node(half: Path) -> None:
    status = watch.read_status(half)
    arms = ("base_student", "bridge", "bridge_rl")
    nodes = [
        replace(node, state="at work", pool="all prompts", arms=arms)
        for node in status.nodes
        if node.state == "stopped"
    ]
    view = serve.status_view("", replace(status, running=True, nodes=tuple(nodes)))
    assert view["rows"][0][:6] == [
        "On-policy distillation",
        "all prompts",
        "bridge, bridge_rl",
        "0",
        "12 of 40",
        "14 s",
    ]
    assert view["summary"] == "0 of 1 nodes done; running"


def test_server_serves_only_page_and_refuses_other_hosts(address: str) -> None:
    for path, host, code in (("nodes", None, 404), ("../../etc/passwd", None, 404), ("", "evil.example:80", 403)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            _get(address, path, host)
        assert refused.value.code == code


def test_serve_refuses_occupied_port(half: Path, address: str) -> None:
    port = int(address.rstrip("/").rsplit(":", 1)[1])
    with pytest.raises(UserError, match=f"--port {port}: cannot listen there"):
        serve.serve([half], port, lambda where: None)


def test_slow_clients_hold_bounded_threads_and_are_closed(
    half: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "CONNECTION_SECONDS", 0.5)
    before, place = threading.active_count(), ("127.0.0.1", int(address.rstrip("/").rsplit(":", 1)[1]))
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(place, timeout=10)) for _ in range(60)]
        for client in clients[:: len(clients) - 1]:
            with contextlib.suppress(OSError):
                client.sendall(b"GET / HT")  # and no more
        assert threading.active_count() - before <= 2 * serve.MAX_CONNECTIONS  # a thread and its timer
        for client in clients:
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(1) == b""
    monkeypatch.undo()
    until = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.02)
    assert "<main" in _get(address)
