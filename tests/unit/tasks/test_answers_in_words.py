"""Answers in words without a box: announcements in many languages, conclusions, choices; and what must not be taken for an answer."""

from __future__ import annotations

import time

import pytest

from headwater.tasks import choice, maths, numeric
from headwater.tasks.announced import without_announcement
from headwater.tasks.conclusions import concluded_value
from headwater.tasks.maths_numbers import number
from headwater.tasks.thinking import after_thinking, is_thinking_mark

FORTY_TWO = [
    "Therefore, the total is 42.", "Hence the total cost is $42.", "Thus, the number of apples is 42.",
    "So the total is 42 apples.", "Therefore, 42.", "Therefore the value of $x$ is $42$.", "Thus, $x = 42$.", "Thus x = 42.",
    "Hence, $\\angle ABC = 42^\\circ$.", "The result is 42.", "The final result is **42**.", "The value is 42.",
    "The solution is $x = 42$.", "The correct answer is 42.", "My final answer is 42.", "Final answer: 42",
    "Final Answer: The final answer is $42$. I hope it is correct.", "**Final Answer: 42**", "Answer: $42", "Ans: 42",
    "ANSWER: 42", "The answer is therefore 42.", "The answer is thus 42.", "The answer would be 42.",
    "The answer should be 42.", "The answer must be 42.", "The answer comes out to 42.", "The answer equals 42.",
    "The answer, then, is 42.", "The answer to the question is 42.", "The final answer to the problem is 42.",
    "The answer for this problem is: 42", "The answer is indeed 42.",
    "the answer is approximately 42? Checking, the answer is 42.", "The answer is 4. Wait, no: the answer is 42.",
    "donc la réponse est 42.", "Donc, le total est 42.", "La réponse est donc 42.", "Par conséquent, la réponse est 42.",
    "Le résultat est 42.", "La réponse est : 42", "Réponse finale : **42**", "Also ist die Antwort 42.", "Die Lösung ist 42.",
    "Die Lösung lautet 42.", "Daher ist die Lösung 42.", "Daher ist die Antwort 42.", "Das Ergebnis ist 42.",
    "Das Ergebnis beträgt 42 Euro.", "Die richtige Antwort ist 42.", "Die endgültige Antwort lautet: 42",
    "Por lo tanto, la respuesta es 42.", "Por lo tanto, la respuesta correcta es 42.", "El resultado es 42.",
    "La solución es 42.", "Respuesta final: 42", "La respuesta es: $42$", "Quindi la risposta è 42.", "Il risultato è 42.",
    "La soluzione è 42.", "Risposta: 42", "Portanto, a resposta é 42.", "O resultado é 42.", "A solução é 42.",
    "Logo, a resposta final é 42.", "Resposta final: 42", "最终结果是42。", "最终结果为：42", "结果是42。", "因此,结果为 $42$。",
    "所以,最终答案是42。",
    "综上所述,答案为42", "答案是四十二。",
    "したがって、答えは42です。", "したがって、答えは 42 個です。",
    "よって、答えは42である。", "よって、答えは $42$ となります。",
    "最終的な答えは42です。",
    "따라서 정답은 42입니다.", "따라서 답은 42입니다.", "따라서, 정답은 **42**입니다.", "최종 답변: 42",
    "최종 답은 42입니다.", "คำตอบคือ 42",
    "ดังนั้น คำตอบคือ 42 บาท", "คำตอบ: 42", "คำตอบสุดท้ายคือ 42", "উত্তর: 42", "উত্তর হল ৪২।", "উত্তর হলো ৪২",
    "সুতরাং, উত্তর ৪২।", "پاسخ: ۴۲", "پاسخ ۴۲ است.", "جواب ۴۲ است", "بنابراین پاسخ نهایی 42 است.", "جواب: 42",
    "لذلك، الإجابة هي 42.", "إذن الجواب هو 42", "الإجابة النهائية هي: ٤٢", "لكن التأكد: الإجابة: 42", "לכן התשובה היא 42.",
    "התשובה: 42", "התשובה הסופית היא 42.", "תשובה: 42", "Cevap 42'dir.", "Cevap: 42", "Doğru cevap 42.",
    "Bu nedenle cevap 42'dir.", "Yanıt: 42", "Vastaus on 42.", "Vastaus: 42", "Oikea vastaus on 42.", "Siis vastaus on 42.",
    "A válasz 42.", "A válasz: 42", "Tehát a válasz 42.", "A végső válasz: 42", "Válasz: 42", "Odpowiedź to 42.",
    "Odpowiedzią jest 42.", "Odpowiedź brzmi 42.", "Zatem odpowiedź to 42.", "Wynik to 42.", "Odpověď je 42.",
    "Výsledek je 42.", "Odpověď: 42", "Đáp án là 42.", "Vậy đáp án là 42.", "Đáp số: 42", "Câu trả lời là 42.",
    "Kết quả là 42.", "Jadi jawabannya adalah 42.", "Jadi, jawabannya 42.", "Jawaban: 42", "Jawaban akhir: 42",
    "Hasilnya adalah 42.", "Η απάντηση είναι 42.", "Άρα η απάντηση είναι 42.", "Απάντηση: 42", "Η τελική απάντηση είναι 42.",
    "Відповідь: 42", "Відповідь — 42.", "Отже, відповідь дорівнює 42.", "Отже, правильна відповідь: 42.",
    "Правильный ответ: 42", "Следовательно, ответ: 42.", "Ответом является 42.", "Таким образом, ответ 42.", "Jibu ni 42.",
    "Jibu: 42", "Kwa hiyo, jibu ni 42.", "Jibu la mwisho ni 42.", "Răspunsul este 42.", "Deci răspunsul final este 42.",
    "Het antwoord is dus 42.", "Dus het antwoord is 42.", "Svaret är alltså 42.", "Svaret er 42.", "इसलिए, उत्तर 42 है।",
    "उत्तर ४२ है।", "अंतिम उत्तर: 42", "सही जवाब 42 है।", "Ang sagot ay 42.", "Sagot: 42", "பதில்: 42", "సమాధానం: 42",
    "جواب 42 ہے۔",
]  # fmt: skip
STATED = [
    ("42", "Therefore, the total is:\n\n\\[\n42\n\\]"), ("42", "So the total is:\n$$42$$"),
    ("42", "Therefore, the total is $6 \\times 7 = 42$."), ("42", "**Therefore, the total cost is $42.**"),
    ("42", "Thus, the area is **42 square units**."), ("\\frac{1}{2}", "Therefore, the probability is $\\frac{1}{2}$."),
    ("42", "Therefore, there are 42 apples."), ("42", "Hence, $x=42$.\n"), ("42", "<answer>42</answer>"),
    ("42", "<think>a</think><answer>\nThe answer is 42.\n</answer>"),
    ("42", "<reasoning>6*7=\\boxed{41}</reasoning>\n<answer>\n42\n</answer>"), ("42", "答案是四十二个。"),
    ("42", "The answer is four: no. The answer would be 42."), ("42", "<answer> \\boxed{42} </answer>"),
    ("42", "<answer>$42$</answer>"), ("1234", "Therefore, the total is 1,234 dollars."), ("-3", "Thus the value of x is -3."),
    ("42", "So the answer is 42 (apples)."), ("42", "so x+y = 42. The answer, therefore, is 42."), ("42", "最终的结果是 $42$ 元。"),
    ("42", "Das Ergebnis lautet **42**."), ("10000", "Therefore, she makes a total of 10,000.\nThe answer is $10,000."),
    ("3/4", "Thus, the fraction is 3/4."), ("42", "Answer:\n\n\\[ 42 \\]"),
]  # fmt: skip
NOT_STATED = [
    ("7", "Therefore, one of the factors is 7."), ("42", "Therefore, the total is not 42."),
    ("42", "Thus, the total may be 42."), ("42", "So the total is 42? Let me check."),
    ("42", "Therefore, the first term is 42."), ("42", "Hence the cost is at least $42$."),
    ("42", "Therefore, the total is about 42."), ("42", "So the subtotal is 42. Adding 7, we get 49."),
    ("2", "Thus, the number of ways is 2"), ("42", "If x were 6, therefore the total is 42."),
    ("42", "Suppose the result is 42."), ("42", "The result is 42.\nNow add the tax of 8."),
    ("42", "The value is between 41 and 42."), ("42", "Therefore, the ratio is 42:1."), ("42", "Donc, le total n'est pas 42."),
    ("42", "Die Lösung ist nicht 42."), ("42", "Das Ergebnis ist 42 Millionen."), ("42", "La respuesta no puede ser 42."),
    ("42", "Por lo tanto, el total no es 42."), ("42", "结果不是42。"), ("42", "因此,结果约为42。"), ("42", "คำตอบไม่ใช่ 42"),
    ("42", "উত্তর হল ৪২ নয়।"), ("42", "پاسخ ۴۲ نیست."), ("42", "الإجابة ليست 42."), ("42", "התשובה אינה 42."),
    ("42", "Cevap 42 değil."), ("42", "Vastaus ei ole 42."), ("42", "A válasz nem 42."), ("42", "Odpowiedzią nie jest 42."),
    ("42", "Odpověď není 42."), ("42", "Đáp án không phải là 42."), ("42", "Jawabannya bukan 42."),
    ("42", "Η απάντηση δεν είναι 42."), ("42", "Відповідь не 42."), ("42", "Jibu si 42."), ("42", "답은 42가 아니다."),
    ("42", "答えは42ではない。"), ("42", "The answer should be a 42-digit number."), ("3", "The answer should be 3 digits long."),
    ("42", "The answer would not be 42."), ("42", "The answer to the question is not 42."),
    ("42", "The answer to the first part is 41."), ("42", "Antwort: 42 ist falsch."), ("42", "The answer is 42 or so."),
    ("42", "<answer>41</answer>"), ("42", "<answer>42</answer> No: <answer>43</answer>"), ("42", "<answer></answer>"),
    ("42", "答案是四十三。"), ("42", "答案是四十多。"), ("34", "答案是三四。"), ("5", "Thus, x < 5."), ("5", "Therefore, $x \\neq 5$."),
    ("5", "Therefore, $x > 5$."), ("42", "So 42"), ("42", "So is 42."), ("42", "Question 42: so the next question is 43."),
    ("10", "Therefore, 10 is divisible by $2$."), ("2", "Therefore, 10 is divisible by $2$."),
    ("2", "Hence $n$ is even, as is $2$."), ("3", "So the total is 5 - 2 = 4."), ("5", "So x is in the interval $(0,5)$."),
    ("4", "Thus there are 3 apples and 4 pears."), ("42", "The sum is 42, which is wrong."), ("42", "Sum: 42 + 8."),
    ("8", "Sum: 42 + 8."), ("4", "Thus the total is 2/3 of 4."), ("2", "Therefore, $x = 2$ or $x = 3$."),
    ("42", "The answer is 42 mod 50."), ("42", "So the answer isn't 42."), ("42", "Also gilt $x = 42$ nicht."),
    ("7", "So we know that $y = 7$, and $x$ remains."), ("12", "Therefore, the total is 12 times 4."),
    ("12", "Therefore, the total is 12 dozen."), ("12", "Therefore, the total is 12 more."), ("12", "So it is 12% of 50."),
]  # fmt: skip
CHOSEN = [
    ("B", "(B)"), ("B", "B."), ("B", "**B**"), ("B", "选项B"), ("B", "Option B"), ("B", "The correct answer is B) 12 km"),
    ("B", "b"), ("B", "the answer is b."), ("B", "The answer is (b)."), ("B", "答案是选项B。"), ("B", "答案：选项 B"), ("B", "选B"),
    ("B", "所以选B。"), ("B", "因此,选择B。"), ("B", "The correct option is B."), ("B", "The correct option is **(B)**."),
    ("B", "Correct answer: B"), ("B", "**Answer: B. Paris**"), ("B", "Therefore, the correct choice is B."),
    ("B", "\\boxed{\\textbf{(B)}\\ 12}"), ("B", "\\boxed{B. \\text{Paris}}"), ("B", "The best answer is B."),
    ("B", "B) 12 km"), ("B", "Explanation…\n\n**B) 12 km**"), ("B", "Explanation ...\nB. Paris"),
    ("B", "The answer is **B**: Paris"), ("B", "the answer is option (b)"), ("B", "<answer>B</answer>"),
    ("B", "Die richtige Antwort ist B."), ("B", "La bonne réponse est B."), ("B", "La respuesta correcta es la opción B."),
    ("B", "Option B is correct."), ("B", "(B) is the correct answer."), ("B", "B is the correct answer."),
    ("B", "$\\boxed{\\text{Option B}}$"), ("B", "I'd go with B."), ("B", "Answer: (B) 7"), ("A", "The answer is A."),
    ("A", "A"), ("A", "Answer: A) apple"), ("C", "ANSWER: C"), ("D", "The answer is: D"), ("J", "\\boxed{J}"),
    ("B", "The correct answer is:\n\n**B) 12 km**"), ("B", "The correct answer is option B: 12"), ("B", "正确选项是B。"),
    ("B", "正确答案是：**B**"), ("B", "정답은 B입니다."), ("B", "答えはBです。"), ("B", "The correct answer is choice $\\mathbf{B}$."),
    ("B", "The answer is \\(\\boxed{B}\\)"), ("B", "So B is correct."), ("B) 12 km", "The answer is 12 km."),
    ("(B) Paris", "\\boxed{\\text{paris}}"),
]  # fmt: skip
NOT_CHOSEN = [
    ("B", "Options A, B and C are wrong."), ("B", "Option B is wrong."), ("B", "选项B是错误的。"),
    ("B", "Option B is incorrect. Option C is correct."), ("B", "不选B。"), ("B", "The answer is not B."), ("B", "Is it B?"),
    ("A", "A good idea"), ("B", "B or C"), ("B", "Option B is tempting, but the answer is C."),
    ("B", "I would not choose option B."), ("A", "a good one is missing"), ("B", "b) is wrong"), ("B", "(B) is incorrect."),
    ("A", "The answer is a number."), ("B", "So B is not correct."), ("B", "Option A is correct, not option B."),
    ("B", "选B是错的。"), ("B) 12 km", "The answer is 13 km."), ("D", "A) 1\nB) 2\nC) 3\nD) 4"),
    ("D", "Option A gives 3. Option D gives 6."),
]  # fmt: skip


