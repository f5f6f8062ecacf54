"""Cellcano on gene scores, by its commands: two rounds where there are 1,000 cells and more; its features chosen."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
from task import run

GRID = [{"num_features": n} for n in (1000, 3000)]


def fit_and_tell_of(task):
    folder = os.path.join(task.folder, "cellcano")
    command = os.path.join(os.path.dirname(sys.executable), "Cellcano")

    def write(cells, path):
        # Its own form: genes in rows, cells in columns.
        names = [f"c{cell}" for cell in cells]
        values = np.asarray(task.rows[cells].todense()).T.astype(np.int32)
        pd.DataFrame(values, index=task.columns, columns=names).to_csv(path)
        return names

    def fit_and_tell(options, train, codes, asked):
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
        names = write(train, os.path.join(folder, "train.csv"))
        types = pd.DataFrame({"celltype": [f"t{code}" for code in codes]}, index=names)
        types.to_csv(os.path.join(folder, "types.csv"))
        asked_names = write(asked, os.path.join(folder, "asked.csv"))
        where = ["-o", folder, "--prefix"]
        given = ["-i", os.path.join(folder, "train.csv"), "-m", os.path.join(folder, "types.csv")]
        features = ["--num_features", str(options["num_features"])]
        subprocess.check_call([command, "train", *given, *features, *where, "a_"])
        given = [
            "-i",
            os.path.join(folder, "asked.csv"),
            "--trained_model",
            os.path.join(folder, "a_MLP_model"),
        ]
        subprocess.check_call([command, "predict", *given, *where, "b_"])
        told = pd.read_csv(os.path.join(folder, "b_celltypes.csv"), index_col=0)["pred_celltype"]
        return np.array([int(name[1:]) for name in told.loc[asked_names].astype(str)])

    return fit_and_tell


if __name__ == "__main__":
    run(GRID, fit_and_tell_of)
