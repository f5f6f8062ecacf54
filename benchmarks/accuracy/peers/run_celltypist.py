"""CellTypist on islands: log-normalised levels, C chosen, no majority voting."""

import anndata
import celltypist
import numpy as np
import pandas as pd
from task import log_normal, run

GRID = [{"C": c} for c in (0.01, 0.1, 1.0)]


def fit_and_tell_of(task):
    rows = log_normal(task.rows)
    names = np.array(task.columns)

    def cells_of(cells):
        made = anndata.AnnData(rows[cells].astype(np.float32))
        made.var_names = names
        made.obs_names = [f"c{cell}" for cell in cells]
        return made

    def fit_and_tell(options, train, codes, asked):
        reference = cells_of(train)
        reference.obs["type"] = pd.Categorical([f"t{code}" for code in codes])
        model = celltypist.train(
            reference,
            labels="type",
            check_expression=False,
            C=options["C"],
            max_iter=200,
            n_jobs=1,
            use_SGD=False,
        )
        told = celltypist.annotate(cells_of(asked), model=model, majority_voting=False).predicted_labels
        return [int(name[1:]) for name in told["predicted_labels"].astype(str)]

    return fit_and_tell


if __name__ == "__main__":
    run(GRID, fit_and_tell_of)
