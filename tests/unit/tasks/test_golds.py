"""Gold answers from cells as data files hold them, graded against answers as models write them."""

from __future__ import annotations

from datetime import date
from typing import Any

import pytest

from headwater.data.cells import plain_value
from headwater.tasks import maths
from headwater.tasks.golds import gold_answer
from headwater.tasks.maths_clock import read_date

EQUAL: list[tuple[Any, str]] = [
    ('["4"]', "4"), ("['4']", "4"), (["4"], "4"), ([4], "4"), ([["4"]], "4"), ('["\\\\frac{1}{2}"]', "0.5"),
    ('["\\frac{1}{2}"]', "0.5"),
    ("-1e-07", "-10^{-7}"), (-1e-07, "-10^{-7}"), ("1e-7", "10^{-7}"), ("1e-7", "0.0000001"), (1e-7, "1\\times10^{-7}"),
    ("1e-7", "\\frac{1}{10^7}"), ("$-1e-07$", "-10^{-7}"), ("1.5\\times10^{3}", "1500"), ("1500", "1.5e3"), ("1500", "1.5×10³"),
    ("10%", "10"), ("10%", "0.1"), ("10\\%", "\\frac{1}{10}"), ("0.1", "10\\%"), ("10", "10%"), ("10 percent", "0.1"), ("0.5", "50％"),
    ("12 cm", "12"), ("12cm", "12"), ("12", "12km/h"), ("5 m/s", "5"), ("$12", "12"), ("USD 12", "12"),
    ("12 €", "12"), ("42 (apples)", "42"),
    ("1,234,567", "1234567"), ("42.", "42"), ("1,080.", "1080"), ("$\\frac{1}{2}$.", "0.5"), ("\\(42\\)", "42"), ("$$42$$", "42"),
    ("so \\boxed{42} is it", "42"), ("The answer is $\\boxed{42}$.", "42"), ("**42**", "42"), ('"42"', "42"), ("`42`", "42"),
    (True, "True"), (False, "\\text{False}"), ("Yes", "yes"),
    (date(2024, 5, 1), "May 1, 2024"), (date(2024, 5, 1), "2024-05-01"), ("2024-05-01", "1 May 2024"), ("May 1", "May 1st"),
    ("May 1, 2024", "\\text{May 1, 2024}"), ("2024-05-01", "2024年5月1日"), ("May 1, 2024", "Wednesday, May 1st, 2024"),
]  # fmt: skip
DIFFERENT: list[tuple[Any, str]] = [
    ("10%", "0.01"), ("10%", "1"), ("50%", "0.5\\%"), ("0.5%", "50%"), ("0.5", "0.005"), ("50", "0.5"), ("0.1", "1\\%"),
    ("1e-7", "10^{-6}"), ("-1e-07", "1e-7"), ("-1e-07", "-e-7"), ("1e-7", "1-7"), ("1.5\\times10^{3}", "150"),
    ("[4]", "5"), ("12 cm", "13"), ("12cm", "12c"), ("12", "12x"), ("42", "42 (mod 50)"),
    ("2024-05-01", "2018"), ("2024-05-01", "May 2, 2024"),
    ("May 1, 2024", "May 1, 2023"), ("May 1", "May 1, 2024"), (True, "False"), (True, "1"),
]  # fmt: skip


@pytest.mark.parametrize(("cells", "equal"), [(EQUAL, True), (DIFFERENT, False)])
def test_gold_cell_equals_only_answers_of_its_value(cells: list[tuple[Any, str]], equal: bool) -> None:
    golds = [(gold_answer(plain_value(cell)) or "", answer) for cell, answer in cells]
    assert [pair for pair in golds if maths.grade(pair[0], f"\\boxed{{{pair[1]}}}")[0] != equal] == []


def test_list_written_as_text_gives_its_only_element() -> None:
    assert gold_answer('["\\\\frac{1}{2}"]') == gold_answer("['\\frac{1}{2}']") == "\\frac{1}{2}"
    assert gold_answer("[0, 1)") == "[0, 1)" and gold_answer("[3]") == "[3]"
    for several in ('["4", "5"]', "['4' '5']", ["4", "5"]):  # numpy writes lists without commas
        with pytest.raises(ValueError, match="not an answer but"):
            gold_answer(several)


def test_date_is_read_in_unambiguous_spellings_only() -> None:
    assert read_date("May 1st, 2024") == read_date("the 1 of May 2024") == (2024, 5, 1)
    assert read_date("Sept. 3") == (None, 9, 3)
    assert read_date("05/01/2024") is None and read_date("May") is None and read_date("mayor 1") is None
