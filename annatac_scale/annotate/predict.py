"""Prediction: the cells of a store through a fine-tuned model into a labels data set, one part at a time.

A part is 16 blocks of one sample. It is cut into batches by a rule that looks at its cells alone, so that a cell
shares its batch with the same cells whichever parts were there already: a run that was interrupted and gone on with
writes the same values as one that was not. Memory holds one part.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from numpy.typing import NDArray

from annatac_scale.annotate.confidence import ConfidenceOptions, ConfidenceRule, few_for_sets
from annatac_scale.annotate.labels import (
    PART_CELLS,
    LabelsFolder,
    Manifest,
    Part,
    SampleRecord,
    labels_writer,
)
from annatac_scale.annotate.splits import Splits
from annatac_scale.annotate.table import LabelRule
from annatac_scale.errors import ConfigError, InputError, ModelError
from annatac_scale.memory import give_back_freed_memory
from annatac_scale.model.cell_typer import CellTyper
from annatac_scale.model.folder import Model, read_model
from annatac_scale.model.hierarchy import DEFAULT_THRESHOLD
from annatac_scale.model.labels import LOW_DEPTH, NOVEL
from annatac_scale.model.novelty import PROFILED, Outputs
from annatac_scale.progress import Progress, Silent
from annatac_scale.store.export import write_obs_into_h5ad
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.place import Location, is_url, on_disk
from annatac_scale.store.schema import SHARD_BLOCKS
from annatac_scale.store.store import IslandStore, Sample
from annatac_scale.stream.batch import Batch

BATCH_TOKENS = 16_384
"""Most tokens of a batch of several cells: about 200 MB at the size of the paper's encoder."""

BATCH_CELLS = 256
"""Most cells of a batch: each has some tensors of its own, however few its tokens."""

OBS_PREFIX = "annatac_"
_MAY_BE_ABSENT = ("novelty_p", "set", "set_size", "split")
"""Columns that an h5ad goes without where no cell has a value."""

ADAPT_CELLS = 100
"""Cells that a sample must have for its median novelty score to be taken: with fewer it is too uncertain."""


@dataclass(frozen=True)
class PredictReport:
    """What a prediction did.

    out: the data set; n_cells: its cells; n_parts: its parts; n_skipped: those that were there already
    labels: cells of each label, most frequent first
    dropped: for each sample the share of its open islands that the model has no token for
    h5ad: the file with the labels in its obs, if one was asked for
    """

    out: Path
    n_cells: int
    n_parts: int
    n_skipped: int
    labels: dict[str, int]
    dropped: dict[str, float]
    h5ad: Path | None = None

    @property
    def n_novel(self) -> int:
        """Cells whose type the model is not sure of."""
        return self.labels.get(NOVEL, 0)

    @property
    def n_low_depth(self) -> int:
        """Cells with too few open islands to tell their type."""
        return self.labels.get(LOW_DEPTH, 0)


