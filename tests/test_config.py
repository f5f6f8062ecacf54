"""Configurations: TOML there and back, assignments, and refusals that name the key."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from annatac_scale.config import from_dict, override, read_toml, to_toml
from annatac_scale.errors import ConfigError


@dataclass(frozen=True)
class Inner:
    width: int = 8
    sizes: tuple[int, ...] = (1, 2)


@dataclass(frozen=True)
class Outer:
    rate: float = 0.5
    name: str = "a"
    on: bool = False
    limit: int | None = None
    inner: Inner = field(default_factory=Inner)


def test_toml_gives_back_an_equal_configuration(tmp_path: Path) -> None:
    config = Outer(rate=1e-4, name='quo"ted', on=True, inner=Inner(width=3, sizes=(5,)))
    (tmp_path / "c.toml").write_text(to_toml(config))
    assert read_toml(Outer, tmp_path / "c.toml") == config


def test_a_file_changes_only_what_it_names(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[inner]\nwidth = 4\n")
    assert read_toml(Outer, tmp_path / "c.toml", Outer(name="b")) == Outer(name="b", inner=Inner(width=4))


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("rate=1e-3", Outer(rate=1e-3)),
        ("rate=2", Outer(rate=2.0)),
        ("name=word", Outer(name="word")),
        ("on=true", Outer(on=True)),
        ("limit=7", Outer(limit=7)),
        ("inner.width=16", Outer(inner=Inner(width=16))),
        ("inner.sizes=[3, 4]", Outer(inner=Inner(sizes=(3, 4)))),
    ],
)
def test_assignments_reach_every_kind_of_field(assignment: str, expected: Outer) -> None:
    assert override(Outer(), [assignment]) == expected


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("rat=1", "rat: no such setting; there are inner, limit, name, on, rate"),
        ("inner.depth=1", r"inner\.depth: no such setting"),
        ("rate=fast", "rate: found 'fast', expected float"),
        ("on=1", "on: found 1, expected bool"),
        ("limit=true", "limit: found True"),
        ("inner.width=1.5", r"inner\.width: found 1.5, expected int"),
        ("inner=3", "inner: found 3, expected Inner"),
        ("rate", "expected key=value"),
    ],
)
def test_a_wrong_assignment_is_refused_by_name(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        override(Outer(), [assignment])


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("rate = \n")
    with pytest.raises(ConfigError, match=r"c\.toml: cannot be read as TOML"):
        read_toml(Outer, tmp_path / "c.toml")
    with pytest.raises(ConfigError, match=r"missing\.toml"):
        read_toml(Outer, tmp_path / "missing.toml")


def test_unknown_keys_of_a_mapping_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"here: x: no such setting"):
        from_dict(Outer, {"x": 1}, place="here: ")
