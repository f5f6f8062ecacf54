"""The table of quality against pandas on the same obs."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from quality_samples import LINES, fragment_obs, fragments_record, matrix_obs, write_store

from annatac_scale.report.quality import QC_COLUMNS, QualityTable, read_quality
from annatac_scale.store.store import IslandStore


def table_of(path: Path) -> QualityTable:
    return QualityTable(str(path), read_quality(IslandStore.open(path)))


def parsed(text: str) -> pd.DataFrame:
    """The lines of the table by sample: columns are two or more spaces apart."""
    head, *lines = text.split("\n\n")[0].splitlines()
    names = [name for name in head.split("  ") if name.strip()]
    rows = [[field.strip() for field in line.split("  ") if field.strip()] for line in lines]
    return pd.DataFrame(rows, columns=[name.strip() for name in names]).set_index("sample")


@pytest.fixture(scope="module")
def obs() -> pd.DataFrame:
    return fragment_obs(40)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, obs: pd.DataFrame) -> Path:
    """A sample of fragments, one of a matrix, one of fragments without QC, one whose user has our names for texts."""
    bare = obs[["n_fragments", "n_insertions", "n_open", "fraction_in_islands"]]
    own = pd.DataFrame(
        {"n_counts": ["many"] * 3, "tss_enrichment": [1.0, np.nan, 4.0]}, index=["a", "b", "c"]
    )
    return write_store(
        tmp_path_factory.mktemp("qc") / "atlas.zarr",
        {
            "kidney": (obs, fragments_record(obs)),
            "cells": (matrix_obs(30), {"kind": "h5ad"}),
            "bare": (bare, fragments_record(bare) | {"lines": LINES | {"counted": 480, "invalid": 20}}),
            "own": (own, {}),
        },
    )


def test_medians_are_those_of_pandas(path: Path) -> None:
    store = IslandStore.open(path)
    found = {sample["name"]: sample["medians"] for sample in table_of(path).to_dict()["samples"]}
    assert list(found) == ["kidney", "cells", "bare", "own"]
    for name, sample in store.samples.items():
        numbers = sample.obs().select_dtypes("number").median()
        expected = {column: None if pd.isna(numbers[column]) else numbers[column] for column in numbers.index}
        assert {column: found[name][column] for column in sorted(found[name])} == pytest.approx(
            dict(sorted(expected.items()))
        )


def test_barcodes_and_shares_of_lines_come_from_the_conversion(path: Path) -> None:
    kidney, cells, bare, own = table_of(path).to_dict()["samples"]
    assert kidney["n_barcodes"] == 5040
    assert cells["n_barcodes"] is own["n_barcodes"] is None
    assert kidney["lines"] == LINES
    assert kidney["shares_of_lines"] == {
        "counted": 0.5, "outside_islands": 0.3, "not_a_cell": 0.18, "other_contig": 0.02, "invalid": 0.0,
    }  # fmt: skip
    assert sum(bare["shares_of_lines"].values()) == pytest.approx(1)
    assert cells["shares_of_lines"] == own["shares_of_lines"] == {}


def test_the_values_are_json_as_the_standard_has_it(path: Path) -> None:
    json.dumps(table_of(path).to_dict(), allow_nan=False)


def test_the_text_has_a_line_a_sample_and_a_dash_for_what_it_lacks(path: Path, obs: pd.DataFrame) -> None:
    table = parsed(table_of(path).text())
    assert table.index.tolist() == ["kidney", "cells", "bare", "own"]
    assert table.loc["kidney", "cells"] == "40"
    assert float(table.loc["kidney", "fragments"].replace(",", "")) == pytest.approx(
        obs["n_fragments"].median(), abs=0.5
    )
    assert table.loc["kidney", "in peaks"] == f"{100 * obs['fraction_in_peaks'].median():.1f}%"
    assert table.loc["kidney", "TSS enr."] == f"{obs['tss_enrichment'].median():.2f}"
    assert table.loc["kidney", ["barcodes", "lines", "counted", "no cell"]].tolist() == [
        "5,040", "1,010", "50.0%", "18.0%",
    ]  # fmt: skip
    assert table.loc[
        "cells", ["fragments", "in peaks", "TSS enr.", "barcodes", "lines", "counted"]
    ].tolist() == (["-"] * 6)
    assert table.loc["bare", ["counts", "TSS enr.", "chrM"]].tolist() == ["-"] * 3
    assert table.loc["bare", ["counted", "invalid"]].tolist() == ["48.0%", "2.0%"]
    assert table.loc["own", ["counts", "TSS enr."]].tolist() == ["-", "2.50"]


def test_a_column_that_is_nowhere_defined_is_left_out(path: Path) -> None:
    assert "duplicates" not in table_of(path).text()


def test_all_lines_of_the_table_are_aligned(path: Path) -> None:
    head, *lines = table_of(path).text().split("\n\n")[0].splitlines()
    ends = [i for i in range(1, len(head) + 1) if head[i - 1] != " " and head[i : i + 2] in ("  ", "")]
    for line in lines:
        assert len(line) == len(head)
        assert all(line[end - 1] != " " for end in ends[2:])


def test_a_matrix_alone_has_no_columns_of_fragments(tmp_path: Path) -> None:
    path = write_store(tmp_path / "m.zarr", {"cells": (matrix_obs(30), {"kind": "h5ad"})})
    assert parsed(table_of(path).text()).columns.tolist() == ["from", "cells", "counts", "open", "in islands"]


def test_stores_without_samples_or_cells_are_no_mistake(tmp_path: Path) -> None:
    empty = write_store(tmp_path / "e.zarr", {})
    assert "holds no sample" in table_of(empty).text()
    assert table_of(empty).to_dict()["samples"] == []
    none = write_store(tmp_path / "n.zarr", {"none": (matrix_obs(0), {"kind": "h5ad"})})
    assert parsed(table_of(none).text()).loc["none", "cells"] == "0"
    assert set(table_of(none).to_dict()["samples"][0]["medians"].values()) == {None}


def test_every_column_has_a_head_of_its_own() -> None:
    assert len(set(QC_COLUMNS.values())) == len(QC_COLUMNS)
