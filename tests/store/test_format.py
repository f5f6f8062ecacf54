"""A fresh store against docs/store-format.md, read by plain Python, without zarr and without our reader.

Tables, tree, JSON, hex and code of the document are taken as they stand there, so that it cannot drift.
"""

import ast
import hashlib
import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from plain_store import (
    DOCUMENT,
    Row,
    attributes,
    crc32c,
    documented_tree,
    fenced,
    keys,
    metadata,
    plain_array,
    plain_block,
    plain_blocks,
    plain_column,
    plain_digest,
    plain_islands_sha256,
    plain_shard,
    plain_x_sha256,
    section,
    table,
)

from annatac_scale.errors import StoreError
from annatac_scale.genome.assembly import Assembly
from annatac_scale.genome.islands import IslandSpace
from annatac_scale.store import schema
from annatac_scale.store.codec import encode_block
from annatac_scale.store.draft import open_draft
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.store import IslandStore
from annatac_scale.store.writer import SampleWriter, committed_samples, create_store, replace_obs

ASSEMBLY = Assembly("toy", ("chr1", "chr2", "chrM"), (1_000_000, 302_000, 300))
SPACE = IslandSpace.all(
    ASSEMBLY,
    pd.DataFrame(
        {
            "chrom": ["chr1", "chr1", "chr2"],
            "position": [7, 9, 301_999],
            "strand": "+",
            "gene": ["A", "B", "Ccdc-é"],
            "type": "protein_coding",
        }
    ),
)
MEASURED = np.arange(len(SPACE)) % 7 != 3


def some_rows(n_cells: int, seed: int) -> list[Row]:
    """Rows of (island, level) in measured islands; cells 500 to 749, a whole block, are closed."""
    rng = np.random.default_rng(seed)
    measured = np.flatnonzero(MEASURED)
    rows: list[Row] = []
    for cell in range(n_cells):
        islands = np.sort(rng.choice(measured, rng.integers(0, 9), replace=False))
        rows.append([] if 500 <= cell < 750 else [(int(i), int(rng.integers(1, 6))) for i in islands])
    return rows


ROWS: dict[str, list[Row]] = {"pbmc": some_rows(4100, 0), "closed": [[] for _ in range(10)], "none": []}


def open_islands(rows: list[Row]) -> OpenIslands:
    flat = [pair for row in rows for pair in row]
    islands, levels = np.array([i for i, _ in flat], np.int32), np.array([v for _, v in flat], np.uint8)
    return OpenIslands(np.cumsum([0, *(len(row) for row in rows)]), islands, levels)


def some_obs(rows: list[Row]) -> pd.DataFrame:
    n = len(rows)
    return pd.DataFrame(
        {
            "n_open": np.array([len(row) for row in rows], np.int64),
            "cell_type": pd.Categorical([["B", "T", "µ-glia 🧠", None][i % 4] for i in range(n)]),
            "note": np.full(n, "same", object),
            "doublet": np.arange(n) % 3 == 0,
            "score": np.linspace(0, 1, n, dtype=np.float32),
            "lane": np.arange(n, dtype=np.uint8),
        },
        index=[f"BC{i:05d}-1" for i in range(n)],
    )


def write_sample(path: Path, name: str, rows: list[Row]) -> None:
    with SampleWriter(path, name, len(rows)) as writer:
        for shard, first in enumerate(range(0, len(rows), schema.SHARD_CELLS)):
            writer.write_shard(shard, open_islands(rows[first : first + schema.SHARD_CELLS]))
        writer.commit(some_obs(rows), MEASURED, {"kind": "fragments", "inputs": []})


def write_store(path: Path) -> Path:
    create_store(path, SPACE, "insertion")
    for name, rows in ROWS.items():
        write_sample(path, name, rows)
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("format") / "atlas.zarr")


@pytest.fixture(scope="module")
def _template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "atlas.zarr"
    create_store(path, SPACE, "insertion")
    write_sample(path, "s", ROWS["pbmc"][:20])
    return path


