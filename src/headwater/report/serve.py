"""`headwater report DIR --serve`: the report on a page that refreshes from the run's files, for this machine alone.

Nothing is written, nothing can be asked for but the page, and who asks by another name than this machine's own (as a web page
that rebinds its name would) is refused.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from headwater.errors import HeadwaterError, UserError
from headwater.report import build as report
from headwater.report.format import duration
from headwater.report.render import render
from headwater.report.watch import METRIC_LABELS, RunStatus, read_status
from headwater.storage.run_dir import RunDir

REFRESH, PATIENCE = 10, 10.0
"""Seconds between two refreshes of the page; how many times its own making a page lasts at least."""

Seen = tuple[tuple[str, int, int], ...]
"""Of each file its name, when it was last written, and its length."""


@dataclass
class Page:
    """The page as it was last made. It is made again beside the answers, when files changed, and not more than a tenth of the time."""

    outs: Sequence[Path]
    html: str = ""
    seen: Seen = ()
    until: float = 0.0
    maker: threading.Thread | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def now(self) -> str:
        """The page with what is going on at its top; only the first one is waited for."""
        changed = _changed(self.outs)
        with self.lock:
            idle = self.maker is None or not self.maker.is_alive()
            if idle and changed != self.seen and time.monotonic() >= self.until:
                self.maker = threading.Thread(target=self._make, args=(changed,), daemon=True)
                self.maker.start()
        if not self.html and self.maker is not None:
            self.maker.join()
        status, running = _status(self.outs)
        return _with_status(self.html, status, running or changed != self.seen)

    def _make(self, changed: Seen) -> None:
        began = time.monotonic()
        try:
            self.html, self.seen = report.page(self.outs), changed
        except HeadwaterError as error:  # a run that has just begun, or a row that is being written: it is tried again
            self.html = self.html or render("message.html.j2", {"message": str(error)})
        self.until = time.monotonic() + PATIENCE * (time.monotonic() - began)


def serve(outs: Sequence[Path], port: int, ready: Callable[[str], None]) -> None:
    """Answer until interrupted. `ready` is told the address; port 0 takes a free one. Raises UserError where it cannot listen."""
    page = Page(outs)
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), _handler(page))
    except OSError as error:
        raise UserError(f"--port {port}: cannot listen there ({error.strerror})") from None
    with server:
        ready(f"http://127.0.0.1:{server.server_port}/")
        server.serve_forever()


def _handler(page: Page) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            port = self.connection.getsockname()[1]
            if self.headers.get("Host") not in (f"127.0.0.1:{port}", f"localhost:{port}"):
                return self.send_error(403, "only this machine may ask")
            if self.path.split("?")[0] != "/":
                return self.send_error(404, "there is only one page")
            body = page.now().encode()
            self.send_response(200)
            for name, value in HEADERS.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return None

        def log_message(self, format: str, *args: object) -> None:
            """Silent: the terminal belongs to the user."""

    return Handler


HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "frame-ancestors 'none'",
}


def _changed(outs: Sequence[Path]) -> Seen:
    """When each of the files that the page shows was last written, and how long it is."""
    nodes = [node for out in outs for node in RunDir(out).nodes()]
    files = [file for node in nodes for file in (node.metrics, node.conditions, node.warnings, node.done, node.failed)]
    found = [(str(file), file.stat()) for file in files if file.exists()]
    return tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in found)


def _status(outs: Sequence[Path]) -> tuple[str, bool]:
    """The nodes at work as HTML, and whether anybody is."""
    try:
        found = [read_status(out) for out in outs]
    except HeadwaterError:
        return "", True
    return "".join(map(_one, found)), any(one.running for one in found)


def _one(found: RunStatus) -> str:
    rows = []
    for one in found.nodes:
        if one.state == "at work":
            numbers = " · ".join(f"{METRIC_LABELS.get(name, name)} {value:.3g}" for name, value in one.numbers.items())
            left = duration(one.seconds_left) if one.seconds_left is not None else "?"
            step = f"{one.step} of {one.steps or '?'}"
            rows.append([one.stage, str(one.seed), step, left, numbers, "; ".join(one.warnings)])
    done = sum(one.state == "done" for one in found.nodes)
    summary = f"{done} of {len(found.nodes)} nodes done; {'at work' if found.running else 'nobody at work'}"
    return render("status.html.j2", {"summary": summary, "rows": rows})


def _with_status(html: str, status: str, again: bool) -> str:
    """The page with what is going on at its top; it asks again by itself while there is something to come."""
    if again:
        html = html.replace("<title>", f'<meta http-equiv="refresh" content="{REFRESH}">\n<title>', 1)
    return html.replace("<main", f"{status}<main", 1)
