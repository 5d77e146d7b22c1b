"""Texts in ten languages with emoji, code, maths and mixed white space, for tests of tokenizers."""

from __future__ import annotations

from headwater import seeds

FRAGMENTS = (
    "The answer is forty-two",
    "naïve café déjà vu",
    "Größe überprüfen, Straße",
    "¿Cuántos niños hay?",
    "привет, как дела",
    "今天天气很好",
    "数学の問題を解く",
    "안녕하세요 세계",
    "كم عدد الطلاب",
    "गणित का प्रश्न",
    "αβγ και δέλτα",
    "x = 3*y + 4",
    "def f(x):\n    return x ** 2\n",
    "\\boxed{\\frac{3}{4}}",
    "∑_{i=1}^n i² ≤ ∞",
    "🙂👩‍👩‍👧‍👦🇩🇪",
    "e\u0301 combining",
    "  two  spaces\t tab",
    "\n\n\r\n \u00a0",
    "1234567890",
    "<think>17+45=62</think>",
    "…“quotes”—dash",
    "if (a && b) { return !c; }",
    "𝒜𝓁ℊℯ𝒷𝓇𝒶",
    "İstanbul'da",
)


def texts(count: int) -> list[str]:
    """Distinct texts of two to eight fragments, the same in every process."""
    draw = seeds.generator("texts")
    made: dict[str, None] = {}
    while len(made) < count:
        chosen = draw.integers(len(FRAGMENTS), size=int(draw.integers(2, 9)))
        separators = draw.choice(["", " ", "\n", "  ", "\t"], size=len(chosen))
        made["".join(FRAGMENTS[index] + separator for index, separator in zip(chosen, separators, strict=True))] = None
    return list(made)
