"""Imported for what it does: small conversions and an epoch, so that compiled kernels are loaded.

Servers that processes are forked from import it (forked.py; for the tests, their conftest.py): else each process takes
a second to load them.
"""

import gzip
import tempfile
from contextlib import suppress
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from annatac_scale.ingest.convert import convert
from annatac_scale.stream.loader import BatchStream

PEAKS = [f"chr1:{start}-{start + 500}" for start in range(0, 50_000, 5_000)]
LINES = "".join(f"chr1\t{start}\t{start + 90}\tcell{start % 7}\n" for start in range(0, 50_000, 50))


def convert_and_read(folder: Path) -> None:
    """Convert fragments and a matrix, and read the stores; no thread is left."""
    sizes, fragments, matrix = folder / "toy.sizes", folder / "f.tsv.gz", folder / "m.h5ad"
    sizes.write_text("chr1\t60000\n")
    fragments.write_bytes(gzip.compress(LINES.encode()))
    obs = pd.DataFrame(index=[f"cell{number}" for number in range(50)])
    var = pd.DataFrame(index=PEAKS)
    anndata.AnnData(sparse.csr_matrix(np.ones((50, len(PEAKS)), np.int32)), obs=obs, var=var).write_h5ad(
        matrix
    )
    for file, more in ((fragments, {"min_fragments": 1}), (matrix, {})):
        store = folder / f"{file.name}.zarr"
        convert([file], assembly="toy", select="all", chrom_sizes=sizes, out=store, **more)
        list(BatchStream(store, global_batch_size=4, seed=0))


with tempfile.TemporaryDirectory() as folder, suppress(Exception):  # the tests tell what does not work
    convert_and_read(Path(folder))
