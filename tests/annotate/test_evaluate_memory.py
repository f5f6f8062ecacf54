"""Evaluation sample by sample: the same figures as of all cells at once, in memory that hardly grows with the cells."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from drawn_labels import CLASSES, PARENTS, TRUTHS, write_labels, write_store
from object_storage import ObjectStorage

from annatac_scale.annotate.bootstrap import compare_labels, figures_of_drawn_groups
from annatac_scale.annotate.by_group import ByGroup
from annatac_scale.annotate.cell_counts import _combinations
from annatac_scale.annotate.evaluate import evaluate
from annatac_scale.annotate.evaluation_report import EvaluationReport
from annatac_scale.annotate.hierarchy_metrics import lineage_figures
from annatac_scale.annotate.metrics import evaluate_labels
from annatac_scale.annotate.reliability import ConfidenceSums, calibration
from annatac_scale.model.hierarchy import Hierarchy
from annatac_scale.store.store import IslandStore

SIZES = {"z": 4300, "a": 700, "none": 0}
N_SAMPLES, N_CELLS = 9, 10_000


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("drawn")
    write_store(path / "atlas.zarr", SIZES)
    write_labels(path / "labels", SIZES)
    write_labels(path / "others", SIZES, seed=5)
    return path


def figures(report: EvaluationReport) -> dict[str, object]:
    """All of it but for what says where the truth was."""
    return {name: value for name, value in report.to_dict().items() if name not in ("truth_file", "notes")}


@pytest.mark.parametrize("cells", ["test", "all"])
@pytest.mark.parametrize("against", ["others", None])
def test_sample_by_sample_the_figures_are_those_of_all_cells_at_once(
    atlas: Path, tmp_path: Path, cells: str, against: str | None
) -> None:
    """A truth in a file is joined to all cells at once."""
    file, store = tmp_path / "truth.parquet", IslandStore.open(atlas / "atlas.zarr")
    store.obs(["truth", "donor"]).to_parquet(file)
    asked = {"cells": cells, "against": against and atlas / against, "group": "donor"}
    by_sample = evaluate(atlas / "labels", store, "truth", **asked)
    at_once = evaluate(atlas / "labels", None, "truth", truth_file=file, **asked)
    assert figures(by_sample) == figures(at_once)
    assert by_sample.coverage is not None
    assert by_sample.lineage is not None
    assert by_sample.types_above.keys() == {"lymphocyte"}


def test_labels_in_object_storage_are_evaluated_as_those_on_a_disk(atlas: Path, s3: ObjectStorage) -> None:
    url = f"{s3.bucket()}/labels"
    write_labels(url, SIZES)
    remote, here = (evaluate(place, atlas / "atlas.zarr", "truth") for place in (url, atlas / "labels"))
    assert {**figures(remote), "labels": ""} == {**figures(here), "labels": ""}


def test_a_truth_may_be_the_sample_itself_and_a_column_that_one_sample_has(tmp_path: Path) -> None:
    write_store(tmp_path / "atlas.zarr", SIZES)
    write_labels(tmp_path / "labels", SIZES)
    report = evaluate(tmp_path / "labels", tmp_path / "atlas.zarr", "sample", cells="all")
    assert report.evaluation.per_type.set_index("cell_type")["n"].to_dict() == {"a": 700, "z": 4300}


def test_counts_of_combinations_are_those_of_pandas_in_the_order_of_the_cells() -> None:
    rng = np.random.default_rng(0)
    columns = [rng.choice(np.array(list(names), object), 500) for names in ("abc", "xy", "z", "klmnop")]
    found = _combinations(columns)
    expected = pd.DataFrame(dict(enumerate(columns))).groupby([0, 1, 2, 3], sort=False).size()
    assert found == list(zip(expected.index, expected, strict=True))
    assert _combinations([column[:0] for column in columns]) == []


def test_a_table_of_counts_has_the_figures_of_its_cells() -> None:
    rng = np.random.default_rng(1)
    truth, first, second = (rng.choice(np.array([*TRUTHS[:6], ""], object), 40) for _ in range(3))
    first, second = (np.where(labels == "", "NK", labels).astype(object) for labels in (first, second))
    groups, n = rng.choice(np.array(list("abcdef"), object), 40), rng.integers(1, 9, 40)
    cells = [np.repeat(labels, n) for labels in (truth, first, second, groups)]
    assert evaluate_labels(truth, first, n).to_dict() == evaluate_labels(*cells[:2]).to_dict()
    assert compare_labels(truth, first, second, 50, n_cells=n) == compare_labels(*cells[:3], 50)
    known, all_known = truth != "", cells[0] != ""
    counted = ByGroup.of("donor", *(one[known] for one in (groups, truth, first, second, n)))
    by_cell = ByGroup.of("donor", *(cells[i][all_known] for i in (3, 0, 1, 2)))
    assert counted.to_dict() == by_cell.to_dict()
    drawn = figures_of_drawn_groups(groups, truth, [first], 20, n_cells=n)[0]
    for name, values in figures_of_drawn_groups(cells[3], cells[0], [cells[1]], 20)[0].items():
        np.testing.assert_array_equal(drawn[name], values)
    hierarchy = Hierarchy.of(CLASSES, PARENTS, "drawn")
    assert lineage_figures(hierarchy, truth, first, second, n) == lineage_figures(hierarchy, *cells[:3])


def test_sums_of_confidences_do_not_depend_on_how_the_cells_come() -> None:
    rng = np.random.default_rng(2)
    confidence, right = rng.random(1000).astype(np.float32), rng.random(1000) < 0.5
    sums = ConfidenceSums()
    for part in np.split(np.arange(1000), [3, 3, 400]):
        sums.add(confidence[part], right[part])
    assert sums.calibration().to_dict() == calibration(confidence, right).to_dict()
    assert len(sums) == 1000


MEASURED = """
import sys
from annatac_scale.annotate.evaluate import evaluate

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

peaks = []
for labels, store in (sys.argv[1:3], sys.argv[3:5]):
    evaluate(labels, store, "truth", cells="all")
    peaks.append(peak())
print(peaks[1] - peaks[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_memory_grows_by_few_bytes_a_cell(tmp_path: Path) -> None:
    """Of 80,000 more cells; Python's texts and lists would take above 1,000 bytes a cell."""
    words = []
    for name, n in (("few", 1), ("many", N_SAMPLES)):
        sizes = {f"s{i}": N_CELLS for i in range(n)}
        write_labels(tmp_path / f"{name}-labels", sizes)
        write_store(tmp_path / f"{name}.zarr", sizes)
        words += [tmp_path / f"{name}-labels", tmp_path / f"{name}.zarr"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, words)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 250 * (N_SAMPLES - 1) * N_CELLS
