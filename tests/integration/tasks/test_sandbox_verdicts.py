"""Verdicts of the Python sandbox: tests reach a solution through proxies, and a solution cannot decide its own verdict."""

from __future__ import annotations

import textwrap

import pytest

from headwater.tasks import sandbox

LIMITS = sandbox.Limits(seconds=20.0)


def run(code: str, tests: str, entry_point: str | None = None) -> sandbox.Outcome:
    return sandbox.run(textwrap.dedent(code), textwrap.dedent(tests), entry_point, LIMITS)


DATA = """
import collections, datetime, decimal, fractions
def same(x): return x
def kind(x): return type(x).__name__
Pair = collections.namedtuple("Pair", "left right")
def pair(): return Pair(1, [2])
def infinite():
    n = 0
    while True:
        yield n
        n += 1
"""
DATA_TESTS = """
import collections, datetime, decimal, fractions, itertools, math
values = [
    None, True, 0, -7, 2**5000, 1.5, float("inf"), 2 + 1j, "text \\ud800 \\0", b"\\xff", bytearray(b"a"), [1, [2, (3,)]], (), (1, "a"),
    {1, 2}, frozenset({(1, 2)}), {"a": {1: (2,)}, (1, 2): None}, range(1, 9, 2), slice(1, None, 2), decimal.Decimal("0.10"),
    fractions.Fraction(1, 3), datetime.date(2024, 2, 29), datetime.datetime(2024, 1, 2, 3, 4, 5, 6), datetime.timedelta(days=1),
    datetime.time(1, 2), collections.deque([1, 2], 3), collections.Counter("aab"), collections.OrderedDict(b=1, a=2), int, dict,
]
for value in values:
    answer = same(value)
    assert answer == value and type(answer) is type(value), value
    assert kind(value) == type(value).__name__
assert math.isnan(same(float("nan"))) and str(same(decimal.Decimal("0.10"))) == "0.10"
assert pair() == (1, [2]) and pair().left == 1 and pair().right == [2]
assert list(itertools.islice(infinite(), 3)) == [0, 1, 2]
assert sorted(same({"b": 1, "a": 2}.keys())) == ["a", "b"] and list(same(iter([1, 2]))) == [1, 2]
"""

