"""Answers in other notations: times of day, LaTeX without braces, other languages; each rule with what it must not accept."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwater.tasks import maths
from headwater.tasks.announced import announced_answer, is_solution, marked_answer
from headwater.tasks.maths_arguments import brace_arguments
from headwater.tasks.maths_clock import read_clock
from headwater.tasks.maths_text import canonical
from headwater.tasks.verifier import Verifier


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier("maths", workers=1, seconds=5) as made:
        yield made


def wrongly_graded(verifier: Verifier, cases: list[tuple[str, str]], expected: bool) -> list[tuple[str, str, str]]:
    """The (gold, completion) pairs whose verdict is not the expected one, with the reason."""
    verdicts = verifier(cases)
    return [
        (*case, verdict.reason) for case, verdict in zip(cases, verdicts, strict=True) if verdict.correct != expected
    ]


def boxed(*pairs: tuple[str, str]) -> list[tuple[str, str]]:
    return [(gold, f"\\boxed{{{answer}}}") for gold, answer in pairs]


# Times of day ---------------------------------------------------------------------------------------------------------

SAME_TIME = boxed(
    (r"3:45\text{ PM}", "15:45"), ("15:45", r"3:45\text{ p.m.}"), ("3:45 PM", "3:45pm"), ("3:45 PM", r"3{:}45\,\mathrm{PM}"),
    (r"\text{3:45 PM}", r"3:45~\text{P.M.}"), ("12:00 PM", "noon"), (r"\text{noon}", r"12:00\text{ p.m.}"),
    ("midnight", "12:00 AM"),
    ("12 noon", "12:00 PM"), ("12:00 AM", "0:00"), ("12:30 AM", "00:30"), ("3 PM", "3:00 PM"), ("3 PM", "15:00"),
    ("7:00 in the evening", "7:00 PM"), ("3 o'clock PM", "3 PM"), ("11:59:30 PM", "23:59:30"), ("t=3:45 PM", "3:45 PM"),
    ("5 pm, 6 pm", "6 pm, 5 pm"),
    ("3:45 PM", "3:45"), ("3 PM", "3"), (r"10:30\text{ a.m.}", "10:30"),  # as a number without its unit
)  # fmt: skip
OTHER_TIME = boxed(
    (r"3:45\text{ PM}", r"3:45\text{ AM}"), ("3 PM", "3 AM"), ("12:00 AM", "noon"), ("12:00 PM", "midnight"),
    ("12:30 AM", "12:30 PM"),
    (r"10:30\text{ a.m.}", "22:30"), ("3:45 PM", "4:45"), ("3:45 PM", "03:45"), ("3:45", "15:45"), ("9 AM - 5 PM", "9 AM - 5 AM"),
    ("7:00 in the morning", "7:00 PM"), ("5 pm, 6 pm", "5 am, 6 pm"), ("15", "3 PM"), ("3.45", "3:45 PM"), ("3 PM",
    "4"), ("12:00", "1:00"),
    ("3:45 PM", "3:45 PM or 4:45 PM"), ("2:3", "4:6"), ("2024-05-01", "2018"), ("2018", "2024-05-01"),
)  # fmt: skip


def test_time_of_day_is_equal_in_each_spelling_only(verifier: Verifier) -> None:
    assert wrongly_graded(verifier, SAME_TIME, True) == []
    assert wrongly_graded(verifier, OTHER_TIME, False) == []


@pytest.mark.parametrize(("hour", "minute"), list(product(range(24), (0, 7, 59))))
def test_every_minute_is_read_on_both_dials(hour: int, minute: int) -> None:
    spelled = f"{(hour - 1) % 12 + 1}:{minute:02d} {'AM' if hour < 12 else 'PM'}"
    read = read_clock(spelled)
    assert read is not None and read.certain and read.seconds == 3600 * hour + 60 * minute
    other = f"{(hour - 1) % 12 + 1}:{minute:02d}\\text{{ {'p.m.' if hour < 12 else 'a.m.'}}}"
    assert maths.quick(spelled, f"\\boxed{{{other}}}") == (False, "different")


# LaTeX without braces -------------------------------------------------------------------------------------------------

SAME_LATEX = boxed(
    (r"\log_28", "3"), ("3", r"\log_28"), (r"\log_216", "4"), (r"\log_39", "2"), (r"\log_28+1", "4"), (r"\frac{\log_28}{3}", "1"),
    (r"2\log_28", "6"), (r"\log_{10}100", "2"), (r"\log_10 100", "2"), (r"\log_10(100)", "2"), (r"\log_327", r"\log_3 27"),
    (r"\binom52", str(math.comb(5, 2))), (r"\binom{5}2", "10"), (r"\binom5{2}", "10"), (r"\dbinom52", r"\binom{5}{2}"),
    (r"{5 \choose 2}", "10"), (r"\tbinom63", str(math.comb(6, 3))),
    (r"\frac12", "0.5"), (r"\frac1{2}", "0.5"), (r"\frac{1}2", "0.5"), (r"\tfrac12", ".5"), (r"\cfrac12", ".5"),
    (r"\frac123", "1.5"),
    (r"\frac{\sqrt{3}}2", r"\frac{\sqrt{3}}{2}"), (r"\frac{x^2}2", "0.5x^2"), (r"\frac\pi2", r"\frac{\pi}{2}"),
    (r"\frac12x", r"\frac{x}{2}"),
    (r"\sqrt23", r"3\sqrt2"), ("√23", r"\sqrt{23}"), ("sqrt 23", r"\sqrt{23}"), (r"\sqrt[3]8", "2"), (r"\sqrt\frac14", "0.5"),
    ("2^{10}", "1024"), ("2^10", "1024"), (r"4^\frac12", "2"), (r"2^\sqrt4", "4"), ("x^23", "x^{23}"),
    ("x^-1", r"\frac1x"), ("2^0.5", r"\sqrt2"),
    (r"{1 \over 2}", "0.5"), ("x_12", "x_{12}"), (r"\sqrt\sqrt{16}", "2"), ("log₂8", "3"), (r"\vec a", r"\vec{a}"),
)  # fmt: skip
OTHER_LATEX = boxed(
    (r"\log_28", r"\log_{28}"), (r"\log_28", "4"), (r"\log_28", "28"), (r"\binom52", "5"), (r"\binom52", r"\frac52"),
    (r"\binom52", "52"),
    (r"\frac12", "12"), (r"\frac ab", r"\frac ba"), (r"\frac123", r"\frac{1}{23}"), (r"\sqrt23", r"\sqrt{23}"),
    ("√23", r"3\sqrt{2}"),
    ("x^23", "3x^2"), ("2^10", "20"), (r"\sqrt[3]8", r"3\sqrt8"), (r"{5 \choose 2}", "2.5"),
)  # fmt: skip


def test_arguments_without_braces_follow_tex(verifier: Verifier) -> None:
    assert wrongly_graded(verifier, SAME_LATEX, True) == []
    assert wrongly_graded(verifier, OTHER_LATEX, False) == []
    assert wrongly_graded(verifier, [("5", r"so \boxed 5."), ("5", r"so \boxed5")], True) == []


@given(
    st.lists(
        st.sampled_from(["{", "}", "^", "_", "\\frac", "\\sqrt", "[", "]", "(", ")", " ", "1", "x", "-", "\\pi", "\\{"])
    )
)
def test_brace_arguments_only_adds_braces(pieces: list[str]) -> None:
    text = "".join(pieces)
    made = brace_arguments(text)
    assert [char for char in made if char not in "{} ()"] == [char for char in text if char not in "{} ()"]
    assert made.count("{") - text.count("{") == made.count("}") - text.count("}") or "(" in text


@pytest.mark.parametrize(
    "text",
    [r"\sqrt" * 3000, r"\frac" * 3000, "^" * 15_000, "{" * 7000 + "}" * 7000, r"\sqrt[" * 2500, r"\sqrt(" * 2500],
)
def test_brace_arguments_is_fast_on_degenerate_text(text: str) -> None:
    started = time.process_time()
    canonical(text)
    assert time.process_time() - started < 0.5


# Announcements --------------------------------------------------------------------------------------------------------

ANNOUNCED = {
    "42": [
        "答案是42。", "答案为：42", "所以答案：42。", "最终答案是 $42$。", "因此，正确答案为４２。",
        "答案是42个苹果。", "答案是42，因为6×7=42。", "**答案：42**",
        "答案：\n\n42", "答案是 \\(42\\)。", "答案是41。不，答案是42。", "### 最终答案\n42",
        "答案应为42。", "答案应该是 $42$。", "答案就是42。",
        "Die Antwort ist 42.", "Die Antwort lautet: 42", "Antwort: 42", "Die Antwort ist 42 Äpfel.",
        "La réponse est 42.", "Réponse : 42", "La réponse finale est $42$.", "La respuesta es 42.",
        "La respuesta final es **42**.",
        "La risposta è 42.", "A resposta é 42.", "Ответ: 42 яблока.", "Ответ — 42.", "Відповідь: 42",
        "Het antwoord is 42.", "Svaret är 42.",
        "答えは42です。", "答え：42", "正解は42円です。", "정답은 42입니다.", "답: 42", "정답은 42개입니다.",
        "الإجابة هي 42", "الجواب هو ٤٢.",
        "उत्तर 42 है।", "उत्तर: ४२", "सही उत्तर है 42", "Odpowiedź: 42", "Cevap: 42", "Đáp án là 42.", "Jawabannya adalah 42.",
        "Η απάντηση είναι 42.", "התשובה היא 42.", "Answer：42",
        "#### Step 1\nAdd.\n#### Final answer\n42", "## Final Answer\n\n$42$", "**Answer**\n42",
        "#### 42\nHope this helps!", "#### **42**",
        "#### Answer: 42", "\\boxed{４２}", "\\boxed{42。}",
    ],
    "2,3": ["答案是 $2$ 或 $3$。", "答案是2、3。", "Die Antwort ist 2 oder 3.", "La réponse est $2$ et $3$.", "\\boxed{２，３}"],
    "1.5": ["答案是1.5米。", "答えは3/2です。"],
    "C": ["正确答案是C。", "La respuesta es C.", "答案选C。", "故选C。", "故选：C", "因此答案应选 C。"],
}  # fmt: skip
NOT_ANNOUNCED = {
    "42": [
        "答案是41。", "答案不是42。", "答案是42吗？", "答案是42？不对。", "答案是42万。", "答案是42亿元。",
        "答案是42以上。", "答案是42个左右。", "答案是 $42$ 或 $43$。",
        "Die Antwort ist nicht 42.", "Die Antwort ist 43.", "Die Antwort ist 42 Millionen.", "Die Antwort ist 42? Nein.",
        "La réponse n'est pas 42.", "La réponse est 42 mille.", "La respuesta no es 42.", "La respuesta es 42 mil.",
        "A resposta não é 42.",
        "Ответ: 43", "Ответ: 42 тысячи.", "Ответ не 42.", "答えは42ではありません。", "答えは43です。",
        "정답은 42가 아닙니다.", "정답은 43입니다.",
        "الإجابة هي ٤٣", "उत्तर 42 नहीं है।", "the answer is not 42", "#### Step 42\nso it is 43",
        "#### Final answer\n43", "答案是\\boxed{41}",
        "42", "四十二",
    ],
    "2": ["答案是 $2$ 或 $3$。", "Die Antwort ist $2$ oder $3$."],
    "0.5": ["\\boxed{５％}"],
    "C": ["故选B。", "答案选B。", "答案不选C。", "答案不应选C。"],
}  # fmt: skip


def test_answer_language_follows_its_announcement(verifier: Verifier) -> None:
    cases = [(gold, text) for gold, texts in ANNOUNCED.items() for text in texts]
    assert wrongly_graded(verifier, cases, True) == []


def test_announcement_of_other_quantity_is_not_accepted(verifier: Verifier) -> None:
    cases = [(gold, text) for gold, texts in NOT_ANNOUNCED.items() for text in texts]
    assert wrongly_graded(verifier, cases, False) == []


@pytest.mark.parametrize(
    ("text", "marked"),
    [
        ("48+24=<<48+24=72>>72\n#### 72", "72"), ("so 72. #### 72", "72"), ("#### 1,080\n", "1,080"), ("#### Paris", "Paris"),
        ("#### Step 1\nAdd.\n#### Final answer\n42", None), ("#### Final answer", None), ("##### 42", None), ("####\n42", None),
        ("#### 1. Add both\nso 42", None), ("#### 145\nThe answer is: 145", "145"), ("#### Plan\nsum\n#### 42",
        "42"), ("no mark", None),
        ("#### \\begin{pmatrix} 1 \\\\\n2 \\end{pmatrix}", "\\begin{pmatrix} 1 \\\\\n2 \\end{pmatrix}"),
    ],
)  # fmt: skip
def test_mark_in_reference_solution_counts_if_answer_follows(text: str, marked: str | None) -> None:
    assert marked_answer(text) == marked


def test_explanation_is_distinguished_from_answer() -> None:
    answers = [
        "42",
        "x = 1\ny = 2",
        "\\begin{pmatrix} 1 & 2 \\\\\n 3 & 4 \\end{pmatrix}",
        "The lines are parallel",
        "A\nB",
    ]
    solutions = [
        "Add both.\nThat makes 42 apples in all.",
        "# Plan\n42",
        "我们先把两个数加起来，\n得到四十二",
        "word " * 31,
    ]
    assert [is_solution(text) for text in answers] == [False] * len(answers)
    assert [is_solution(text) for text in solutions] == [True] * len(solutions)


@given(st.text(max_size=200))
def test_no_text_raises_in_search(text: str) -> None:
    for answer in (announced_answer(text), marked_answer(text)):
        assert answer is None or isinstance(answer, str)


def test_equal_values_are_one_vote() -> None:
    for answers in (
        ["x=5", "5", "5.0"],
        ["12/2", "6", r"\frac{12}{2}"],
        ["3:45 PM", "15:45", r"3:45\text{ p.m.}"],
        ["noon", "12:00 PM"],
    ):
        assert len({maths.extract(f"\\boxed{{{answer}}}") for answer in answers}) == 1
    for answers in (["x=5", "x=6"], ["3:45 PM", "3:45 AM"], ["x=1, y=2", "2"], ["(1,2)", "(2,1)"]):
        assert len({maths.extract(f"\\boxed{{{answer}}}") for answer in answers}) == len(answers)
