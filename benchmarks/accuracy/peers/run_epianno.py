"""EpiAnno on binary islands, by its own script, which is on no registry: EPIANNO_SOURCE names a clone of it.

Its script reads ``tf_config`` where there is no GPU without having set it, so it is run with the name set to None.
"""

import os
import shutil
import subprocess
import sys

import hickle
import numpy as np
from task import run

GRID = [{"learning_rate": rate} for rate in (0.15, 0.01)]
EPOCHS = 2000
RUN = (
    "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], {'tf_config': None}, '__main__')"
)


def fit_and_tell_of(task):
    source = os.environ.get("EPIANNO_SOURCE", "")
    script = os.path.join(source, "code", "run_crossdataset_projection.py")
    if not os.path.isfile(script):
        sys.exit(f"EPIANNO_SOURCE: expected a clone of github.com/xy-chen16/EpiAnno, found {source!r}")
    folder = os.path.join(task.folder, "epianno")

    def fit_and_tell(options, train, codes, asked):
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
        arrays = {"train": task.rows[train] > 0, "test": task.rows[asked] > 0}
        for name, rows in arrays.items():
            hickle.dump(rows.astype(np.float32).toarray(), os.path.join(folder, name + ".hkl"), mode="w")
        types = np.array([f"t{code}" for code in codes])
        hickle.dump(types, os.path.join(folder, "types.hkl"), mode="w")
        paths = [os.path.join(folder, name) for name in ("train.hkl", "types.hkl", "test.hkl")]
        given = ["-d", paths[0], "-c", paths[1], "-t", paths[2], "-o", folder, "-e", str(EPOCHS), "-g", ""]
        given += ["-lr", str(options["learning_rate"]), "--seed", str(task.seed)]
        subprocess.check_call([sys.executable, "-c", RUN, script, *given], cwd=os.path.dirname(script))
        name = "result_peak_rate_0.030_latent_10.npy"
        # Its own file, just written here; it keeps a dictionary.
        told = np.load(os.path.join(folder, name), allow_pickle=True).item()["pred_label"]
        return np.array([int(str(one)[1:]) for one in told])

    return fit_and_tell


if __name__ == "__main__":
    run(GRID, fit_and_tell_of)
