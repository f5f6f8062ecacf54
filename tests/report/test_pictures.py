"""What is drawn, read from the figure; and the files."""

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from quality_samples import fragment_sample, matrix_sample

from annatac_scale.errors import InputError
from annatac_scale.report.pictures import MOST_NAMED, called_share, draw, write_picture
from annatac_scale.report.quality import RankCurve, SampleQuality


def panel(figure: Figure, title: str) -> Axes:
    (found,) = [ax for ax in figure.axes if title.lower() in ax.get_title().lower()]
    return found


def titles(figure: Figure) -> list[str]:
    return [ax.get_title().split(" (")[0] for ax in figure.axes if ax.get_title()]


def test_fragments_with_quality_fill_six_panels() -> None:
    assert titles(draw([fragment_sample("kidney")])) == [
        "Barcodes by rank", "TSS enrichment", "Fragments of a cell", "Share in peaks", "Nucleosome signal",
        "Share on chrM",
    ]  # fmt: skip


def test_only_what_samples_have_is_drawn() -> None:
    assert titles(draw([matrix_sample("cells")])) == [
        "Counts of a cell", "Share in islands", "Open islands of a cell"
    ]  # fmt: skip
    mixed = titles(draw([matrix_sample("cells"), fragment_sample("kidney")]))
    assert mixed[2:4] == ["Fragments or counts of a cell", "Share in peaks or islands"]


def test_curves_pass_through_the_recorded_ranks() -> None:
    samples = [fragment_sample("a", seed=1), matrix_sample("b"), fragment_sample("c", seed=2)]
    ranks = panel(draw(samples), "rank")
    assert (ranks.get_xscale(), ranks.get_yscale()) == ("log", "log")
    curves = [one for one in ranks.collections if isinstance(one, LineCollection)]
    for curve, sample in zip(curves, (samples[0], samples[2]), strict=True):
        starts = np.array([segment[0] for segment in curve.get_segments()])
        assert sample.curve is not None
        assert starts.tolist() == np.column_stack([sample.curve.rank, sample.curve.n_fragments])[:-1].tolist()


def test_stretches_are_as_coloured_as_their_barcodes_are_cells() -> None:
    """Against a plain loop over barcodes, at a curve of all ranks; the cells are some, not the first."""
    chance = random.Random(5)
    n_fragments = sorted((chance.randint(1, 40) for _ in range(500)), reverse=True)
    cells = [n for n in n_fragments if chance.random() < n / 40]
    curve = RankCurve(np.arange(1, 501), np.array(n_fragments), 500)
    expected = [
        sum(1 for n in cells if n == number) / sum(1 for n in n_fragments if n == number)
        for number in n_fragments[1:]
    ]
    assert called_share(curve, np.array(cells, float)).tolist() == pytest.approx(expected)


def test_cells_called_by_a_threshold_are_coloured_and_no_other() -> None:
    n_fragments = np.sort(np.random.default_rng(3).integers(1, 5000, 3000))[::-1]
    rank = np.unique(np.geomspace(1, 3000, 50).astype(int))
    curve = RankCurve(rank, n_fragments[rank - 1], 3000)
    share = called_share(curve, n_fragments[n_fragments >= 1000].astype(float))
    n = curve.n_fragments
    assert (share[n[1:] >= 1000] > 0.85).all()  # equal numbers beyond a recorded rank are missed
    assert (share[n[:-1] < 1000] < 0.01).all()
    assert not called_share(curve, np.empty(0)).any()


def test_the_density_counts_every_cell_but_the_highest_few() -> None:
    samples = [fragment_sample("a", 400, seed=1), fragment_sample("b", 600, seed=2)]
    density = panel(draw(samples), "TSS")
    assert density.get_xscale() == "log"
    n_cells = density.collections[0].get_array().sum()
    assert 995 <= n_cells <= 1000
    dots = [line.get_xydata()[0].tolist() for line in density.lines]
    assert dots == [
        [np.median(sample.columns["n_fragments"]), np.median(sample.columns["tss_enrichment"])]
        for sample in samples
    ]


def test_distributions_are_shares_of_the_cells() -> None:
    sample = fragment_sample("a", 500)
    values = sample.columns["fraction_in_peaks"]
    (steps,) = panel(draw([sample]), "Share in peaks").patches
    shares, edges, _ = steps.get_data()
    expected = [sum(low <= value < high for value in values) / 500 for low, high in itertools.pairwise(edges)]
    assert shares.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("n_samples", "n_named"), [(1, 0), (2, 2), (MOST_NAMED, MOST_NAMED), (100, 0)])
def test_few_samples_are_named_and_many_are_thin(n_samples: int, n_named: int) -> None:
    samples = [fragment_sample(f"s{i}", 50, i) for i in range(n_samples)]
    figure = draw(samples)
    named = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert named == [sample.name for sample in samples][:n_named]
    steps = panel(figure, "Nucleosome").patches
    are_many = n_samples > MOST_NAMED
    assert len(steps) == n_samples + are_many
    assert (steps[0].get_linewidth() < 1) == are_many
    assert f"{50 * n_samples:,} cells" in figure.get_suptitle()
    if n_samples > 1:
        assert len({tuple(np.round(patch.get_edgecolor(), 6)) for patch in steps[:n_samples]}) == n_samples


@pytest.mark.parametrize("ending", ["png", "svg", "pdf", "PNG"])
def test_equal_samples_give_equal_files_whatever_the_user_has_set(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import matplotlib as mpl

    samples = [fragment_sample("a"), fragment_sample("b", seed=4)]
    one, two = tmp_path / f"one.{ending}", tmp_path / f"two.{ending}"
    write_picture(samples, one)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    with mpl.rc_context({"font.size": 30, "lines.linewidth": 9, "svg.hashsalt": None, "savefig.dpi": 10}):
        write_picture(samples, two)
    assert one.read_bytes() == two.read_bytes()
    starts = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
    assert one.read_bytes().startswith(starts[ending.lower()])


@pytest.mark.parametrize("name", ["picture", "picture.jpg", "picture.png.gz"])
def test_other_endings_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected \.png, \.svg, \.pdf"):
        write_picture([matrix_sample("a")], tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("samples", [[], [SampleQuality("a", "-", 3, {}, None, {})]])
def test_nothing_to_draw_is_said(samples: list[SampleQuality], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found no sample with a column of quality"):
        write_picture(samples, tmp_path / "p.png")
    assert list(tmp_path.iterdir()) == []


def odd(n_cells: int, **columns: object) -> SampleQuality:
    defaults: dict[str, object] = {"n_fragments": 5.0, "tss_enrichment": 0.0, "fraction_mitochondrial": 0.0}
    filled = {name: np.full(n_cells, value, float) for name, value in (defaults | columns).items()}
    curve = RankCurve(np.arange(1, n_cells + 1), np.full(n_cells, 5), n_cells)
    return SampleQuality("odd", "fragments", n_cells, filled, curve, {})


@pytest.mark.parametrize(
    "sample",
    [odd(0), odd(1), odd(3), odd(9, n_fragments=0), odd(5, tss_enrichment=np.nan, nucleosome_signal=np.nan)],
    ids=["no_cells", "one_cell", "all_alike", "no_fragments", "nowhere_defined"],
)
def test_odd_samples_are_drawn_beside_others(sample: SampleQuality, tmp_path: Path) -> None:
    write_picture([sample, fragment_sample("kidney")], tmp_path / "two.png")
    if sample.n_cells:
        write_picture([sample], tmp_path / "one.png")
