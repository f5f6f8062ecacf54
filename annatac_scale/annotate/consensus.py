"""The consensus of a labels data set: the label that most cells of a cluster have, beside the label of each cell.

Cells of a cluster vote for their ``label``, also for Novel_cell_type; those of low depth say nothing and do not vote.
Labels of cells stay what they are; where a cell's own label and the consensus differ is for the reader to weigh.

Parts are read twice, once to count the votes and once to be written anew, one at a time. Memory, beside that of
finding clusters: one part, and 8 bytes for each pair of cluster and label.
"""

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from annatac_scale.annotate.clusters import (
    LEIDEN,
    OPTION,
    RESOLUTION,
    Clusters,
    column_clusters,
    leiden_clusters,
    with_codes,
)
from annatac_scale.annotate.labels import CONSENSUS_COLUMNS, Consensus, LabelsFolder
from annatac_scale.annotate.labels_writer import note_consensus, rewriting
from annatac_scale.errors import ConfigError
from annatac_scale.model.labels import NOVEL
from annatac_scale.progress import Progress, Silent
from annatac_scale.store.columns import obs_names
from annatac_scale.store.store import IslandStore


def add_consensus(
    folder: LabelsFolder,
    by: str,
    store: IslandStore | None = None,
    progress: Progress | None = None,
    seed: int = 0,
    resolution: float = RESOLUTION,
) -> Consensus:
    """Add CONSENSUS_COLUMNS to a complete data set, in place of those of another consensus.

    by: "leiden" for clusters of the embeddings; else the column of obs that names them, which ``store`` is for
    seed, resolution: of Leiden

    Of labels that equally many have, the one that is first among the classes is taken, Novel_cell_type last. Does
    nothing where the data set has that consensus already. A run that was interrupted is made up for by another one;
    until then some parts may have columns that others lack, and the manifest names no consensus. Raises as
    ``column_clusters`` and ``leiden_clusters``; InputError where the data set is not complete or another process writes
    into it; ConfigError where a column is asked for without a store.
    """
    progress = progress or Silent()
    with rewriting(folder):
        clusters = None
        if by == LEIDEN:
            _warn_of_column(store, progress)
            asked = Consensus(by, seed, resolution)
        else:
            clusters = column_clusters(_needed(store, by), folder.manifest.samples, by)
            asked = Consensus(by, column_sha256=clusters.sha256)
        there = folder.manifest.consensus
        if there is not None and there.same_clusters(asked):
            return there
        clusters = clusters or leiden_clusters(folder, progress, seed, resolution)
        votes = _votes(folder, clusters)
        note_consensus(folder, None)  # first, as from now on parts differ
        _write(folder, clusters, _Elected.of(votes, _voted(folder)), progress)
        consensus = replace(
            asked,
            n_clusters=len(clusters.names),
            n_voting=int(votes.sum()),
            n_agree=int(votes.max(axis=1, initial=0).sum()),
        )
        note_consensus(folder, consensus)
    return consensus


def _needed(store: IslandStore | None, by: str) -> IslandStore:
    if store is None:
        raise ConfigError(
            f"{OPTION} {by}: found no store, expected the one that was predicted, whose obs has that column; give it, "
            f"or use {OPTION} {LEIDEN}"
        )
    return store


def _warn_of_column(store: IslandStore | None, progress: Progress) -> None:
    if store is not None and LEIDEN in obs_names(store):
        progress.say(
            f"{OPTION} {LEIDEN}: clusters are found by the embeddings; the obs column {LEIDEN!r} of {store.path} is "
            "not looked at, rename it to use it"
        )


def _voted(folder: LabelsFolder) -> list[str]:
    """Labels that cells vote for, in the order in which ties are settled."""
    return [*folder.manifest.classes, NOVEL]


def _votes(folder: LabelsFolder, clusters: Clusters) -> NDArray[np.int64]:
    """Cells of each cluster that vote for each label, int64 [clusters, labels]."""
    labels = pa.array(_voted(folder), pa.string())
    votes = np.zeros((len(clusters.names), len(labels)), np.int64)
    for part, own in with_codes(folder.manifest.parts, clusters.codes):
        column = folder.read(part, ["label"])["label"]
        label = pc.index_in(column, value_set=labels).fill_null(-1).to_numpy()
        voting = (own >= 0) & (label >= 0)
        np.add.at(votes, (own[voting], label[voting]), 1)
    return votes


@dataclass(frozen=True, eq=False)
class _Elected:
    """label: string [clusters], share: float32 [clusters], both null where no cell votes."""

    label: pa.Array
    share: pa.Array

    @classmethod
    def of(cls, votes: NDArray[np.int64], labels: list[str]) -> "_Elected":
        n_voting = votes.sum(axis=1)
        nobody = n_voting == 0
        share = votes.max(axis=1) / np.maximum(n_voting, 1)
        most = pa.array(votes.argmax(axis=1), mask=nobody)  # of equal ones the first
        label = pa.array(labels, pa.string()).take(most)
        return cls(label, pa.array(share.astype(np.float32), mask=nobody))


def _write(folder: LabelsFolder, clusters: Clusters, elected: _Elected, progress: Progress) -> None:
    names, predicted = pa.array(clusters.names, pa.string()), folder.manifest.predicted_columns
    with progress.task("write consensus", len(clusters.codes), "cells") as advance:
        for part, own in with_codes(folder.manifest.parts, clusters.codes):
            cluster = pa.array(own, mask=own < 0)
            table = folder.read(part, predicted)
            columns = (names.take(cluster), elected.label.take(cluster), elected.share.take(cluster))
            for name, column in zip(CONSENSUS_COLUMNS, columns, strict=True):
                table = table.append_column(name, column)
            folder.replace(part, table)
            advance(part.n_cells)
