"""Probe the Hugging Face hub before its libraries use it: they retry a hub that cannot be reached for minutes."""

from __future__ import annotations

import os
import re
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

from headwater.errors import error_text

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
"""owner/name"""
PROBE_SECONDS = 6.0
"""Time limit of the probe, unless HF_HUB_ETAG_TIMEOUT sets another."""
REMEMBERED_SECONDS = 60.0
"""How long a failed probe holds; one that was answered holds for the whole process."""
GATEWAY_ERRORS = (502, 503, 504)

_probes: dict[str, tuple[float, str | None]] = {}  # endpoint -> when it was probed, and why it cannot be reached


def unreachable() -> str | None:
    """Why the hub cannot be reached, in a few words; None if it answers.

    While it cannot be reached, `huggingface_hub` is in its offline mode: cached files load at once, and nothing is retried.
    """
    from huggingface_hub import constants

    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in constants.ENV_VARS_TRUE_VALUES:
            return f"{name} is set"
    endpoint = constants.ENDPOINT
    probed, reason = _probes.get(endpoint, (0.0, ""))
    if reason is not None and (not reason or time.monotonic() - probed > REMEMBERED_SECONDS):
        constants.HF_HUB_OFFLINE = False  # it would refuse the probe too
        reason = _probe(endpoint, float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or PROBE_SECONDS))
        _probes[endpoint] = (time.monotonic(), reason)
    constants.HF_HUB_OFFLINE = reason is not None
    return reason


def remedy(name: str, reason: str) -> str:
    """The end of a message about a name that is neither here nor in the hub's cache, after "the hub cannot be reached"."""
    other = f"unset {reason.split()[0]}" if reason.endswith(" is set") else "set HF_ENDPOINT"
    return f"({reason}): download {name} to a folder on a machine with network, or {other}"


def in_local_folder(name: str) -> bool:
    """Whether the first part of a name such as `models/Qwen3` is a folder here, so that a path was meant."""
    return Path(Path(name).parts[0]).is_dir()


def _probe(endpoint: str, seconds: float) -> str | None:
    """Send one request, in a thread: the look-up of a host's name has no time limit of its own. Any answer will do."""
    from huggingface_hub.utils import get_session

    host = urlsplit(endpoint).netloc.rpartition("@")[2] or endpoint
    reasons: list[str | None] = []

    def ask() -> None:
        try:
            # Its own timeout is for each step of a request, so the limit is that of `join` below.
            status = get_session().head(endpoint, timeout=2 * seconds).status_code
        except Exception as error:  # of the HTTP library, which differs between versions of huggingface_hub
            detail = error_text(re.sub(r"^\[Errno -?\d+\] ", "", str(error)) or type(error).__name__)
            reasons.append(f"{host}: {detail}")
        else:
            reasons.append(f"{host} answers with HTTP {status}" if status in GATEWAY_ERRORS else None)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return reasons[0] if reasons else f"{host} does not answer within {seconds:g} s"
