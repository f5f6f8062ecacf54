"""The house's rules, read from the sources: floors, fences, no cycles, light start, short files."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import annatac_scale

ROOT = Path(annatac_scale.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

FLOORS = (
    ("errors", "config", "memory", "progress", "progress_lines"),
    ("genome",),
    ("store",),
    ("ingest",),
    ("stream",),
    ("model",),
    ("train",),
    ("annotate",),
    ("biology",),
    ("report",),
    ("baseline",),
    ("demonstration", "api", "terminal", "cli", "cli_options", "__init__", "__main__"),
)
"""From the lowest to the highest: a room may import from its own and from lower floors."""

FENCES = {
    "zarr": ("store/",),
    "numcodecs": ("store/",),
    "numba": ("store/", "ingest/", "stream/"),
    "anndata": ("store/", "ingest/"),
    "h5py": ("store/", "ingest/"),
    "dask": ("ingest/", "train/positions.py"),
    "ray": ("train/cluster.py", "annotate/cluster.py"),
    "torch": ("stream/", "model/", "train/", "annotate/", "biology/"),
    "safetensors": ("model/",),
    "pronto": ("model/ontology.py",),
    "igraph": ("annotate/clusters.py",),
    "pynndescent": ("annotate/clusters.py",),
    "sklearn": ("train/", "annotate/", "baseline.py", "demonstration.py"),
    "click": ("cli.py", "cli_options.py"),
    "rich": ("terminal.py",),
    "matplotlib": ("report/", "biology/"),
}
"""Where alone a heavy library may be imported, in functions too."""

WHEN_CALLED = (ROOT / "api.py", ROOT / "demonstration.py")
"""The one import that closes a circle: the demo calls the API, which offers the demo as one of its functions."""

MOST_LINES = 500
HEAVY = ("torch", "ray", "dask", "matplotlib")


@dataclass(frozen=True)
class Import:
    """An import statement: the module that makes it, and the module or name that it takes."""

    file: Path
    line: int
    target: str
    typing_only: bool

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.target}"


def imports_of(file: Path, source: str | None = None) -> list[Import]:
    """All imports of a file, those in functions too."""
    tree = ast.parse(file.read_text() if source is None else source)
    typing_only = {
        id(node) for test in ast.walk(tree) if _tests_type_checking(test) for node in ast.walk(test)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parent = file.relative_to(ROOT.parent).with_suffix("").parts[: -node.level]
            base = ".".join([*(parent if node.level else ()), *filter(None, [node.module])])
            targets = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        found += [Import(file, node.lineno, target, id(node) in typing_only) for target in targets]
    return found


def _tests_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def all_imports() -> Iterator[Import]:
    for file in FILES:
        yield from imports_of(file)


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def own_module(target: str) -> Path | None:
    """The file of one of our own modules that a target names, or that it is in."""
    parts = target.split(".")
    if parts[0] != ROOT.name:
        return None
    for n in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[1:n])
        if path.with_suffix(".py").is_file() and n > 1:
            return path.with_suffix(".py")
        if (path / "__init__.py").is_file():
            return path / "__init__.py"
    return None


def floor_of(room: str) -> int:
    floors = [number for number, rooms in enumerate(FLOORS) if room in rooms]
    assert floors, f"{room} is on no floor: add it to FLOORS"
    return floors[0]


def breaks_floors(found: Import) -> bool:
    target = own_module(found.target)
    if target is None or found.typing_only:
        return False
    return floor_of(room_of(target)) > floor_of(room_of(found.file))


def breaks_fence(found: Import) -> bool:
    allowed = FENCES.get(found.target.split(".")[0])
    place = found.file.relative_to(ROOT).as_posix()
    return allowed is not None and not any(place == one or place.startswith(one) for one in allowed)


def test_every_file_is_on_a_floor() -> None:
    assert len(FILES) > 40
    for file in FILES:
        floor_of(room_of(file))


def test_no_folder_imports_from_a_floor_above() -> None:
    assert [str(found) for found in all_imports() if breaks_floors(found)] == []


def test_heavy_libraries_stay_inside_their_fences() -> None:
    assert [str(found) for found in all_imports() if breaks_fence(found)] == []


def test_the_rules_are_seen_to_be_broken() -> None:
    file = ROOT / "genome" / "islands.py"

    def broken(source: str, rule: object) -> list[str]:
        return [found.target for found in imports_of(file, source) if rule(found)]  # type: ignore[operator]

    above = "from annatac_scale.store.store import IslandStore"
    assert broken(above, breaks_floors) == ["annatac_scale.store.store.IslandStore"]
    assert broken("def f():\n  from ..store import schema", breaks_floors) == ["annatac_scale.store.schema"]
    assert broken("import annatac_scale.cli", breaks_floors) == ["annatac_scale.cli"]
    assert broken("from annatac_scale.errors import InputError\nfrom . import rows", breaks_floors) == []
    assert broken(f"if TYPE_CHECKING:\n  {above}", breaks_floors) == []
    assert broken("def f():\n  import torch.nn as nn", breaks_fence) == ["torch.nn"]
    assert broken("import numpy", breaks_fence) == []


def test_no_module_imports_itself_through_others() -> None:
    graph: dict[Path, set[Path]] = {file: set() for file in FILES}
    for found in all_imports():
        target = own_module(found.target)
        if target is not None and not found.typing_only and (found.file, target) != WHEN_CALLED:
            graph[found.file].add(target)
    done: set[Path] = set()

    def visit(file: Path, road: tuple[Path, ...]) -> None:
        if file in road:
            names = [p.relative_to(ROOT).as_posix() for p in (*road[road.index(file) :], file)]
            pytest.fail(f"circular import: {' -> '.join(names)}")
        if file not in done:
            for target in sorted(graph[file]):
                visit(target, (*road, file))
            done.add(file)

    for file in FILES:
        visit(file, ())


IMPORT_ALONE = """
import importlib, json, sys
importlib.import_module({module!r})
print(json.dumps([name for name in {heavy!r} if name in sys.modules]))
"""

ASK_FOR_HELP = """
import json, sys
from annatac_scale.cli import main
for command in [None, *main.commands]:
    try:
        main([*([command] if command else []), "--help"])
    except SystemExit as leaving:
        assert leaving.code == 0
