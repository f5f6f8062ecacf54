"""Frozen dataclasses to and from TOML, and ``--set key=value``. Knows no field of any configuration.

A configuration is a frozen dataclass whose fields are bool, int, float, str, tuples of these, or further
configurations; ``--set encoder.width=64`` reaches into them.
"""

import dataclasses
import tomllib
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import tomli_w

from annatac_scale.errors import ConfigError

C = TypeVar("C")


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as nested plain values; fields that are None are left out, tuples become lists."""
    plain: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            plain[field.name] = to_dict(value)
        elif isinstance(value, tuple):
            plain[field.name] = list(value)
        elif value is not None:
            plain[field.name] = value
    return plain


def from_dict(kind: type[C], values: Mapping[str, Any], base: C | None = None, place: str = "") -> C:
    """A ``kind`` from nested plain values; what is not given is taken from ``base``, else from the defaults.

    place: where the values come from, for messages. Raises ConfigError on unknown keys and wrong types.
    """
    hints = get_type_hints(kind)
    fields = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    given: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(f"{place}{key}: no such setting; there are {', '.join(sorted(fields))}")
        inner = getattr(base, key, None)
        if dataclasses.is_dataclass(hints[key]) and isinstance(value, Mapping):
            given[key] = from_dict(hints[key], value, inner, f"{place}{key}.")
        else:
            given[key] = _checked(value, hints[key], f"{place}{key}")
    return dataclasses.replace(base, **given) if base is not None else kind(**given)  # type: ignore[type-var]


def read_toml(kind: type[C], path: Path | str, base: C | None = None) -> C:
    """A ``kind`` from a TOML file. Raises ConfigError naming the file and the key or line."""
    try:
        values = tomllib.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot be read as TOML ({error}); give a TOML file such as a run's config.toml"
        ) from error
    return from_dict(kind, values, base, f"{path}: ")


def to_toml(config: Any) -> str:
    """The configuration as TOML that ``read_toml`` takes back."""
    return tomli_w.dumps(to_dict(config))


def override(config: C, assignments: Iterable[str]) -> C:
    """The configuration with ``key=value`` assignments (dotted keys, TOML values, bare words are strings)."""
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise ConfigError(
                f"--set {assignment!r}: expected key=value; write for example --set train.learning_rate=1e-3"
            )
        value: Any = _parse(text.strip())
        for name in reversed(key.strip().split(".")):
            value = {name: value}
        config = from_dict(type(config), value, config, "--set ")
    return config


def _parse(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _checked(value: Any, hint: Any, place: str) -> Any:
    """``value`` if it is of the hinted type (an int passes for a float), else ConfigError."""
    if get_origin(hint) in (Union, types.UnionType):
        options = get_args(hint)
        if value is None and type(None) in options:
            return None
        hint = next(option for option in options if option is not type(None))
    if get_origin(hint) is tuple and isinstance(value, list | tuple):
        return tuple(_checked(item, get_args(hint)[0], place) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    expected = get_origin(hint) or hint
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise ConfigError(f"{place}: found {value!r}, expected {getattr(hint, '__name__', hint)}")
    return value
