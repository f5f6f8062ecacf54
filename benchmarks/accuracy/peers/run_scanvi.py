"""SCANVI on the levels of islands: all cells at once, those to tell of as unlabelled; latent channels chosen."""

import anndata
import numpy as np
import pandas as pd
import scvi
import torch
from task import run

GRID = [{"n_latent": 10}, {"n_latent": 30}]
EPOCHS, LABELLED_EPOCHS = 60, 20
WHOLE_BATCHES = {"drop_last": True}
"""Its normalisation cannot train on a last batch of one cell."""
UNKNOWN = "unknown"


def fit_and_tell_of(task):
    torch.set_num_threads(1)

    def fit_and_tell(options, train, codes, asked):
        scvi.settings.seed = task.seed
        cells = np.concatenate([train, asked])
        data = anndata.AnnData(task.rows[cells].astype(np.float32))
        data.obs["batch"] = pd.Categorical(task.groups[cells].astype(str))
        labels = [f"t{code}" for code in codes] + [UNKNOWN] * len(asked)
        data.obs["type"] = pd.Categorical(labels)
        scvi.model.SCVI.setup_anndata(data, batch_key="batch", labels_key="type")
        base = scvi.model.SCVI(data, n_latent=options["n_latent"], n_layers=2)
        base.train(
            max_epochs=EPOCHS, accelerator="cpu", enable_progress_bar=False, datasplitter_kwargs=WHOLE_BATCHES
        )
        model = scvi.model.SCANVI.from_scvi_model(base, UNKNOWN)
        model.train(
            max_epochs=LABELLED_EPOCHS,
            n_samples_per_label=100,
            accelerator="cpu",
            enable_progress_bar=False,
            datasplitter_kwargs=WHOLE_BATCHES,
        )
        told = model.predict()[len(train) :]
        return np.array([int(name[1:]) for name in told])

    return fit_and_tell


if __name__ == "__main__":
    run(GRID, fit_and_tell_of)