print(json.dumps([name for name in {heavy!r} if name in sys.modules]))
"""


def heavy_after(script: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("module", ["annatac_scale", "annatac_scale.cli", "annatac_scale.store.codec"])
def test_importing_what_all_need_loads_neither_torch_nor_ray_nor_dask(module: str) -> None:
    assert heavy_after(IMPORT_ALONE.format(module=module, heavy=HEAVY)) == []


def test_the_heavy_libraries_would_be_seen() -> None:
    assert heavy_after(IMPORT_ALONE.format(module="dask", heavy=HEAVY)) == ["dask"]


def test_help_of_every_command_loads_neither_torch_nor_ray_nor_dask() -> None:
    assert heavy_after(ASK_FOR_HELP.format(heavy=HEAVY)) == []


def test_nothing_that_can_run_code_is_loaded_from_files() -> None:
    unsafe = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
    harmless = "pickle.UnpicklingError"  # what torch.load raises of a file that it refuses
    loaders = [found for found in all_imports() if found.target.split(".")[0] in unsafe]
    assert [str(found) for found in loaders if found.target != harmless] == []
    for file, call in all_calls():
        name = ast.unparse(call.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        place = f"{file.relative_to(ROOT)}:{call.lineno}"
        assert name != "torch.load" or given.get("weights_only") == "True", place
        assert given.get("allow_pickle", "False") == "False", place
        assert not name.endswith("read_pickle"), place
        assert name not in ("eval", "exec"), place


def test_only_the_command_line_and_ray_workers_print() -> None:
    printing = {file.relative_to(ROOT).as_posix() for file, call in all_calls() if is_named(call, "print")}
    assert printing <= {"cli.py", "train/cluster.py"}


def test_no_handler_catches_whatever_comes() -> None:
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ExceptHandler):
                caught = "" if node.type is None else ast.unparse(node.type)
                place = f"{file.relative_to(ROOT)}:{node.lineno}"
                reraises = any(isinstance(line, ast.Raise) for line in node.body)
                assert caught not in ("", "Exception", "BaseException") or reraises, place


def all_calls() -> Iterator[tuple[Path, ast.Call]]:
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                yield file, node


def is_named(call: ast.Call, name: str) -> bool:
    return isinstance(call.func, ast.Name) and call.func.id == name


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_no_file_is_long(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= MOST_LINES