def predict(
    store: IslandStore | Location,
    model: Model | Location,
    out: Location,
    *,
    hierarchy_threshold: float | None = None,
    write_h5ad: Location | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> PredictReport:
    """Tell the type of every cell of a store, into the labels data set ``out`` (columns: LabelRule.schema).

    store, model: may lie in object storage; out, write_h5ad: only on a disk
    hierarchy_threshold: probability that a node of the model's hierarchy needs to be a cell's lineage; None: 0.8
    options: as in ConfidenceOptions, as novel_threshold=0.5 or coverage=0.9
    write_h5ad: where to write the h5ad that the one sample was converted from, with the labels in its obs

    Parts that are there already are skipped: the same command goes on after an interruption. ``split`` is copied from
    split.parquet beside the model folder. Raises ModelError where the model has no cell types, does not fit the store
    or is another one than made the labels in ``out``; InputError where ``out`` holds something else or labels made
    with other options, where ``out`` or ``write_h5ad`` is a URL, and where ``write_h5ad`` asks for the impossible;
    ConfigError for options out of range, or that contradict each other, and for ``hierarchy_threshold`` where the
    model has no hierarchy.
    """
    progress = progress or Silent()
    out = on_disk(out, "--out")
    h5ad = None if write_h5ad is None else on_disk(write_h5ad, "--write-h5ad")
    store = store if isinstance(store, IslandStore) else IslandStore.open(store)
    if not isinstance(model, Model):
        model = read_model(model, "cuda" if torch.cuda.is_available() else "cpu")
    predictor = _Predictor(store, model, hierarchy_threshold, ConfidenceOptions(**options), progress)
    source = None if h5ad is None else _h5ad_source(store, h5ad)
    with labels_writer(out, predictor.manifest) as folder:
        n_skipped = _write_parts(folder, predictor, progress)
        report = _report(folder, store, n_skipped)
    for name, share in report.dropped.items():
        progress.say(f"{name}: {share:.1%} of the open islands are not in the model's vocabulary")
    if source is None or h5ad is None:
        return report
    write_obs_into_h5ad(source, _obs_columns(folder), h5ad)
    return replace(report, h5ad=h5ad)


def _write_parts(folder: LabelsFolder, predictor: "_Predictor", progress: Progress) -> int:
    """Write the parts that are missing; returns how many were there."""
    parts = folder.manifest.parts
    todo = [part for part in parts if not folder.has(part)]
    n_cells = sum(part.n_cells for part in parts)
    with progress.task("predict", n_cells, "cells") as advance:
        advance(n_cells - sum(part.n_cells for part in todo))
        for part in todo:
            folder.write(part, predictor.table(part))
            give_back_freed_memory()
            advance(part.n_cells)
    if todo or not folder.manifest.complete:
        folder.write_manifest(complete=True)
    return len(parts) - len(todo)


def _report(folder: LabelsFolder, store: IslandStore, n_skipped: int) -> PredictReport:
    labels: Counter[str] = Counter()
    n_read: Counter[str] = Counter()
    parts = folder.manifest.parts
    for part in parts:
        table = folder.read(part, ["label", "n_open"])
        labels.update({row["values"]: row["counts"] for row in table["label"].value_counts().to_pylist()})
        n_read[part.sample] += int(np.sum(table["n_open"].to_numpy()))
    dropped = {
        name: 1 - n_read[name] / sample.n_open if sample.n_open else 0.0
        for name, sample in store.samples.items()
    }
    n_cells = sum(part.n_cells for part in parts)
    return PredictReport(folder.path, n_cells, len(parts), n_skipped, dict(labels.most_common()), dropped)


class _Predictor:
    """A model set up for a store: makes the table of any part of it."""

    def __init__(
        self,
        store: IslandStore,
        model: Model,
        hierarchy_threshold: float | None,
        options: ConfidenceOptions,
        progress: Progress,
    ) -> None:
        self._typer = _typer_of(model)
        model.check_store(store)
        info = model.info
        rule = ConfidenceRule.of(model, options)
        if too_few := few_for_sets(model, rule):
            progress.say(too_few)
        self._store = store
        self._progress = progress
        lineage = _lineage_threshold(model, hierarchy_threshold)
        self._rule = LabelRule(info.labels, info.scaling, rule, model.known, info.hierarchy, lineage)
        self._profiles = model.known.profiles if model.known and rule.novelty in PROFILED else None
        self._attend = model.attend
        self._lister = model.lister(store)
        self._new_of_old = model.vocabulary.new_of_old()
        self._splits = Splits.beside(model.path)
        self._cells = _SampleCells("", np.empty(0, object), np.empty(0, object), 0.0)
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
            parents=None if info.hierarchy is None else info.hierarchy.to_json(),
            hierarchy_threshold=None if info.hierarchy is None else lineage,
        )

    def table(self, part: Part) -> pa.Table:
        """The rows of a part."""
        sample = self._store.samples[part.sample]
        blocks = range(part.unit * SHARD_BLOCKS, min((part.unit + 1) * SHARD_BLOCKS, sample.n_blocks))
        rows = OpenIslands.concatenate([sample.read_block(block) for block in blocks])
        first = part.unit * PART_CELLS
        outputs = self._outputs(sample.first_cell, np.arange(first, first + part.n_cells), rows)
        cells, own = self._cells_of(sample), slice(first, first + part.n_cells)
        return self._rule.table(sample.name, cells.barcodes[own], outputs, cells.split[own], cells.shift)

    def _cells_of(self, sample: Sample) -> "_SampleCells":
        """Kept from part to part, as a sample's parts follow each other."""
        if self._cells.sample != sample.name:
            barcodes = sample.obs().index.to_numpy(object)
            split = self._splits.of(sample, barcodes)
            self._cells = _SampleCells(sample.name, barcodes, split, self._shift(sample, split))
        return self._cells

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
        outputs = self._outputs(sample.first_cell, cells, self._store.read(sample.first_cell + cells))
        deep = outputs.n_open >= max(rule.min_open, 1)
        scores = self._rule.novelty_scores(outputs)[deep]
        if len(scores) < ADAPT_CELLS:
            self._progress.say(
                f"{sample.name}: --novel-adapt: found {len(scores):,} cells deep enough that the model was not trained "
                f"on, expected at least {ADAPT_CELLS}; its novelty scores stay as they are"
            )
            return 0.0
        return float(np.median(scores) - np.median(calib.scores[rule.novelty]))

    def _outputs(self, first_cell: int, cells: NDArray[np.int64], rows: OpenIslands) -> Outputs:
        """What the model says of some cells of a sample. first_cell: the sample's first id; rows: of those cells."""
        rows = rows.renumber(self._new_of_old)
        classifier, profiles = self._typer.head.classifier, self._profiles
        fit = None if profiles is None else np.empty(len(rows), np.float32)
        logits = np.empty((len(rows), classifier.out_features), np.float32)
        embedding = np.empty((len(rows), classifier.in_features), np.float32)
        for chosen in cut_batches(self._n_tokens(first_cell, rows)):
            opened = rows.take(chosen)
            batch = Batch.from_open(first_cell + cells[chosen], opened)
            said = self._typer.predict_with_embedding(self._lister(batch))
            logits[chosen], embedding[chosen] = said
            if profiles is not None and fit is not None:
                fit[chosen] = profiles.fit(opened)
        return Outputs(logits, embedding, rows.n_open, fit)

    def _n_tokens(self, first_cell: int, rows: OpenIslands) -> NDArray[np.int64]:
        """Tokens that the lister will give each cell."""
        if self._attend == "open":
            return rows.n_open
        sample = np.searchsorted(self._lister.first_cells, first_cell, side="right") - 1
        return np.full(len(rows), len(self._lister.measured[sample]), np.int64)