@pytest.fixture
def small(_template: Path, tmp_path: Path) -> Path:
    """A store with one sample of 20 cells, to be changed."""
    return shutil.copytree(_template, tmp_path / "atlas.zarr")


def test_the_document_names_exactly_the_constants_of_the_schema() -> None:
    documented = {name: ast.literal_eval(value.strip("`")) for name, value, _ in table("Constants")}
    assert documented == {name: value for name, value in vars(schema).items() if name.isupper()}
    assert DOCUMENT.startswith(f"# The island store, format {schema.FORMAT_VERSION}\n")
    assert table(f"The island store, format {schema.FORMAT_VERSION}")[0][0] == schema.FORMAT_VERSION


def test_every_link_of_the_document_leads_somewhere() -> None:
    headings = re.findall(r"^#+ (.*)$", DOCUMENT, flags=re.M)
    anchors = {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]*)\)", DOCUMENT)) <= anchors


def test_the_tree_on_disk_is_the_documented_one(store: Path) -> None:
    nodes = documented_tree()
    on_disk = {
        str(file.parent.relative_to(store)): metadata(file.parent)
        for file in store.rglob("zarr.json")
        if file.parent != store
    }
    for name in ROWS:
        for node in nodes:
            path = "/".join(node.path).replace("<sample>", name)
            assert "<" in path or path in on_disk
    for path, meta in on_disk.items():
        is_array = meta["node_type"] == "array"
        node = next(n for n in nodes if re.fullmatch(n.pattern, path) and (n.shape is not None) == is_array)
        if node.shape is not None:
            n_cells = len(ROWS.get(path.split("/")[1], []))
            sizes = {"n_islands": len(SPACE), "n_chromosomes": 3, "n_cells": n_cells}
            assert meta["data_type"] in node.dtypes
            assert all(
                size == sizes.get(name, size) for size, name in zip(meta["shape"], node.shape, strict=True)
            )
        elif not node.says.startswith("attribute"):
            kind = node.says.split(",")[0].replace(" ", "")
            version = re.search(rf"`{kind}` ([0-9.]+)", section("Tree"))
            assert version is not None
            assert meta["attributes"]["encoding-type"] == kind
            assert meta["attributes"]["encoding-version"] == version[1]


def test_no_other_files_lie_in_the_store(store: Path) -> None:
    files = {str(file.relative_to(store)) for file in store.rglob("*") if file.is_file()}
    other = {file for file in files if not re.search(r"(^|/)zarr\.json$|/c\.0$|/X/c/[0-9]+/0$", file)}
    assert other == {".lock"}
    assert not [
        path for path in store.rglob("zarr.json") if "consolidated_metadata" in json.loads(path.read_text())
    ]


def test_the_root_has_the_documented_attributes(store: Path) -> None:
    root = attributes(store)
    assert list(root) == list(schema.ROOT_KEYS) == keys("Root")
    assert (root["format"], root["version"]) == ("annatac_scale.island_store", "2.0")
    assert root["assembly"] == "toy"
    assert root["chromosomes"] == ["chr1", "chr2", "chrM"]
    assert (root["width_bp"], root["selection"], root["n_islands"], root["n_levels"]) == (5000, "all", 262, 5)
    counting = next(says for name, says in table("Root") if name == "`counting`")
    assert tuple(re.findall(r'`"([a-z-]+)"`', counting)) == schema.COUNTINGS
    assert root["counting"] in schema.COUNTINGS


