"""Probe the Hugging Face hub before its libraries use it: they retry a hub that cannot be reached for minutes.

Every sentence about a name that the hub does not have, or will not give, comes from here.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from headwater.errors import UserError, did_you_mean, error_text

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


def refuse_unreachable(models: Mapping[str, str]) -> None:
    """Raises UserError, once for all of these models by field, where one is not in the cache and the hub cannot be reached."""
    from huggingface_hub import try_to_load_from_cache

    missing = {
        field: name
        for field, name in models.items()
        if not in_local_folder(name) and not isinstance(try_to_load_from_cache(name, "config.json"), str)
    }
    reason = unreachable() if missing else None
    if reason is None:
        return
    names = list(dict.fromkeys(missing.values()))
    are = "is no folder here" if len(names) == 1 else "are no folders here"
    single = len(missing) == 1
    advice = remedy("it", reason) if single else remedy("them", reason).replace("to a folder", "to folders")
    raise UserError(f"{' and '.join(missing)}: {' and '.join(names)} {are}, and the hub cannot be reached {advice}")


def refuse_absent(field: str, name: str, kind: Literal["model", "data set"] = "model") -> None:
    """Raises UserError where the hub, which answers, has no such name, or does not give it without a token.

    One request without retries: the hub's library repeats it, and hides which of these it is.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session

    host = urlsplit(constants.ENDPOINT).netloc
    path = f"{name}/resolve/main/config.json" if kind == "model" else f"datasets/{name}/resolve/main/README.md"
    try:
        answer = get_session().head(f"{constants.ENDPOINT}/{path}", headers=build_hf_headers(), timeout=PROBE_SECONDS)
    except Exception as error:  # of the HTTP library, which differs between versions of huggingface_hub
        raise UserError(f"{field}: {name} cannot be loaded from {host} ({error_text(error)})") from None
    code = answer.headers.get("X-Error-Code", "")
    if code == "GatedRepo":
        raise UserError(
            f"{field}: {name} needs its owner's permission: accept the terms on its page at {host}, then set HF_TOKEN"
        )
    if code == "EntryNotFound":
        if kind == "data set":
            return  # it exists, without a README
        raise UserError(f"{field}: {name} on {host} holds no config.json, so no model")
    if answer.status_code in (401, 404):  # 401 is the hub's answer for an unknown name without a token
        raise UserError(f"{field}: {absent(name, host)}")
    if answer.status_code >= 400:
        raise UserError(f"{field}: {name} cannot be loaded: {host} answers with HTTP {answer.status_code}")


def absent(name: str, host: str) -> str:
    """Sentence that the hub has no such name, with the nearest name here."""
    likely = did_you_mean(name, names_here(name)) or "."
    return f"{name} exists neither on {host} nor as a file or folder here{likely} Check its spelling, or set HF_TOKEN if it is private"


def names_here(name: str) -> list[str]:
    """Files and folders that a name may mean: those in the working folder, and in its first part where that is one of them."""
    parent = Path(name).parts[0]
    names: list[str] = []
    with contextlib.suppress(OSError):  # a folder that may not be listed
        names += [path.name for path in Path().iterdir() if not path.name.startswith(".") and path.name != parent]
        names += [f"{parent}/{path.name}" for path in Path(parent).iterdir()] if Path(parent).is_dir() else []
    return names


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
