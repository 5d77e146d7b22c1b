"""Put braces around the arguments of LaTeX commands that are written without them: `\\frac12`, `\\binom5{2}`, `2^\\frac12`."""

from __future__ import annotations

import re

_TOKENS = re.compile(r"\\[a-zA-Z]+|\\.|\s+|.", re.DOTALL)
_ARGUMENTS = {"\\frac": 2, "\\binom": 2, "\\sqrt": 1, "\\vec": 1, "\\hat": 1}
# Commands that are no argument by themselves: relations, operators, and those with arguments of their own that are not read here.
_NO_ARGUMENT = re.compile(
    r"\\(?:cdot|times|div|pm|mp|leq|geq|neq|in|cup|cap|to|ldots|text|begin|end|frac|binom|sqrt|vec|hat|overline|mathbb|left|right)"
)
LONGEST_INDEX, LONGEST_BRACKETS = 20, 300  # tokens of the n in \sqrt[n]{x} and of the x in \sqrt(x)


def brace_arguments(text: str) -> str:
    """Put braces around the arguments of `\\frac`, `\\binom`, `\\sqrt`, `\\vec`, `\\hat`, `^` and `_`: one token or group, as in TeX.

    A number after `^` or `_` is one argument, since `2^10` is written for 2 to the 10; TeX would raise to the 1.

    Example: `brace_arguments("\\\\frac1{2}x^10")` is `"\\\\frac{1}{2}x^{10}"`.
    """
    # From right to left, so that arguments are complete when a command takes them. `level` holds what stands right of the token
    # within the same braces, nearest last; `outer` the levels around it.
    level: list[str] = []
    outer: list[list[str]] = []
    after_script = False
    for token in reversed(_TOKENS.findall(text)):
        if after_script and token.isspace():
            continue
        after_script = False
        if token == "}":
            outer.append(level)
            level = []
        elif token == "{" and outer:
            group = "{" + "".join(reversed(level)) + "}"
            level = outer.pop()
            level.append(group)
        elif token in "^_":
            after_script = True
            _push_script(level, token)
        elif token in _ARGUMENTS:
            _push_command(level, token)
        else:
            level.append(token)
    while outer:  # closing braces that nothing opens
        inner, level = level, outer.pop()
        level += ["}", *inner]
    return "".join(reversed(level))


def _push_command(level: list[str], command: str) -> None:
    end = len(level)
    made = command
    if command == "\\sqrt":
        index, end = _bracketed(level, end, "[", "]", LONGEST_INDEX)
        made += "" if index is None else f"[{index}]"
        inner, after = _bracketed(level, end, "(", ")", LONGEST_BRACKETS)
        if inner is not None and "(" not in inner:
            level[after:] = [f"{made}{{{inner}}}"]
            return
    for _ in range(_ARGUMENTS[command]):
        argument, end = _argument(level, end)
        if argument is None:
            level.append(command)
            return
        made += argument
    level[end:] = [made]


def _push_script(level: list[str], sign: str) -> None:
    number = _number(level)
    argument, end = number if number[0] is not None else _argument(level, len(level))
    if argument is None:
        level.append(sign)
    else:
        level[end:] = [f"{sign}{{{argument[1:-1].strip()}}}"]


def _number(level: list[str]) -> tuple[str | None, int]:
    """The number at the top of a level, in braces, and the length of the level without it."""
    end = _skip_space(level, len(level))
    start = end
    if end and level[end - 1] == "-":
        end -= 1
    digits = end
    while end and level[end - 1].isdigit():
        end -= 1
    if end == digits:
        return None, start
    if end > 1 and level[end - 1] == "." and level[end - 2].isdigit():
        end -= 1
        while end and level[end - 1].isdigit():
            end -= 1
    return "{" + "".join(reversed(level[end:start])) + "}", end


def _argument(level: list[str], end: int) -> tuple[str | None, int]:
    """The argument that stands below `end` in a level, in braces, and the length of the level without it."""
    end = _skip_space(level, end)
    unit = level[end - 1] if end else ""
    if unit.startswith("{") and unit.endswith("}"):
        return unit, end - 1
    if unit.isalnum() or (re.match(r"\\[a-zA-Z]", unit) and not _NO_ARGUMENT.fullmatch(unit)):
        return f"{{{unit}}}", end - 1
    return None, end


def _bracketed(level: list[str], end: int, opening: str, closing: str, longest: int) -> tuple[str | None, int]:
    start = _skip_space(level, end)
    if not start or level[start - 1] != opening:
        return None, end
    for place in range(start - 2, max(-1, start - 2 - longest), -1):
        if level[place] == closing:
            return "".join(reversed(level[place + 1 : start - 1])), place
    return None, end


def _skip_space(level: list[str], end: int) -> int:
    while end and level[end - 1].isspace():
        end -= 1
    return end