@pytest.mark.parametrize("frame", ["islands", "samples/pbmc/var", "samples/none/var"])
def test_islands_and_var_hold_the_islands_in_order(store: Path, frame: str) -> None:
    root, folder = attributes(store), store / frame
    columns = ["chrom", "start", "end", "genes"] + ["measured"] * (frame != "islands")
    assert attributes(folder)["column-order"] == columns
    assert attributes(folder)["_index"] == "island"
    assert plain_array(folder / "chrom/categories") == root["chromosomes"]
    chrom, start, end, genes = (plain_column(folder / name) for name in columns[:4])
    assert plain_islands_sha256(root, folder) == root["islands_sha256"]
    order = [root["chromosomes"].index(c) for c in chrom]
    places = list(zip(order, start, end, strict=True))
    assert places == sorted(places)
    assert all(a[0] < b[0] or a[2] <= b[1] for a, b in itertools.pairwise(places))
    assert plain_array(folder / "island") == [
        f"{c}:{a}-{b}" for c, a, b in zip(chrom, start, end, strict=True)
    ]
    assert [gene for gene in genes if gene] == ["A,B", "Ccdc-é"]


def test_var_says_what_is_measured(store: Path) -> None:
    assert plain_array(store / "samples/pbmc/var/measured") == MEASURED.tolist()


def test_the_index_lists_the_samples_in_order_of_commit(store: Path) -> None:
    index = attributes(store / "samples")["index"]
    assert [list(entry) for entry in index] == [keys("The index of samples")] * 3
    assert [entry["name"] for entry in index] == list(ROWS)
    assert [entry["n_cells"] for entry in index] == [4100, 10, 0]
    assert [entry["n_open"] for entry in index] == [sum(map(len, rows)) for rows in ROWS.values()]
    pbmc = [sum(map(len, rows)) for rows in (ROWS["pbmc"][:4000], ROWS["pbmc"][4000:])]
    assert [entry["shard_open"] for entry in index] == [pbmc, [0], []]


def test_the_metadata_of_x_is_the_documented_one(store: Path) -> None:
    text = fenced("json")[0].replace('"n_islands"', str(len(SPACE)))
    for name in ("SHARD_CELLS", "BLOCK_CELLS", "ZSTD_LEVEL", "CODEC"):
        text = text.replace(f'"{name}"', json.dumps(getattr(schema, name)))
    for name, rows in ROWS.items():
        found = metadata(store / "samples" / name / "X")
        documented = json.loads(text)
        assert {key: found[key] for key in documented} == documented
        assert found["shape"] == [len(rows), len(SPACE)]


@pytest.mark.parametrize("name", ROWS)
def test_a_decoder_written_from_the_document_reads_every_cell(store: Path, name: str) -> None:
    expected = ROWS[name]
    blocks = list(itertools.chain.from_iterable(plain_blocks(store / "samples" / name / "X", len(expected))))
    rows = [row for block in blocks for row in plain_block(block, 250, len(SPACE))]
    assert rows[: len(expected)] == expected
    assert not any(rows[len(expected) :])


def test_blocks_and_shards_without_open_islands_are_left_out(store: Path) -> None:
    shards = store / "samples/pbmc/X/c"
    assert [block is None for block in plain_shard(shards / "0/0")] == [i == 2 for i in range(16)]
    assert [block is None for block in plain_shard(shards / "1/0")] == [i > 0 for i in range(16)]
    assert not (store / "samples/closed/X/c").exists()
    assert not (store / "samples/none/X/c").exists()


@pytest.mark.parametrize("name", ROWS)
def test_the_digests_are_those_of_the_document(store: Path, name: str) -> None:
    entry = next(entry for entry in attributes(store / "samples")["index"] if entry["name"] == name)
    sample = store / "samples" / name
    assert entry["x_sha256"] == plain_x_sha256(sample / "X", len(ROWS[name]))
    assert entry["digest"] == plain_digest(attributes(store)["islands_sha256"], entry["x_sha256"], sample)


def test_the_digest_of_the_store_is_that_of_the_document(store: Path) -> None:
    index = attributes(store / "samples")["index"]
    lines = [attributes(store)["islands_sha256"], *(f"{entry['name']} {entry['digest']}" for entry in index)]
    assert (
        IslandStore.open(store).digest
        == hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
    )


