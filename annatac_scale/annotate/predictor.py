"""One part of a store's cells through a fine-tuned model: read, computed, written.

A part is 16 blocks of one sample. It is cut into batches by a rule that looks at its cells alone, and each operation
runs on one thread, several batches side by side: what is written of a cell depends on the cells of its part alone, not
on how many processes and threads there are, nor on what was there already.
"""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from annatac_scale.annotate.batches import BATCH_TOKENS, SUMMED_BATCH_TOKENS, cut_batches, evenly_spaced
from annatac_scale.annotate.confidence import ConfidenceOptions, ConfidenceRule
from annatac_scale.annotate.labels import PART_CELLS, LabelsFolder, Manifest, Part, SampleRecord, Written
from annatac_scale.annotate.splits import Splits
from annatac_scale.annotate.table import LabelRule
from annatac_scale.errors import AnnatacError, ConfigError, ModelError
from annatac_scale.memory import give_back_freed_memory, keep_freed_memory
from annatac_scale.model.cell_typer import CellTyper
from annatac_scale.model.folder import Model, read_model
from annatac_scale.model.hierarchy import DEFAULT_THRESHOLD
from annatac_scale.model.island_sums import SummedHead
from annatac_scale.model.novelty import PROFILED, Outputs
from annatac_scale.progress import Progress
from annatac_scale.store.encoded_rows import EncodedRows
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.schema import BLOCK_CELLS, SHARD_BLOCKS
from annatac_scale.store.store import IslandStore, Sample
from annatac_scale.stream.batch import Batch, RowsOrigin

ADAPT_CELLS = 100
"""Cells that a sample must have for its median novelty score to be taken: with fewer it is too uncertain."""

IN_FLIGHT = 3
"""Parts that one process has at work: one is read, one computed, one written."""

_SAMPLES_KEPT = IN_FLIGHT + 1


class StoppedError(AnnatacError):
    """A part was left in the middle, as ``Predictor.stop`` asked."""


@dataclass(frozen=True)
class Asked:
    """What a prediction is asked for, beside store, model and place.

    confidence: rates, thresholds, coverage; hierarchy_threshold: probability that a lineage needs; None: 0.8
    written: what to write of each cell besides the columns that are always there
    project: whether the store's islands may be others than the model's, of the same assembly
    """

    confidence: ConfidenceOptions = field(default_factory=ConfidenceOptions)
    hierarchy_threshold: float | None = None
    written: Written = field(default_factory=Written)
    project: bool = False


@dataclass(frozen=True)
class PredictTask:
    """All that another process needs to do parts of a prediction; JSON-able by ``to_dict``.

    threads: batches that run side by side
    """

    store: str
    model: str
    out: str
    asked: Asked
    threads: int

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "PredictTask":
        """From what ``to_dict`` gave."""
        asked = values["asked"]
        confidence, written = ConfidenceOptions(**asked["confidence"]), Written(**asked["written"])
        found = Asked(confidence, asked["hierarchy_threshold"], written, asked["project"])
        return cls(**{**values, "asked": found})

    def open(self, progress: Progress) -> tuple["Predictor", LabelsFolder]:
        """The predictor, and the data set that it writes parts of."""
        predictor = Predictor(
            IslandStore.open(self.store), read_model(self.model, device()), self.asked, progress, self.threads
        )
        return predictor, LabelsFolder(self.out, predictor.manifest)


