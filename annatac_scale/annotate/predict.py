"""Prediction: the cells of a store through a fine-tuned model into a labels data set, part by part.

In this process, on several of this machine, or on a Ray cluster; as one of many that share the work, too. Parts that
are there are skipped: an interrupted run is gone on with, and writes the same values as one that was not. Memory holds
a few parts a process.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from annatac_scale.annotate.clusters import LEIDEN, RESOLUTION
from annatac_scale.annotate.confidence import ConfidenceOptions, few_for_sets
from annatac_scale.annotate.consensus import add_consensus
from annatac_scale.annotate.here import run_here
from annatac_scale.annotate.labels import Consensus, LabelsFolder, Part, Written
from annatac_scale.annotate.labels_writer import Share, finish, labels_writer, reopen
from annatac_scale.annotate.predictor import Asked, Predictor, PredictTask, device
from annatac_scale.annotate.processes import run_in_processes
from annatac_scale.annotate.written_back import h5ad_source, write_into_h5ad, write_into_store
from annatac_scale.errors import ConfigError, ModelError
from annatac_scale.model.folder import Model, read_model
from annatac_scale.model.labels import LOW_DEPTH, NOVEL
from annatac_scale.progress import Progress, Silent
from annatac_scale.store.place import Location, is_url, location_of, on_disk
from annatac_scale.store.store import IslandStore
from annatac_scale.train.interruption import interruption


@dataclass(frozen=True)
class PredictReport:
    """What a prediction did.

    out: the data set; n_cells: cells of this share; n_parts: its parts; n_skipped: those that were there already
    complete: whether all parts of the data set are there
    labels: cells of each label, most frequent first
    dropped: for each sample of which all is there the share of its open islands that the model has no token for; none
        where islands were projected
    h5ad: the file with the labels in its obs, if one was asked for; consensus: likewise
    """

    out: Location
    n_cells: int
    n_parts: int
    n_skipped: int
    complete: bool
    labels: dict[str, int]
    dropped: dict[str, float]
    h5ad: Path | None = None
    consensus: Consensus | None = None

    @property
    def n_novel(self) -> int:
        """Cells whose type the model is not sure of."""
        return self.labels.get(NOVEL, 0)

    @property
    def n_low_depth(self) -> int:
        """Cells with too few open islands to tell their type."""
        return self.labels.get(LOW_DEPTH, 0)


@dataclass(frozen=True)
class Workers:
    """Who does the work.

    share: of the parts, this process's and its workers'
    n: processes; 0: this one. ray: the cluster that they are on, "auto", HOST:PORT, or "local" for one that is started
    here; None: processes of this machine without Ray
    gpus: one GPU a worker, on Ray
    """

    n: int = 0
    ray: str | None = None
    gpus: bool = False
    share: Share = field(default_factory=Share)

    def __post_init__(self) -> None:
        if self.n < 0:
            raise ConfigError(f"--workers {self.n}: expected 0, for this process, or more")
        if self.gpus and self.ray is None:
            raise ConfigError(
                "--gpus: found no --ray; expected it to give each worker its GPU; without Ray this process uses the "
                "GPU that it sees: leave --gpus out, and for more GPUs start one --part K/N on each"
            )


def predict(
    store: IslandStore | Location,
    model: Model | Location,
    out: Location,
    *,
    hierarchy_threshold: float | None = None,
    probabilities: bool = False,
    embeddings: bool = False,
    project: bool = False,
    workers: Workers | None = None,
    consensus: str | None = None,
    consensus_resolution: float = RESOLUTION,
    write_h5ad: Location | None = None,
    write_obs: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> PredictReport:
    """Tell the type of every cell of a store, into the labels data set ``out`` (columns: LabelRule.schema).

    store, model, out: on a disk or in object storage; write_h5ad: on a disk
    hierarchy_threshold: probability that a node of the model's hierarchy needs to be a cell's lineage; None: 0.8
    probabilities: also write those of all classes; embeddings: also write what the logits stand on, float16, as a Zarr
        group in the data set
    project: map a store of other islands of the same assembly onto the model's (stream/projection.py says how)
    consensus: also vote in clusters (annotate/consensus.py): of "leiden", which has the embeddings written, or of
        the obs column of the store that names them; consensus_resolution: of Leiden, the higher, the more clusters
    options: as in ConfidenceOptions, as novel_threshold=0.5 or coverage=0.9
    write_h5ad: where to write the h5ad that the one sample was converted from, with the labels in its obs
    write_obs: write the labels into the obs of the store's samples; its digest changes with them

    Parts that are there already are skipped: the same command goes on after an interruption. ``split`` is copied from
    split.parquet beside the model folder. Equal bits on machines of one kind, whatever the number of workers, parts
    and threads. Raises ModelError where the model has no cell types, does not fit the store or is another one than made
    the labels in ``out``; InputError where ``out`` holds something else or labels made with other options, another
    process writes the same share, where ``write_h5ad`` is a URL or asks for the impossible; ConfigError for options out
    of range, or that contradict each other, and for ``hierarchy_threshold`` where the model has no hierarchy;
    RunInterruptedError where a signal asked this process to end: parts that are written stay.
    """
    progress, workers, out = progress or Silent(), workers or Workers(), location_of(out)
    h5ad = None if write_h5ad is None else on_disk(write_h5ad, "--write-h5ad")
    store = store if isinstance(store, IslandStore) else IslandStore.open(store)
    if not isinstance(model, Model):
        model = read_model(model, "cpu" if workers.n else device())
    if workers.share.of > 1:
        _check_share(
            workers.share, {"--write-h5ad": h5ad, "--write-obs": write_obs, "--consensus": consensus}
        )
    written = Written(probabilities, embeddings or consensus == LEIDEN)
    asked = Asked(ConfidenceOptions(**options), hierarchy_threshold, written, project)
    threads = torch.get_num_threads()
    predictor = Predictor(store, model, asked, progress, threads)
    if too_few := few_for_sets(model, predictor.manifest.rule):
        progress.say(too_few)
    for coverage in predictor.projection.coverage:
        if (warning := coverage.warning()) is not None:
            progress.say(warning)
    source = None if h5ad is None else h5ad_source(store, h5ad)
    with interruption(), labels_writer(out, predictor.manifest, workers.share, progress.say) as folder:
        own = workers.share.of_parts(folder.manifest.parts)
        missing = folder.missing(own)
        if missing:
            reopen(folder)

        def work(done: Callable[[Part], None]) -> None:
            if not workers.n:
                run_here(predictor, folder, missing, done)
            else:
                _run_elsewhere(
                    _task(store, model, out, asked, threads, workers), workers, missing, progress, done
                )

        _with_progress(work, own, missing, progress)
        complete = finish(folder, workers.share)
        report = _report(folder, store, own, len(own) - len(missing), complete)
    if predictor.projection.projected:
        # Open islands that were merged count once: the share of them that is left says nothing.
        report = replace(report, dropped={})
        for coverage in predictor.projection.coverage:
            progress.say(coverage.text())
    for name, share in report.dropped.items():
        progress.say(f"{name}: {share:.1%} of the open islands are not in the model's vocabulary")
    if consensus is not None:
        folder = LabelsFolder.open(out)
        found = add_consensus(folder, consensus, store, progress, resolution=consensus_resolution)
        report = replace(report, consensus=found)
    if write_obs:
        write_into_store(store, folder, progress)
    if source is None or h5ad is None:
        return report
    write_into_h5ad(source, folder, h5ad)
    return replace(report, h5ad=h5ad)


def _check_share(share: Share, asked: Mapping[str, Any]) -> None:
    """Raise ConfigError for what is done when all parts are there."""
    for name, value in asked.items():
        if value:
            raise ConfigError(
                f"--part {share}: found {name} too; expected it when all parts are there; run the same command once "
                "more without --part"
            )


def _with_progress(
    work: Callable[[Callable[[Part], None]], None],
    own: Sequence[Part],
    missing: Sequence[Part],
    progress: Progress,
) -> None:
    if not missing:
        return
    n_cells = sum(part.n_cells for part in own)
    with progress.task("predict", n_cells, "cells") as advance:
        advance.found(n_cells - sum(part.n_cells for part in missing))
        work(lambda part: advance(part.n_cells))


def _task(
    store: IslandStore, model: Model, out: Location, asked: Asked, threads: int, workers: Workers
) -> PredictTask:
    """What the workers are told: they open all of it themselves."""
    if model.path is None:
        raise ModelError(
            "the model lies in no folder that workers could read; write it, or leave workers out"
        )
    return PredictTask(
        store=_absolute(store.path),
        model=_absolute(model.path),
        out=_absolute(out),
        asked=asked,
        threads=max(1, threads // workers.n),
    )


def _absolute(place: Location) -> str:
    return str(place) if is_url(place) else str(Path(place).resolve())


def _run_elsewhere(
    task: PredictTask,
    workers: Workers,
    parts: Sequence[Part],
    progress: Progress,
    done: Callable[[Part], None],
) -> None:
    if not parts:
        return
    if workers.ray is None:
        run_in_processes(task, workers.n, parts, progress, done)
        return
    from annatac_scale.annotate.cluster import run_on_ray
    from annatac_scale.train.cluster import Cluster

    address = None if workers.ray == "local" else workers.ray
    run_on_ray(task, Cluster.of(workers.n, workers.gpus, address), parts, progress, done)


def _report(
    folder: LabelsFolder, store: IslandStore, own: Sequence[Part], n_skipped: int, complete: bool
) -> PredictReport:
    labels: Counter[str] = Counter()
    n_read: Counter[str] = Counter()
    n_cells: Counter[str] = Counter()
    for part, table in folder.read_all(own, ["label", "n_open"]):
        labels.update({row["values"]: row["counts"] for row in table["label"].value_counts().to_pylist()})
        n_read[part.sample] += int(np.sum(table["n_open"].to_numpy()))
        n_cells[part.sample] += part.n_cells
    dropped = {
        name: 1 - n_read[name] / sample.n_open if sample.n_open else 0.0
        for name, sample in store.samples.items()
        if name in n_cells and n_cells[name] == sample.n_cells
    }
    return PredictReport(
        out=folder.location,
        n_cells=n_cells.total(),
        n_parts=len(own),
        n_skipped=n_skipped,
        complete=complete,
        labels=dict(labels.most_common()),
        dropped=dropped,
    )