def test_the_digest_of_a_replaced_obs_is_that_of_the_document(small: Path) -> None:
    replace_obs(small, "s", some_obs(ROWS["pbmc"][:20])[["lane"]].assign(donor="D5 ü"))
    entry = attributes(small / "samples")["index"][0]
    expected = plain_digest(attributes(small)["islands_sha256"], entry["x_sha256"], small / "samples/s")
    assert entry["digest"] == expected


def test_obs_holds_numbers_and_text(store: Path) -> None:
    obs, expected = store / "samples/pbmc/obs", some_obs(ROWS["pbmc"])
    assert attributes(obs)["_index"] == "barcode"
    assert attributes(obs)["column-order"] == list(expected.columns)
    assert plain_array(obs / "barcode") == list(expected.index)
    for name, column in expected.items():
        assert plain_column(obs / name) == column.astype(object).where(column.notna(), None).tolist()


def test_the_conversion_has_the_documented_attributes(store: Path) -> None:
    for name in ROWS:
        conversion = attributes(store / "samples" / name / schema.CONVERSION)
        entry = next(entry for entry in attributes(store / "samples")["index"] if entry["name"] == name)
        assert set(conversion) - {"encoding-type", "encoding-version"} == set(keys("uns/conversion"))
        assert conversion["complete"] is True
        assert conversion["conversion"] == {"kind": "fragments", "inputs": []}
        assert all(conversion[key] == entry[key] for key in ("n_cells", "n_open", "x_sha256"))


def test_the_worked_example_is_what_the_codec_writes() -> None:
    rows = [[(island, level) for island, level in row] for row in json.loads(fenced("rows")[0])]
    encoded = bytes.fromhex(re.sub("#.*", "", fenced("hex")[0]))
    stated = re.search(r"are these (\d+) bytes", DOCUMENT)
    assert stated is not None
    assert len(encoded) == int(stated[1])
    assert plain_block(encoded, 4, 354) == rows
    assert encode_block(open_islands(rows), 4) == encoded


