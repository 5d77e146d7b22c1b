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


SENTENCES = {
    "en": ("The train leaves at noon.", "She sold 48 clips in April.", "Why is the sky blue?", "Half of it is gone"),
    "de": ("Der Zug fährt um zwölf.", "Wie groß ist die Straße?", "Die Hälfte fehlt noch", "Übung macht Äpfel süß."),
    "fr": ("Où est la gare ?", "L’élève a déjà mangé.", "Ça coûte 12,50 €", "Le garçon lit à l'école."),
    "es": ("¿Cuántos niños hay?", "Mañana llueve más.", "El año tiene 365 días", "¡Qué difícil!"),
    "ru": ("Поезд уходит в полдень.", "Сколько стоит хлеб?", "Ещё одна задача", "Небо синее."),
    "zh": ("今天天气很好。", "火车中午出发", "一共有多少苹果?", "答案是四十二。"),
    "ja": ("電車は正午に出ます。", "りんごはいくつ?", "数学の問題を解く", "答えは四十二です。"),
    "ko": ("기차는 정오에 떠난다.", "사과가 몇 개예요?", "수학 문제", "답은 사십이."),
    "ar": ("كم عدد الطلاب؟", "القطار يغادر ظهرا", "الجواب هو ٤٢", "السماء زرقاء."),
    "hi": ("आज मौसम अच्छा है।", "कितने सेब हैं?", "गणित का प्रश्न", "उत्तर ४२ है।"),
}
OTHERS = {
    "emoji": ("🙂", "👩‍👩‍👧‍👦", "🇩🇪 🇯🇵", "🤷🏽‍♀️!", "✅🚀"),
    "code": (
        "x = [i**2 for i in range(9)]",
        "if (a && b) { return !c; }",
        "def f(x):\n\treturn x",
        "<p>&amp;</p>",
        "$ ls -la | wc",
    ),
    "maths": ("\\frac{3}{4}", "∑_{i=1}^n i² ≤ ∞", "7×8=56", "√2≈1.41421", "α+β≠γ", "𝒜⊂ℝ"),
    "space": ("  two  spaces\t tab", "\n\n\r\n \u00a0", " \u3000 ", "\t\t", "\u200b \u2009"),
}
UNNORMALIZED = ("e\u0301te\u0301", "Gro\u0308ße", "5 \u212b", "\u1100\u1161")
"""Not in normal form C, so that a tokenizer that normalizes does not give them back."""
UNNORMALIZED_SHARE = 0.06


def sentences(count: int) -> list[str]:
    """Distinct short texts: a sentence of one of ten languages in turn with emoji, code, maths or white space; few are not NFC."""
    draw = seeds.generator("sentences")
    languages, made = list(SENTENCES), dict[str, None]()
    separators = ("", " ", "\n", "  ", "\t")
    while len(made) < count:
        parts = [str(draw.choice(SENTENCES[languages[len(made) % len(languages)]]))]
        for kind in draw.choice(list(OTHERS), size=int(draw.integers(1, 3))):
            parts.append(str(draw.choice(OTHERS[str(kind)])))
        if draw.random() < UNNORMALIZED_SHARE:
            parts.append(str(draw.choice(UNNORMALIZED)))
        order = draw.permutation(len(parts))
        made["".join(parts[index] + str(draw.choice(separators)) for index in order)] = None
    return list(made)
