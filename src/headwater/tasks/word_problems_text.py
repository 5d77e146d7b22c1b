"""How a word problem is said: word lists of our own, and several sentences for every relation and question.

A sentence names owner and thing of all that it speaks of and has no pronoun, so that it can be read in one way only. The
order in which people are named tells nothing: "Mia picked 5 fewer apples than Tom" may tell Tom's number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headwater.tasks.word_problems_world import Draw, Quantity, Step, World, pick

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
    """What the people of a problem do.

    did, do    the verb: "picked", "pick"
    groups     what the things come in: "baskets"
    things     in the plural; without its last letter each is the singular
    shareable  whether the things can be put into piles afterwards

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


def story(world: World, scene: Scene, draw: Draw) -> str:
    """The problem as text: a sentence for each step, in order, then the question."""
    told = [sentence(step, world.steps, scene, draw) for step in world.steps]
    return " ".join([*told, question(world, scene, draw)])


def solution(world: World, scene: Scene) -> str:
    """The steps to the answer in plain English, those of distractors and plain numbers left out, and the answer.

    Example: `"Mia picked 3*4=12 apples. Tom picked 12+5=17 apples. Together that is 12+17=29. The answer is 29."`
    """
    steps = [world.steps[index] for index in world.needed]
    said = [
        f"{one.quantity.owner} {scene.did} {one.expression}={one.value} {one.quantity.thing}."
        for one in steps
        if one.sign
    ]
    asked = world.question
    if asked.sign:
        subject = {"total": "Together that is", "gap": "The difference is", "price": "That is", "share": "Each part is"}
        said.append(f"{subject[asked.relation]} {asked.expression}={asked.value}.")
    return " ".join([*said, answer(asked.value)])


def answer(value: int) -> str:
    return f"The answer is {value}."


def sentence(step: Step, steps: Sequence[Step], scene: Scene, draw: Draw) -> str:
    """One of the ways to tell a step, at random."""
    new, did = step.quantity, scene.did
    known = [steps[parent].quantity for parent in step.known]
    told = step.right if step.parents[1] is None else step.left  # the number that stands in the text
    this = f"The number of {new.thing} that {new.owner} {did} was"
    if step.relation == "given":
        ways = [f"{new.owner} {did} {step.left} {new.thing}.", f"In all, {new.owner} {did} {step.left} {new.thing}."]
        return pick(draw, [*ways, f"{this} {step.left}."])
    if step.relation == "groups":
        many, groups, each = step.left, scene.groups, f"{step.right} {new.thing}"
        return pick(
            draw,
            [
                f"{new.owner} {did} {many} {groups} of {each} each.",
                f"{new.owner} {did} {many} {groups} with {each} in each of them.",
                f"There were {each} in each of the {many} {groups} that {new.owner} {did}.",
            ],
        )
    if step.relation in ("sum", "balance"):
        return pick(draw, on_two(step.relation, new, known[0], known[1], scene, this))
    (old,) = known
    that = number_of(old, did)
    if step.relation == "rest":
        return pick(draw, both(new, old, f"{told}", scene))
    if step.relation in ("more", "fewer"):
        said, turned = ("more", "fewer") if step.relation == "more" else ("fewer", "more")
        ways = [f"{than(new, f'{told} {said}', old, did)}.", f"{than(old, f'{told} {turned}', new, did)}."]
        return pick(draw, [*ways, f"{this} {told} {'more' if said == 'more' else 'less'} than {that}."])
    times, part = "twice" if told == 2 else f"{told} times", PARTS[told]
    said, turned = (times, part) if step.relation == "times" else (part, times)
    of = said if said in ("half", times) else f"{said} of"
    return pick(
        draw, [f"{as_many(new, said, old, did)}.", f"{as_many(old, turned, new, did)}.", f"{this} {of} {that}."]
    )


def number_of(one: Quantity, did: str) -> str:
    return f"the number of {one.thing} that {one.owner} {did}"


def than(one: Quantity, more: str, other: Quantity, did: str) -> str:
    """Example: `"Tom picked 5 more pears than Mia picked apples"`."""
    return f"{one.owner} {did} {more} {one.thing} than {beside(one, other, did)}"


