"""Conditions on obs as text: read by Python's parser, checked node by node, computed by Arrow's kernels.

Only the few kinds of nodes that are allowed get that far, and none is ever run. They do not become pyarrow expressions:
pyarrow walks those by recursion, and some thousand comparisons joined by ``or`` ended the process.
"""

import ast
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from annatac_scale.errors import InputError
from annatac_scale.store.columns import obs_columns
from annatac_scale.store.store import IslandStore

_LONGEST = 10**6
_DEEPEST = 100
EXAMPLE = "expected comparisons of obs columns, as tissue == 'lung' and n_open >= 500"
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], pa.Array]] = {
    ast.Eq: pc.equal,
    ast.NotEq: pc.not_equal,
    ast.Lt: pc.less,
    ast.LtE: pc.less_equal,
    ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
}
_MIRRORED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.Gt,
    ast.Gt: ast.Lt,
    ast.LtE: ast.GtE,
    ast.GtE: ast.LtE,
}
_LISTS = ast.List | ast.Tuple | ast.Set
_INSTEAD = {ast.BitAnd: "and", ast.BitOr: "or", ast.Invert: "not"}

Literal = str | int | float | bool
Piece = Mapping[str, pa.Array]
"""The same cells of each column."""
Condition = Callable[[Piece], pa.BooleanArray]
"""What is true, false or null of each cell of a piece."""
_SHOWN = 200


def one_line(text: str) -> str:
    """A text as messages show it."""
    line = " ".join(text.encode(errors="backslashreplace").decode().split())
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}..."


@dataclass(frozen=True)
class ConditionText:
    """A condition as it was given. source: what is parsed; in parentheses where it runs over lines"""

    text: str
    source: str

    @classmethod
    def of(cls, where: str) -> "ConditionText":
        """What is parsed of a text."""
        text = where.strip()
        return cls(text, f"({text}\n)" if re.search(r"[\r\n]", text) else text)

    @property
    def said(self) -> str:
        """The condition, for messages."""
        return f'where "{one_line(self.text)}"'

    def tree(self) -> ast.expr:
        """The syntax tree, of allowed nodes alone."""
        if not self.text:
            raise InputError(f"where: found no text; {EXAMPLE}")
        if len(self.text) > _LONGEST:
            raise InputError(
                f"{self.said}: found {len(self.text):,} characters, expected at most {_LONGEST:,}; choose cells "
                "by ids instead"
            )
        try:
            with warnings.catch_warnings(action="ignore"):  # of odd escapes in strings
                tree = ast.parse(self.source, mode="eval").body
        except SyntaxError as error:
            raise self._not_understood(error) from None
        except (ValueError, RecursionError, MemoryError) as error:
            raise InputError(
                f"{self.said}: cannot be read ({str(error) or 'nested too deeply'}); {EXAMPLE}; write it more simply"
            ) from None
        self._check(tree)
        return tree

    def _not_understood(self, error: SyntaxError) -> InputError:
        place = self._place(error.lineno or 1, error.offset or 1)
        if self.source.splitlines()[(error.lineno or 1) - 1][(error.offset or 1) - 1 :][:1] == "=":
            return InputError(f"{self.said}{place}: found =; expected ==; write ==")
        return InputError(
            f"{self.said}{place}: not understood ({error.msg}); {EXAMPLE}; a column whose name is no word is "
            'field("its name")'
        )

    def _check(self, tree: ast.expr) -> None:
        """Refuse every node that is not among the allowed ones."""
        left: list[tuple[ast.AST, int]] = [(tree, 0)]
        while left:
            node, depth = left.pop()
            if depth > _DEEPEST:
                raise InputError(
                    f"{self.said}: nested more than {_DEEPEST} deep; expected less; write it more simply"
                )
            if isinstance(node, ast.expr):
                self._check_node(node)
            if not isinstance(node, ast.Call):
                left += [(child, depth + 1) for child in ast.iter_child_nodes(node)]

    def _check_node(self, node: ast.expr) -> None:
        fine = isinstance(node, ast.BoolOp | ast.Compare | ast.Name | _LISTS)
        fine |= isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | None)
        fine |= isinstance(node, ast.UnaryOp) and not isinstance(node.op, ast.Invert)
        fine |= isinstance(node, ast.Call) and _field_name(node) is not None
        if fine:
            return
        if isinstance(node, ast.BinOp | ast.UnaryOp) and type(node.op) in _INSTEAD:
            word = _INSTEAD[type(node.op)]
            raise self.error(node, f"expected the word {word}; write {word} between comparisons")
        raise self.error(node, f'{EXAMPLE}; a column whose name is no word is field("its name")')

    def error(self, node: ast.expr, problem: str) -> InputError:
        """What is wrong with a part of the text."""
        lines = re.split(r"\r\n|\r|\n", self.source)
        before = lines[node.lineno - 1].encode()[: node.col_offset].decode()
        found = one_line(ast.get_source_segment(self.source, node) or "")[:60]
        return InputError(f"{self.said}{self._place(node.lineno, len(before) + 1)}: found {found}; {problem}")

    def _place(self, line: int, character: int) -> str:
        if self.source == self.text:
            return f", character {character}"
        return f", line {line}, character {character - (line == 1)}"