def test_the_code_of_the_document_runs(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(store.parent)
    runs: list[dict[str, Any]] = [{}, {}, {}]
    for code, names in zip(fenced("python"), runs, strict=True):
        exec(code, names)
    with_zarr, with_anndata, with_ours = runs
    dense = np.zeros((250, len(SPACE)), np.uint8)
    for cell, row in enumerate(ROWS["pbmc"][:250]):
        for island, level in row:
            dense[cell, island] = level
    assert with_zarr["names"] == list(ROWS)
    np.testing.assert_array_equal(with_zarr["levels"], dense)
    np.testing.assert_array_equal(with_anndata["known"].X[:250], dense[:, MEASURED])
    assert with_anndata["cells"].uns == {"conversion": {}}
    np.testing.assert_array_equal(with_ours["matrix"].toarray(), dense[:100])


def edit(folder: Path, **changes: Any) -> None:
    meta = metadata(folder)
    meta["attributes"] |= changes
    (folder / "zarr.json").write_text(json.dumps(meta))


def add_group(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {"a": 1}}')


def add_entry_key(path: Path) -> None:
    index = attributes(path / "samples")["index"]
    edit(path / "samples", index=[{**entry, "n_reads": 5} for entry in index])


def add_column(frame: Path) -> None:
    meta = metadata(frame / "start")
    (frame / "gc").mkdir()
    (frame / "gc/zarr.json").write_text(json.dumps(meta))
    edit(frame, **{"column-order": [*attributes(frame)["column-order"], "gc"]})


ADDITIONS = {
    "minor version": lambda path: edit(path, version="2.7"),
    "root attribute": lambda path: edit(path, licence="CC0"),
    "root group": lambda path: add_group(path / "motifs"),
    "attribute of samples": lambda path: edit(path / "samples", origin="here"),
    "key of an index entry": add_entry_key,
    "group in a sample": lambda path: add_group(path / "samples/s/obsm"),
    "group in uns": lambda path: add_group(path / "samples/s/uns/mylab.doublets"),
    "attribute of a sample": lambda path: edit(path / "samples/s", donor="D5"),
    "attribute of the conversion": lambda path: edit(path / "samples/s/uns/conversion", host="x"),
    "attribute of X": lambda path: edit(path / "samples/s/X", unit="level"),
    "column of islands": lambda path: add_column(path / "islands"),
    "column of var": lambda path: add_column(path / "samples/s/var"),
    "file with a dot": lambda path: (path / ".notes").write_text("mine"),
    "sample without commit": lambda path: add_group(path / "samples/half"),
}


@pytest.mark.parametrize("add", ADDITIONS.values(), ids=ADDITIONS.keys())
def test_additions_of_a_minor_version_break_nothing(small: Path, add: Any) -> None:
    add(small)
    check_small(IslandStore.open(small), 20)


def check_small(store: IslandStore, n_cells: int) -> None:
    """That the store reads as the first cells of "pbmc"."""
    read, expected = store.read(np.arange(n_cells)), open_islands(ROWS["pbmc"][:n_cells])
    assert store.n_cells == len(store.obs()) == n_cells
    np.testing.assert_array_equal(read.offsets, expected.offsets)
    np.testing.assert_array_equal(read.islands, expected.islands)
    np.testing.assert_array_equal(read.levels, expected.levels)
    assert store.space.sha256 == SPACE.sha256
    for sample in store.samples.values():
        np.testing.assert_array_equal(sample.measured, MEASURED)


def test_samples_are_added_beside_additions_and_keep_them(small: Path) -> None:
    for add in ADDITIONS.values():
        add(small)
    write_sample(small, "later", ROWS["pbmc"][20:30])
    replace_obs(small, "s", some_obs(ROWS["pbmc"][:20]))
    check_small(IslandStore.open(small), 30)
    assert attributes(small)["licence"] == "CC0"
    samples = attributes(small / "samples")
    assert samples["origin"] == "here"
    assert [entry.get("n_reads") for entry in samples["index"]] == [5, None]


def test_islands_that_do_not_fit_their_sha256_are_refused(small: Path) -> None:
    edit(small, islands_sha256="0" * 64)
    with pytest.raises(StoreError, match="sha256"):
        _ = IslandStore.open(small).space


def test_a_draft_has_the_documented_files(small: Path) -> None:
    with open_draft(small, "t", {"input": "x"}) as draft:
        draft.write_shard(0, open_islands(ROWS["pbmc"][:4000]))
        draft.write_shard(1, open_islands(ROWS["closed"]))
        assert sorted(file.name for file in (small / ".incoming").iterdir()) == [".t.lock", "t"]
        folder = small / ".incoming/t"
        found = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
        assert found == ["plan.json", "sample/X/c/0/0", "shards/0.json", "shards/1.json"]
        assert [re.sub("<s>", "0", key) for key in keys("Writing")] == [
            "plan.json",
            "shards/0.json",
            "sample/",
        ]
        assert json.loads((folder / "plan.json").read_text()) == {"input": "x"}
        data = (folder / "sample/X/c/0/0").read_bytes()
        blocks = next(plain_blocks(folder / "sample/X", 4000))
        assert json.loads((folder / "shards/0.json").read_text()) == {
            "shard": 0,
            "n_cells": 4000,
            "n_open": sum(map(len, ROWS["pbmc"][:4000])),
            "sha256": hashlib.sha256(b"".join(blocks)).hexdigest(),
            "bytes": len(data),
            "crc32c": int.from_bytes(crc32c(data), "little"),
        }
        assert json.loads((folder / "shards/1.json").read_text())["bytes"] == 0
        assert committed_samples(small) == ["s"]
        draft.discard()
    assert not (small / ".incoming").exists()
