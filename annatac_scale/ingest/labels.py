"""Tables of labels (``--obs``) joined to the cells of samples by barcode, at conversion or later."""

from dataclasses import dataclass

import pandas as pd

from annatac_scale.errors import InputError
from annatac_scale.genome.rows import Path, shown
from annatac_scale.ingest.quality import unusable
from annatac_scale.ingest.tables import read_table, some, typed
from annatac_scale.progress import Progress, Silent
from annatac_scale.store.place import Location
from annatac_scale.store.store import IslandStore
from annatac_scale.store.writer import replace_obs


@dataclass(frozen=True, eq=False)
class LabelTable:
    """Labels of cells: columns as typed() makes them, and sample and barcode (str) of each row; sample None: any."""

    path: Path
    columns: pd.DataFrame
    barcode: pd.Series
    sample: pd.Series | None

    def of(self, sample: str) -> pd.DataFrame:
        """The rows that may be of a sample, indexed by barcode."""
        rows = slice(None) if self.sample is None else (self.sample == sample).to_numpy()
        return self.columns.set_axis(pd.Index(self.barcode, dtype=object, name="barcode"))[rows]

    def described(self) -> str:
        """Its barcodes and samples, for messages."""
        samples = "" if self.sample is None else f" of samples {some(sorted(set(self.sample)))}"
        return f"barcodes such as {some(list(self.barcode))}{samples}"


def read_labels(path: Path) -> LabelTable:
    """Read a tab-separated table with the column barcode, optionally sample, and any others.

    Raises InputError for a barcode that comes twice (in one sample) and for a column that conversion fills itself.
    """
    table = read_table(path, ("barcode",))
    columns = table.drop(columns=["barcode", "sample"], errors="ignore")
    wrong = [name for name in map(str, columns) if unusable(name)]
    if wrong or columns.empty:
        column = (
            f"the column {shown(wrong[0])}, which is reserved or has a slash"
            if wrong
            else "no column of labels"
        )
        raise InputError(f"{path}: found {column}; expected columns of labels; rename or add the column")
    sample = table.get("sample")
    keys = table[["barcode"] if sample is None else ["sample", "barcode"]]
    if keys.duplicated().any():
        again = keys[keys.duplicated()].iloc[0]
        raise InputError(
            f"{path}: found barcode {shown(again['barcode'])} twice; expected each once (in a sample); "
            "remove one, or add a column sample"
        )
    return LabelTable(path, columns.apply(typed), table["barcode"], sample)


def join_labels(
    obs: pd.DataFrame, labels: LabelTable, sample: str, progress: Progress, needed: bool = True
) -> pd.DataFrame:
    """``obs`` (indexed by barcode) with the columns of the labels added, or replaced where it has them.

    Cells without a row get missing values; rows without a cell are left out; both are counted and said. Raises
    InputError where the table has rows that may be of the sample, none is of a cell, and some are ``needed``.
    """
    rows = labels.of(sample)
    n_found = int(obs.index.isin(rows.index).sum())
    if len(rows) and not n_found and needed:
        raise InputError(
            f"{labels.path}: found barcodes such as {some(list(rows.index))} and none of sample {sample}; "
            f"expected barcodes such as {some(list(obs.index))}; write them as in the data"
        )
    progress.say(
        f"{sample}: {n_found:,} of {len(obs):,} cells have labels in {labels.path}; "
        f"{len(rows) - n_found:,} of its {len(rows):,} rows for the sample are of no cell"
    )
    kept = obs.drop(columns=[name for name in rows.columns if name in obs.columns])
    return pd.concat([kept, rows.reindex(obs.index)], axis=1)


def join_obs(store: Location, obs: Path, progress: Progress | None = None) -> None:
    """Join a table of labels to the samples of a store; X is untouched.

    Samples that the table's column ``sample`` does not name stay as they are. Raises InputError, before anything is
    written, for what is wrong with the table, and where none of its rows is of a cell.
    """
    labels = read_labels(obs)
    samples = {name: sample.obs() for name, sample in IslandStore.open(store).samples.items()}
    rows = {name: labels.of(name) for name in samples}
    matching = [name for name, frame in samples.items() if frame.index.isin(rows[name].index).any()]
    if not matching:
        barcodes = [barcode for frame in samples.values() for barcode in frame.index[:3]]
        raise InputError(
            f"{obs}: found {labels.described()}, none of a cell of {store}; expected barcodes such as "
            f"{some(barcodes)} of samples {some(list(samples))}; write them as in the store"
        )
    joined = {
        name: join_labels(samples[name], labels, name, progress or Silent(), needed=labels.sample is not None)
        for name in samples
        if len(rows[name])
    }
    for name, frame in joined.items():
        replace_obs(store, name, frame)