def as_many(one: Quantity, times: str, other: Quantity, did: str) -> str:
    """Example: `"Tom picked twice as many pears as Mia"`."""
    return f"{one.owner} {did} {times} as many {one.thing} as {beside(one, other, did)}"


def beside(one: Quantity, other: Quantity, did: str) -> str:
    """What follows "than" or "as": only that in which the other quantity differs."""
    if one.thing == other.thing:
        return other.owner
    return other.thing if one.owner == other.owner else f"{other.owner} {did} {other.thing}"


def both(one: Quantity, other: Quantity, many: str, scene: Scene) -> list[str]:
    """Ways to say that two quantities make `many` together, a number or "?"."""
    did = scene.did
    if one.thing == other.thing:
        return [
            f"Together, {one.owner} and {other.owner} {did} {many} {one.thing}.",
            f"{other.owner} and {one.owner} {did} {many} {one.thing} between them.",
            f"{other.owner} and {one.owner} together {did} {many} {one.thing}.",
        ]
    if one.owner == other.owner:
        return [
            f"{one.owner} {did} {many} {one.thing} and {other.thing} together.",
            f"In all, {one.owner} {did} {many} {other.thing} and {one.thing}.",
        ]
    return [f"The sum of {number_of(other, did)} and {number_of(one, did)} was {many}."]


def on_two(relation: str, new: Quantity, b: Quantity, c: Quantity, scene: Scene, this: str) -> list[str]:
    """Ways to say that a new quantity is the sum of two others, or the first less the second."""
    did = scene.did
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


def question(world: World, scene: Scene, draw: Draw) -> str:
    """One of the ways to ask, at random."""
    asked, did, do = world.question, scene.did, scene.do
    one, *others = (world.steps[parent].quantity for parent in asked.known)
    if asked.relation == "plain":
        ways = [
            f"How many {one.thing} did {one.owner} {do}?",
            f"What was {number_of(one, did)}?",
            f"Find {number_of(one, did)}.",
        ]
    elif asked.relation == "price":
        unit, single = pick(draw, UNITS), one.thing[:-1]
        ways = [
            f"For each {single} that {one.owner} {did}, {one.owner} got {asked.right} {unit}. "
            f"How many {unit} did {one.owner} get in all?",
            f"Each {single} that {one.owner} {did} was worth {asked.right} {unit}. "
            f"How many {unit} were the {one.thing} that {one.owner} {did} worth together?",
        ]
    elif asked.relation == "share" and scene.shareable:
        ways = [
            f"The {one.thing} that {one.owner} {did} were put into {asked.right} equal piles. "
            f"How many {one.thing} were in each pile?",
            f"The {one.thing} that {one.owner} {did} were shared equally by {asked.right} people. "
            f"How many {one.thing} did each of them get?",
        ]
    elif asked.relation == "share":
        ways = [
            f"{one.owner} {did} the {one.thing} over {asked.right} days, the same number on each day. "
            f"How many {one.thing} did {one.owner} {do} on each day?"
        ]
    else:
        ways = on_two_asked(asked.relation, one, others[0], scene)
    return pick(draw, ways)


def on_two_asked(relation: str, one: Quantity, other: Quantity, scene: Scene) -> list[str]:
    """Ways to ask for the sum of two quantities, or for how much the first is larger than the second."""
    did, do = scene.did, scene.do
    numbers = number_of(one, did), number_of(other, did)
    alike, same = one.thing == other.thing, one.owner == other.owner
    if relation == "total":
        ways = [f"What was the sum of {numbers[0]} and {numbers[1]}?"]
        if alike:
            ways = [
                f"How many {one.thing} did {one.owner} and {other.owner} {do} together?",
                f"What was the total number of {one.thing} that {other.owner} and {one.owner} {did}?",
            ]
        elif same:
            ways = [f"How many {one.thing} and {other.thing} did {one.owner} {do} in all?"]
        return ways
    ways = [f"By how much was {numbers[0]} larger than {numbers[1]}?"]
    if alike:
        ways += [
            f"How many more {one.thing} did {one.owner} {do} than {other.owner}?",
            f"How many fewer {one.thing} did {other.owner} {do} than {one.owner}?",
        ]
    elif same:
        ways += [f"How many more {one.thing} than {other.thing} did {one.owner} {do}?"]
    return ways
