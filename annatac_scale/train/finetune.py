"""Fine-tuning: a pretrained encoder and a cell-type head on labelled cells, to a model that annotates."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from annatac_scale.errors import ConfigError, ModelError
from annatac_scale.model.calibration import Scaling
from annatac_scale.model.cell_typer import CellTyper, build_head
from annatac_scale.model.folder import Model, ModelInfo, read_model, write_model
from annatac_scale.model.heads import LinearHead, PooledHead
from annatac_scale.model.hierarchy import Hierarchy
from annatac_scale.model.lora import add_adapters, merge_adapters
from annatac_scale.model.novelty import Outputs
from annatac_scale.model.ontology import read_hierarchy
from annatac_scale.progress import Progress, Silent
from annatac_scale.store.place import Location, on_disk
from annatac_scale.store.store import IslandStore
from annatac_scale.stream.cell_matrix import CellMatrix
from annatac_scale.stream.loader import BatchStream
from annatac_scale.stream.tokens import TokenLister
from annatac_scale.stream.vocabulary import count_open
from annatac_scale.train.card import finetuned_card, groups_text
from annatac_scale.train.cell_type_task import CellTypeModel, FinetuneTask, figures_of
from annatac_scale.train.cell_weights import cell_weights, class_weights
from annatac_scale.train.confidence_fit import OUT_OF_FOLD, Confidence, Judged, fit_confidence
from annatac_scale.train.head_choice import check_enough, training_counts, with_head
from annatac_scale.train.heldout import HELDOUT_FILE, HELDOUT_SPLITS, facts_of_test, write_heldout
from annatac_scale.train.interruption import interruption
from annatac_scale.train.label_map import LabelMap
from annatac_scale.train.loop import Loop, train
from annatac_scale.train.positions import inverse_document_frequency, truncated_svd
from annatac_scale.train.presets import FinetuneConfig, finetune_preset
from annatac_scale.train.probe import deal_folds, fit_probe
from annatac_scale.train.provenance import earlier_sight, made_by, run_inputs, sample_facts
from annatac_scale.train.ranks import Ranks
from annatac_scale.train.record import Record
from annatac_scale.train.run_folder import RunFolder
from annatac_scale.train.run_options import RunOptions
from annatac_scale.train.splits import (
    SPLIT_FILE,
    SPLITS,
    LabelledCells,
    SplitRule,
    split_cells,
    write_split,
)


@dataclass(frozen=True)
class FinetuneReport:
    """What a fine-tuning run made.

    figures: of the ``judged_on`` cells, "val" or, of a linear head without any, "out-of-fold training"
    test: of the held-out cells, empty without any
    """

    model: Path
    types: tuple[str, ...]
    split: dict[str, int]
    n_without_label: int
    """Cells of the store that have none, apart from those that the label map drops."""
    n_dropped: int
    temperature: float
    figures: dict[str, float]
    test: dict[str, float]
    head: str
    judged_on: str


@dataclass(frozen=True, eq=False)
class _Work:
    """What a fine-tuning works with."""

    store: IslandStore
    pretrained: Model
    labels: str
    labelled: LabelledCells
    config: FinetuneConfig
    holdout: str
    group: str | None
    label_map: LabelMap | None
    hierarchy: Hierarchy | None


def finetune(
    store: IslandStore,
    model: Model | Location,
    labels: str,
    out: Location,
    config: FinetuneConfig,
    holdout: float | str = 0.2,
    progress: Progress | None = None,
    group: str | None = None,
    label_map: Location | None = None,
    hierarchy: Location | None = None,
) -> FinetuneReport:
    """Fine-tune a pretrained model on the cells of a store that have a label; the model folder is ``out``/model.

    model: a folder, on a disk or in object storage, or as it was read from one: its encoder is trained in place
    labels: obs column with the cell types; cells without one are left out and counted
    out: a folder on a disk
    holdout: share of each type's cells, or "column=value", that test and are never trained on; with a value, cells
        that have none in the column are left out and counted
    group: obs column, or "sample", whose cells of one value (a donor, a batch) keep together: whole groups test
    label_map: a table on a disk that renames, merges and drops labels first (train/label_map.py)
    hierarchy: a table or ontology on a disk with what lies above the labels (model/ontology.py), kept in the model

    A pooled head becomes a linear one up to ``config.linear_up_to`` training cells; val cells then train as well,
    unless they are whole groups.
    Run again with the same arguments, it goes on after the newest checkpoint; a complete run is left as it is.
    Raises InputError where there are too few labelled cells or ``out`` is a URL, ConfigError for settings that do not
    fit the model, ModelError where model and store do not fit or the model was never written.
    """
    progress = progress or Silent()
    out = on_disk(out, "--out")
    pretrained = model if isinstance(model, Model) else read_model(model)
    if not pretrained.digest:
        raise ModelError(
            "the model was never written, so the run could not say what it is trained from; write it first"
        )
    pretrained.check_store(store)
    if config.group_weights != "none" and group is None:
        raise ConfigError(
            f"group_weights: found {config.group_weights!r} without --group, expected the column of the groups; add it"
        )
    rule = SplitRule(holdout, config.validation_share, config.calibration_share, config.train.seed, group)
    mapping = None if label_map is None else LabelMap.read(label_map)
    labelled = split_cells(store, labels, rule, mapping, progress)
    untouched = finetune_preset(pretrained.info.preset, None, pretrained.info.pooled_layer)
    config = with_head(config, untouched, labelled, pretrained.encoder.pool is not None, progress)
    if config.head.kind == "linear" and "val" not in labelled.whole:
        labelled = labelled.with_val_training()
    progress.say(_split_line(labels, rule, labelled))
    check_enough(labels, labelled, config.head.kind)
    above = None if hierarchy is None else read_hierarchy(hierarchy, labelled.types)
    work = _Work(store, pretrained, labels, labelled, config, rule.described, group, mapping, above)
    if (groups := _group_facts(work)) is not None:
        progress.say(groups_text(groups))
    run = RunFolder(out, config, _identity(work))
    with run.use(progress.say):
        if run.complete:
            progress.say(f"{run.location}: complete already; its model stays as it is")
        else:
            _finetune(work, run, progress)
    return _report(run)


def _split_line(labels: str, rule: SplitRule, labelled: LabelledCells) -> str:
    sizes = ", ".join(f"{n:,} {name}" for name, n in labelled.sizes.items())
    dropped = f", {labelled.n_dropped:,} dropped by the label map" if labelled.n_dropped else ""
    without = f"{labelled.n_without_label:,} cells without a label{dropped}"
    if rule.held_out is not None and labelled.n_without_value:
        without += (
            f", {labelled.n_without_value:,} labelled ones without a {rule.held_out[0]}, which are left out"
        )
    return f"labels {labels}: {len(labelled.types)} types, {sizes}; {without}"


def _identity(work: _Work) -> dict[str, Any]:
    labelled = work.labelled
    cells = hashlib.sha256(labelled.cells.tobytes() + labelled.codes.tobytes())
    cells.update(json.dumps([*labelled.split, *labelled.types]).encode())
    named = {"label_map": work.label_map, "hierarchy": work.hierarchy}
    return {
        "kind": "finetune",
        "model": work.pretrained.digest,
        "labels": work.labels,
        "holdout": work.holdout,
        "group": work.group or "",
        "labelled_cells": cells.hexdigest(),
        **{name: file.sha256 for name, file in named.items() if file is not None},
        **run_inputs(work.store),
    }


def _finetune(work: _Work, run: RunFolder, progress: Progress) -> None:
    """Train or fit, learn how sure to be, test, and write split, held-out cells and model."""
    ranks, labelled, config = Ranks(), work.labelled, work.config
    torch.manual_seed(config.train.seed)
    task = _task(work, ranks)
    judged: Judged | None = None
    figures: dict[str, float] = {}
    if config.head.kind == "linear":
        judged = _fit(work, task, progress)
    else:
        figures = _train(work, task, run, ranks, progress)
    said = {split: task.outputs(labelled.of(split)) for split in HELDOUT_SPLITS}
    judged = judged or Judged("val", labelled.of("val"), said["val"].logits)
    confidence = fit_confidence(task, work.store, labelled, config, judged, said)
    for note in confidence.notes:
        progress.say(note)
    validated = confidence.scaling.scaled(judged.logits), labelled.codes_of(judged.cells)
    tested = confidence.scaling.scaled(said["test"].logits), labelled.codes_of(labelled.of("test"))
    facts = {
        "labels": work.labels,
        "holdout": work.holdout,
        "groups": _group_facts(work),
        "split": labelled.sizes,
        "svd_cells": _start_facts(work),
        "n_without_label": labelled.n_without_label,
        "n_dropped": labelled.n_dropped,
        "n_without_value": labelled.n_without_value,
        "label_map": None if work.label_map is None else work.label_map.facts,
        "judged_on": judged.on,
        "folds_of": judged.folds_of,
        "validation": figures | figures_of(*validated),
        "test": figures_of(*tested),
        **facts_of_test(labelled, *tested),
        "calibration": {"kind": confidence.scaling.kind, "errors": confidence.errors},
    }
    info = _info(work, confidence, facts)
    pretrained = work.pretrained
    typer = task.module.typer
    encoder = typer.encoder_and_pool(info.linformer_trained)
    model = Model(info, pretrained.vocabulary, pretrained.islands, encoder, typer, known=confidence.known)
    write_split(Path(run.location) / SPLIT_FILE, work.store, labelled)
    told = _told(labelled, judged, said, confidence.scaling)
    write_heldout(Path(run.location) / HELDOUT_FILE, work.store, labelled, told)
    write_model(run.model, model, finetuned_card(info, model.vocabulary))


def _told(
    labelled: LabelledCells, judged: Judged, said: Mapping[str, Outputs], scaling: Scaling
) -> dict[str, tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """Cells that the fit did not see, and their probabilities, by split."""
    told: dict[str, tuple[NDArray[np.int64], NDArray[np.floating]]] = {
        split: (labelled.of(split), outputs.logits) for split, outputs in said.items()
    }
    if judged.on == OUT_OF_FOLD:
        told["train"] = judged.cells, judged.logits
    return {split: (cells, scaling.probabilities(logits)) for split, (cells, logits) in told.items()}


def _train(
    work: _Work, task: FinetuneTask, run: RunFolder, ranks: Ranks, progress: Progress
) -> dict[str, float]:
    """Train until val gains nothing; the figures of its best epoch, whose weights stay."""
    options = work.config.train
    stream = BatchStream(
        work.store,
        cells=work.labelled.of("train"),
        vocabulary=work.pretrained.vocabulary,
        global_batch_size=options.global_batch_size,
        seed=options.seed,
        lanes=options.lanes or None,
    )
    with (
        Record.of(run, work.store, RunOptions(), ranks, progress) as record,
        interruption() as asked,
    ):
        loop = Loop(task, stream, options, ranks, record, progress, asked)
        figures = train(loop, lambda: _initialise(task.module.typer, work, progress))
    merge_adapters(task.module.typer.linformer)
    return figures


def _fit(work: _Work, task: FinetuneTask, progress: Progress) -> Judged | None:
    """Fit the linear head; what it says of its training cells, out of fold, unless there are val cells to judge it."""
    labelled, typer = work.labelled, task.module.typer
    assert isinstance(typer.head, LinearHead)
    _initialise(typer, work, progress)
    training = labelled.of("train")
    codes = labelled.codes_of(training)
    groups = None if labelled.groups is None else labelled.groups[labelled.split == "train"]
    folds = deal_folds(codes, groups, work.config.train.seed)
    rows = task.unit_rows(training) if typer.head.per_island is not None else None
    weights = task.module.weights_of(training)
    probe = fit_probe(task.vectors(training), rows, codes, weights, folds, progress)
    centre, weight, bias = (torch.from_numpy(part) for part in (probe.centre, probe.weight, probe.bias))
    per_island = None if probe.per_island is None else torch.from_numpy(probe.per_island)
    typer.head.take_over(centre, weight, bias, per_island)
    folds_of = f"{work.group} groups" if folds.by_group else "cells"
    for name, fitted in probe.regressions.items():
        progress.say(
            f"linear head: regression on {name}: C = {fitted.strength:g} has the least loss of those tried, over "
            f"{folds.n} folds of the training {folds_of}: {fitted.losses[fitted.strength]:.4g}"
        )
    if labelled.sizes["val"]:
        return None
    judged = probe.judged
    return Judged(OUT_OF_FOLD, training[judged], probe.logits, folds.number[judged], folds_of)


def _group_facts(work: _Work) -> dict[str, Any] | None:
    """Which groups the splits are of; None where cells were dealt without."""
    labelled = work.labelled
    if labelled.groups is None:
        return None
    return {
        "column": work.group,
        "of_split": {name: labelled.groups_of(name) for name in SPLITS},
        "whole": list(labelled.whole),
        "n_without_group": labelled.n_without_group,
    }


def _task(work: _Work, ranks: Ranks) -> FinetuneTask:
    """Pretrained encoder and new head, its start still to be set."""
    pretrained, labelled, config = work.pretrained, work.labelled, work.config
    n_types = len(labelled.types)
    head = build_head(config.head, pretrained.info.encoder, len(pretrained.vocabulary), n_types)
    keeps = "--freeze-encoder" if config.freeze_encoder else "lora" if config.lora else ""
    if keeps and head.reads_encoder and not pretrained.info.linformer_trained:
        raise ConfigError(
            f"{keeps}: the head reads the Linformer, which pretraining did not train ({pretrained.path}); "
            f"leave {keeps} out, or pretrain with --set reads=gate or another objective"
        )
    if config.lora and not head.reads_encoder:
        raise ConfigError(
            f"lora: found {config.lora} under a head that does not read the Linformer; leave it out, or "
            "--set head.reads=gate"
        )
    if config.lora:
        add_adapters(pretrained.encoder.linformer, config.lora)
    elif config.freeze_encoder or config.head.kind == "linear" or not head.reads_encoder:
        pretrained.encoder.linformer.requires_grad_(False)
    of_type = class_weights(training_counts(labelled), config.class_weights)
    weights = cell_weights(labelled, of_type, config.group_weights)
    typer = CellTyper(pretrained.encoder.linformer, head)
    module = CellTypeModel(typer, weights, labelled, config.label_smoothing).to(ranks.device)
    attend = pretrained.info.encoder.attend if head.reads_encoder else "open"
    lister = TokenLister(work.store, pretrained.vocabulary, attend)
    return FinetuneTask(module, config, lister, work.store, labelled)


def _initialise(typer: CellTyper, work: _Work, progress: Progress) -> None:
    """Start a pooled layer from the pretrained one; without one, from idf and SVD of the training cells.

    Of a linear head, which needs no labels for it: from those of the cells beside them too.
    """
    if not isinstance(typer.head, PooledHead):
        return
    pretrained = work.pretrained.encoder.pool
    if pretrained is not None:
        typer.head.pool.start_from(pretrained)
        return
    vocabulary = work.pretrained.vocabulary
    cells = np.union1d(work.labelled.of("train"), _cells_beside(work))
    counts = count_open(work.store, cells, progress)[vocabulary.islands]
    idf = inverse_document_frequency(counts, len(cells))
    rank, seed = work.config.head.pooled, work.config.train.seed
    matrix = CellMatrix(work.store, vocabulary, cells, idf)
    svd = truncated_svd(matrix, rank, seed, torch.get_num_threads(), progress)
    typer.head.pool.initialise(torch.from_numpy(idf), torch.from_numpy(svd.components * svd.singular_values))


def _cells_beside(work: _Work) -> NDArray[np.int64]:
    """The cells in no split that a pooled layer which pretraining did not make starts from; ids."""
    return work.labelled.beside if work.config.head.kind == "linear" else np.empty(0, np.int64)


def _start_facts(work: _Work) -> dict[str, int] | None:
    """Of how many cells idf and SVD are; None where pretraining made the pooled layer, or there is none."""
    if not work.config.head.pools or work.pretrained.encoder.pool is not None:
        return None
    return {"training": work.labelled.sizes["train"], "beside": len(_cells_beside(work))}


def _info(work: _Work, confidence: Confidence, facts: dict[str, Any]) -> ModelInfo:
    labelled, before = work.labelled, work.pretrained.info.provenance
    before_trained = work.pretrained.info.linformer_trained
    reads = not work.config.head.pools or work.config.head.reads != "none"
    frozen = work.config.freeze_encoder or work.config.head.kind == "linear"
    counts = Counter(labelled.types[code] for code in labelled.codes_of(labelled.of("train")))
    return replace(
        work.pretrained.info,
        pool=None,
        linformer_trained=before_trained or (reads and not frozen),
        head=work.config.head,
        labels=labelled.types,
        hierarchy=work.hierarchy,
        temperature=confidence.scaling.temperature,
        scales=confidence.scaling.scales,
        biases=confidence.scaling.biases,
        novel_threshold=work.config.novel_threshold,
        novelty=confidence.novelty,
        novel_rate=confidence.novel_rate,
        calibration_errors=confidence.errors,
        provenance={
            "made_by": made_by(),
            "kind": "finetuned",
            **facts,
            "samples": sample_facts(work.store),
            "training_cells_per_type": {name: counts[name] for name in labelled.types},
            "class_weights": work.config.class_weights,
            "group_weights": work.config.group_weights,
            "seed": work.config.train.seed,
            "pretraining_cells": earlier_sight(before, work.store),
            "pretrained": {"digest": work.pretrained.digest, **before},
        },
    )


def _report(run: RunFolder) -> FinetuneReport:
    info = read_model(run.model).info
    facts = info.provenance
    return FinetuneReport(
        Path(run.model),
        info.labels,
        facts["split"],
        facts["n_without_label"],
        facts["n_dropped"],
        info.temperature,
        facts["validation"],
        facts["test"],
        info.head.kind if info.head is not None else "",
        facts["judged_on"],
    )
