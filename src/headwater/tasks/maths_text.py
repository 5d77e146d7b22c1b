"""Extract the final answer from a completion and normalize its LaTeX.

Everything here takes linear time (no nested quantifiers over the same characters), so it can run in the parent process on
untrusted text.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

from headwater.tasks.announced import announced_answer, last_match
from headwater.tasks.conclusions import concluded_value
from headwater.tasks.maths_arguments import brace_arguments
from headwater.tasks.thinking import after_thinking

MAX_OUTER_BRACKETS = 5  # pairs removed around the whole; a thousand pairs would take quadratic time
_BRACES = re.compile(r"\\+(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_BARE_BOX = re.compile(r"\\(?:boxed|fbox)(?:\s+|(?=\d))([^\s{}$\\,;]+)")


def extract(completion: str) -> tuple[str | None, str]:
    """Extract the final answer: (text, "") or (None, "no_answer" | "truncated").

    Order, after the thinking: the last complete box; without any box the last `####` that an answer follows; else the last
    "answer is", also in other languages. An empty answer is none.

    Example: `extract("so \\boxed{41}, no: \\boxed{42}")` gives `("42", "")`.
    """
    text = after_thinking(completion)
    box, opened = last_box(text)
    if box is None and opened:
        return None, "truncated"
    answer = announced_answer(text) if box is None else box
    answer = answer.strip() if answer else ""
    return (answer, "") if answer else (None, "no_answer")


def extract_value(completion: str) -> tuple[str | None, str]:
    """Extract as `extract` does, else the value in the last sentence: for tasks whose answers are numbers and expressions.

    Example: `extract_value("Therefore, the total is $42$.")` gives `("$42$", "")`.
    """
    answer, missing = extract(completion)
    if missing == "no_answer":
        value = concluded_value(after_thinking(completion))
        return (None, missing) if value is None else (value, "")
    return answer, missing


def last_box(text: str) -> tuple[str | None, bool]:
    """(content of the complete box that starts last, whether any box starts), by one pass with a stack of braces."""
    if "boxed" not in text and "fbox" not in text:
        return None, False
    stack: list[int] = []  # for each open brace: where the box's content starts, or -1 for a plain brace
    opened = False
    best: tuple[int, int] | None = None
    for match in _BRACES.finditer(text):
        token = match.group()
        if token == "{":
            stack.append(-1)
        elif token == "}":
            start = stack.pop() if stack else -1
            if start >= 0 and (best is None or start > best[0]):
                best = (start, match.start())
        elif token[-1] == "{" and len(token) > 2:
            opened = True
            stack.append(match.end())
    bare = last_match(_BARE_BOX, text)  # TeX allows `\boxed 7` and `\boxed7`
    if bare is not None and (best is None or bare.start() > best[0]):
        return bare.group(1).rstrip("."), True
    return (text[best[0] : best[1]], True) if best else (None, opened)


# Normalization --------------------------------------------------------------------------------------------------------

_SIGNS = {
    "−": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "⁄": "/", "∕": "/",
    "π": r"\pi ", "∞": r"\infty ", "≤": r"\leq ", "≥": r"\geq ", "≠": r"\neq ", "°": r"^{\circ}", "∪": r"\cup ",
    "∩": r"\cap ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}",
    "ℂ": r"\mathbb{C}", "∈": r"\in ", "±": r"\pm ", "∓": r"\mp ", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ",
    "⌉": r"\rceil ", "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "θ": r"\theta ", "λ": r"\lambda ",
    "μ": r"\mu ", "φ": r"\phi ", "ω": r"\omega ", "√": r"\sqrt ", "∠": r"\angle ", "△": r"\triangle ", "→": r"\to ",
    "€": "", "£": "", "¥": "", "₹": "", "’": "'", "′": "'",
    "、": ",", "،": ",", "٬": ",", "٫": ".", "٪": "%", "。": ".", "।": ".",
}  # fmt: skip
_SIGN_PATTERN = re.compile("|".join(map(re.escape, _SIGNS)))
_RAISED = re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+")
_LOWERED = re.compile(r"[₀₁₂₃₄₅₆₇₈₉]+")
_ROOT_OF_NUMBER = re.compile(r"√\s*(\d+(?:\.\d+)?)")  # the sign has no braces: its root is of the whole number
_FOREIGN_DIGIT = re.compile(r"(?![0-9])\d")  # such as ४ and ٤
_VULGAR = re.compile(r"(\d?)([¼½¾⅐-⅞])")

# (pattern, replacement), in order. Each only normalizes notation and never changes a value.
_REWRITES: list[tuple[re.Pattern[str], str]] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\\[$]|[$]", ""),  # currency and stray delimiters
        (r"\A\s*(?:[\"`]|\*\*)(?=[^\"`*]+(?:[\"`]|\*\*)\.?\s*\Z)|(?:[\"`]|\*\*)(?=\.?\s*\Z)", ""),  # "42" and **42**
        (r"\A\s*(?:USD|EUR|GBP|INR|US|Rs\.?)\s?(?=\d)", ""),
        (r"\A([-+]?\d+(?:\.\d*)?)[eE]([-+]?\d{1,6})\Z", r"\1\\cdot 10^{\2}"),  # 1e-07, not e times 1 minus 7
        (r"(?<!\\)\\[()\[\]]", " "),  # \( \) \[ \]
        (r"\\(?:left|right|[bB]igg?[lrm]?)(?![a-zA-Z])\s*", ""),
        (r"(?:,\s*\\!|\{,\}|\\,?,(?=\d{3}\b))\s*(?=\d{3})", ","),  # thousands separators: 32,\! 349 and 1{,}080
        (r"(?<!\\)\\[!]", ""),
        (r"(?<!\\)\\[,;:> ]|~|\\q?quad\b|\\(?:thinspace|enspace|hspace\{[^{}]*\})", " "),
        (r"\\(?:displaystyle|textstyle|limits|nolimits|rm|bf|it|tiny|small|normalsize|[lL]arge|LARGE|[hH]uge|bm"
         r"|boldsymbol|pmb)(?![a-zA-Z])", ""),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\[dt]binom(?![a-zA-Z])", r"\\binom"),
        (r"\{([^{}]*)\\over(?![a-zA-Z])([^{}]*)\}", r"\\frac{\1}{\2}"),
        (r"\{([^{}]*)\\choose(?![a-zA-Z])([^{}]*)\}", r"\\binom{\1}{\2}"),
        (r"\\l?brace(?![a-zA-Z])", r"\\{"),
        (r"\\rbrace(?![a-zA-Z])", r"\\}"),
        (r"\\(?:text(?:bf|it|rm|sf|tt|normal|up)?|math(?:rm|bf|it|sf|tt|normal)|mbox|hbox|operatorname\*?|emph|textup)"
         r"\s*(?=\{)", r"\\text"),
        (r"\\(?:leqslant|leqq|le)(?![a-zA-Z])|<=", r"\\leq "),
        (r"\\(?:geqslant|geqq|ge)(?![a-zA-Z])|>=|=>", r"\\geq "),
        (r"\\ne(?![a-zA-Z])|!=", r"\\neq "),
        (r"\\lt(?![a-zA-Z])", "<"),
        (r"\\gt(?![a-zA-Z])", ">"),
        (r"\\(?:varnothing|O)(?![a-zA-Z])|\\\{\s*\\\}", r"\\emptyset "),
        (r"\(\s*-\s*\\infty\s*,\s*\+?\s*\\infty\s*\)", r"\\mathbb{R}"),
        (r"\\mathbb\s*([RNZQC])", r"\\mathbb{\1}"),
        (r"\\langle(?![a-zA-Z])", "("),
        (r"\\rangle(?![a-zA-Z])", ")"),
        (r"\\[lr]?vert(?![a-zA-Z])|\\mid(?![a-zA-Z])", "|"),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\(?:degree|textdegree)s?(?![a-zA-Z])", " "),  # degrees are ignored
        (r"\\%|%", " "),  # so are percent signs
        (r"\\begin\s*\{array\}\s*\{[lcr| ]*\}", r"\\begin{matrix}"),
        (r"\\end\s*\{array\}", r"\\end{matrix}"),
        (r"\\(begin|end)\s*\{(?:small|p|b)matrix\}", r"\\\1{matrix}"),
        (r"\\\\\s*\[[^\[\]]{0,10}\]", r"\\\\"),
        (r"\\(?:dots|cdots|ldots|dotsc)(?![a-zA-Z])|\.\.\.|…", r"\\ldots "),
        (r"\\infin(?![a-zA-Z])|(?<![a-zA-Z\\])(?:infinity|inf)(?![a-zA-Z])", r"\\infty "),
        (r"(?<![a-zA-Z\\])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<![a-zA-Z\\])sqrt\s*(\d+(?:\.\d+)?)", r"\\sqrt{\1}"),  # no LaTeX, so the root is of the whole number
        (r"(?<![a-zA-Z\\])(pi|sqrt)(?![a-zA-Z])", r"\\\1 "),
        (r"(?<![a-zA-Z\\])(log|ln)(?=\s?[_(\d])", r"\\\1"),
        (r"\*\*", "^"),
        (r"\*", r"\\cdot "),
        (r";", ","),
    ]
]  # fmt: skip
# `\log_28` with nothing behind it: the base is one token, as in TeX, since a logarithm needs an argument.
_SHORT_LOG = re.compile(
    r"\\log\s*_\s*([2-9])\s*(\d+(?:\.\d+)?)(?=\s*(?:$|[-+=<>,)\]}/|]|\\(?:cdot|times|leq|geq|neq|pm|text|\})))"
)
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_TEXT_BY_TEXT = re.compile(r"(\\text\s*\{[^{}]*)\}\s*(/|\\cdot|\s)\s*\\text\s*\{(?!\s*(?:and|or)\b)")
_QUANTITY = re.compile(r"([-+]?\d[\d,]*(?:\.\d+)?)\s+([a-zA-Z][a-zA-Z ./-]*)")
_AND_OR = re.compile(r"(?:,\s*)?(?:\\text\{\s*,?\s*(?:and|or),?\s*\}|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z]))\s*(?:,)?")


def canonical(answer: str) -> str:
    """Normalize an answer: ASCII signs, no delimiters, size or spacing commands, braces around every argument.

    Example: `canonical("$\\dfrac12\\,\\text{ or }−√3$")` gives `"\\frac{1}{2} , -\\sqrt{3}"`.
    """
    text = _VULGAR.sub(_spell_vulgar, answer)
    text = _RAISED.sub(lambda match: "^{" + unicodedata.normalize("NFKC", match.group()).replace("−", "-") + "}", text)
    text = _LOWERED.sub(lambda match: "_{" + unicodedata.normalize("NFKC", match.group()) + "}", text)
    text = _ROOT_OF_NUMBER.sub(r"\\sqrt{\1}", text)
    text = _SIGN_PATTERN.sub(lambda match: _SIGNS[match.group()], unicodedata.normalize("NFKC", text))
    text = _FOREIGN_DIGIT.sub(lambda match: str(unicodedata.decimal(match.group())), text)
    # Drop zero-width and direction marks; replace control characters by spaces.
    text = "".join(" " if unicodedata.category(char) == "Cc" else char for char in text
                   if char.isascii() or unicodedata.category(char) != "Cf")  # fmt: skip
    text = " ".join(text.split())  # before the patterns with \s*, which would be quadratic in runs of spaces
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _TEXT_BY_TEXT.sub(r"\1 \2 ", text)  # \text{km}/\text{h} is one unit
    text = _TEXT.sub(_unwrap, text)
    text = _AND_OR.sub(" , ", text)
    return tidy(brace_arguments(_SHORT_LOG.sub(r"\\log_{\1}{\2}", text)))


def _spell_vulgar(match: re.Match[str]) -> str:
    value = Fraction(unicodedata.numeric(match[2])).limit_denominator(10)
    return rf"{match[1]} \frac{{{value.numerator}}}{{{value.denominator}}}"


def _unwrap(match: re.Match[str]) -> str:
    """Remove \\text around numbers, letters and choices; keep it around words and one-letter units."""
    inner = match[1].strip()
    before = match.string[: match.start()].rstrip()
    unit = before[-1:].isdigit() and re.fullmatch(r"[mgshlLJNWVAKCF](?:/[a-zA-Z]+)?", inner)
    if whole := _QUANTITY.fullmatch(inner):
        return rf" {whole[1]} \text{{{whole[2]}}}"
    return match[0] if unit or re.search(r"[a-zA-Z]{2}", inner) else f" {inner} "


def tidy(text: str) -> str:
    """Single spaces, no final punctuation, no braces around the whole."""
    return without_brackets(" ".join(text.split()).rstrip(".:,").strip(), "{", "}")


def without_text(text: str) -> str:
    """Replace each `\\text{…}` by its content between spaces."""
    return _TEXT.sub(r" \1 ", text)


def squeezed(text: str) -> str:
    """Remove spaces, except those that end a command name; for comparing notation."""
    return re.sub(r"(\\[a-zA-Z]+) (?=[a-zA-Z])|\s", lambda match: match[1] + " " if match[1] else "", text)


_TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|.", re.DOTALL)
_OPENING, _CLOSING = ("(", "[", "{", "\\{"), (")", "]", "}", "\\}")


def tokens(text: str) -> list[tuple[str, int, int]]:
    """(token, position, bracket depth around it). Any closing bracket matches any opening one: intervals are half-open."""
    depth = 0
    result = []
    for match in _TOKEN.finditer(text):
        token = match.group()
        if token in _CLOSING or token == r"\end":
            depth -= 1
        result.append((token, match.start(), depth))
        if token in _OPENING or token == r"\begin":
            depth += 1
    return result


def enclosed(text: str, opening: str, closing: str) -> str | None:
    """Text within the pair of brackets around all of it; None without such a pair.

    Example: `enclosed("(1)+(2)", "(", ")")` is None, since the first bracket closes before the end.
    """
    if not (text.startswith(opening) and text.endswith(closing)):
        return None
    closes = (place for token, place, depth in tokens(text)[1:] if depth == 0 and token in _CLOSING)
    return text[len(opening) : -len(closing)] if next(closes, -1) == len(text) - len(closing) else None


def without_brackets(text: str, opening: str, closing: str) -> str:
    """Remove at most MAX_OUTER_BRACKETS pairs of brackets around the whole text."""
    for _ in range(MAX_OUTER_BRACKETS):
        inner = enclosed(text, opening, closing)
        if inner is None:
            break
        text = inner.strip()
    return text


def split(text: str, separators: tuple[str, ...]) -> list[str]:
    """Split at separators outside all brackets.

    Example: `split("(1,2),3", (",",))` gives `["(1,2)", "3"]`.
    """
    parts: list[str] = []
    start = 0
    for token, place, depth in tokens(text):
        if depth == 0 and token in separators:
            parts.append(text[start:place].strip())
            start = place + len(token)
    return [*parts, text[start:].strip()]
