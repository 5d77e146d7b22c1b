"""Plain data that the page templates render: sections, tables, columns with their alignment, intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Literal

from headwater.report.figures import Interval, Plot
from headwater.report.svg import spanning


@dataclass(frozen=True, slots=True)
class Section:
    """One section of the page, rendered by templates/sections/{template}.html.j2.

    view   the values that the template reads
    plots  every figure of the section; some are only written to figures/ and not shown
    """

    title: str
    template: str
    view: dict[str, Any]
    plots: tuple[Plot, ...] = ()


@dataclass(frozen=True, slots=True)
class Axis:
    """Horizontal axis of a column of intervals: its range and the labels at its two ends."""

    low: float
    high: float
    labels: tuple[str, str]

    def position(self, value: float) -> str:
        """Distance from the left end, clipped to the axis. Example: `Axis(0, 2, ("0", "2")).position(1)` is `50.0%`."""
        share = (value - self.low) / ((self.high - self.low) or 1.0)
        return f"{100 * min(1.0, max(0.0, share)):.1f}%"


def interval_axis(rows: Iterable[dict[str, Any]], label: Callable[[float], str]) -> Axis:
    """An axis for shares or their differences, with room for zero and the intervals of all `rows`; from 0 to 1 without rows."""
    ends = [row[end] for row in rows for end in ("low", "high")]
    low, high = spanning([0.0, *ends]) if ends else (0.0, 1.0)
    high = min(high, 1.0)
    return Axis(low, high, (label(low), label(high)))


@dataclass(frozen=True, slots=True)
class RowHeader:
    """The first cell of a row: a name, small print below it, warnings, and where the name links to."""

    text: str
    details: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    href: str | None = None


Cell = str | Sequence[str] | Interval | RowHeader | None
"""Text, a list of points, an interval, or the header of a row. None: there is no value."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    cell   the content of a row's cell; the first column of a table has the headers of the rows
    axis   the cells are `Interval`s, drawn on this axis
    spans  one cell for all rows of an entry (`Table.rows_per_entry`)
    """

    title: str
    cell: Callable[[Any], Cell]
    align: Literal["left", "right"] = "left"
    nowrap: bool = False
    axis: Axis | None = None
    spans: bool = False


def evaluation_column(evals: Sequence[str]) -> list[Column]:
    """The column of the evaluation's name, if there are several."""
    return [Column("evaluation", itemgetter("eval"))] if len(evals) > 1 else []


@dataclass(frozen=True, slots=True)
class Table:
    """A table that scrolls sideways on a narrow screen.

    rows            values that the columns read; a string is the heading of a group of rows
    rows_per_entry  rows that share the cells of the columns with `spans`
    cards           cells hold sentences: on a phone each row is a card whose cells name their columns, as in every table with
                    a column of intervals
    """

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Any]
    rows_per_entry: int = 1
    cards: bool = False
