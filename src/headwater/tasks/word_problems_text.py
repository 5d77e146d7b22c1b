"""English text of word problems: word lists, and several sentence templates per relation and question.

Sentences name every owner and thing and use no pronouns, so they are unambiguous. The order of names gives nothing away:
"Mia picked 5 fewer apples than Tom" may define Tom's number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headwater.tasks.word_problems_world import Draw, Quantity, Step, World, choice

NAMES = (
    "Ada", "Aki", "Ana", "Ben", "Bo", "Carl", "Cleo", "Dan", "Dina", "Eli", "Ella", "Emil", "Eva", "Finn", "Fred", "Gina",
    "Greta", "Hana", "Hugo", "Ida", "Igor", "Ines", "Ivan", "Jack", "Jana", "Joel", "Juan", "Kai", "Kara", "Kim", "Lars",
    "Lena", "Leo", "Lin", "Lola", "Luis", "Mara", "Max", "Mia", "Milo", "Nadia", "Nils", "Nina", "Noor", "Olga", "Omar",
    "Oscar", "Pam", "Paul", "Petra", "Quinn", "Rita", "Rosa", "Ruth", "Sam", "Sara", "Sven", "Tara", "Theo", "Tom", "Uma",
    "Vera", "Wanda", "Yara", "Yuri", "Zoe",
)  # fmt: skip
UNITS = ("points", "cents", "dollars", "tokens")
PARTS = {2: "half", 3: "a third", 4: "a quarter", 5: "a fifth"}


@dataclass(frozen=True, slots=True)
class Scene:
    """Vocabulary of a problem.

    did, do    verb: "picked", "pick"
    groups     containers: "baskets"
    things     plural nouns; dropping the last letter gives the singular
    shareable  whether the things can be split into piles afterwards

    Example: `Scene("picked", "pick", "baskets", ("apples", "pears"))`.
    """

    did: str
    do: str
    groups: str
    things: tuple[str, ...]
    shareable: bool = True


SCENES = (
    Scene("had", "have", "bags", ("marbles", "stickers", "stamps", "beads", "shells", "buttons", "cards", "crayons")),
    Scene("picked", "pick", "baskets", ("apples", "pears", "plums", "lemons", "figs", "oranges", "apricots", "olives")),
    Scene("baked", "bake", "trays", ("cookies", "muffins", "rolls", "cakes", "bagels", "waffles", "pretzels")),
    Scene("found", "find", "jars", ("pebbles", "feathers", "acorns", "fossils", "pearls", "chestnuts", "coins")),
    Scene("planted", "plant", "rows", ("beans", "onions", "carrots", "tulips", "lilacs", "pines", "roses")),
    Scene("painted", "paint", "sets", ("cups", "plates", "tiles", "masks", "bowls", "eggs", "pots")),
    Scene("sold", "sell", "crates", ("hats", "candles", "soaps", "lamps", "kites", "melons", "pumpkins")),
    Scene("wrote", "write", "stacks", ("letters", "poems", "notes", "songs", "riddles", "postcards")),
    Scene("washed", "wash", "loads", ("shirts", "socks", "towels", "aprons", "blankets", "napkins")),
    Scene("counted", "count", "groups", ("ducks", "swans", "boats", "trains", "clouds", "goats"), shareable=False),
    Scene("read", "read", "chapters", ("pages",), shareable=False),
    Scene("ran", "run", "races", ("miles", "kilometers", "laps"), shareable=False),
)


def write_problem(world: World, scene: Scene, draw: Draw) -> str:
    """Problem text: one sentence per step, in order, then the question."""
    sentences = [step_sentence(step, world.steps, scene, draw) for step in world.steps]
    return " ".join([*sentences, question_sentence(world, scene, draw)])


def write_solution(world: World, scene: Scene) -> str:
    """Worked solution: one sentence per operation on the path to the answer, then the answer.

    Example: `"Mia picked 3*4=12 apples. Tom picked 12+5=17 apples. Together that is 12+17=29. The answer is 29."`
    """
    steps = [world.steps[index] for index in world.needed]
    sentences = [
        f"{step.quantity.owner} {scene.did} {step.expression}={step.value} {step.quantity.thing}."
        for step in steps
        if step.sign
    ]
    question = world.question
    if question.sign:
        subject = {"total": "Together that is", "gap": "The difference is", "price": "That is", "share": "Each part is"}
        sentences.append(f"{subject[question.relation]} {question.expression}={question.value}.")
    return " ".join([*sentences, answer_sentence(question.value)])


def answer_sentence(value: int) -> str:
    return f"The answer is {value}."


def step_sentence(step: Step, steps: Sequence[Step], scene: Scene, draw: Draw) -> str:
    """A random phrasing of a step."""
    new, did = step.quantity, scene.did
    operands = [steps[parent].quantity for parent in step.dependencies]
    literal = step.right if step.parents[1] is None else step.left  # the operand that the text states
    this = f"The number of {new.thing} that {new.owner} {did} was"
    if step.relation == "given":
        ways = [f"{new.owner} {did} {step.left} {new.thing}.", f"In all, {new.owner} {did} {step.left} {new.thing}."]
        return choice(draw, [*ways, f"{this} {step.left}."])
    if step.relation == "groups":
        many, groups, each = step.left, scene.groups, f"{step.right} {new.thing}"
        return choice(
            draw,
            [
                f"{new.owner} {did} {many} {groups} of {each} each.",
                f"{new.owner} {did} {many} {groups} with {each} in each of them.",
                f"There were {each} in each of the {many} {groups} that {new.owner} {did}.",
            ],
        )
    if step.relation in ("sum", "balance"):
        return choice(draw, sum_sentences(step.relation, new, operands[0], operands[1], scene))
    (old,) = operands
    that = number_of(old, did)
    if step.relation == "rest":
        return choice(draw, together_sentences(new, old, literal, scene))
    if step.relation in ("more", "fewer"):
        word, inverse = ("more", "fewer") if step.relation == "more" else ("fewer", "more")
        ways = [
            f"{more_than(new, f'{literal} {word}', old, did)}.",
            f"{more_than(old, f'{literal} {inverse}', new, did)}.",
        ]
        return choice(draw, [*ways, f"{this} {literal} {'more' if word == 'more' else 'less'} than {that}."])
    times, part = "twice" if literal == 2 else f"{literal} times", PARTS[literal]
    word, inverse = (times, part) if step.relation == "times" else (part, times)
    of = word if word in ("half", times) else f"{word} of"
    return choice(
        draw,
        [f"{times_as_many(new, word, old, did)}.", f"{times_as_many(old, inverse, new, did)}.", f"{this} {of} {that}."],
    )


def number_of(first: Quantity, did: str) -> str:
    return f"the number of {first.thing} that {first.owner} {did}"


def more_than(first: Quantity, more: str, second: Quantity, did: str) -> str:
    """Example: `"Tom picked 5 more pears than Mia picked apples"`."""
    return f"{first.owner} {did} {more} {first.thing} than {compared_with(first, second, did)}"


def times_as_many(first: Quantity, times: str, second: Quantity, did: str) -> str:
    """Example: `"Tom picked twice as many pears as Mia"`."""
    return f"{first.owner} {did} {times} as many {first.thing} as {compared_with(first, second, did)}"


def compared_with(first: Quantity, second: Quantity, did: str) -> str:
    """The phrase after "than" or "as": only what differs from the first quantity."""
    if first.thing == second.thing:
        return second.owner
    return second.thing if first.owner == second.owner else f"{second.owner} {did} {second.thing}"


def together_sentences(first: Quantity, second: Quantity, many: int, scene: Scene) -> list[str]:
    """Phrasings of: two quantities sum to `many`."""
    did = scene.did
    if first.thing == second.thing:
        return [
            f"Together, {first.owner} and {second.owner} {did} {many} {first.thing}.",
            f"{second.owner} and {first.owner} {did} {many} {first.thing} between them.",
            f"{second.owner} and {first.owner} together {did} {many} {first.thing}.",
        ]
    if first.owner == second.owner:
        return [
            f"{first.owner} {did} {many} {first.thing} and {second.thing} together.",
            f"In all, {first.owner} {did} {many} {second.thing} and {first.thing}.",
        ]
    return [f"The sum of {number_of(second, did)} and {number_of(first, did)} was {many}."]


def sum_sentences(relation: str, new: Quantity, b: Quantity, c: Quantity, scene: Scene) -> list[str]:
    """Phrasings of: a new quantity is the sum `b + c` or, for "balance", the difference `b - c`."""
    did = scene.did
    this = f"The number of {new.thing} that {new.owner} {did} was"
    whole, part, rest = (new, b, c) if relation == "sum" else (b, new, c)
    ways = []
    if whole.thing == part.thing == rest.thing:
        ways = [
            f"{whole.owner} {did} as many {whole.thing} as {part.owner} and {rest.owner} together.",
            f"Together, {part.owner} and {rest.owner} {did} as many {whole.thing} as {whole.owner}.",
        ]
    elif part.owner == rest.owner:
        ways = [
            f"{whole.owner} {did} as many {whole.thing} as {part.owner} {did} {part.thing} and {rest.thing} together.",
            f"Together, the {part.thing} and {rest.thing} that {part.owner} {did} were as many as "
            f"the {whole.thing} that {whole.owner} {did}.",
        ]
    if relation == "sum":
        return [*ways, f"{this} the sum of {number_of(b, did)} and {number_of(c, did)}."]
    return [*ways, f"{this} {number_of(b, did)} minus {number_of(c, did)}."]


def question_sentence(world: World, scene: Scene, draw: Draw) -> str:
    """A random phrasing of the question."""
    question, did, do = world.question, scene.did, scene.do
    first, *rest = (world.steps[parent].quantity for parent in question.dependencies)
    if question.relation == "plain":
        ways = [
            f"How many {first.thing} did {first.owner} {do}?",
            f"What was {number_of(first, did)}?",
            f"Find {number_of(first, did)}.",
        ]
    elif question.relation == "price":
        unit, single = choice(draw, UNITS), first.thing[:-1]
        ways = [
            f"For each {single} that {first.owner} {did}, {first.owner} got {question.right} {unit}. "
            f"How many {unit} did {first.owner} get in all?",
            f"Each {single} that {first.owner} {did} was worth {question.right} {unit}. "
            f"How many {unit} were the {first.thing} that {first.owner} {did} worth together?",
        ]
    elif question.relation == "share" and scene.shareable:
        ways = [
            f"The {first.thing} that {first.owner} {did} were put into {question.right} equal piles. "
            f"How many {first.thing} were in each pile?",
            f"The {first.thing} that {first.owner} {did} were shared equally by {question.right} people. "
            f"How many {first.thing} did each of them get?",
        ]
    elif question.relation == "share":
        ways = [
            f"{first.owner} {did} the {first.thing} over {question.right} days, the same number on each day. "
            f"How many {first.thing} did {first.owner} {do} on each day?"
        ]
    else:
        ways = pair_questions(question.relation, first, rest[0], scene)
    return choice(draw, ways)


def pair_questions(relation: str, first: Quantity, second: Quantity, scene: Scene) -> list[str]:
    """Phrasings of a question for the sum ("total") or the difference ("gap") of two quantities."""
    did, do = scene.did, scene.do
    numbers = number_of(first, did), number_of(second, did)
    same_thing, same_owner = first.thing == second.thing, first.owner == second.owner
    if relation == "total":
        ways = [f"What was the sum of {numbers[0]} and {numbers[1]}?"]
        if same_thing:
            ways = [
                f"How many {first.thing} did {first.owner} and {second.owner} {do} together?",
                f"What was the total number of {first.thing} that {second.owner} and {first.owner} {did}?",
            ]
        elif same_owner:
            ways = [f"How many {first.thing} and {second.thing} did {first.owner} {do} in all?"]
        return ways
    ways = [f"By how much was {numbers[0]} larger than {numbers[1]}?"]
    if same_thing:
        ways += [
            f"How many more {first.thing} did {first.owner} {do} than {second.owner}?",
            f"How many fewer {first.thing} did {second.owner} {do} than {first.owner}?",
        ]
    elif same_owner:
        ways += [f"How many more {first.thing} than {second.thing} did {first.owner} {do}?"]
    return ways
