"""Peak matrices of any kind behind one door."""

from annatac_scale.ingest.h5ad import n_cells_h5ad, open_h5ad
from annatac_scale.ingest.matrices import PeakMatrix
from annatac_scale.ingest.tenx import n_cells_10x_h5, n_cells_10x_mtx, open_10x_h5, open_10x_mtx
from annatac_scale.store.place import Location, Place


def open_matrix(
    path: Location, kind: str, layer: str | None = None, use_raw: bool = False, scratch: Place | None = None
) -> PeakMatrix:
    """Open a peak matrix of the kind "h5ad", "10x h5" or "10x mtx", from any thread and process.

    layer, use_raw: where an h5ad has its counts; scratch: where a matrix that is not stored by cells is put in their
    order, None: among the system's temporary files. Raises InputError where the file is damaged.
    """
    if kind == "h5ad":
        return open_h5ad(path, layer, use_raw, scratch)
    return open_10x_h5(path) if kind == "10x h5" else open_10x_mtx(path, scratch)


def n_cells(path: Location, kind: str) -> int:
    """Cells of a peak matrix, without opening all of it."""
    return {"h5ad": n_cells_h5ad, "10x h5": n_cells_10x_h5, "10x mtx": n_cells_10x_mtx}[kind](path)
