"""Strict reading: only an answer in the form that the prompt asks for."""

from __future__ import annotations

import pytest

from headwater.tasks.answer_forms import FORMS, form_asked_for


@pytest.mark.parametrize(
    ("form", "completion", "answer"),
    [
        ("boxed", r"\boxed{41}, no: \boxed{\frac{1}{2}}.", r"\boxed{\frac{1}{2}}"),
        ("boxed", "The answer is 42.", None),
        ("boxed", r"\boxed{4", None),
        ("boxed", r"<think>\boxed{1}</think> I do not know.", None),
        ("hashes", "6 * 7 = 42\n#### 42", "#### 42"),
        ("hashes", "#### 41\nQuestion: again\n####  42 apples", "#### 42 apples"),
        ("hashes", r"so \boxed{42}", None),
        ("hashes", "####\n42", None),
    ],
)
def test_form_takes_last_answer_written_in_it(form: str, completion: str, answer: str | None) -> None:
    assert FORMS[form][1](completion) == answer


def test_form_asked_for_is_named_by_template_or_by_every_problem() -> None:
    assert form_asked_for("{problem}\nWrite #### and the answer.", ["1 + 1"]) == "hashes"
    assert form_asked_for("{problem}", [r"1 + 1? Use \boxed{}.", r"2 + 2? Use \boxed{}."]) == "boxed"
    assert form_asked_for("{problem}", [r"1 + 1? Use \boxed{}.", "2 + 2?"]) is None
    assert form_asked_for("{problem}", []) is None