def _field_name(call: ast.Call) -> str | None:
    """The name in ``field("name")``; None for any other call."""
    match call:
        case ast.Call(ast.Name("field"), [ast.Constant(str() as name)], []):
            return name
    return None


# From syntax to a condition


@dataclass
class Compiler:
    """Turns an allowed tree into a condition; reads each column when it comes to it."""

    store: IslandStore
    text: ConditionText
    columns: dict[str, pa.Array] = field(default_factory=dict)

    def condition(self, node: ast.expr) -> Condition:
        """The condition that a node is. Raises InputError where it does not fit the columns."""
        match node:
            case ast.BoolOp(operator, parts):
                join = pc.and_kleene if isinstance(operator, ast.And) else pc.or_kleene
                return _joined([self.condition(part) for part in parts], join)
            case ast.UnaryOp(ast.Not(), part):
                return _negated(self.condition(part))
            case ast.Compare(left, operators, rights):
                lefts = [left, *rights[:-1]]
                pairs = zip(lefts, operators, rights, strict=True)
                return _joined([self._pair(*pair) for pair in pairs], pc.and_kleene)
            case ast.Name() | ast.Call():
                return self._flag(node)
        raise self.text.error(node, f"{EXAMPLE}; compare it with a column")

    def _flag(self, node: ast.expr) -> Condition:
        name = self._column(node)
        if name is None or self._kind(name) != "truth values":
            raise self.text.error(
                node, f"it holds {self._kind(name or '')}; expected a comparison; compare it"
            )
        return lambda piece: piece[name]

    def _pair(self, left: ast.expr, operator: ast.cmpop, right: ast.expr) -> Condition:
        name = self._column(left)
        if isinstance(operator, ast.Is | ast.IsNot):
            if name is None or not (isinstance(right, ast.Constant) and right.value is None):
                raise self.text.error(right, "expected `column is None` or `column is not None`; else use ==")
            kernel = pc.is_null if isinstance(operator, ast.Is) else pc.is_valid
            return lambda piece: kernel(piece[name])
        if isinstance(operator, ast.In | ast.NotIn):
            if name is None:
                raise self.text.error(left, "expected a column before `in`; write `column in ['a', 'b']`")
            among = self._among(name, right)
            return among if isinstance(operator, ast.In) else _negated(among)
        other = self._column(right)
        if name is not None and other is not None:
            return self._two_columns(name, other, operator, right)
        if name is not None:
            return self._with_value(name, operator, right)
        if other is not None:
            return self._with_value(other, _MIRRORED.get(type(operator), type(operator))(), left)
        raise self.text.error(left, f"{EXAMPLE}; compare it with a column")

    def _column(self, node: ast.expr) -> str | None:
        """The column that a node names, read; None where it names none."""
        name = node.id if isinstance(node, ast.Name) else None
        if isinstance(node, ast.Call):
            name = _field_name(node)
        if name is None or name in self.columns:
            return name
        try:
            self.columns[name] = obs_columns(self.store, [name])[name].combine_chunks()
        except InputError as error:
            raise self.text.error(node, f"{error}; text is written in quotes") from error
        return name

    def _kind(self, name: str) -> str:
        dtype = self.columns[name].type
        if pa.types.is_dictionary(dtype):
            return "text"
        return "truth values" if pa.types.is_boolean(dtype) else "numbers"

    def _value(self, name: str, node: ast.expr) -> Any:
        """The text, number or truth value of a node, which has to be of the column's kind."""
        sign, constant = 1, node
        if isinstance(node, ast.UnaryOp) and not isinstance(node.op, ast.Not):
            sign, constant = -1 if isinstance(node.op, ast.USub) else 1, node.operand
        value: Any = constant.value if isinstance(constant, ast.Constant) else None
        if value is None:
            hint = "write `is None`" if isinstance(constant, ast.Constant) else "write one, as 'lung' or 500"
            raise self.text.error(node, f"expected a text, a number, True or False; {hint}")
        kind, expected = self._kind(name), _kind_of(value)
        if kind != expected or (constant is not node and kind != "numbers"):
            raise self.text.error(node, f"column {name!r} holds {kind}; expected {_instead(kind, value)}")
        if isinstance(value, str) and not _is_unicode(value):
            raise self.text.error(node, "expected text of Unicode; write it without surrogates")
        if kind == "numbers" and abs(value) >= 2**64 and isinstance(value, int):
            raise self.text.error(node, "expected a number of at most 64 bits; write it as 1e30")
        return sign * value if kind == "numbers" else value

    def _with_value(self, name: str, operator: ast.cmpop, node: ast.expr) -> Condition:
        value = self._value(name, node)
        if isinstance(value, bool) and not isinstance(operator, ast.Eq | ast.NotEq):
            raise self.text.error(node, f"column {name!r} holds truth values; expected == or !=; use these")
        compare, column = _COMPARISONS[type(operator)], self.columns[name]
        if isinstance(value, str):
            return _of_texts(name, compare(column.dictionary, pa.scalar(value)))
        if pa.types.is_integer(column.type) and not _fits(value, column.type):
            return lambda piece: compare(_as_float(piece[name]), pa.scalar(float(value)))
        scalar = pa.scalar(int(value) if pa.types.is_integer(column.type) else value, column.type)
        return lambda piece: compare(piece[name], scalar)

    def _among(self, name: str, node: ast.expr) -> Condition:
        """Whether a column's value is in a list; null where it is missing."""
        if not isinstance(node, _LISTS):
            raise self.text.error(node, "expected a list after `in`; write ['a', 'b']")
        values, column = [self._value(name, item) for item in node.elts], self.columns[name]
        if self._kind(name) == "text":
            return _of_texts(name, pc.is_in(column.dictionary, pa.array(values, pa.string())))
        if pa.types.is_integer(column.type):
            values = [int(value) for value in values if _fits(value, column.type)]
        among = pa.array(values, column.type)
        null = pa.scalar(None, pa.bool_())
        return lambda piece: pc.if_else(pc.is_valid(piece[name]), pc.is_in(piece[name], among), null)

    def _two_columns(self, name: str, other: str, operator: ast.cmpop, node: ast.expr) -> Condition:
        kind = self._kind(name)
        if kind != self._kind(other):
            raise self.text.error(
                node,
                f"it holds {self._kind(other)} and {name!r} {kind}; expected columns of one kind; choose others",
            )
        if kind == "truth values" and not isinstance(operator, ast.Eq | ast.NotEq):
            raise self.text.error(node, "it holds truth values; expected == or !=; use these")
        compare, types = _COMPARISONS[type(operator)], {self.columns[column].type for column in (name, other)}
        if kind == "text":
            return lambda piece: compare(piece[name].dictionary_decode(), piece[other].dictionary_decode())
        if len(types) == 1 or all(pa.types.is_integer(dtype) and dtype != pa.uint64() for dtype in types):
            return lambda piece: compare(piece[name], piece[other])
        return lambda piece: compare(_as_float(piece[name]), _as_float(piece[other]))