CLASSES = """
import asyncio, contextlib, math
from math import sqrt
from typing import Dict, List
LIMIT = 3
class EmptyError(Exception):
    def __init__(self, size):
        super().__init__(f"size {size}")
        self.size = size
class VeryEmptyError(EmptyError): pass
class Stack:
    '''A stack.'''
    def __init__(self, items=()): self.items = list(items)
    def push(self, item): self.items.append(item); return self
    def pop(self):
        if not self.items: raise VeryEmptyError(0)
        return self.items.pop()
    def __len__(self): return len(self.items)
    def __iter__(self): return iter(self.items)
    def __getitem__(self, n): return self.items[n]
    def __str__(self): return f"Stack{self.items}"
    def __enter__(self): return self
    def __exit__(self, *error): self.items = ["left"]
    @property
    def top(self): return self.items[-1]
    @classmethod
    def of(cls, *items): return cls(items)
class Point:
    def __init__(self, x, y): self.x, self.y = x, y
    def __eq__(self, other): return (self.x, self.y) == (other.x, other.y)
    def __hash__(self): return hash((self.x, self.y))
    def __add__(self, other): return Point(self.x + other.x, self.y + other.y)
    def __lt__(self, other): return self.x < other.x
class Text(str):
    def shout(self): return self.upper() + "!"
def sort(xs): xs.sort(); return xs
def deepen(xss): xss[0].append(9)
def apply(f, xs, key=None): return [f(x) for x in xs] if key is None else sorted(xs, key=key)
def fail(kind): raise {"key": KeyError("k"), "value": ValueError("v", 2)}[kind]
def hello(name): print("hello", name)
async def later(x):
    await asyncio.sleep(0)
    return x * 2
def echo():
    got = yield 1
    yield got
"""
CLASS_TESTS = """
import asyncio, copy, io, contextlib, unittest
import solution
from solution import sort as renamed

class StackTests(unittest.TestCase):
    def test_stack(self):
        s = Stack([1]).push(2).push(x := 3)
        self.assertEqual((len(s), list(s), s[0], s.top, str(s)), (3, [1, 2, 3], 1, 3, "Stack[1, 2, 3]"))
        self.assertIsInstance(s, Stack)
        self.assertNotIsInstance(s, Point)
        self.assertEqual(s.pop(), x)
        with self.assertRaises(EmptyError) as caught:
            Stack().pop()
        self.assertEqual((str(caught.exception), caught.exception.size), ("size 0", 0))
        with self.assertRaisesRegex(KeyError, "k"):
            fail("key")
        with self.assertRaises(AttributeError):
            s.missing
        s.items = [5]
        self.assertEqual(s.items, [5])

def test_objects():
    assert Point(1, 2) == Point(1, 2) and Point(1, 2) != Point(2, 1) and Point(1, 2) != None
    assert (Point(1, 2) + Point(2, 2)).x == 3 and Point(1, 2) < Point(2, 0)
    assert len({Point(1, 2), Point(1, 2)}) == 1 and Point(1, 1) in [Point(1, 1)]
    assert Text("a") == "a" and Text("a") != "b" and Text("a").shout() == "A!"
    assert bool(Stack()) is False and Stack.of(1, 2).top == 2 and Stack.__name__ == "Stack" and Stack.__doc__ == "A stack."
    s = Stack([1])
    t = copy.deepcopy(s).push(2)
    assert len(s) == 1 and len(t) == 2 and callable(Stack) and not callable(s)
    with Stack() as opened:
        pass
    assert opened.items == ["left"]

def test_arguments():
    xs, xss = [3, 1], [[1], [2]]
    inner = xss[0]
    assert sort(xs) is xs and xs == [1, 3] and renamed([2, 1]) == [1, 2]
    deepen(xss)
    assert inner == [1, 9] and xss == [[1, 9], [2]]
    seen = []
    assert apply(lambda x: x + len(seen), [1, 2]) == [1, 2] and apply(seen.append, [5]) == [None] and seen == [5]
    assert apply(None, ["bb", "a"], key=len) == ["a", "bb"] and apply(str, [1]) == ["1"] and apply(f=sort, xs=[[2, 1]]) == [[1, 2]]
    assert apply(lambda xs: sort(xs)[0], [[2, 1]]) == [1]

def helper(x: Dict[str, List[int]]) -> List[Point]: pass

def test_the_rest():
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        hello("you")
    assert out.getvalue() == "hello you\\n"
    assert asyncio.run(later(4)) == 8
    talk = echo()
    assert (next(talk), talk.send("x"), list(talk)) == (1, "x", [])
    assert math.isclose(sqrt(4), 2.0) and LIMIT == 3 and solution.LIMIT == 3
    try:
        fail("value")
    except ValueError as error:
        assert error.args == ("v", 2)
    else:
        raise AssertionError
"""


@pytest.mark.parametrize(("code", "tests"), [(DATA, DATA_TESTS), (CLASSES, CLASS_TESTS)], ids=["data", "objects"])
def test_proxies_behave_as_solution_itself(code: str, tests: str) -> None:
    result = run(code, tests)
    assert result.passed, result
    assert not run(code, tests + "\nassert False").passed


def test_entry_point_may_have_name_of_builtin() -> None:
    assert run("def sum(a, b): return a * b", "assert sum(10, 15) == 150").passed
    assert run("def max(a): return 7", "def check(candidate):\n    assert candidate([1]) == 7", "max").passed


