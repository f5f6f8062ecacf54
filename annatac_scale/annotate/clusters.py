"""Clusters of the cells of a labels data set: found by Leiden on their embeddings, or named by a column of obs.

Leiden looks at landmarks: at most LANDMARKS cells, evenly spaced over the data set. Each is joined to its NEIGHBOURS
nearest ones, found approximately (pynndescent), and the graph is cut into communities (igraph; Traag, Waltman and van
Eck 2019). All other cells get the cluster of the nearest landmark, found exactly (scikit-learn), part by part.

Distances are Euclidean between embeddings as they are: the logits are linear in them, the pooled head's went through a
LayerNorm, the linear head's have length 1; the novelty score "knn" measures in the same way. Results depend on the data
set, seed and versions of the libraries alone: the graph is made and cut on one thread.

Memory: 4 bytes a cell for the code of its cluster (a column of obs takes up to four times that while it is read), one
part's embeddings, and what does not grow with the atlas: the landmarks and their graph, some hundred MB.
"""

import builtins
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from annatac_scale.annotate.labels import LabelsFolder, Part, SampleRecord
from annatac_scale.errors import ConfigError, InputError
from annatac_scale.model.labels import label_texts
from annatac_scale.progress import Progress
from annatac_scale.store.columns import obs_columns
from annatac_scale.store.store import IslandStore

_PRINT = builtins.print

LEIDEN = "leiden"
OPTION = "--consensus"

LANDMARKS = 100_000
"""Most cells that clusters are found among. Every other cell is compared with all of them: 0.4 ms of a core at width
64, so about an hour of one core for ten million cells."""
NEIGHBOURS = 15
RESOLUTION = 1.0
"""Of the modularity: the higher, the more clusters."""

_ITERATIONS = 10
"""Of Leiden at most; it mostly stands still after a few."""
_FEWEST_CELLS = 5
"""Up to so many cells each may be a cluster of its own: so small are only trials."""

Codes = NDArray[np.int32]
Vectors = NDArray[np.float32]
Assign = Callable[[Vectors], Codes]


