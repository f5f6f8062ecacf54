"""Pictures of the quality of a store's cells: one file with a panel for each thing that its samples tell.

matplotlib is imported here and nowhere else in this room: load this module only where a picture is asked for. Equal
samples give equal files: no times, a fixed salt for the ids of an SVG, matplotlib's own settings, not the user's.
"""

import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import matplotlib as mpl
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray

from annatac_scale.errors import InputError
from annatac_scale.report.quality import Floats, RankCurve, SampleQuality
from annatac_scale.store.files import write_whole

FORMATS: dict[str, dict[str, str | None]] = {
    ".png": {"Software": None},
    ".svg": {"Date": None},
    ".pdf": {"CreationDate": None},
}
"""Endings of files, and the metadata that keeps times and versions out of each."""

MOST_NAMED = 12
"""Samples up to which each has a colour of its own and a place in the legend."""

_COLORS = (*(f"C{i}" for i in range(10)), "black", "gold")
_UNCALLED = "0.8"
_PANELS_A_ROW, _MOST_PANELS = 3, 6
_PANEL_INCHES = (4.2, 3.5)
_PERCENTILE_SHOWN = 99.9
_DISTRIBUTIONS = (
    ({"n_fragments": "fragments", "n_counts": "counts"}, "{} of a cell"),
    ({"fraction_in_peaks": "peaks", "fraction_in_islands": "islands"}, "share in {}"),
    ({"nucleosome_signal": "nucleosome signal"}, "{}"),
    ({"fraction_mitochondrial": "chrM"}, "share on {}"),
    ({"n_open": "open islands"}, "{} of a cell"),
)
"""A panel each, of the first of the columns that a sample has, and what is said of them."""

Drawing = Callable[[Axes], None]


def check_ending(path: Path | str) -> str:
    """The ending of a picture's name. Raises InputError for one that says no format we write."""
    ending = Path(path).suffix.lower()
    if ending not in FORMATS:
        raise InputError(
            f"{path}: found the ending {ending!r}; expected {', '.join(FORMATS)}; choose one of these for --plot"
        )
    return ending


def write_picture(samples: Sequence[SampleQuality], path: Path | str) -> None:
    """Draw the quality of samples into a PNG, SVG or PDF file, told by its ending.

    Raises InputError for another ending, and where no sample tells anything of its cells.
    """
    ending = check_ending(path)
    buffer = io.BytesIO()
    with mpl.style.context("default"), mpl.rc_context({"svg.hashsalt": "annatac_scale", "font.size": 9}):
        figure = draw(samples)
        figure.savefig(buffer, format=ending[1:], dpi=150, metadata=FORMATS[ending])
    write_whole(Path(path), buffer.getvalue())