EQUAL = (
    "class E:\n    def __eq__(self, other): return True\n    def __sub__(self, other): return 0.0\n"
    "    def __abs__(self): return 0.0\n"
)
FORGERIES = {
    "an object that equals everything": (EQUAL + "def f(x): return E()", "unsupported"),
    "one within a list": (EQUAL + "def f(x): return [E()]", "unsupported"),
    "a subclass of int that equals everything": (
        "class N(int):\n    def __eq__(self, other): return True\ndef f(x): return N(1)", "unsupported"),
    "a difference of 0": (EQUAL.replace("__eq__", "eq") + "def f(x): return E()", "different"),
    "an end of the process": ("import os\ndef f(x): os._exit(0)", "error"),
    "an exit": ("def f(x): raise SystemExit(0)", "error"),
    "a skipped test": ("import unittest\ndef f(x): raise unittest.SkipTest('no')", "different"),
    "an end of a loop": ("def f(x): raise StopIteration", "different"),
    "an end of a loop by a second parent": (
        "class Stop(StopIteration): pass\nclass E(ValueError, Stop): pass\ndef f(x): raise E", "different"),
    "a patched assertion": (
        "import unittest\nunittest.TestCase.assertEqual = lambda *a: None\nimport builtins\n"
        "builtins.AssertionError = KeyError\ndef f(x): return 5", "different"),
    "an exit handler": ("import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 5", "different"),
    "a finalizer": ("import os\nclass D:\n    def __del__(self): os._exit(0)\ndef f(x):\n    D()\n    return 5", "error"),
    "replaced builtins": ("import builtins\nbuiltins.all = builtins.isinstance = lambda *a: True\ndef f(x): return 5", "error"),
    "a printed verdict": ("print('{\"passed\": true, \"reason\": \"equal\"}')\ndef f(x): return 5", "different"),
    "a verdict in every open file": (
        'import os\nfor n in range(3, 64):\n    try: os.write(n, b\'{"passed": true, "reason": "equal", "detail": ""}\')\n'
        "    except OSError: pass\ndef f(x): return 5", "unsupported"),
    "a replaced module": (
        "import sys\nclass M:\n    def __getattr__(self, name): return lambda *a, **k: True\n"
        "for name in list(sys.modules): sys.modules[name] = M()\ndef f(x): return 5", "different"),
    "a message that is no answer": (
        "import os, json, struct\nm = json.dumps({'value': {'reference': {'id': 'x'}}}).encode()\n"
        "def f(x):\n    for n in range(3, 9):\n        try: os.write(n, struct.pack('!I', len(m)) + m)\n"
        "        except OSError: pass", "unsupported"),
    "a deep message": (
        "import os, struct\nm = b'[' * 10**6\ndef f(x):\n    for n in range(3, 9):\n"
        "        try: os.write(n, struct.pack('!I', len(m)) + m)\n        except OSError: pass", "unsupported"),
    "a huge answer": ("def f(x): return 'x' * 10**7", "unsupported"),
    "an endless answer": ("def f(x):\n    a = []\n    a.append(a)\n    return a", "different"),
    "a thread that answers too": (
        "import threading, os, struct, json\n"
        "def flood():\n    m = json.dumps({'value': 4}).encode()\n    m = struct.pack('!I', len(m)) + m\n    while True:\n"
        "        try: os.write(LINK, m)\n        except OSError: pass\n"
        "LINK = 63\ndef f(x):\n    threading.Thread(target=flood, daemon=True).start()\n    return 5", "different"),
    "expected values in frames": (
        "import sys, gc\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n"
        "        for value in list(frame.f_locals.values()) + list(frame.f_globals.values()):\n"
        "            if isinstance(value, str) and 'assert f(2) == ' in value: return 4\n"
        "        frame = frame.f_back\n"
        "    for thing in gc.get_objects():\n"
        "        if isinstance(thing, dict) and any(isinstance(v, str) and '== 4' in v for v in thing.values()): return 4\n"
        "    return 5", "different"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGERIES)
def test_solution_cannot_forge_verdict(name: str) -> None:
    code, reason = FORGERIES[name]
    tests = """
    import unittest
    class Tests(unittest.TestCase):
        def test_f(self):
            self.assertEqual(f(2), 4)
    for answer in map(f, [2]):
        assert answer == 4 or answer == [4]
    assert isinstance(f(2), int) and all([f(2) == 4])
    """
    result = run(code, tests)
    assert (result.passed, result.reason) == (False, reason), result


@pytest.mark.parametrize(
    ("code", "tests", "reason"),
    [
        (EQUAL + "def f(x): return E()", "assert abs(f(2) - 4.0) < 1e-6", "unsupported"),
        (EQUAL + "def f(x): return E()", "assert abs(4.0 - f(2)) < 1e-6", "unsupported"),
        (
            "class S:\n    def startswith(self, t): return True\ndef f(x): return S()",
            "assert f(2).startswith('ab')",
            "unsupported",
        ),
        ("class S:\n    startswith = bool\ndef f(x): return S()", "assert f(2).startswith('ab')", "unsupported"),
        (
            "import collections\nN = collections.namedtuple('N', 'startswith')\ndef f(x): return N(lambda t: True)",
            "assert f(2).startswith('ab')",
            "unsupported",
        ),
        ("class S:\n    issuperset = ValueError\ndef f(x): return S()", "assert f(2).issuperset({4})", "unsupported"),
        (
            "class S:\n    def __contains__(self, t): return True\ndef f(x): return S()",
            "assert 4 in f(2)",
            "unsupported",
        ),
        ("def f(x): return 5\ndef abs(x): return 0", "assert abs(f(2) - 4) < 1e-6", "different"),
        ("def f(x): return [5]\ndef sorted(x): return []", "assert sorted(f(2)) == sorted([4])", "different"),
        (
            "def f(x): return 5\nclass math:\n    fabs = lambda x: 0",
            "import math\nassert math.fabs(f(2) - 4) < 1",
            "different",
        ),
        ("def f(x): return 5\nclass math:\n    isclose = lambda *a: True", "assert math.isclose(f(2), 4)", "different"),
        (
            "def f(x): return 5\nclass unittest:\n    TestCase = object",
            "import unittest\nfrom solution import *\nclass T(unittest.TestCase):\n    def test_f(self): self.assertEqual(f(2), 4)",
            "different",
        ),
        (
            "def f(x): return 5\ndef expect(a, b): pass",
            "def expect(a, b): assert a == b\nfrom solution import *\nexpect(f(2), 4)",
            "different",
        ),
        ("import os\ndef f(x): os._exit(0)", "try: f(2)\nexcept BaseException: pass", "error"),
        (EQUAL + "def f(x): return E()", "try: assert f(2) == 4\nexcept Exception: pass", "unsupported"),
        ("def f(g):\n    try: g(5)\n    except AssertionError: pass", "def g(x): assert x == 4\nf(g)", "different"),
        (
            "class C:\n    def __enter__(self): return 5\n    def __exit__(self, *e): return True\ndef f(): return C()",
            "with f() as x:\n    assert x == 4",
            "unsupported",
        ),
        (
            "def f(x): return 5\ndef abs(x): return 0",
            "import solution\nassert abs(solution.f(2) - 4) < 1e-6",
            "different",
        ),
        ("E = Exception\ndef f(x): return 5", "try:\n    f(-1)\n    assert False\nexcept E: pass", "unsupported"),
        (
            "class F:\n    Errors = (AssertionError,)\ndef f(x): return 5",
            "import contextlib\nwith contextlib.suppress(*F.Errors): assert f(2) == 4",
            "unsupported",
        ),
        ("class A: pass", "class B(A): pass", "unsupported"),
        ("def f(x): return 1", "class Own: pass\nf(Own())", "unsupported"),
        ("x = 1", "import solution\nsolution.x = 2\nassert solution.x == 2", "unsupported"),
    ],
)
def test_unsafe_tests_are_refused(code: str, tests: str, reason: str) -> None:
    result = run(code, tests)
    assert (result.passed, result.reason) == (False, reason), result


HOSTILE_REPORTS = {
    "a list": "[]",
    "a text for a verdict": '{"passed": "yes", "reason": "equal"}',
    "an object for a reason": '{"passed": true, "reason": {"a": 1}}',
    "an unknown reason": '{"passed": false, "reason": "\\u001b]0;title", "detail": ""}',
    "no detail": '{"passed": false, "reason": "different"}',
    "layers of a wrong type": '{"passed": false, "reason": "equal", "layers": 5}',
    "no number": "NaN",
    "no verdict": '{"reason": "equal"}',
    "nested lists": "[" * 5000,
}


@pytest.mark.parametrize("name", HOSTILE_REPORTS)
def test_report_written_by_hostile_tests_is_error(name: str) -> None:
    """Gold answers are untrusted: their tests may write to the channel that carries the verdict."""
    tests = f"""
    import os
    for descriptor in range(3, 64):
        try: os.write(descriptor, {HOSTILE_REPORTS[name]!r}.encode())
        except OSError: pass
    os._exit(0)
    """
    result = run("def f(x): return x", tests)
    assert (result.passed, result.reason) == (False, "error"), result


def test_detail_of_verdict_is_one_printable_line() -> None:
    assert run("def f(x): raise ValueError('\x1b[2J\\n')", "f(1)").detail.isprintable()


def test_expected_values_never_enter_solution() -> None:
    """The solution's process writes all that it can see of itself to the folder; the tests read it there."""
    code = """
    import gc, sys
    def f(x):
        seen = [repr(thing) for thing in gc.get_objects() if isinstance(thing, (str, bytes, tuple, list, dict))]
        with open("seen", "w", encoding="utf-8", errors="replace") as file: file.write("".join(seen)[:3_000_000])
        return x
    """
    tests = "EXPECTED = 'four and ' + 'twenty'\nanswer = f(2)\nassert 'four' + ' and ' not in open('seen').read()"
    assert run(code, tests).passed
    assert not run(code, tests.replace("not in", "in")).passed