@dataclass(frozen=True, eq=False)
class Clusters:
    """What cluster each cell is in.

    codes: int32 [n_cells], in order of the data set's parts; -1 for a cell that is in none
    names: of the clusters, each of which has a cell
    """

    codes: Codes
    names: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Equal (hex) if and only if the same cells are in clusters of the same names."""
        digest = hashlib.sha256(json.dumps(self.names).encode())
        digest.update(self.codes.astype("<i4").tobytes())
        return digest.hexdigest()


def with_codes(parts: Sequence[Part], codes: Codes) -> Iterator[tuple[Part, Codes]]:
    """Parts, in their order, with the codes of their cells: views, which can be written to."""
    first = 0
    for part in parts:
        yield part, codes[first : first + part.n_cells]
        first += part.n_cells


# By a column of obs


def column_clusters(store: IslandStore, samples: Mapping[str, SampleRecord], column: str) -> Clusters:
    """Clusters that a column of obs names; text as ``label_texts`` reads it, a missing value is in no cluster.

    samples: of the data set, in its order. Raises InputError where the store has other cells under their names or no
    such column, where no cell has a value, or next to every cell has its own.
    """
    for name, record in samples.items():
        if name not in store.samples or store.samples[name].x_sha256 != record.x_sha256:
            raise InputError(
                f"{store.path}: found {'no' if name not in store.samples else 'other cells in'} sample {name!r}, "
                "expected the store that was predicted; give that store"
            )
    all_codes, texts = _column(store, column)
    own = (store.samples[name] for name in samples)
    codes = [all_codes[sample.first_cell : sample.first_cell + sample.n_cells] for sample in own]
    return _named(np.concatenate([np.empty(0, np.int32), *codes]), texts, f"{OPTION} {column}: found", store)


def _column(store: IslandStore, column: str) -> tuple[Codes, NDArray[np.object_]]:
    """The code of each cell of a store, -1 where it has no value; and what codes stand for, equal texts among it."""
    values = obs_columns(store, [column])[column].combine_chunks()
    if not pa.types.is_dictionary(values.type):
        values = values.dictionary_encode()
    codes = values.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int32)
    return codes, label_texts(values.dictionary.to_numpy(zero_copy_only=False))


def _named(codes: Codes, texts: NDArray[np.object_], found: str, store: IslandStore) -> Clusters:
    """Clusters of those texts that a cell has, in order of the texts."""
    used = np.unique(codes[codes >= 0])
    names = sorted(set(texts[used]) - {""})
    numbers = {name: number for number, name in enumerate(names)}
    new_of_old = np.full(len(texts) + 1, -1, np.int32)  # the last is of those without a value
    new_of_old[used] = [numbers.get(text, -1) for text in texts[used]]
    codes = new_of_old[codes]
    n_cells = int(np.count_nonzero(codes >= 0))
    if not names:
        raise InputError(
            f"{found} no value in obs of any of {len(codes):,} cells in {store.path}, expected the cluster of each; "
            f"name the column that holds it, or use {OPTION} {LEIDEN}"
        )
    if 2 * len(names) > n_cells > _FEWEST_CELLS:
        raise InputError(
            f"{found} {len(names):,} values in obs of {n_cells:,} cells in {store.path}, expected clusters, which many "
            f"cells share; name the column that holds them, or use {OPTION} {LEIDEN}"
        )
    return Clusters(codes, tuple(names))


# By Leiden


def leiden_clusters(
    folder: LabelsFolder, progress: Progress, seed: int = 0, resolution: float = RESOLUTION
) -> Clusters:
    """Clusters of like embeddings, named "0", "1", ... by their cells, most first; every cell is in one.

    seed: of all that is drawn. Raises ConfigError where the data set has no embeddings, a library is not installed, the
    resolution is not above 0 or the seed not from 0 to 2**32 - 1.
    """
    if not folder.manifest.written.embeddings:
        raise ConfigError(
            f"{OPTION} {LEIDEN}: found no embeddings in {folder.location}, expected them to find clusters by; predict "
            "with --embeddings too, into another --out"
        )
    if not resolution > 0:
        raise ConfigError(f"{OPTION} {LEIDEN}: found the resolution {resolution:g}, expected more than 0")
    if not 0 <= seed < 2**32:
        raise ConfigError(f"{OPTION} {LEIDEN}: found the seed {seed}, expected one from 0 to 2**32 - 1")
    _check_libraries()
    parts = folder.manifest.parts
    n_cells = sum(part.n_cells for part in parts)
    if not n_cells:
        return Clusters(np.empty(0, np.int32), ())
    n_landmarks = min(LANDMARKS, n_cells)
    chosen = np.arange(n_landmarks) * n_cells // n_landmarks
    with _fit_for_numba(), progress.task("find clusters", n_cells, "cells") as advance:
        landmarks = _landmarks(folder, parts, chosen)
        clusters, of_nearest = _clusters_of(landmarks, seed, resolution)
        codes = np.full(n_cells, -1, np.int32)
        codes[chosen] = clusters
        for part, own in with_codes(parts, codes):
            others = np.flatnonzero(own < 0)
            if len(others):
                own[others] = of_nearest(folder.read_embeddings(part)[others].astype(np.float32))
            advance(part.n_cells)
    return _largest_first(codes)


@contextmanager
def _fit_for_numba() -> Iterator[None]:
    """What pynndescent's numba needs of the process, and leaves as it was.

    Ray puts a print of its own in the place of Python's, of which numba can compile no call. And where numba begins its
    threads it sets how many there are for all that shares its OpenMP, torch too, whose bits follow from that.
    """
    replaced, builtins.print = builtins.print, _PRINT
    n_threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)
        builtins.print = replaced


def _check_libraries() -> None:
    try:
        import igraph  # noqa: F401
        import pynndescent  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"{OPTION} {LEIDEN}: clusters are found with pynndescent and igraph, and {error.name} is not installed; "
            f"pip install 'annatac_scale[consensus]', or give {OPTION} a column of obs that names clusters"
        ) from error


def _landmarks(folder: LabelsFolder, parts: Sequence[Part], chosen: NDArray[np.int64]) -> Vectors:
    """Embeddings of some cells, which are increasing, float32 [m, width]."""
    ends = np.cumsum([part.n_cells for part in parts])
    found = []
    for part, end, own in zip(parts, ends, np.split(chosen, np.searchsorted(chosen, ends[:-1])), strict=True):
        if len(own):
            found.append(folder.read_embeddings(part)[own - (end - part.n_cells)].astype(np.float32))
    return np.concatenate(found)


def _clusters_of(landmarks: Vectors, seed: int, resolution: float) -> tuple[Codes, Assign]:
    """The cluster of each landmark, int32 [m], and what gives other cells that of the nearest landmark.

    Landmarks that are alike to the bit, as closed cells are, count as one: with more of them than neighbours no way in
    the graph would lead from them to others, or back.
    """
    points, point_of = np.unique(landmarks, axis=0, return_inverse=True)
    if len(points) <= NEIGHBOURS + 1:  # each is a neighbour of each
        return np.zeros(len(landmarks), np.int32), lambda others: np.zeros(len(others), np.int32)
    import pynndescent
    from sklearn.metrics import pairwise_distances_argmin

    # One neighbour more, as a point is mostly its own.
    graph = pynndescent.NNDescent(points, n_neighbors=NEIGHBOURS + 1, random_state=seed, n_jobs=1)
    clusters = _communities(graph.neighbor_graph[0], seed, resolution)

    def of_nearest(others: Vectors) -> Codes:
        # Not by a search through the graph, which has no way between groups that lie apart: of cells drawn around 20
        # centres in 64 dimensions 6 to 8 in 100 ended in a group that was not theirs.
        found: Codes = clusters[pairwise_distances_argmin(others, points)]
        return found

    return clusters[point_of.ravel()], of_nearest


def _communities(neighbours: NDArray[np.int32], seed: int, resolution: float) -> Codes:
    """Leiden on the graph of ``m`` cells and their neighbours, int32 [m]. neighbours: int32 [m, k], -1 for none"""
    import igraph

    n, k = neighbours.shape
    edges = np.stack([np.repeat(np.arange(n), k), neighbours.ravel().astype(np.int64)], axis=1)
    edges = np.sort(edges[edges[:, 1] >= 0], axis=1)
    keys = np.unique(edges[:, 0] * n + edges[:, 1])  # one edge for two that are neighbours of each other
    edges = np.stack(np.divmod(keys, n), axis=1)
    graph = igraph.Graph(n=n, edges=edges[edges[:, 0] != edges[:, 1]])
    igraph.set_random_number_generator(random.Random(seed))
    try:
        found = graph.community_leiden(
            objective_function="modularity", resolution=resolution, n_iterations=_ITERATIONS
        )
    finally:
        igraph.set_random_number_generator(random)  # igraph's own default
    return np.array(found.membership, np.int32)


def _largest_first(codes: Codes) -> Clusters:
    sizes = np.bincount(codes)
    order = np.argsort(-sizes, kind="stable")
    new_of_old = np.empty(len(order), np.int32)
    new_of_old[order] = np.arange(len(order))
    return Clusters(new_of_old[codes], tuple(map(str, range(len(order)))))
