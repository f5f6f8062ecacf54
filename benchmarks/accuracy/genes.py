"""Gene scores from peaks: the counts of the peaks that touch a gene's body or the 2 kb upstream of it."""

import gzip
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from annatac_scale.errors import InputError

UPSTREAM_BP = 2_000
GENES = Path(__file__).parent / "genes"


def gene_table(assembly: str) -> pd.DataFrame:
    """chrom, start, end, gene, strand of the genes of an assembly. Raises InputError where there is no table."""
    path = GENES / f"{assembly}.bed.gz"
    if not path.is_file():
        raise InputError(f"{path}: not there; expected a table of the genes of {assembly}: genes/README.md")
    with gzip.open(path, "rt") as file:
        return pd.read_csv(file, sep="\t", names=["chrom", "start", "end", "gene", "strand"])


def gene_scores(
    counts: sparse.csr_matrix, peaks: pd.DataFrame, genes: pd.DataFrame
) -> tuple[sparse.csr_matrix, NDArray[np.str_]]:
    """Sums of the counts of the peaks that overlap each gene, [n_cells, n_genes], and the names of the genes.

    counts: [n_cells, n_peaks]; peaks: chrom, start, end, a row a peak. Genes without a peak are left out; places of
    the same name are one gene, in which a peak counts once.
    """
    plus = (genes["strand"] == "+").to_numpy()
    start = genes["start"].to_numpy() - np.where(plus, UPSTREAM_BP, 0)
    end = genes["end"].to_numpy() + np.where(plus, 0, UPSTREAM_BP)
    names, gene_of = np.unique(genes["gene"].to_numpy(str), return_inverse=True)
    found: list[NDArray[np.int64]] = []
    for chrom, at in genes.groupby("chrom").indices.items():
        here = np.flatnonzero((peaks["chrom"] == chrom).to_numpy())
        here = here[np.argsort(peaks["start"].to_numpy()[here], kind="stable")]
        starts, ends = peaks["start"].to_numpy()[here], peaks["end"].to_numpy()[here]
        longest = int((ends - starts).max(initial=0))
        # Peaks of a gene start before its end, and no further before its start than the longest is long.
        first = np.searchsorted(starts, start[at] - longest)
        last = np.searchsorted(starts, end[at])
        for gene, low, high in zip(at, first, last, strict=True):
            peaks_in = here[low:high][ends[low:high] > start[gene]]
            found.append(np.stack([peaks_in, np.full(len(peaks_in), gene_of[gene])]))
    pairs = np.unique(np.concatenate(found, axis=1), axis=1) if found else np.empty((2, 0), np.int64)
    shape = (counts.shape[1], len(names))
    touches = sparse.csr_matrix((np.ones(pairs.shape[1], counts.dtype), (pairs[0], pairs[1])), shape)
    kept = np.flatnonzero(np.diff(touches.tocsc().indptr))
    return sparse.csr_matrix(counts @ touches[:, kept]), names[kept]