@dataclass(frozen=True, eq=False)
class _SampleCells:
    """A sample's barcodes and splits, object [n_cells], and what is taken off its novelty scores."""

    sample: str
    barcodes: NDArray[np.object_]
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


def _h5ad_source(store: IslandStore, out: Path) -> Path:
    """The h5ad file that the store's one sample was converted from, which ``out`` must not be."""
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


def _obs_columns(folder: LabelsFolder) -> pd.DataFrame:
    """The table but for its probabilities, indexed by barcode, columns named for obs; "|" joins the types of a set."""
    names = [name for name in folder.manifest.columns if name not in ("sample", "probabilities")]
    table = pd.concat([folder.read(part, names).to_pandas() for part in folder.manifest.parts])
    told = [name for name in table.columns if name not in _MAY_BE_ABSENT or table[name].notna().any()]
    table = table[told]
    if "set" in told:
        table["set"] = ["|".join(types) for types in table["set"]]
    return table.set_index("barcode").add_prefix(OBS_PREFIX)


def evenly_spaced(cells: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """All of some cells, or ``most`` of them, evenly spaced; int64."""
    n = min(most, len(cells))
    return cells[np.arange(n) * len(cells) // max(n, 1)]


def cut_batches(n_tokens: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Cut cells into batches: positions int64 [B], every cell once.

    n_tokens: int64 [n]. Cells of like length come together, in order of their tokens; a batch has BATCH_CELLS cells
    and BATCH_TOKENS tokens at most, or one cell.
    """
    order = np.argsort(n_tokens, kind="stable")
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(n_tokens[order])])
    start = 0
    while start < len(order):
        within = int(np.searchsorted(before, before[start] + BATCH_TOKENS, side="right")) - 1
        stop = max(start + 1, min(within, start + BATCH_CELLS))
        yield order[start:stop]
        start = stop
