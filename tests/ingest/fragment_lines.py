"""Random fragment files on the toy genome: hypothesis strategies of peaks, lines and texts."""

from counted import TOY
from hypothesis import strategies as st
from plain_counts import Interval

BARCODES = ("A", "B-1", "CC:x", "d d", "#e", "AAACCC" * 6, "é_2", "B" * 700)


def intervals(longest: int) -> st.SearchStrategy[Interval]:
    """Intervals inside the toy genome; many of them near each other, so that they meet."""

    def place(drawn: tuple[int, int, int, bool]) -> Interval:
        chrom, start, length, near = drawn
        size = TOY.sizes[chrom]
        start = (start % 300 if near else start) % size
        return TOY.chromosomes[chrom], start, min(size, start + length)

    return st.tuples(st.integers(0, 2), st.integers(0, 9999), st.integers(1, longest), st.booleans()).map(
        place
    )


PEAKS = st.lists(
    intervals(3000)
    | intervals(40)
    | st.tuples(st.sampled_from(["chrUn_1", "mm9_chr1"]), st.integers(0, 99), st.integers(100, 200)),
    min_size=1,
    max_size=25,
    unique=True,
).map(lambda peaks: [("chr1", 100, 600), *(peak for peak in peaks if peak != ("chr1", 100, 600))])
"""In any order, over each other, with equal starts, over borders of bins, on unknown contigs."""

FURTHER = st.sampled_from(
    [
        "",
        "\t1",
        "\t3",
        "\t12\t",
        "\t.",
        "\t1.0",
        "\t",
        "\t2\t+",
        "\t2\t-\tx",
        "\t7\tx\ty\tz",
        "\t99999999999999",
        "\t0",
    ]
)
FRAGMENTS = st.tuples(intervals(700), st.sampled_from(BARCODES), FURTHER, st.booleans()).map(
    lambda t: (
        f"{t[0][0].removeprefix('chr') if t[3] else t[0][0]}\t{t[0][1]}\t{t[0][2]}\t{t[1]}{t[2]}".encode()
    )
)
COMMENTS = st.sampled_from(
    [b"", b"# c", b" ", b"\t", b" \t", b"\t \t ", b"#", b"#chr1\t1\t2\tA", b"# " + b"x" * 300]
)
ELSEWHERE = st.sampled_from(
    [b"chrX\t1\t2\tA", b"chrUn_1\t5\t6\tB-1\t1", b" \t5\t6\tA", b"NC_" + b"9" * 200 + b"\t1\t9\tA"]
)
INVALID_LINES = {
    b"chr1\t5\t9": "few_columns",
    b"chr1 5 9 A": "few_columns",
    b"x": "few_columns",
    b"\t5\t9\tA": "no_contig",
    b"\t\t\tA": "no_contig",
    b"chrom\tstart\tend\tbarcode": "bad_start",
    b"chr1\t-5\t9\tA": "bad_start",
    b"chr1\t\t9\tA": "bad_start",
    b"chr1\t5.0\t9\tA": "bad_start",
    b"chr1\t0000000000000000005\t9\tA": "bad_start",
    b"chr1\t5\t1e3\tA": "bad_end",
    b"chr1\t5\t 9\tA": "bad_end",
    b"chr1\t5\t99999999999999999999\tA": "bad_end",
    b"chr1\t9\t9\tA": "end_not_after_start",
    b"chr1\t9\t5\tA\t3": "end_not_after_start",
    b"elsewhere\t9\t5\tA": "end_not_after_start",
    b"chr1\t5\t9\t": "no_barcode",
    b"chr1\t5\t9\t\t1": "no_barcode",
    b"chr1\t9\t5\t": "no_barcode",
    b"chr1\t5\t10001\tA": "end_beyond_chromosome",
    b"M\t899\t901\tA": "end_beyond_chromosome",
    b"chr1\t4294967297\t4294967300\tA": "end_beyond_chromosome",
    b"chr1\t999999999999999998\t999999999999999999\tA": "end_beyond_chromosome",
}
LINES = st.lists(
    FRAGMENTS | FRAGMENTS | COMMENTS | ELSEWHERE | st.sampled_from(list(INVALID_LINES)),
    min_size=1,
    max_size=40,
)
"""Lines of every kind, without their ends."""


@st.composite
def texts(draw: st.DrawFn) -> bytes:
    """A file of lines of every kind, with one fragment at least."""
    lines = [*draw(LINES), b"chr1\t110\t120\tA", b"chr1\t111\t121\tA\t2"]
    order = draw(st.randoms(use_true_random=False))
    order.shuffle(lines)
    ends = draw(st.sampled_from([b"\n", b"\r\n"]))
    mark = b"\xef\xbb\xbf" * draw(st.booleans())
    return mark + ends.join(lines) + ends * draw(st.booleans())
