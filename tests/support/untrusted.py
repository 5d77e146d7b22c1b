"""Hostile parts of model folders: a pickle that runs code, and chat templates that fail, loop or grow."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class TouchOnUnpickle:
    """An object whose pickle creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


HOSTILE_TEMPLATES = {
    "syntax": "{% if %}",
    "attribute": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "mutation": "{{ messages.append(1) }}",
    "its own error": "{{ raise_exception('no system prompt, please') }}",
    "division": "{{ 1 / 0 }}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "doubling": "{% set ns = namespace(s='aa') %}{% for i in range(40) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "multiplication": "{{ 'a' * 10**12 }}",
    "constant": "{{ 9 ** (9 ** 9) }}",
    "long": "{{ 'a' * 20000000 }}",
    "lipsum": "{{ lipsum(n=10000) }}",
}
