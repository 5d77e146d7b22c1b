"""Order in which a stage visits its prompts: each once per epoch, none twice in a step."""

from __future__ import annotations

import math

from headwater import seeds


class PromptOrder:
    """Epochs of shuffled names, cut into steps of `count` names; no step holds a name twice.

    Each epoch has a shuffle of its own, named by `draw`. Where an epoch begins within a step, names that the step already
    holds move behind the step. That depends on the epoch before it, and so on back to an epoch that begins with a step, so
    an order can be computed from any epoch on: a resumed stage needs no state.

    Example: names a–c, 2 per step, shuffles abc and cab: the second becomes acb, and the steps are ab, ca, cb.
    """

    def __init__(self, names: list[str], count: int, *draw: str | int) -> None:
        self._names, self._count, self._draw = names, count, draw
        self._orders: dict[int, list[str]] = {}
        self._cycle = count // math.gcd(len(names), count)  # epochs until one begins with a step again

    def step(self, step: int) -> list[str]:
        """The names of a step (from 0)."""
        positions = range(step * self._count, (step + 1) * self._count)
        places = (divmod(position, len(self._names)) for position in positions)
        return [self.epoch(epoch)[place] for epoch, place in places]

    def epoch(self, epoch: int) -> list[str]:
        """The names of an epoch (from 0), in order."""
        if epoch not in self._orders:
            known = max((earlier for earlier in self._orders if earlier < epoch), default=-1)
            for number in range(max(known + 1, epoch - epoch % self._cycle), epoch + 1):
                self._orders[number] = self._next(number)
                for old in [key for key in self._orders if key < number - 1]:
                    del self._orders[old]
        return self._orders[epoch]

    def _next(self, epoch: int) -> list[str]:
        names = seeds.shuffled(self._names, *self._draw, "epoch", epoch)
        overlap = epoch * len(names) % self._count  # names of the previous epoch in this epoch's first step
        if not overlap:
            return names
        previous = set(self._orders[epoch - 1][-overlap:])
        first = [name for name in names if name not in previous][: self._count - overlap]
        return first + [name for name in names if name not in set(first)]
