"""A store that a model was not made for: refused with a table, or projected where only the windows are others."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from model_folders import N_SPACE, toy_model, toy_space
from scipy import sparse

from annatac_scale.errors import ModelError
from annatac_scale.genome.islands import IslandSpace
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.store import IslandStore
from annatac_scale.store.writer import SampleWriter, create_store

N_CELLS = 6


def stored(path: Path, space: IslandSpace, counting: str = "insertion") -> IslandStore:
    """A store of one sample that measures all islands."""
    create_store(path, space, counting)
    levels = np.random.default_rng(1).integers(0, 6, (N_CELLS, len(space))).astype(np.uint8)
    with SampleWriter(path, "s0", N_CELLS) as writer:
        writer.write_shard(0, OpenIslands.from_csr(sparse.csr_matrix(levels)))
        obs = pd.DataFrame(index=pd.Index([f"c{i}" for i in range(N_CELLS)], name="barcode"))
        writer.commit(obs, np.ones(len(space), bool), {})
    return IslandStore.open(path)


def halves() -> IslandSpace:
    """Bins of half the width over the same part of the genome."""
    space = toy_space()
    middle = (space.start + space.end) // 2
    start = np.stack([space.start, middle], 1).ravel()
    end = np.stack([middle, space.end], 1).ravel()
    return replace(
        space,
        width_bp=2500,
        selection="windows",
        chrom=np.repeat(space.chrom, 2),
        start=start,
        end=end,
        genes=np.repeat(space.genes, 2),
    )


def test_the_table_has_a_line_a_property_and_is_aligned(tmp_path: Path) -> None:
    store = stored(tmp_path / "a.zarr", halves())
    with pytest.raises(ModelError) as refused:
        toy_model(None).check_store(store)
    first, *table, remedy = str(refused.value).splitlines()
    assert first == f"{store.path} does not fit the model:"
    found, expected = store.islands_sha256[:12], toy_space().sha256[:12]
    assert table == [
        "  assembly:        store toy,           model toy;",
        "  width_bp:        store 2500,          model 5000         (differs);",
        "  selection:       store windows,       model all          (differs);",
        "  counting:        store insertion,     model insertion;",
        "  islands:         store 60,            model 30           (differs);",
        f"  islands sha256:  store {found},  model {expected} (differs);",
    ]
    assert remedy.startswith(
        "convert the cells anew, with `annatac convert --assembly toy --chrom-sizes FILE"
    )


def test_the_table_can_be_read_as_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as refused:
        toy_model(None).check_store(stored(tmp_path / "a.zarr", halves()))
    line = " ".join(str(refused.value).split())
    assert "model: assembly: store toy, model toy; width_bp: store 2500, model 5000 (differs); sel" in line


@pytest.mark.parametrize(
    ("info", "options", "more"),
    [
        (
            {"assembly": "hg38", "selection": "tss"},
            "--assembly hg38 --select tss --counting insertion` and another --out",
            "",
        ),
        (
            {"assembly": "toy", "selection": "tss"},
            "--assembly toy --chrom-sizes FILE --select tss --tss FILE --counting insertion` and another --out",
            "",
        ),
        (
            {"assembly": "mm9", "selection": "windows", "counting": "fragment"},
            "--assembly mm9 --select FILE --counting fragment` and another --out",
            ", where --select is the BED file that the model's islands are from",
        ),
        (
            {"selection": "all", "space_sha256": "0" * 64},
            "--assembly toy --chrom-sizes FILE --select all --counting insertion` and another --out",
            ", with the same TSS table (--tss, --gtf) and chromosome sizes as for the model",
        ),
    ],
    ids=["tss", "own_assembly", "windows", "same_names"],
)
def test_the_options_that_make_a_fitting_store_are_spelled(
    tmp_path: Path, info: dict[str, str], options: str, more: str
) -> None:
    model = toy_model(None)
    model = replace(model, info=replace(model.info, **{"space_sha256": "1" * 64, **info}))  # type: ignore[arg-type]
    with pytest.raises(ModelError) as refused:
        model.check_store(stored(tmp_path / "a.zarr", toy_space()))
    assert str(refused.value).endswith(f"\nconvert the cells anew, with `annatac convert {options}{more}")


def test_project_is_offered_only_by_who_can_project_and_where_it_would_do(tmp_path: Path) -> None:
    model = toy_model(None)
    other_windows = stored(tmp_path / "a.zarr", halves())
    with pytest.raises(ModelError, match=r"; or give --project, "):
        model.projection(other_windows)
    for refused in (
        lambda: model.check_store(other_windows),
        lambda: model.projection(stored(tmp_path / "b.zarr", toy_space(assembly="hg38"))),
        lambda: model.projection(stored(tmp_path / "c.zarr", halves(), "fragment")),
    ):
        with pytest.raises(ModelError) as error:
            refused()
        assert "--project" not in str(error.value)
        assert "convert the cells anew" in str(error.value)


@pytest.mark.parametrize(
    ("space", "counting", "reason"),
    [
        (
            toy_space(assembly="hg38"),
            "insertion",
            "the same coordinates mean other places of the genome in hg38",
        ),
        (halves(), "fragment", "levels that count by fragment and by insertion are different numbers"),
        (toy_space(), "fragment", "levels that count by fragment and by insertion are different numbers"),
    ],
    ids=["assembly", "counting_and_windows", "counting"],
)
def test_another_assembly_or_counting_is_refused_with_projection_too(
    tmp_path: Path, space: IslandSpace, counting: str, reason: str
) -> None:
    with pytest.raises(ModelError) as refused:
        toy_model(None).projection(stored(tmp_path / "a.zarr", space, counting), project=True)
    message = str(refused.value)
    assert f"--project does not help here: {reason}" in message
    assert "(differs);" in message
    assert "; convert the cells anew, with `annatac convert" in message


def test_a_store_that_fits_is_renumbered_with_and_without_project(tmp_path: Path) -> None:
    model, store = toy_model(None), stored(tmp_path / "a.zarr", toy_space())
    sample = store.samples["s0"]
    block = sample.read_block(0)
    expected = block.renumber(model.vocabulary.new_of_old())
    for project in (False, True):
        projection = model.projection(store, project)
        rows = projection.rows(block, sample)
        assert not projection.projected
        assert rows.islands.tolist() == expected.islands.tolist()
        assert rows.levels.tolist() == expected.levels.tolist()
        assert rows.offsets.tolist() == expected.offsets.tolist()


def test_half_bins_are_averaged_onto_the_models_islands(tmp_path: Path) -> None:
    model, store = toy_model(None), stored(tmp_path / "a.zarr", halves())
    projection = model.projection(store, project=True)
    assert projection.projected
    sample = store.samples["s0"]
    block = sample.read_block(0)
    dense = block.to_csr(2 * N_SPACE).toarray().astype(int).reshape(N_CELLS, N_SPACE, 2)
    expected = -(-dense.sum(2) // 2)[:, model.vocabulary.islands]
    rows = projection.rows(block, sample)
    assert rows.to_csr(len(model.vocabulary)).toarray().tolist() == expected.tolist()
    coverage = projection.coverage[0]
    assert (coverage.covered, coverage.placed) == (1.0, 40 / 60)
    lister = model.lister(store, projection)
    assert [own.tolist() for own in lister.measured] == [list(range(20))]


def test_without_a_projection_a_lister_still_refuses_other_islands(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="convert the cells with"):
        toy_model(None).lister(stored(tmp_path / "a.zarr", halves()))