def draw(samples: Sequence[SampleQuality]) -> Figure:
    """The picture: barcode ranks, TSS enrichment by fragments, distributions; a panel only where there is data.

    Raises InputError where there is none.
    """
    looks = _Looks(samples)
    drawings = _drawings(samples, looks)
    if not drawings:
        raise InputError(
            "found no sample with a column of quality in obs; expected n_fragments or n_counts at least"
        )
    n_rows, n_columns = -(-len(drawings) // _PANELS_A_ROW), min(len(drawings), _PANELS_A_ROW)
    width, height = _PANEL_INCHES
    figure = Figure(figsize=(width * n_columns, height * n_rows + 0.8), layout="constrained")
    axes = figure.subplots(n_rows, n_columns, squeeze=False).ravel()
    for ax, drawing in zip(axes, drawings, strict=False):
        drawing(ax)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[len(drawings) :]:
        ax.set_axis_off()
    n_cells = sum(sample.n_cells for sample in samples)
    named = samples[0].name if len(samples) == 1 else f"{len(samples):,} samples"
    figure.suptitle(f"{named}, {n_cells:,} cells{looks.explanation}")
    if 1 < len(samples) <= MOST_NAMED:
        handles = [Line2D([], [], color=color) for color in looks.colors]
        names = [sample.name for sample in samples]
        figure.legend(handles, names, loc="outside lower center", ncols=min(len(samples), 6), frameon=False)
    return figure


class _Looks:
    """Colours and widths of the samples' curves: strong for a few, thin and in order of the store for many."""

    def __init__(self, samples: Sequence[SampleQuality]) -> None:
        self.are_many = len(samples) > MOST_NAMED
        shades = mpl.colormaps["viridis"](np.linspace(0, 0.9, max(len(samples), 1)))
        named = _COLORS[: len(samples)]
        self.colors = [to_rgb(color) for color in (shades if self.are_many else named)]
        self.width, self.alpha = (0.5, 0.6) if self.are_many else (1.4, 1.0)

    @property
    def explanation(self) -> str:
        """What the colours mean where no legend says it."""
        return (
            "; from dark to light: in order of the store; black: all cells together" if self.are_many else ""
        )


def _drawings(samples: Sequence[SampleQuality], looks: _Looks) -> list[Drawing]:
    """A function a panel, for what the samples have."""
    drawings: list[Drawing] = []
    if any(sample.curve is not None for sample in samples):
        drawings.append(lambda ax: _draw_ranks(ax, samples, looks))
    if any(len(_tss_points(sample)) for sample in samples):
        drawings.append(lambda ax: _draw_tss(ax, samples, looks))
    for said_of, title in _DISTRIBUTIONS:
        chosen = [_column(said_of, sample) for sample in samples]
        values = [_defined(sample, name) for sample, name in zip(samples, chosen, strict=True)]
        if any(map(len, values)) and len(drawings) < _MOST_PANELS:
            said = title.format(" or ".join(said_of[name] for name in said_of if name in chosen))
            drawings.append(_distribution(values, said, next(iter(said_of)).startswith("n_"), looks))
    return drawings


def _column(names: Iterable[str], sample: SampleQuality) -> str | None:
    """The first of the columns that a sample has."""
    return next((name for name in names if name in sample.columns), None)


def _defined(sample: SampleQuality, name: str | None) -> Floats:
    values = np.empty(0) if name is None else sample.columns[name]
    return values[np.isfinite(values)]


def _draw_ranks(ax: Axes, samples: Sequence[SampleQuality], looks: _Looks) -> None:
    """Barcodes from the one with most fragments on, each stretch as coloured as its barcodes are cells."""
    least, most = np.inf, (1, 1)
    for sample, color in zip(samples, looks.colors, strict=True):
        if sample.curve is None or not len(sample.curve.rank):
            continue
        rank, n_fragments = sample.curve.rank, sample.curve.n_fragments
        share = called_share(sample.curve, sample.columns.get("n_fragments", np.empty(0)))[:, None]
        shades = (1 - share) * np.array(to_rgb(_UNCALLED)) + share * np.array(color)
        points = np.column_stack([rank, np.maximum(n_fragments, 1)]).astype(float)
        lines = np.stack([points[:-1], points[1:]], axis=1)
        ax.add_collection(LineCollection(list(lines), colors=shades, linewidths=looks.width * 1.4))
        most = max(most[0], int(rank[-1])), max(most[1], int(n_fragments[0]))
        least = min(least, points[-1, 1])
    ax.set(xlim=(0.9, most[0] * 1.3), ylim=(0.8 * min(least, most[1]), most[1] * 1.6))
    for axis in (ax.xaxis, ax.yaxis):
        _make_log(axis)
    ax.set(xlabel="barcodes", ylabel="fragments of a barcode", title="Barcodes by rank (grey: no cells)")


def called_share(curve: RankCurve, n_fragments: Floats) -> Floats:
    """float64 [m - 1]: the share of cells among the barcodes of each stretch of a curve of m points.

    n_fragments: of the called cells. Barcodes of equal numbers have no order: stretches of one number get one share.
    """
    numbers, last = np.unique(curve.n_fragments[::-1], return_index=True)
    n_barcodes = curve.rank[
        len(curve.rank) - 1 - last
    ]  # with at least so many fragments, fewest fragments first
    n_cells = len(n_fragments) - np.searchsorted(np.sort(n_fragments), numbers)
    between = -np.diff(n_cells, append=0) / np.maximum(-np.diff(n_barcodes, append=0), 1)
    of_number = dict(zip(numbers.tolist(), np.clip(between, 0, 1).tolist(), strict=True))
    return np.array([of_number[number] for number in curve.n_fragments[1:].tolist()])


def _tss_points(sample: SampleQuality) -> Floats:
    """float64 [m, 2]: fragments and TSS enrichment of the cells that have both."""
    if not {"n_fragments", "tss_enrichment"} <= sample.columns.keys():
        return np.empty((0, 2))
    points = np.column_stack([sample.columns["n_fragments"], sample.columns["tss_enrichment"]])
    return points[np.isfinite(points).all(axis=1) & (points[:, 0] >= 1)]


def _draw_tss(ax: Axes, samples: Sequence[SampleQuality], looks: _Looks) -> None:
    """All cells as a density, and the median of each sample as a dot."""
    points = [_tss_points(sample) for sample in samples]
    x, y = np.concatenate(points).T
    top = _shown_most(y)
    n_bins = _n_bins(len(x) // 2)
    edges = _log_edges(x, n_bins), np.linspace(0, top, n_bins + 1)
    counts, _, _ = np.histogram2d(x, y, edges)
    shown = np.ma.masked_equal(counts.T, 0)
    norm = LogNorm(1, max(counts.max(), 2))
    mesh = ax.pcolormesh(
        *edges, shown, norm=norm, cmap="Greys" if len(samples) > 1 else "viridis", rasterized=True
    )
    ticks = _log_ticks(1, counts.max())
    bar = ax.figure.colorbar(mesh, ax=ax, label="cells", ticks=ticks, format=EngFormatter(sep=""))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    if len(samples) > 1:
        for one, color in zip(points, looks.colors, strict=True):
            if len(one):
                ax.plot(
                    *np.median(one, axis=0),
                    "o",
                    ms=3 if looks.are_many else 6,
                    mec="white",
                    mew=0.5,
                    color=color,
                )
    ax.set(xlabel="fragments of a cell", ylabel="TSS enrichment", xlim=(edges[0][0], edges[0][-1]))
    _make_log(ax.xaxis)
    ax.set_title("TSS enrichment" + (" (dots: medians of samples)" if len(samples) > 1 else ""))


def _distribution(values: Sequence[Floats], title: str, is_log: bool, looks: _Looks) -> Drawing:
    """Share of the cells in each bin, a curve a sample."""

    def drawing(ax: Axes) -> None:
        together = np.concatenate(values)
        n_bins = _n_bins(int(np.median([len(one) for one in values if len(one)])))
        edges = _log_edges(together, n_bins) if is_log else np.linspace(0, _shown_most(together), n_bins + 1)
        for one, color in zip(values, looks.colors, strict=True):
            fill = len(values) == 1
            alpha = 0.7 if fill else looks.alpha
            if len(one):
                ax.stairs(_shares(one, edges), edges, color=color, lw=looks.width, alpha=alpha, fill=fill)
        if looks.are_many:
            ax.stairs(_shares(together, edges), edges, color="black", lw=1.4)
        ax.set(ylabel="share of cells", title=title[0].upper() + title[1:], xlim=(edges[0], edges[-1]))
        if is_log:
            _make_log(ax.xaxis)
        ax.set_ylim(bottom=0)

    return drawing


def _make_log(axis: Axis) -> None:
    """A logarithmic axis with labels such as 200, 5k, at 1, 2 and 5 where it is short."""
    low, high = axis.get_view_interval()
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})  # type: ignore[attr-defined]
    axis.set_major_locator(_log_ticks(low, high))
    axis.set_major_formatter(EngFormatter(sep=""))
    axis.set_minor_formatter(NullFormatter())


def _log_ticks(low: float, high: float) -> LogLocator:
    return LogLocator(subs=(1.0,) if high > 300 * low else (1.0, 2.0, 5.0))


def _shares(values: Floats, edges: Floats) -> Floats:
    """Share of the values in each bin. Those below are in the first; the few above are left out."""
    counts, _ = np.histogram(np.maximum(values, edges[0]), edges)
    return counts / len(values)


def _n_bins(n_cells: int) -> int:
    """Bins that a number of cells fills: 15 to 60."""
    return int(np.clip(np.sqrt(n_cells), 15, 60))


def _log_edges(values: Floats, n_bins: int) -> NDArray[np.float64]:
    low, high = max(values.min(), 1.0), max(values.max(), 2.0)
    return np.geomspace(low, max(high, low * 1.5), n_bins + 1)


def _shown_most(values: Floats) -> float:
    """The upper end of a linear axis: beyond all but the highest thousandth of the values, which would flatten it."""
    return 1.05 * float(np.percentile(values, _PERCENTILE_SHOWN)) or 1.0
