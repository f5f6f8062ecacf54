"""Cells by what obs says of them: ``tissue == 'lung' and n_open >= 500``.

A missing value compares neither as true nor as false, as in SQL: whatever hangs on it leaves the cell out, but for
``is None`` and ``is not None``.
"""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow import acero

from annatac_scale.errors import InputError
from annatac_scale.store.columns import obs_columns, obs_names
from annatac_scale.store.store import IslandStore
from annatac_scale.stream.conditions import EXAMPLE, Compiler, ConditionText, Piece, one_line

Ints = NDArray[np.int64]

_PIECE = 2**20
"""Cells that are looked at a time: what is computed on the way, and text spelled out, is held for these alone."""

_CELL = "/cell"
"""Where an expression's rows are numbered beside the columns, none of which has a slash in its name."""

_BESIDE_OBS = ("sample", "barcode")
_VALUES_SHOWN = 5


def cells_where(store: IslandStore, where: "str | pc.Expression") -> Ints:
    """Ids of the cells that a condition holds for: int64, increasing.

    where: text of == != < <= > >=, chains of them, ``in`` and ``not in`` with a list, ``is None``, ``is not None``,
        and, or, not, parentheses; columns of obs, ``sample`` and ``barcode`` by their names, or by field("a name that
        is no word"); text in quotes, numbers, True and False. A column of truth values may stand alone.
        Or a pyarrow expression over the columns as ``obs_columns`` has them, text as plain strings

    Raises InputError where the condition is not understood, does not fit the columns, or leaves no cell.
    """
    if isinstance(where, str):
        text = ConditionText.of(where)
        compiler, said = Compiler(store, text), text.said
        condition, columns = compiler.condition(text.tree()), compiler.columns
        cells = _cells(store, columns, lambda piece, _: _places(condition(piece)))
    elif isinstance(where, pc.Expression):
        said = f"where {one_line(str(where))}"
        columns = _columns_of(store, where, said)
        cells = _cells(store, columns, lambda piece, n: _filtered(store, where, said, piece, n))
    else:
        raise InputError(f"where = {where!r}: expected text or a pyarrow expression; {EXAMPLE}")
    if not len(cells):
        held = "".join(f"; {_held(name, column)}" for name, column in columns.items())
        raise InputError(f"{said}: holds for none of {store.n_cells:,} cells{held}; ask for what is there")
    return cells


def _cells(store: IslandStore, columns: Piece, find: Callable[[Piece, int], Ints]) -> Ints:
    """What ``find`` finds in each piece of the columns, of so many cells, as ids."""
    found = [np.empty(0, np.int64)]
    for start in range(0, store.n_cells, _PIECE):
        n = min(_PIECE, store.n_cells - start)
        found.append(start + find({name: column.slice(start, n) for name, column in columns.items()}, n))
    return np.concatenate(found)


def _places(holds: pa.BooleanArray) -> Ints:
    return np.flatnonzero(holds.fill_null(False).to_numpy(zero_copy_only=False))


def _filtered(store: IslandStore, where: "pc.Expression", said: str, piece: Piece, n: int) -> Ints:
    """Where an expression is true; in this thread, for Arrow's own threads outlived some programs that used them."""
    spelled = {
        name: column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
        for name, column in piece.items()
    }
    table = pa.table({**spelled, _CELL: np.arange(n)})
    plan = [
        acero.Declaration("table_source", acero.TableSourceNodeOptions(table)),
        acero.Declaration("filter", acero.FilterNodeOptions(where)),
    ]
    try:
        chosen = acero.Declaration.from_sequence(plan).to_table(use_threads=False)
    except pa.ArrowException as error:
        known = ", ".join(sorted([*obs_names(store), *_BESIDE_OBS]))
        raise InputError(
            f"{said}: pyarrow cannot compute it ({one_line(str(error))}); there are the columns {known}; change the "
            "expression"
        ) from error
    return chosen[_CELL].to_numpy()


def _columns_of(store: IslandStore, where: "pc.Expression", said: str) -> dict[str, pa.Array]:
    """The columns that an expression may use: those whose names are in its text, for it does not tell."""
    text = str(where)
    if "FieldPath(" in text:
        raise InputError(
            f"{said}: found a column by its number; expected columns by name; use pyarrow.compute.field('name')"
        )
    table = obs_columns(store, [name for name in (*obs_names(store), *_BESIDE_OBS) if name in text])
    return {name: table[name].combine_chunks() for name in table.column_names}


def _held(name: str, column: pa.Array) -> str:
    """What is in a column, for someone who looked for what is not."""
    if not pa.types.is_dictionary(column.type):
        least, most = pc.min_max(column).as_py().values()
        return f"{name!r} is missing everywhere" if least is None else f"{name!r} is {least} to {most}"
    some = ", ".join(repr(text.as_py()) for text in column.dictionary[:_VALUES_SHOWN])
    return f"{name!r} holds {some}{' and more' if len(column.dictionary) > _VALUES_SHOWN else ''}"
