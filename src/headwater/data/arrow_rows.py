"""Rows of Arrow tables as Python values, without losing how a number would be written."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from headwater.errors import error_text
from headwater.tasks.golds import LARGEST_EXACT_FLOAT

_CONTROLS = re.compile("[\x00-\x08\x0e-\x1f]")


@dataclass(frozen=True)
class Unreadable:
    """A cell that has no Python value. `reason` follows the column's name in a message, written only if the cell is needed."""

    reason: str


class ArrowRow(Mapping[str, Any]):
    """One row of an Arrow batch or table, converted cell by cell on access: columns that are not needed cost nothing.

    json_columns  columns of JSON texts, which are parsed (the feature `Json` of `datasets`)

    A cell that cannot be converted is `Unreadable`.

    Example: `dict(ArrowRow(pyarrow.table({"answer": pyarrow.array([0.1], "float32")}), 0))` is `{"answer": 0.1}`.
    """

    def __init__(self, batch: Any, index: int, json_columns: Collection[str] = ()) -> None:
        self._batch, self._index, self._json_columns = batch, index, json_columns

    def __getitem__(self, name: str) -> Any:
        places = self._batch.schema.get_all_field_indices(name)
        if not places:
            raise KeyError(name)
        if len(places) > 1:
            return Unreadable("is the name of several columns; rename all but one")
        try:
            value = python_value(self._batch.column(places[0])[self._index])
            if isinstance(value, float) and value.is_integer() and abs(value) <= LARGEST_EXACT_FLOAT:
                return int(value)  # a table has no spelling of it, and a person would write 27, not 27.0
            return json.loads(value) if name in self._json_columns and isinstance(value, str) else value
        except Exception as error:  # pyarrow raises many kinds
            return Unreadable(f"cannot be read ({error_text(error)})")

    def __iter__(self) -> Iterator[str]:
        return iter(self._batch.schema.names)

    def __len__(self) -> int:
        return len(self._batch.schema.names)


def python_value(scalar: Any) -> Any:
    """The Python value of an Arrow scalar: floats of 16 and 32 bits as their shortest decimal, UTF-8 bytes as text.

    Bytes that are not UTF-8 stay bytes. Raises ValueError for a float that no longer tells which integer it was.

    Example: a `float32` of 0.1, whose exact value is 0.100000001490116…, gives 0.1.
    """
    import pyarrow

    kind = scalar.type
    if not scalar.is_valid:
        return None
    wrapped = (pyarrow.DictionaryScalar, pyarrow.ExtensionScalar, pyarrow.RunEndEncodedScalar, pyarrow.UnionScalar)
    if isinstance(scalar, wrapped):
        return python_value(scalar.value)
    if isinstance(scalar, pyarrow.StructScalar):
        return {name: python_value(part) for name, part in scalar.items()}
    if isinstance(scalar, (pyarrow.ListScalar, pyarrow.ListViewScalar)) and not isinstance(scalar, pyarrow.MapScalar):
        return [python_value(part) for part in scalar.values]
    value = scalar.as_py()
    if pyarrow.types.is_float32(kind) or pyarrow.types.is_float16(kind):
        return _shortest(value, kind.bit_width)
    if isinstance(value, bytes):
        try:
            text = value.decode("utf-8")
        except UnicodeDecodeError:
            return value
        return value if _CONTROLS.search(text) else text  # packed numbers, not text
    return value


def _shortest(value: Any, bits: int) -> float:
    """The shortest decimal that rounds to this value in its width.

    An integer that was rounded to fit is recognised by its many digits: 123456789 is stored as 123456792.
    """
    import numpy as np

    exact = float(value)
    spelling = str((np.float16 if bits == 16 else np.float32)(exact))
    largest, digits = (2**11, 3) if bits == 16 else (2**24, 7)
    rounded = largest < abs(exact) < math.inf and float(spelling) != exact
    if rounded and len(Decimal(spelling).normalize().as_tuple().digits) > digits:
        raise ValueError(
            f"a {bits}-bit float does not hold every integer near {exact:.0f}; store it as an integer or as text"
        )
    return float(spelling)
