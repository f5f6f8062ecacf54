"""Labels written back to where the cells came from: into a copy of their h5ad, or into the obs of their samples."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from annatac_scale.annotate.labels import LabelsFolder, Part
from annatac_scale.errors import InputError
from annatac_scale.progress import Progress
from annatac_scale.store.export import write_obs_into_h5ad
from annatac_scale.store.obs import replace_obs
from annatac_scale.store.place import is_url
from annatac_scale.store.store import IslandStore

OBS_PREFIX = "annatac_"
OBSM = "X_annatac"
_MAY_BE_ABSENT = ("novelty_p", "set", "set_size", "split")
"""Columns that obs goes without where no cell has a value."""


def h5ad_source(store: IslandStore, out: Path) -> Path:
    """The h5ad file that the store's one sample was converted from, which ``out`` must not be.

    Raises InputError where there is none.
    """
    names = list(store.samples)
    if len(names) != 1:
        raise InputError(
            f"--write-h5ad: found {len(names):,} samples in {store.path}, expected one that was converted from an h5ad "
            "file; leave the option out and join the table by sample and barcode"
        )
    conversion = store.samples[names[0]].conversion
    paths = [entry["path"] for entry in conversion.get("inputs", []) if entry["role"] == "data"]
    if conversion.get("kind") != "h5ad" or not paths:
        raise InputError(
            f"--write-h5ad: found sample {names[0]!r} converted from {conversion.get('kind') or 'no file'}, expected "
            "an h5ad file; leave the option out and join the table by barcode"
        )
    if is_url(paths[0]):
        raise InputError(
            f"--write-h5ad: found sample {names[0]!r} converted from {paths[0]}, expected an h5ad file on a disk; "
            "leave the option out and join the table by barcode"
        )
    source = Path(paths[0])
    if not source.exists():
        raise InputError(
            f"{source}: not there any more, expected the file that sample {names[0]!r} was converted from; put it "
            "back or leave out --write-h5ad"
        )
    if out.exists() and out.samefile(source):
        raise InputError(
            f"--write-h5ad {out}: found the file that sample {names[0]!r} was converted from, expected another one, as "
            "the input stays what it was; choose another path"
        )
    return source


def write_into_h5ad(source: Path, folder: LabelsFolder, out: Path) -> None:
    """Copy an h5ad file, the labels of a data set in its obs, and its embeddings, if it has any, in its obsm.

    Raises InputError where it cannot be made.
    """
    parts, obsm = folder.manifest.parts, {}
    if folder.manifest.written.embeddings:
        obsm[OBSM] = np.concatenate([folder.read_embeddings(part) for part in parts]).astype(np.float32)
    write_obs_into_h5ad(source, _obs_columns(folder, parts), out, obsm)


def write_into_store(store: IslandStore, folder: LabelsFolder, progress: Progress) -> None:
    """Write the labels of a data set into the obs of the store's samples, one after the other; X stays untouched.

    Columns of an earlier time are replaced. Raises StoreError where the store cannot be written.
    """
    with progress.task("write labels into obs", store.n_cells, "cells") as advance:
        for name, sample in store.samples.items():
            parts = [part for part in folder.manifest.parts if part.sample == name]
            obs, labels = sample.obs(), _obs_columns(folder, parts)
            kept = obs.drop(columns=[column for column in obs if str(column).startswith(OBS_PREFIX)])
            replace_obs(store.path, name, pd.concat([kept, labels.set_axis(obs.index)], axis=1))
            advance(sample.n_cells)


def _obs_columns(folder: LabelsFolder, parts: Sequence[Part]) -> pd.DataFrame:
    """The table but for its probabilities, indexed by barcode, columns named for obs; "|" joins the types of a set."""
    names = [name for name in folder.manifest.columns if name not in ("sample", "probabilities")]
    table = pa.concat_tables([folder.read(part, names) for part in parts]).to_pandas()
    told = [name for name in table.columns if name not in _MAY_BE_ABSENT or table[name].notna().any()]
    table = table[told]
    if "set" in told:
        table = table.assign(set=["|".join(types) for types in table["set"]])
    return table.set_index("barcode").add_prefix(OBS_PREFIX)