def device() -> str:
    """The device that this process predicts on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def one_thread_an_operation() -> Iterator[None]:
    """Let torch use one thread for each operation, whichever thread asks for it: bits do not depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Predictor:
    """A model set up for a store: does any part of it. Some parts may be at work at the same time, a thread each.

    threads: batches that run side by side, on a CPU

    Raises ModelError where the model has no cell types or does not fit the store; ConfigError for what it cannot do.
    """

    def __init__(
        self, store: IslandStore, model: Model, asked: Asked, progress: Progress, threads: int = 1
    ) -> None:
        self._typer = _typer_of(model).eval()  # before threads share it
        self.projection = model.projection(store, asked.project)
        info = model.info
        rule = ConfidenceRule.of(model, asked.confidence)
        lineage = _lineage_threshold(model, asked.hierarchy_threshold)
        self._store = store
        self._progress = progress
        written = replace(asked.written, projected=self.projection.projected)
        self._written = written
        self._rule = LabelRule(
            info.labels, info.scaling, rule, model.known, info.hierarchy, lineage, asked.written.probabilities
        )
        self._profiles = model.known.profiles if model.known and rule.novelty in PROFILED else None
        self._attend = model.attend
        self._lister = model.lister(store, self.projection)
        self._n_listed = {one.sample: one.n_covered for one in self.projection.coverage}
        new_of_old = None if self.projection.projected else model.vocabulary.new_of_old()
        self._origin = RowsOrigin(str(store.path), store.n_islands, new_of_old)
        self._splits = Splits.beside(model.path)
        self._cells: dict[str, _SampleCells] = {}
        self._cells_lock, self._at_work = threading.Lock(), threading.Lock()
        on_cpu = next(self._typer.parameters()).device.type == "cpu"
        self._threads = ThreadPoolExecutor(max(1, threads) if on_cpu else 1, "batches")
        self._stopped = threading.Event()
        self.manifest = Manifest(
            model=model.digest,
            store=str(store.path),
            samples={
                name: SampleRecord(s.n_cells, s.x_sha256, s.digest) for name, s in store.samples.items()
            },
            rule=rule,
            split_sha256=self._splits.sha256,
            classes=info.labels,
            columns=tuple(self._rule.schema.names),
            written=written,
            parents=None if info.hierarchy is None else info.hierarchy.to_json(),
            hierarchy_threshold=None if info.hierarchy is None else lineage,
        )

    def stop(self) -> None:
        """Leave all parts that are at work after the batches that are: ``run`` raises StoppedError."""
        self._stopped.set()

    def run(self, part: Part, folder: LabelsFolder) -> None:
        """Read, compute and write a part. Only one is computed at a time, so that others are read and written then."""
        keep_freed_memory()  # its batches are alike; at its end it is given back
        sample = self._store.samples[part.sample]
        blocks = range(part.unit * SHARD_BLOCKS, min((part.unit + 1) * SHARD_BLOCKS, sample.n_blocks))
        chunks = zip(blocks, sample.read_chunks(blocks), strict=True)
        rows = EncodedRows.concatenate([sample.decompress(block, chunk) for block, chunk in chunks])
        cells = self._cells_of(sample)
        with self._at_work:
            outputs = self._outputs(sample, np.arange(part.first, part.first + part.n_cells), rows)
        folder.write(part, self._table(part, cells, outputs), self._embeddings(outputs))
        give_back_freed_memory()

    def _table(self, part: Part, cells: "_SampleCells", outputs: Outputs) -> pa.Table:
        barcodes = cells.barcodes.slice(part.first, part.n_cells)
        split = cells.split[part.first : part.first + part.n_cells]
        return self._rule.table(part.sample, barcodes, outputs, split, cells.shift)

    def _embeddings(self, outputs: Outputs) -> NDArray[np.float16] | None:
        if not self._written.embeddings:
            return None
        most = np.finfo(np.float16).max
        return np.clip(outputs.embedding, -most, most).astype(np.float16)

    def _cells_of(self, sample: Sample) -> "_SampleCells":
        """Kept from part to part, as a sample's parts follow each other."""
        with self._cells_lock:
            if sample.name not in self._cells:
                barcodes = sample.barcodes()
                split = self._splits.of(sample, barcodes)
                self._cells[sample.name] = _SampleCells(barcodes, split, self._shift(sample, split))
                if len(self._cells) > _SAMPLES_KEPT:
                    del self._cells[next(iter(self._cells))]
            return self._cells[sample.name]

    def _shift(self, sample: Sample, split: NDArray[np.object_]) -> float:
        """What the median novelty score of a sample's cells is above that of the calib cells.

        Cells that the model was trained on score low and have no part in it, nor have closed ones and shallow ones. Of
        the others it looks at as many as a part has, evenly spaced: one part's memory and time, but for the blocks that
        are read to find them, and a function of the sample alone.
        """
        rule, calib = self._rule.rule, self._rule.calib
        if not rule.novel_adapt or calib is None:
            return 0.0
        cells = evenly_spaced(np.flatnonzero(split != "train"), PART_CELLS)
        rows = _encoded(sample, cells)
        with self._at_work:
            outputs = self._outputs(sample, cells, rows)
        deep = outputs.n_open >= max(rule.min_open, 1)
        scores = self._rule.novelty_scores(outputs)[deep]
        if len(scores) < ADAPT_CELLS:
            self._progress.say(
                f"{sample.name}: --novel-adapt: found {len(scores):,} cells deep enough that the model was not trained "
                f"on, expected at least {ADAPT_CELLS}; its novelty scores stay as they are"
            )
            return 0.0
        return float(np.median(scores) - np.median(calib.scores[rule.novelty]))

    def _outputs(self, sample: Sample, cells: NDArray[np.int64], rows: EncodedRows) -> Outputs:
        """What the model says of some cells of a sample. cells: counted within the sample; rows: theirs

        Rows are decoded batch by batch, where the numbers then lie in the processor's cache: of a whole part that takes
        twice as long.
        """
        classifier, profiles = self._typer.head.classifier, self._profiles
        fit = None if profiles is None else np.empty(len(rows), np.float32)
        n_open = np.empty(len(rows), np.int64)
        logits = np.empty((len(rows), classifier.out_features), np.float32)
        embedding = np.empty((len(rows), classifier.in_features), np.float32)

        def compute(chosen: NDArray[np.int64]) -> None:
            if self._stopped.is_set():
                raise StoppedError("stopped")
            ids = sample.first_cell + cells[chosen]
            opened = self._origin.decode(ids, rows.take(chosen))
            if self.projection.projected:
                opened = self.projection.rows(opened, sample)
            n_open[chosen] = opened.n_open
            logits[chosen], embedding[chosen] = self._logits_and_embedding(ids, opened)
            if profiles is not None and fit is not None:
                fit[chosen] = profiles.fit(opened)

        # At most as many tokens as there are: an open island takes a byte or more.
        n_tokens, most = rows.sizes, SUMMED_BATCH_TOKENS
        if self._summed is None:  # made here, by one thread
            most = BATCH_TOKENS
            if self._attend == "all":
                n_tokens = np.full(len(rows), self._n_listed[sample.name], np.int64)
        for _ in self._threads.map(compute, cut_batches(n_tokens, most)):
            pass
        return Outputs(logits, embedding, n_open, fit)

    @cached_property
    def _summed(self) -> SummedHead | None:
        """The head as sums over islands, if it is that; with tables of its own, which not everybody needs to hold."""
        head = self._typer.head
        return SummedHead(head) if SummedHead.can_be(head) else None

    def _logits_and_embedding(
        self, ids: NDArray[np.int64], opened: OpenIslands
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        if self._summed is not None:
            return self._summed(opened)
        return self._typer.predict_with_embedding(self._lister(Batch.from_open(ids, opened)))


def _encoded(sample: Sample, cells: NDArray[np.int64]) -> EncodedRows:
    """The rows of some cells of a sample, increasing; of their blocks nothing else is kept."""
    parts = []
    owner = cells // BLOCK_CELLS
    for block in np.unique(owner).tolist():
        rows = sample.decompress(block, sample.read_chunks([block])[0])
        own = rows.take(cells[owner == block] - block * BLOCK_CELLS)
        parts.append(EncodedRows.of_bytes(*own.packed()))
    return EncodedRows.concatenate(parts)


@dataclass(frozen=True, eq=False)
class _SampleCells:
    """A sample's barcodes, its splits, object [n_cells], and what is taken off its novelty scores."""

    barcodes: pa.StringArray
    split: NDArray[np.object_]
    shift: float


def _typer_of(model: Model) -> CellTyper:
    if model.typer is None:
        raise ModelError(
            f"{model.path or 'model'}: a pretrained model that knows no cell types yet; make one that does with "
            "`annatac finetune`"
        )
    if not model.digest:
        raise ModelError(
            "the model was never written, so its labels could not say what made them; write it first"
        )
    return model.typer


def _lineage_threshold(model: Model, asked: float | None) -> float:
    if asked is not None and model.info.hierarchy is None:
        raise ConfigError(
            f"--hierarchy-threshold {asked:g}: {model.path or 'the model'} has no hierarchy; leave it out, or "
            "fine-tune with --hierarchy"
        )
    return DEFAULT_THRESHOLD if asked is None else float(asked)
