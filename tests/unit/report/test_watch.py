"""How far a run is, seen from its files: in a terminal, as JSON, and on a page that only this machine may ask for."""

from __future__ import annotations

import io
import json
import re
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from fakes import ARMS, fake_run, names
from headwater.errors import UserError
from headwater.report import serve, watch
from headwater.storage.files import lock
from runs import call


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """A run of the bridge that was left within OPD: 12 steps of half a second each are written down, of 40."""
    out = fake_run(tmp_path / "out", seeds=(0,), arms={"bridge": ARMS["bridge"], "bridge_rl": ARMS["bridge_rl"]})
    opd = out / "nodes" / names(out, "bridge")[-1]
    (opd / "DONE").unlink()
    info = json.loads((opd / "node.json").read_text())
    (opd / "node.json").write_text(json.dumps({**info, "steps": 40}))
    alarm = {
        "guard": "truncation",
        "action": "warn",
        "step": 9,
        "sentence": "truncation: 0.62 of the completions ran into the token limit",
    }
    (opd / "warnings.jsonl").write_text(json.dumps(alarm) + "\n")
    for name in names(out, "bridge_rl")[-2:]:
        shutil.rmtree(out / "nodes" / name)
    return out


def test_a_look_says_step_rate_time_left_and_the_numbers_that_matter(half: Path) -> None:
    found = watch.read_status(half)
    standing = {one.node: one for one in found.nodes}
    opd = standing[names(half, "bridge")[-1]]
    assert (opd.state, opd.step, opd.steps, opd.steps_a_minute, opd.seconds_left) == ("stopped", 12, 40, 120.0, 14.0)
    assert list(opd.numbers) == ["kl_student_teacher", "kl_teacher_student", "entropy"]
    assert opd.warnings == ("truncation: 0.62 of the completions ran into the token limit",)
    waiting = standing[names(half, "bridge_rl")[-2]]
    assert waiting.state == "waiting" and waiting.seconds_left is None  # no OPD is done yet to go by
    assert found.running is False and found.seconds_left is None
    assert {one.state for one in found.nodes} == {"done", "stopped", "waiting"}


def test_a_waiting_stage_is_taken_to_last_as_long_as_a_finished_one_did(half: Path) -> None:
    (half / "nodes" / names(half, "bridge")[-1] / "DONE").write_text('{"fingerprint": "x"}')
    waiting = next(one for one in watch.read_status(half).nodes if one.node == names(half, "bridge_rl")[-2])
    assert waiting.seconds_left == pytest.approx(6.0)  # twelve steps of half a second


def test_a_run_that_somebody_works_on_is_seen_by_its_lock_without_touching_it(half: Path) -> None:
    assert not watch.is_locked(half / ".lock")
    with lock(half / ".lock", 0.0) as free:
        assert free
        found = watch.read_status(half)
        assert found.running and "at work" in {one.state for one in found.nodes}
    assert not watch.read_status(half).running


def test_the_terminal_names_stages_and_warnings_and_a_machine_reads_the_same(half: Path) -> None:
    said = call("watch", half)
    assert said.code == 0
    assert "On-policy distillation" in said.out and "12/40" in said.out and "KL(S‖T)" in said.out
    assert "! On-policy distillation, seed 0: truncation: 0.62" in said.out
    found = json.loads(call("watch", half, "--json").out)
    assert found["running"] is False and [node["step"] for node in found["nodes"] if node["steps"] == 40] == [12]


def test_a_study_that_is_longer_than_the_terminal_shows_what_is_at_work() -> None:
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


def test_a_folder_without_a_run_and_one_of_another_shape_end_in_a_sentence(tmp_path: Path, half: Path) -> None:
    assert call("watch", tmp_path).code == 2
    opd = half / "nodes" / names(half, "bridge")[-1]
    (opd / "metrics.jsonl").write_text('{"step": {"no": 1}}\n')
    said = call("watch", half)
    assert said.code == 2 and "Traceback" not in said.err and str(half) in said.err


@pytest.fixture
def address(half: Path) -> Iterator[str]:
    """The page served from a thread of this process."""
    told: list[str] = []
    ready = threading.Event()
    servers: list[object] = []

    def started(where: str) -> None:
        told.append(where)
        ready.set()

    made = serve.ThreadingHTTPServer

    class Kept(made):  # type: ignore[valid-type, misc]
        def __init__(self, *given: object) -> None:
            super().__init__(*given)
            servers.append(self)

    serve.ThreadingHTTPServer = Kept  # type: ignore[misc]
    try:
        thread = threading.Thread(target=serve.serve, args=([half], 0, started), daemon=True)
        thread.start()
        assert ready.wait(10)
        yield told[0]
    finally:
        serve.ThreadingHTTPServer = made  # type: ignore[misc]
        servers[0].shutdown()  # type: ignore[attr-defined]
        thread.join(10)


def _get(address: str, path: str = "", host: str | None = None) -> str:
    asked = urllib.request.Request(address + path, headers={} if host is None else {"Host": host})
    with urllib.request.urlopen(asked, timeout=60) as answer:
        return answer.read().decode()


def test_the_served_page_shows_the_run_as_it_grows_and_writes_nothing(half: Path, address: str) -> None:
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


def test_the_served_page_is_made_again_only_when_files_changed_and_nobody_waits_for_it(
    half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    go_on = threading.Event()
    go_on.set()

    def slow(outs: object) -> str:
        assert go_on.wait(20)
        made.append(len(made))
        return f"<title>report {len(made)}</title><main></main>"

    monkeypatch.setattr(serve.report, "page", slow)
    monkeypatch.setattr(serve, "REST_FACTOR", 0.0)
    page = serve.LivePage([half])
    assert all("report 1" in page.render() for _ in range(5)) and len(made) == 1
    go_on.clear()
    opd = half / "nodes" / names(half, "bridge")[-1]
    with (opd / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "seconds": 1.0}\n')
    stale = page.render()  # comes at once, though the next page is not yet made, and asks again by itself
    assert "report 1" in stale and "13 of 40" not in stale and '<meta http-equiv="refresh"' in stale
    go_on.set()
    assert page.builder is not None
    page.builder.join()
    assert "report 2" in page.render() and len(made) == 2
    assert '<meta http-equiv="refresh"' not in page.render() and len(made) == 2


def test_only_the_page_is_there_and_only_this_machine_may_ask(address: str) -> None:
    for path, host, code in (("nodes", None, 404), ("../../etc/passwd", None, 404), ("", "evil.example:80", 403)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            _get(address, path, host)
        assert refused.value.code == code


def test_a_port_that_is_taken_is_a_sentence(half: Path, address: str) -> None:
    port = int(address.rstrip("/").rsplit(":", 1)[1])
    with pytest.raises(UserError, match=f"--port {port}: cannot listen there"):
        serve.serve([half], port, lambda where: None)
