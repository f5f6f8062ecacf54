"""SingleR on gene scores: log-normalised, the way of choosing markers tuned."""

import numpy as np
import singler
from task import log_normal, run

GRID = [{"marker_method": "classic"}, {"marker_method": "auc"}, {"marker_method": "cohens_d"}]


def fit_and_tell_of(task):
    rows = log_normal(task.rows).T.tocsc()

    def fit_and_tell(options, train, codes, asked):
        labels = [f"t{code}" for code in codes]
        built = singler.train_single(
            rows[:, train].tocsr(),
            labels,
            task.columns,
            marker_method=options["marker_method"],
            aggregate=False,
        )
        told = singler.classify_single(rows[:, asked].tocsr(), built)
        return np.array([int(name[1:]) for name in told.column("best")])

    return fit_and_tell


if __name__ == "__main__":
    run(GRID, fit_and_tell_of)
