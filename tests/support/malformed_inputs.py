"""Values that often break programs, and mutations of valid ones; `fuzz` draws from them."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 10**6, 10**9, 2**31, 2**63, 2**64, -(2**63), 10**30, 10**400, 0.0, -0.0, 0.5, 1e-300, 1e308,
    float("nan"), float("inf"), -float("inf"), "", " ", "\n", "a\nb", "\x00", "\x1b[2J", "é", "数学", "\u2028", "\u202egpj", "🙂",
    "a" * 5000, "../..", "../../etc/passwd", "/", "/dev/null", "/dev/zero", "~", ".", "..", "a/b", "a b", "nan", "1e5", "0x10",
    "off", "null", "{problem}", "{", "}", "%s", "$(true)", "`true`", "<script>alert(1)</script>", "pocket:", "pocket:nope",
    "pocket:qwen3-student", "pocket:countdown-student", "pocket:../pocket/qwen3-student", "desk:", "desk:../../x", "desk:student",
    "grpo", "opd", "sft", "mixed", "constant", "forward_kl", "full", "half", "sums", "maths", "countdown", "words", "regex", "json",
    "python", "choice", "numeric", "exact", "os:system", "timeit:timeit", "builtins:exec", "headwater.tasks.registry:find_task",
    ":", "a:b:c",
    "no.such:thing", "antigravity:x", "bfloat16", "cuda", "eval", "train", [], {}, [None], [[]], {"a": {"b": []}}, {"": ""}, [1, 2],
    {"path": "x.jsonl"}, {"generate": {"pool": "train", "count": 3}}, "x.jsonl", "x.parquet", "x.json",
]  # fmt: skip


def leaf(draw: random.Random) -> Any:
    value = draw.choice(NASTY)
    roll = draw.random()
    if roll < 0.1:
        return draw.randint(-5, 200)
    if roll < 0.15:
        return draw.random() * 10 ** draw.randint(-8, 8)
    if roll < 0.2:
        return "".join(
            chr(draw.choice([draw.randint(0, 127), draw.randint(0, 0xD7FF)])) for _ in range(draw.randint(0, 12))
        )
    if roll < 0.23:
        for _ in range(draw.choice([3, 40, 100])):
            value = draw.choice([[value], {"a": value}])
    return copy.deepcopy(value)


WORDS = [value for value in NASTY if isinstance(value, str)]
NUMBERS = [value for value in NASTY if isinstance(value, (int, float)) and not isinstance(value, bool)]


def near(draw: random.Random, value: Any) -> Any:
    """Another value of the same type, which passes type checks."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw.choice([value + 1, value - 1, value * 2, value * 1000, draw.randint(0, 40), draw.choice(NUMBERS)])
    if isinstance(value, float):
        return draw.choice([value * 10, value / 10, -value, draw.random(), draw.choice(NUMBERS)])
    return draw.choice([draw.choice(WORDS), value[: len(value) // 2], value * 2]) if isinstance(value, str) else value


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to all parts of a nested value."""
    if path:
        yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def mutated(draw: random.Random, value: Any, most: int = 4, leaves: Callable[[random.Random], Any] = leaf) -> Any:
    value = copy.deepcopy(value)
    for _ in range(draw.choice([1, 1, draw.randint(1, most)])):
        ways = list(places(value))
        if not ways:
            return value
        path = draw.choice(ways)
        holder, key = at(value, path[:-1]), path[-1]
        kind = draw.choice([*["near"] * 9, "set", "set", "set", "drop", "add", "rename", "wrap", "swap", "double"])
        if kind == "near":
            holder[key] = near(draw, holder[key])
        elif kind == "set":
            holder[key] = leaves(draw)
        elif kind == "drop":
            del holder[key]
        elif kind == "wrap":
            holder[key] = draw.choice([[holder[key]], {"x": holder[key]}, str(holder[key])])
        elif kind == "swap":
            holder[key] = copy.deepcopy(at(value, draw.choice(ways)))
        elif isinstance(holder, list):
            holder.insert(key, leaves(draw) if kind == "add" else copy.deepcopy(holder[key]))
        elif kind == "add":
            holder[draw.choice(["x", "steps", "path", "", "é", f"{key}_", 3])] = leaves(draw)
        else:
            holder[f"{key}{draw.choice(['s', '_', ' ', 'X'])}"] = holder.pop(key)
    return value


def spoiled(draw: random.Random, data: bytes) -> bytes:
    """Bytes truncated, flipped, repeated, or with others inserted."""
    for _ in range(draw.randint(1, 3)):
        place = draw.randint(0, max(0, len(data) - 1))
        kind = draw.choice(["cut", "flip", "insert", "double", "zero", "front"])
        if kind == "cut":
            data = data[:place]
        elif kind == "flip" and data:
            data = data[:place] + bytes([data[place] ^ (1 << draw.randint(0, 7))]) + data[place + 1 :]
        elif kind == "double":
            data = data[:place] + data[max(0, place - 50) :]
        elif kind == "zero":
            data = data[:place] + bytes(draw.randint(1, 30)) + data[place:]
        else:
            more = draw.choice(
                [
                    b"\xff",
                    b"\xef\xbb\xbf",
                    b"\x00",
                    b"\r\n",
                    b"\r",
                    b"\xe2\x80\xa8",
                    b"\xed\xa0\x80",
                    b"{",
                    b"[" * 2000,
                    b"NaN",
                    b"9" * 5000,
                ]
            )
            data = more + data if kind == "front" else data[:place] + more + data[place:]
    return data


BOMBS = [
    b"",
    b"a: &a [1]\nb: *a\n",
    b"a: &a {b: *a}\n",
    b"x: !!python/object/apply:os.system ['true']\n",
    b"x: !!int q\n",
    b"x: 2001-13-45\n",
    b"? [1]\n: 2\n",
    b"%YAML 9.9\n",
    b"x: !!timestamp q\n",
    b"x: !!bool maybe\n",
    *(
        first + b"".join(b"a%d: &a%d %s\n" % (n, n, form % b",".join([b"*a%d" % (n - 1)] * 9)) for n in range(1, 12))
        for first, form in ((b"a0: &a0 [x,x]\n", b"[%s]"), (b"a0: &a0 {x: 1}\n", b"{<<: [%s]}"))
    ),
]
"""Text appended to a recipe; the last two expand to more values than fit in memory."""

CELLS = [
    *NASTY,
    "47",
    "#### 42",
    "\\boxed{7}",
    "\\boxed{",
    "A",
    "(a+)+b",
    "[",
    "(?P<x>a)(?P=x)",
    "(a{9999}){9999}",
    "assert f(2) == 4",
    '{"pattern": "a"}',
    '{"tests": "assert f(1)", "solution": "def f(x): return x"}',
    '{"value": 1, "abs": 0.1}',
    "\ud800",
    "50,46,24=28",
    "(" * 300,
    "-" * 3000 + "1",
    "1,080",
    "½",
    "3.14 ± 0.01",
    [{"role": "user", "content": "2+2"}],
    [{"role": "user"}],
]


LINES = [
    b'{"problem": "a", "problem": "b", "answer": "1", "answer": "2"}\n',
    b'{"problem": ' + b"[" * 100_000 + b"\n",
    b'{"problem": "' + b"x" * 100 + b'", "answer": "1"}\n',
    b'{"problem": "' + b"x" * 10_000_000 + b'", "answer": "1"}\n',
    b'{"problem": "caf\xc3',
    b"\xef\xbb\xbf",
    b'{"problem": "p", "answer": ' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}\n",
    b'{"problem": "p", "answer": ' + b"9" * 5000 + b"}\n",
    b'{"problem": "\\ud800", "answer": "\\udfff"}\n',
    b'{"problem": "p", "answer": 1e999}\n',
    b"\x00\x00\x00",
    b"PK\x03\x04",
    b"\x1f\x8b\x08",
]

TEMPLATES = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10**10 }}",
    "{{ messages.__class__ }}",
    "{{ ''.__class__.__mro__ }}",
    "{% if %}",
    "{{ raise_exception('no') }}",
    "{{ 1/0 }}",
    "",
    "{{ messages[9].content }}",
    "{% include 'x' %}",
    "{% set ns = namespace(s='aa') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
    "{{ lipsum(n=10000) }}",
    "{{ messages.append(1) }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ x.y.z }}",
    "{% import 'os' as os %}",
]