@pytest.mark.parametrize("text", FORTY_TWO)
def test_answer_in_words_is_read_in_each_language(text: str) -> None:
    assert maths.grade("42", text) == (True, "equal")
    assert not maths.grade("43", text)[0]


def test_stated_value_is_graded_without_box() -> None:
    assert [case for case in STATED if not maths.grade(*case)[0]] == []


def test_maths_refuses_value_not_stated_as_answer() -> None:
    assert [case for case in NOT_STATED if maths.grade(*case)[0]] == []


def test_choice_is_read_in_each_spelling() -> None:
    assert [case for case in CHOSEN if not choice.grade(*case)[0]] == []


def test_rejected_or_listed_option_is_not_chosen() -> None:
    assert [case for case in NOT_CHOSEN if choice.grade(*case)[0]] == []


def test_last_announcement_counts_though_it_is_revised() -> None:
    text = "The answer is 4. No, wait, it is 5"
    assert maths.grade("4", text)[0] and not maths.grade("5", text)[0]


def test_conclusion_is_last_complete_sentence_only() -> None:
    assert concluded_value("3 + 4 = 7. Therefore, the total is 7 apples.") == "7 apples"
    assert concluded_value("Therefore, the total is 7") is None  # may be cut off before further digits
    assert concluded_value("Therefore, the total is 7. Then we add 3.") is None
    assert numeric.grade("7", "Therefore, the total is 7.") == (True, "equal")
    started = time.process_time()
    for piece in ("so ", "Therefore, ", "is ", "so the total is ", "$ ", ". So ", "\n"):
        concluded_value(piece * 20_000 + "is 7.")
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    ("numeral", "value"),
    [("四十二", 42), ("十二", 12), ("一百零五", 105), ("一万零五", 10_005), ("两千零二十四", 2024), ("一亿三千万", 130_000_000),
     ("三四", None), ("一百五", None), ("十几", None), ("二〇二四", None)],
)  # fmt: skip
def test_chinese_numeral_is_read_if_unambiguous(numeral: str, value: int | None) -> None:
    assert number(numeral) == value


def test_special_tokens_around_thinking_are_told_from_controls() -> None:
    marks = (
        "</reasoning> </think_fast> </reflection> <|end_of_thought|> <seed:think> [THINK] ◁/think▷ <seed:cot_budget_reflect> "
        "<|START_THINKING|> [REASONING] <scratchpad>"
    )
    controls = (
        "<|im_end|> <|endoftext|> <pad> </s> [PAD] <|assistant|> <|eot_id|> <unk> [INST] <mask> <|begin_of_solution|>"
    )
    assert [mark for mark in marks.split() if not is_thinking_mark(mark)] == []
    assert [control for control in controls.split() if is_thinking_mark(control)] == []


def test_reasoning_marks_within_answer_are_kept() -> None:
    assert after_thinking("<reasoning>6?</reasoning>5") == after_thinking("6?</reasoning>5") == "5"
    for text in ("5 <reasoning>since 2+3</reasoning> as said", "<reasoning>It is 5.</reasoning>"):
        assert after_thinking(text) == text


def test_article_before_announcement_is_removed_with_it() -> None:
    assert without_announcement("The answer is 42.") == without_announcement("Final answer: 42") == "42"
