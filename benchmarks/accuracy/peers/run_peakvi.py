"""PEAKVI on binary islands, all cells at once, then nearest neighbours in its latent channels; their number chosen."""

import anndata
import numpy as np
import pandas as pd
import scvi
import torch
from sklearn.neighbors import KNeighborsClassifier
from task import run

GRID = [{"neighbours": k} for k in (5, 10, 20, 50)]
EPOCHS = 60


def fit_and_tell_of(task):
    torch.set_num_threads(1)
    scvi.settings.seed = task.seed
    # It looks at no labels, so one model serves the inner fold as well.
    cells = np.concatenate([task.train, task.test])
    data = anndata.AnnData((task.rows[cells] > 0).astype(np.float32))
    data.obs["batch"] = pd.Categorical(task.groups[cells].astype(str))
    scvi.model.PEAKVI.setup_anndata(data, batch_key="batch")
    model = scvi.model.PEAKVI(data)
    model.train(max_epochs=EPOCHS, accelerator="cpu", enable_progress_bar=False)
    latent = dict(zip(cells.tolist(), model.get_latent_representation(), strict=True))

    def fit_and_tell(options, train, codes, asked):
        neighbours = KNeighborsClassifier(options["neighbours"], weights="distance")
        neighbours.fit([latent[cell] for cell in train], codes)
        return neighbours.predict([latent[cell] for cell in asked])

    return fit_and_tell


if __name__ == "__main__":
    run(GRID, fit_and_tell_of)
