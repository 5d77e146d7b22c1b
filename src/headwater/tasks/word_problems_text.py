"""English text of word problems: word lists, and several sentence templates for each relation and question.

Sentences name every owner and thing and use no pronouns, so they are unambiguous. The order of names gives nothing away:
"Mia picked 5 fewer apples than Tom" may define Tom's number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headwater.tasks.pools import Draw, choice
from headwater.tasks.word_problems_world import Quantity, Step, World

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

# In the templates x is the quantity that a step defines or that is asked for first, y and z are those that it refers to, and nx, ny and
# nz are "number of … that …". `xy` is what x is compared with: only what differs from x.
_SUM, _BALANCE = "The {nx} was the sum of the {ny} and the {nz}.", "The {nx} was the {ny} minus the {nz}."
_GAP = "By how much was the {nx} larger than the {ny}?"
# Of two parts that make a whole together; their place is given by the relation.
_TOGETHER = {
    "same thing": (
        "{whole.owner} {did} as many {whole.thing} as {part.owner} and {z.owner} together.",
        "Together, {part.owner} and {z.owner} {did} as many {whole.thing} as {whole.owner}.",
    ),
    "same owner": (
        "{whole.owner} {did} as many {whole.thing} as {part.owner} {did} {part.thing} and {z.thing} together.",
        "Together, the {part.thing} and {z.thing} that {part.owner} {did} were as many as the {whole.thing} that {whole.owner} {did}.",
    ),
    "neither": (),
}
TEMPLATES: dict[str, tuple[str, ...]] = {
    "given": ("{x.owner} {did} {left} {x.thing}.", "In all, {x.owner} {did} {left} {x.thing}.", "The {nx} was {left}."),
    "groups": (
        "{x.owner} {did} {left} {groups} of {right} {x.thing} each.",
        "{x.owner} {did} {left} {groups} with {right} {x.thing} in each of them.",
        "There were {right} {x.thing} in each of the {left} {groups} that {x.owner} {did}.",
    ),
    "more": (
        "{x.owner} {did} {right} more {x.thing} than {xy}.",
        "{y.owner} {did} {right} fewer {y.thing} than {yx}.",
        "The {nx} was {right} more than the {ny}.",
    ),
    "fewer": (
        "{x.owner} {did} {right} fewer {x.thing} than {xy}.",
        "{y.owner} {did} {right} more {y.thing} than {yx}.",
        "The {nx} was {right} less than the {ny}.",
    ),
    "times": (
        "{x.owner} {did} {times} as many {x.thing} as {xy}.",
        "{y.owner} {did} {fraction} as many {y.thing} as {yx}.",
        "The {nx} was {times} the {ny}.",
    ),
    "part": (
        "{x.owner} {did} {fraction} as many {x.thing} as {xy}.",
        "{y.owner} {did} {times} as many {y.thing} as {yx}.",
        "The {nx} was {fraction_of} the {ny}.",
    ),
    **{f"sum, {case}": (*ways, _SUM) for case, ways in _TOGETHER.items()},
    **{f"balance, {case}": (*ways, _BALANCE) for case, ways in _TOGETHER.items()},
    "rest, same thing": (
        "Together, {x.owner} and {y.owner} {did} {left} {x.thing}.",
        "{y.owner} and {x.owner} {did} {left} {x.thing} between them.",
        "{y.owner} and {x.owner} together {did} {left} {x.thing}.",
    ),
    "rest, same owner": (
        "{x.owner} {did} {left} {x.thing} and {y.thing} together.",
        "In all, {x.owner} {did} {left} {y.thing} and {x.thing}.",
    ),
    "rest, neither": ("The sum of the {ny} and the {nx} was {left}.",),
    "plain": ("How many {x.thing} did {x.owner} {do}?", "What was the {nx}?", "Find the {nx}."),
    "price": (
        "For each {single} that {x.owner} {did}, {x.owner} got {right} {unit}. How many {unit} did {x.owner} get in all?",
        "Each {single} that {x.owner} {did} was worth {right} {unit}. "
        "How many {unit} were the {x.thing} that {x.owner} {did} worth together?",
    ),
    "share": (
        "The {x.thing} that {x.owner} {did} were put into {right} equal piles. How many {x.thing} were in each pile?",
        "The {x.thing} that {x.owner} {did} were shared equally by {right} people. How many {x.thing} did each of them get?",
    ),
    "share, not shareable": (
        "{x.owner} {did} the {x.thing} over {right} days, the same number on each day. "
        "How many {x.thing} did {x.owner} {do} on each day?",
    ),
    "total, same thing": (
        "How many {x.thing} did {x.owner} and {y.owner} {do} together?",
        "What was the total number of {x.thing} that {y.owner} and {x.owner} {did}?",
    ),
    "total, same owner": ("How many {x.thing} and {y.thing} did {x.owner} {do} in all?",),
    "total, neither": ("What was the sum of the {nx} and the {ny}?",),
    "gap, same thing": (
        _GAP,
        "How many more {x.thing} did {x.owner} {do} than {y.owner}?",
        "How many fewer {x.thing} did {y.owner} {do} than {x.owner}?",
    ),
    "gap, same owner": (_GAP, "How many more {x.thing} than {y.thing} did {x.owner} {do}?"),
    "gap, neither": (_GAP,),
}
"""Relation, and what its quantities share where the sentence depends on it -> phrasings."""


def write_problem(world: World, scene: Scene, draw: Draw) -> str:
    """Problem text: one sentence per step, in order, then the question."""
    sentences = []
    for step in (*world.steps, world.question):
        named = [world.steps[parent].quantity for parent in step.dependencies]
        quantities = named if step is world.question else [step.quantity, *named]
        sentences.append(write_sentence(step, quantities, scene, draw))
    return " ".join(sentences)


def write_sentence(step: Step, quantities: Sequence[Quantity], scene: Scene, draw: Draw) -> str:
    """A random phrasing of a step or question about these quantities, that of the step itself first."""
    x, y, z = [*quantities, quantities[-1], quantities[-1]][:3]
    whole, part = (y, x) if step.relation == "balance" else (x, y)  # the sum of part and z is the whole
    first = part if len(quantities) > 2 else x
    case = "same thing" if len({quantity.thing for quantity in quantities}) == 1 else "neither"
    if case == "neither" and first.owner == z.owner:
        case = "same owner"
    if step.relation == "share" and not scene.shareable:
        case = "not shareable"
    fraction, times = PARTS.get(step.right, ""), "twice" if step.right == 2 else f"{step.right} times"
    named = {"x": x, "y": y, "z": z, "whole": whole, "part": part}
    unit = choice(draw, UNITS) if step.relation == "price" else ""
    ways = TEMPLATES.get(f"{step.relation}, {case}") or TEMPLATES[step.relation]
    return choice(draw, ways).format(
        **named,
        **{f"n{name}": f"number of {named[name].thing} that {named[name].owner} {scene.did}" for name in "xyz"},
        xy=_beside(x, y, scene),
        yx=_beside(y, x, scene),
        left=step.left,
        right=step.right,
        times=times,
        fraction=fraction,
        fraction_of=fraction if fraction == "half" else f"{fraction} of",
        did=scene.did,
        do=scene.do,
        groups=scene.groups,
        single=x.thing[:-1],
        unit=unit,
    )


def _beside(first: Quantity, second: Quantity, scene: Scene) -> str:
    """The phrase after "than" or "as". Example: `"Mia"` in "more apples than Mia", `"Mia picked apples"` in "more pears than …"."""
    if first.thing == second.thing:
        return second.owner
    return second.thing if first.owner == second.owner else f"{second.owner} {scene.did} {second.thing}"