def _joined(parts: list[Condition], join: Callable[[Any, Any], pa.Array]) -> Condition:
    return parts[0] if len(parts) == 1 else lambda piece: reduce(join, (part(piece) for part in parts))


def _negated(part: Condition) -> Condition:
    return lambda piece: pc.invert(part(piece))


def _of_texts(name: str, holds: pa.BooleanArray) -> Condition:
    """A condition that is computed once for each text of a column: only codes are looked at cell by cell."""
    return lambda piece: holds.take(piece[name].indices)


def _kind_of(value: Literal) -> str:
    if isinstance(value, bool):
        return "truth values"
    return "text" if isinstance(value, str) else "numbers"


def _instead(kind: str, value: Literal) -> str:
    """What to write where a value is not of a column's kind."""
    if kind == "text":
        return f"text; write it in quotes, as '{value}'"
    if kind == "numbers":
        return "a number; leave out the quotes" if isinstance(value, str) else "a number; write one, as 500"
    return "True or False; write one of these"


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _fits(value: Literal, dtype: pa.DataType) -> bool:
    """Whether a whole-numbered type holds just this number."""
    limits = np.iinfo(dtype.to_pandas_dtype())
    return bool(np.isfinite(float(value)) and value == int(value) and limits.min <= value <= limits.max)


def _as_float(numbers: pa.Array) -> pa.Array:
    return numbers.cast(pa.float64(), safe=False)
