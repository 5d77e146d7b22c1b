"""Local HTTP server for `headwater report DIR --serve`: the report page, rebuilt as the run's files change.

Listens on 127.0.0.1 only, serves one page, writes nothing, and refuses requests with another Host header, so that a web page
cannot read it by DNS rebinding.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from headwater.config.arms import BASE_MODELS
from headwater.errors import HeadwaterError, UserError
from headwater.report import build as report
from headwater.report import side_by_side
from headwater.report.format import duration
from headwater.report.render import render
from headwater.report.watch import RunStatus, read_status
from headwater.storage.run_dir import RunDir

REFRESH_SECONDS = 10
"""The page reloads itself after this time while there is something to come."""
SILENCE_SECONDS, CONNECTION_SECONDS, MAX_CONNECTIONS = 10.0, 60.0, 32
"""Limits of a connection: silence of the client, and its whole time; connections at a time, beyond which new ones are closed."""
REST_FACTOR = 10.0
"""After a build, wait this many times the build's duration before the next one."""
HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "frame-ancestors 'none'",
}

FileVersions = tuple[tuple[str, int, int], ...]
"""(name, modification time, size) of each file."""


@dataclass
class LivePage:
    """The last built report page. A background thread rebuilds it when files changed, at most a tenth of the time."""

    outs: Sequence[Path]
    html: str = ""
    built_from: FileVersions = ()
    next_build: float = 0.0
    builder: threading.Thread | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def render(self) -> str:
        """The page with the current status at its top. Only the first call waits for a build."""
        versions = _file_versions(self.outs)
        with self.lock:
            idle = self.builder is None or not self.builder.is_alive()
            if idle and versions != self.built_from and time.monotonic() >= self.next_build:
                self.builder = threading.Thread(target=self._build, args=(versions,), daemon=True)
                self.builder.start()
        if not self.html and self.builder is not None:
            self.builder.join()
        status, running = _status(self.outs)
        html = self.html.replace("<main", f"{status}<main", 1)
        if running or versions != self.built_from:
            refresh = f'<meta http-equiv="refresh" content="{REFRESH_SECONDS}">'
            html = html.replace("<title>", f"{refresh}\n<title>", 1)
        return html

    def _build(self, versions: FileVersions) -> None:
        started = time.monotonic()
        try:
            page = report.page if side_by_side.of_one_recipe(self.outs) else side_by_side.current_page
            self.html, self.built_from = page(self.outs), versions
        except (HeadwaterError, OSError) as error:
            # The run has just started, is writing a row or removes a file: the next request tries again.
            self.html = self.html or render("message.html.j2", {"message": str(error)})
        self.next_build = time.monotonic() + REST_FACTOR * (time.monotonic() - started)


def serve(outs: Sequence[Path], port: int, ready: Callable[[str], None]) -> None:
    """Serve until interrupted. Calls `ready` with the address; port 0 takes a free one. Raises UserError if the port is taken."""
    page = LivePage(outs)
    try:
        server = PageServer(("127.0.0.1", port), _handler(page))
    except OSError as error:
        raise UserError(f"--port {port}: cannot listen there ({error.strerror})") from None
    with server:
        ready(f"http://127.0.0.1:{server.server_port}/")
        server.serve_forever()


class PageServer(ThreadingHTTPServer):
    """A thread per connection, up to `MAX_CONNECTIONS`, each ended after `CONNECTION_SECONDS`."""

    request_queue_size = MAX_CONNECTIONS

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(address, handler)
        self.free = threading.BoundedSemaphore(MAX_CONNECTIONS)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self.free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started
            self.free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        timer = threading.Timer(CONNECTION_SECONDS, _shut_down, (request,))
        timer.daemon = True
        timer.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            timer.cancel()
            self.free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing: a client has closed its connection, or was too slow."""


def _shut_down(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _handler(page: LivePage) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = SILENCE_SECONDS

        def do_GET(self) -> None:
            port = self.connection.getsockname()[1]
            if self.headers.get("Host") not in (f"127.0.0.1:{port}", f"localhost:{port}"):
                return self.send_error(403, "only this machine may connect")
            if self.path.split("?")[0] != "/":
                return self.send_error(404, "there is only one page")
            body = page.render().encode()
            self.send_response(200)
            for name, value in HEADERS.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return None

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing: the terminal belongs to the user."""

    return Handler


def _file_versions(outs: Sequence[Path]) -> FileVersions:
    nodes = [node for out in outs for node in RunDir(out).nodes()]
    files = [file for node in nodes for file in (node.metrics, node.conditions, node.warnings, node.done, node.failed)]
    versions = []
    for file in files:
        with contextlib.suppress(FileNotFoundError):  # not written yet, or removed just now by a node that starts anew
            stat = file.stat()
            versions.append((str(file), stat.st_mtime_ns, stat.st_size))
    return tuple(versions)


def _status(outs: Sequence[Path]) -> tuple[str, bool]:
    """The running nodes of each run as HTML, and whether a run is going on."""
    try:
        statuses = dict(zip(side_by_side.run_names(outs), map(read_status, outs), strict=True))
    except (HeadwaterError, OSError):
        return "", True
    runs = [status_view(name if len(outs) > 1 else "", status) for name, status in statuses.items()]
    return render("status.html.j2", {"runs": runs}), any(status.running for status in statuses.values())


def status_view(name: str, status: RunStatus) -> dict[str, Any]:
    """A summary line, and a row for each node that is at work: what `headwater watch` shows."""
    rows = []
    for node in status.nodes:
        if node.state == "at work":
            left = duration(node.seconds_left) if node.seconds_left is not None else "unknown yet"
            arms = ", ".join(arm for arm in node.arms if arm not in BASE_MODELS)
            metrics, warnings = " · ".join(node.metrics_text), "; ".join(node.warnings)
            step = f"{node.step} of {node.steps}" if node.steps else "–"
            rows.append([node.stage, node.pool, arms, str(node.seed), step, left, metrics, warnings])
    summary = f"{status.done} of {len(status.nodes)} nodes done; {'running' if status.running else 'not running'}"
    return {"summary": f"{name}: {summary}" if name else summary, "rows": rows}
