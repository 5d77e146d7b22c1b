"""Word problems: exact DAGs, matching English text, disjoint pools, grader, hostile text."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from itertools import islice

import pytest

from headwater.config.recipe import Generate, Source
from headwater.data.sources import load
from headwater.tasks.pools import POOLS, pool_of
from headwater.tasks.registry import TASKS
from headwater.tasks.word_problems import WordProblem, WordsDials, extract, generate, grade, problems
from headwater.tasks.word_problems_text import NAMES, SCENES
from headwater.tasks.word_problems_world import Quantity, Step, gradients, has_no_shortcut
from tools.pretrain.solutions import words_is_worked, words_short, words_solutions, words_worked

EASY, HARD = WordsDials(1, 4), WordsDials(7, 10, distractors=3)


def made(count: int, dials: WordsDials, pool: str = "train", seed: int = 0) -> list[WordProblem]:
    return list(islice(problems(pool, seed, dials), count))


# The DAG --------------------------------------------------------------------------------------------------------------

OPERATIONS: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "": lambda a, b: a,
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
}


def evaluated(problem: WordProblem) -> tuple[Fraction, set[int], int]:
    """By recursion in fractions, from the numbers of the text alone: the answer, the steps it needs, its operations."""
    needed: set[int] = set()
    signs = 0

    def of(step: Step) -> Fraction:
        nonlocal signs
        signs += step.sign != ""
        sides = []
        for number, parent in zip((step.left, step.right), step.parents, strict=True):
            if parent is None:
                sides.append(Fraction(number))
            else:
                sides.append(value_of(parent))
                assert sides[-1] == number  # what a step repeats is what the earlier one came to
        return OPERATIONS[step.sign](sides[0], sides[1])

    known: dict[int, Fraction] = {}

    def value_of(index: int) -> Fraction:
        if index not in known:
            known[index] = of(problem.world.steps[index])
            needed.add(index)
        return known[index]

    return of(problem.world.question), needed, signs


def operations(problem: WordProblem) -> int:
    return evaluated(problem)[2]


@pytest.mark.parametrize("dials", [EASY, WordsDials(), HARD], ids=["easy", "usual", "hard"])
def test_answers_and_operation_counts_equal_graph_evaluator(dials: WordsDials) -> None:
    beside = set()
    for problem in made(150, dials):
        answer, needed, signs = evaluated(problem)
        assert answer.denominator == 1 and str(answer) == problem.gold
        assert needed == set(problem.world.needed)
        assert dials.min_ops <= signs <= dials.max_ops
        beside.add(len(problem.world.steps) - len(needed))
        numbers = [number for step in problem.world.steps for number in (step.left, step.value)]
        assert min(numbers) >= 2 and max(numbers) <= dials.largest
        quantities = [step.quantity for step in problem.world.steps]
        assert len(set(quantities)) == len(quantities)  # nothing is told twice
        assert all(parent < index for index, step in enumerate(problem.world.steps) for parent in step.dependencies)
    assert beside == set(range(dials.distractors + 1))


def test_operation_counts_are_spread_evenly_between_dials() -> None:
    counts = [operations(problem) for problem in made(600, WordsDials(2, 4))]
    # 200 of each are expected, with a standard deviation of 11.5.
    assert {ops: abs(counts.count(ops) - 200) < 50 for ops in (2, 3, 4)} == {2: True, 3: True, 4: True}


def test_cancelling_number_is_detected_by_its_slope() -> None:
    def apples(owner: str) -> Quantity:
        return Quantity(owner, "apples")

    steps = [
        Step("given", apples("Mia"), 12),
        Step("more", apples("Tom"), 12, 5, (0, None)),
        Step("more", apples("Ada"), 12, 3, (0, None)),
        Step("times", apples("Leo"), 12, 3, (0, None)),
    ]
    # Tom has m + 5 and Ada m + 3: their difference is 2 whatever m is. Leo has 3m, so Leo's less Tom's is 2m - 5.
    assert not has_no_shortcut(steps, Step("gap", apples("Tom"), 17, 15, (1, 2)))
    assert has_no_shortcut(steps, Step("gap", apples("Leo"), 36, 17, (3, 1)))
    assert has_no_shortcut(steps, Step("total", apples("Tom"), 17, 15, (1, 2)))
    assert gradients(steps, Step("gap", apples("Leo"), 36, 17, (3, 1))) == {3: 1.0, 1: -1.0, 0: 2.0}


# The text -------------------------------------------------------------------------------------------------------------

THINGS = {thing for scene in SCENES for thing in scene.things}
NAME, THING, VERB, NUMBER = "([A-Z][a-z]+)", "([a-z]+)", f"(?:{'|'.join(scene.did for scene in SCENES)})", r"(\d+)"
GROUPS = f"(?:{'|'.join(scene.groups for scene in SCENES)})"
THE = f"the number of {THING} that {NAME} {VERB}"
TIMES = {"twice": Fraction(2), "half": Fraction(1, 2), "a third": Fraction(1, 3), "a quarter": Fraction(1, 4)} | {
    "a fifth": Fraction(1, 5)
}
FACTOR = r"(twice|half|a third|a quarter|a fifth|\d+ times)"


def factor(text: str) -> Fraction:
    return TIMES[text] if text in TIMES else Fraction(int(text.split()[0]))


class Reader:
    """Reads a problem as a person would: sentence after sentence, each telling one number that was not known before.

    It knows English sentences only, nothing of how problems are made. A sentence that tells nothing new, or two new things at
    once, fails the test: it could be read in two ways or in none.
    """

    def __init__(self) -> None:
        self.known: dict[tuple[str, str], Fraction] = {}

    def tell(self, sentence: str) -> None:
        for pattern, equation in self.sentences():
            match = re.fullmatch(pattern, sentence)
            if match:
                left, right = equation(*match.groups())
                break
        else:
            raise AssertionError(f"not understood: {sentence}")
        # Both sides are sums of {quantity: coefficient} and a number; exactly one quantity is new.
        total: dict[tuple[str, str] | None, Fraction] = {}
        for side, sign in ((left, 1), (right, -1)):
            for quantity, coefficient in side:
                total[quantity] = total.get(quantity, Fraction(0)) + sign * Fraction(coefficient)
        number = total.pop(None, Fraction(0))
        new = [part for part in total if part not in self.known]
        assert len(new) == 1, f"tells {len(new)} new things: {sentence}"
        rest = number + sum(total[part] * self.known[part] for part in total if part in self.known)
        self.known[new[0]] = -rest / total[new[0]]  # type: ignore[index]

    def sentences(self):  # type: ignore[no-untyped-def]
        def q(owner: str, thing: str):  # type: ignore[no-untyped-def]
            assert owner in NAMES and thing in THINGS, (owner, thing)
            return (owner, thing)

        def is_number(owner: str, number: str, thing: str):  # type: ignore[no-untyped-def]
            return [(q(owner, thing), 1)], [(None, int(number))]

        def more(owner: str, number: str, word: str, thing: str, rest: str):  # type: ignore[no-untyped-def]
            sign = 1 if word == "more" else -1
            return [(q(owner, thing), 1)], [(other(owner, thing, rest), 1), (None, sign * int(number))]

        def other(owner: str, thing: str, rest: str):  # type: ignore[no-untyped-def]
            if rest in NAMES:
                return q(rest, thing)
            if rest in THINGS:
                return q(owner, rest)
            match = re.fullmatch(f"{NAME} {VERB} {THING}", rest)
            assert match, rest
            return q(match[1], match[2])

        def many(owner: str, times: str, thing: str, rest: str):  # type: ignore[no-untyped-def]
            return [(q(owner, thing), 1)], [(other(owner, thing, rest), factor(times))]

        def grouped(owner: str, number: str, each: str, thing: str):  # type: ignore[no-untyped-def]
            return [(q(owner, thing), 1)], [(None, int(number) * int(each))]

        def together(a: str, b: str, number: str, thing: str):  # type: ignore[no-untyped-def]
            return [(q(a, thing), 1), (q(b, thing), 1)], [(None, int(number))]

        def of_one(a: str, number: str, thing: str, second: str):  # type: ignore[no-untyped-def]
            return [(q(a, thing), 1), (q(a, second), 1)], [(None, int(number))]

        def added(whole, thing, first, second):  # type: ignore[no-untyped-def]
            return [(q(whole, thing), 1)], [(q(first, thing), 1), (q(second, thing), 1)]

        yield f"(?:In all, )?{NAME} {VERB} {NUMBER} {THING}\\.", is_number
        yield f"The number of {THING} that {NAME} {VERB} was {NUMBER}\\.", lambda t, a, n: is_number(a, n, t)
        yield f"{NAME} {VERB} {NUMBER} {GROUPS} of {NUMBER} {THING} each\\.", grouped
        yield f"{NAME} {VERB} {NUMBER} {GROUPS} with {NUMBER} {THING} in each of them\\.", grouped
        yield (
            f"There were {NUMBER} {THING} in each of the {NUMBER} {GROUPS} that {NAME} {VERB}\\.",
            lambda each, t, n, a: grouped(a, n, each, t),
        )
        yield f"{NAME} {VERB} {NUMBER} (more|fewer) {THING} than (.+)\\.", more
        yield (
            f"The number of {THING} that {NAME} {VERB} was {NUMBER} (more|less) than {THE}\\.",
            lambda t, a, n, word, u, b: more(a, n, word, t, f"{b} had {u}"),
        )
        yield (
            f"{NAME} {VERB} as many {THING} as {NAME} and {NAME} together\\.",
            lambda a, t, b, c: added(a, t, b, c),
        )
        yield (
            f"Together, {NAME} and {NAME} {VERB} as many {THING} as {NAME}\\.",
            lambda b, c, t, a: added(a, t, b, c),
        )
        yield (
            f"{NAME} {VERB} as many {THING} as {NAME} {VERB} {THING} and {THING} together\\.",
            lambda a, t, b, u, w: ([(q(a, t), 1)], [(q(b, u), 1), (q(b, w), 1)]),
        )
        yield (
            f"Together, the {THING} and {THING} that {NAME} {VERB} were as many as the {THING} that {NAME} {VERB}\\.",
            lambda u, w, b, t, a: ([(q(a, t), 1)], [(q(b, u), 1), (q(b, w), 1)]),
        )
        yield f"{NAME} {VERB} {FACTOR} as many {THING} as (.+)\\.", many
        yield (
            f"The number of {THING} that {NAME} {VERB} was {FACTOR}(?: of)? {THE}\\.",
            lambda t, a, times, u, b: many(a, times, t, f"{b} had {u}"),
        )
        yield f"Together, {NAME} and {NAME} {VERB} {NUMBER} {THING}\\.", together
        yield f"{NAME} and {NAME} {VERB} {NUMBER} {THING} between them\\.", together
        yield f"{NAME} and {NAME} together {VERB} {NUMBER} {THING}\\.", together
        yield f"{NAME} {VERB} {NUMBER} {THING} and {THING} together\\.", of_one
        yield f"In all, {NAME} {VERB} {NUMBER} {THING} and {THING}\\.", of_one
        yield (
            f"The sum of {THE} and {THE} was {NUMBER}\\.",
            lambda t, a, u, b, n: ([(q(a, t), 1), (q(b, u), 1)], [(None, int(n))]),
        )
        yield (
            f"The number of {THING} that {NAME} {VERB} was the sum of {THE} and {THE}\\.",
            lambda t, a, u, b, w, c: ([(q(a, t), 1)], [(q(b, u), 1), (q(c, w), 1)]),
        )
        yield (
            f"The number of {THING} that {NAME} {VERB} was {THE} minus {THE}\\.",
            lambda t, a, u, b, w, c: ([(q(a, t), 1)], [(q(b, u), 1), (q(c, w), -1)]),
        )

    def answer_question(self, question: str) -> Fraction:
        """What the last sentences ask for. Every pattern gives what is to be added up, multiplied or divided."""
        known = self.known
        do = f"(?:{'|'.join(scene.do for scene in SCENES)})"
        unit = "(?:points|cents|dollars|tokens)"
        forms: list[tuple[str, Callable[..., Fraction]]] = [
            (f"How many {THING} did {NAME} {do}\\?", lambda t, a: known[a, t]),
            (f"(?:What was|Find) {THE}[?.]", lambda t, a: known[a, t]),
            (
                f"How many {THING} did {NAME} and {NAME} {do} together\\?",
                lambda t, a, b: known[a, t] + known[b, t],
            ),
            (
                f"What was the total number of {THING} that {NAME} and {NAME} {VERB}\\?",
                lambda t, a, b: known[a, t] + known[b, t],
            ),
            (f"How many {THING} and {THING} did {NAME} {do} in all\\?", lambda t, u, a: known[a, t] + known[a, u]),
            (f"What was the sum of {THE} and {THE}\\?", lambda t, a, u, b: known[a, t] + known[b, u]),
            (f"By how much was {THE} larger than {THE}\\?", lambda t, a, u, b: known[a, t] - known[b, u]),
            (f"How many more {THING} did {NAME} {do} than {NAME}\\?", lambda t, a, b: known[a, t] - known[b, t]),
            (f"How many fewer {THING} did {NAME} {do} than {NAME}\\?", lambda t, a, b: known[b, t] - known[a, t]),
            (f"How many more {THING} than {THING} did {NAME} {do}\\?", lambda t, u, a: known[a, t] - known[a, u]),
            (
                f"For each {THING} that {NAME} {VERB}, {NAME} got {NUMBER} {unit}\\. How many {unit} did {NAME} get in all\\?",
                lambda t, a, b, n, c: known[a, f"{t}s"] * int(n) if a == b == c else Fraction(-1),
            ),
            (
                f"Each {THING} that {NAME} {VERB} was worth {NUMBER} {unit}\\. How many {unit} were the {THING} that {NAME} "
                f"{VERB} worth together\\?",
                lambda t, a, n, u, b: known[a, u] * int(n) if (a, f"{t}s") == (b, u) else Fraction(-1),
            ),
            (
                f"The {THING} that {NAME} {VERB} were put into {NUMBER} equal piles\\. How many {THING} were in each pile\\?",
                lambda t, a, n, u: known[a, t] / int(n),
            ),
            (
                f"The {THING} that {NAME} {VERB} were shared equally by {NUMBER} people\\. How many {THING} did each of them "
                f"get\\?",
                lambda t, a, n, u: known[a, t] / int(n),
            ),
            (
                f"{NAME} {VERB} the {THING} over {NUMBER} days, the same number on each day\\. How many {THING} did {NAME} "
                f"{do} on each day\\?",
                lambda a, t, n, u, b: known[a, t] / int(n),
            ),
        ]
        for pattern, answer in forms:
            match = re.fullmatch(pattern, question)
            if match:
                return answer(*match.groups())
        raise AssertionError(f"not understood: {question}")


def read(text: str) -> Fraction:
    sentences = re.findall(r"[^.?]+[.?]", text)
    sentences = [sentence.strip() for sentence in sentences]
    last = (
        2
        if re.match("For each|Each|The .* (?:equal piles|people)|.* the same number on each day", sentences[-2])
        else 1
    )
    reader = Reader()
    for sentence in sentences[:-last]:
        reader.tell(sentence)
    return reader.answer_question(" ".join(sentences[-last:]))


@pytest.mark.parametrize("dials", [EASY, WordsDials(), HARD], ids=["easy", "usual", "hard"])
def test_problem_text_states_its_graph(dials: WordsDials) -> None:
    for problem in made(250, dials, seed=7):
        assert str(read(problem.text)) == problem.gold, problem.text


def test_reader_distinguishes_right_from_wrong_text() -> None:
    text = (
        "Mia picked 12 apples. Tom picked 5 more apples than Mia. Ada picked half as many pears as Mia picked apples. "
    )
    assert read(text + "How many apples did Mia and Tom pick together?") == 29  # 12 + 17
    assert (
        read(
            text
            + "By how much was the number of apples that Tom picked larger than the number of pears that Ada picked?"
        )
        == 11
    )
    with pytest.raises(AssertionError, match="tells 0 new things"):
        read("Mia picked 12 apples. Mia picked 13 apples. How many apples did Mia pick?")


def test_worked_solution_has_sentence_and_valid_equation_per_operation() -> None:
    for problem in made(200, WordsDials()):
        *steps, last = re.findall(r"[^.]+\.", words_worked(problem))
        assert last.strip() == words_short(problem) == f"The answer is {problem.gold}."
        assert len(steps) == operations(problem)
        for step in steps:
            left, sign, right, value = re.search(r"(\d+)([-+*/])(\d+)=(\d+)", step).groups()  # type: ignore[union-attr]
            assert OPERATIONS[sign](Fraction(left), Fraction(right)) == int(value)
        assert words_is_worked(words_worked(problem)) and not words_is_worked(words_short(problem))


def test_texts_vary_in_every_respect() -> None:
    texts = [problem.text for problem in made(1500, WordsDials())]
    words = set(re.findall("[A-Za-z]+", " ".join(texts)))
    assert set(NAMES) <= words and words >= THINGS
    assert len({re.sub(r"\d+|[A-Z][a-z]+|\b(?:" + "|".join(THINGS) + r")\b", "_", text) for text in texts}) > 1400


# Pools and draws ------------------------------------------------------------------------------------------------------


def test_pools_share_no_problem_for_any_seed() -> None:
    texts_by_pool = {pool: {text for seed in (0, 1) for text, _ in generate(150, pool, seed)} for pool in POOLS}
    for pool, texts in texts_by_pool.items():
        assert {pool_of("words", text) for text in texts} == {pool}
        assert not any(texts & other for name, other in texts_by_pool.items() if name != pool)


def test_problems_have_no_duplicates_and_extend_shorter_calls() -> None:
    many = generate(300, "train", seed=3, dials=WordsDials(1, 1, distractors=0))
    assert len({text for text, _ in many}) == 300
    assert generate(50, "train", seed=3, dials=WordsDials(1, 1, distractors=0)) == many[:50]
    assert generate(20, "train", seed=4) != generate(20, "train", seed=3)


def test_problems_are_equal_in_every_process() -> None:
    code = "from headwater.tasks.word_problems import generate; print(generate(2, 'eval', 0))"
    environment = {"PYTHONHASHSEED": "77", "PYTHONPATH": ":".join(sys.path)}
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == repr(generate(2, "eval", 0))
    # Written down once: a change here would silently move problems between the pools of old runs.
    assert generate(1, "eval", 0, WordsDials(1, 1, distractors=0)) == [
        (
            "In all, Fred baked 29 muffins. The number of muffins that Vera baked was 15. "
            "By how much was the number of muffins that Fred baked larger than the number of muffins that Vera baked?",
            "14",
        )
    ]
    assert [gold for _, gold in generate(8, "eval", 0)] == ["34", "44", "9", "52", "57", "23", "32", "85"]


def test_worked_share_of_solutions_follows_setting() -> None:
    worked = [words_is_worked(completion) for _, completion in words_solutions(400, "pretrain", 0, 0.25)]
    assert abs(sum(worked) - 100) < 35  # 100 are expected, with a standard deviation of 8.7
    assert all(words_is_worked(completion) for _, completion in words_solutions(50, "pretrain", 0, 1.0))


@pytest.mark.parametrize(
    "wrong", [{"min_ops": 0}, {"min_ops": 5, "max_ops": 4}, {"max_ops": 17}, {"distractors": 9}, {"largest": 39}]
)
def test_impossible_dials_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="words: "):
        WordsDials(**wrong)


def test_unknown_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="no pool 'test'"):
        generate(1, "test", 0)


def test_hardest_dials_generate_problems() -> None:
    assert {operations(problem) for problem in made(5, WordsDials(16, 16, distractors=8, largest=40))} == {16}


# The grader -----------------------------------------------------------------------------------------------------------


def test_gold_grades_one_in_both_forms_and_perturbed_zero() -> None:
    for problem in made(60, WordsDials()):
        for completion in (words_worked(problem), words_short(problem), f"the answer is {problem.gold}"):
            assert grade(problem.gold, completion) == (True, "equal")
        for wrong in (
            f"{problem.gold}0",
            f"1{problem.gold}",
            f"-{problem.gold}",
            f"{problem.gold}.5",
            f"{problem.gold} or 1",
            "",
        ):
            assert grade(problem.gold, f"The answer is {wrong}.")[0] is False


def test_generated_gold_validates_as_recipe_reads_it() -> None:
    loaded = load(Source(generate=Generate(task="words", pool="train", count=100)), "data.labeled", need_answers=True)
    task = TASKS["words"]
    assert len(loaded.gold) == 100
    assert all(task.grade(gold, task.as_completion(gold) or "") == (True, "equal") for gold in loaded.gold.values())


def test_last_stated_answer_counts_and_unit_may_follow() -> None:
    assert extract("The answer is 5. No, the answer is 12 apples.") == "12"
    assert extract("The answer is 012") == "12"
    for silent in (
        "",
        "12",
        "The answer is",
        "The answer is twelve.",
        "The answer is 12 or 13.",
        "The answer is 12-1.",
        "answer 12",
    ):
        assert extract(silent) is None and grade("12", silent) == (False, "no_answer")
    assert grade("12", "The answer is 13.") == (False, "different")


@pytest.mark.parametrize(
    "hostile",
    [
        "The answer is " * 1_000_000,
        "The answer is " + "9" * 10_000_000,
        "The answer is 47" + " " * 10_000_000 + "x",
        "İ" * 100_000 + "The answer is 4",
        "The answer is __import__('os').system('exit')",
        "The answer is ٤٧",
        "The answer is 47\u202e",
        "The answer is \ud800",
        "The answer is 47\0",
    ],
    ids=range(9),
)
def test_hostile_text_is_graded_wrong_at_once(hostile: str) -> None:
    began = time.process_time()
    assert grade("47", hostile) in {(False, "no_answer"), (False, "different")}
    assert time.process_time() - began < 2.0
