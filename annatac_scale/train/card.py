"""Model cards, generated from what was run."""

from collections.abc import Mapping
from typing import Any

from annatac_scale.model.folder import ModelInfo
from annatac_scale.model.labels import in_table
from annatac_scale.stream.vocabulary import Vocabulary

_CONFIDENCE = (
    "A confidence is the largest softmax probability after scaling. The model knows only the types above: a cell of "
    "another type gets one of them, or `Novel_cell_type` where the novelty rule says so."
)


def pretrained_card(info: ModelInfo, vocabulary: Vocabulary) -> str:
    """The README.md of a pretrained model."""
    facts = info.provenance
    return "\n".join(
        [
            "# Pretrained island encoder",
            "",
            *_common(info, vocabulary),
            f"- objective: {facts['objective']}, on {facts['n_training_cells']:,} cells",
            f"- levels of open islands: {', '.join(f'{share:.1%}' for share in facts['level_shares'])}",
            *_figures("validation", facts["validation"]),
            "",
            "It gives no labels yet: `annatac finetune STORE --model THIS_FOLDER --labels COLUMN --out RUN`.",
            "",
        ]
    )


def finetuned_card(info: ModelInfo, vocabulary: Vocabulary) -> str:
    """The README.md of a fine-tuned model."""
    facts = info.provenance
    head = info.head.kind if info.head is not None else "none"
    folds = f" (folds of {facts['folds_of']})" if facts["folds_of"] else ""
    return "\n".join(
        [
            "# Cell-type model",
            "",
            *_common(info, vocabulary),
            f"- head: {head}; labels from obs column `{facts['labels']}`, {_held_out(facts)}",
            *([] if facts["groups"] is None else [f"- {groups_text(facts['groups'])}"]),
            f"- cells: {', '.join(f'{n:,} {split}' for split, n in facts['split'].items())}",
            f"- {_scaling(info)}, fitted on the {facts['judged_on']} cells{folds}; {_novel(info)}",
            *_errors(info),
            *_labels(info),
            *_figures(facts["judged_on"], facts["validation"]),
            *_figures("test (cells that fine-tuning never saw)", facts["test"]),
            f"- {facts['pretraining_cells']}",
            "",
            *_types(facts),
            "",
            *[f"{sentence}\n" for sentence in facts["confusions"]],
            _CONFIDENCE,
            "",
        ]
    )


def _held_out(facts: dict[str, Any]) -> str:
    """What was held out, and which cells then take no part."""
    n, column = facts["n_without_value"], str(facts["holdout"]).partition("=")[0]
    left_out = f"; {n:,} labelled cells without a {column} are left out" if n else ""
    return f"held out: {facts['holdout']}{left_out}"


def groups_text(groups: Mapping[str, Any]) -> str:
    """Which groups the splits are of. groups: column, of_split, whole, n_without_group"""
    of_split, whole = groups["of_split"], groups["whole"]
    shown = [f"{split} {', '.join(of_split[split])}" for split in (*whole, "train")]
    if "val" not in whole:
        shown.append("val and calib: cells of the groups that train, of which none can be spared")
    return (
        f"whole groups of {groups['column']}: {'; '.join(shown)}; {groups['n_without_group']:,} labelled cells without "
        "a group are left out"
    )


def _types(facts: dict[str, Any]) -> list[str]:
    """A table of the types, with the figures of their test cells."""
    figures = {row["cell_type"]: row for row in facts["test_types"]}
    lines = [
        "| cell type | training cells | test cells | precision | recall | F1 |",
        "|---|---|---|---|---|---|",
    ]
    for name, n in facts["training_cells_per_type"].items():
        row = figures.get(name)
        shown = (
            [f"{row['n']:,}", *(f"{row[f]:.3f}" for f in ("precision", "recall", "f1"))]
            if row
            else ["0", *"---"]
        )
        lines.append(f"| {in_table(name)} | {n:,} | {' | '.join(shown)} |")
    return lines


def _labels(info: ModelInfo) -> list[str]:
    """What fine-tuning did to the labels, and what lies above them."""
    facts, lines = info.provenance, []
    if facts["label_map"] is not None:
        lines.append(
            f"- label map: {len(facts['label_map']['to']):,} labels named, {facts['n_dropped']:,} cells dropped, "
            f"sha256 {facts['label_map']['sha256']}"
        )
    if info.hierarchy is not None:
        roots = [
            name
            for name, above in zip(info.hierarchy.nodes, info.hierarchy.parents, strict=True)
            if not above
        ]
        lines.append(
            f"- hierarchy: {len(info.hierarchy.nodes):,} nodes below {', '.join(map(in_table, roots))}"
        )
    return lines


def _scaling(info: ModelInfo) -> str:
    return f"temperature {info.temperature:.3f}" if not info.scales else "vector scaling"


def _novel(info: ModelInfo) -> str:
    if info.novel_rate is None:
        return f"novel below {info.novel_threshold}; by {info.novelty} where a rate is asked for"
    return f"novel by {info.novelty}, so that {info.novel_rate:.1%} of known cells are"


def _errors(info: ModelInfo) -> list[str]:
    shown = [
        f"{found['before']:.3f} -> {found['after']:.3f} ({split})"
        for split, found in info.calibration_errors.items()
    ]
    return [f"- expected calibration error, before -> after scaling: {', '.join(shown)}"] if shown else []


def _common(info: ModelInfo, vocabulary: Vocabulary) -> list[str]:
    encoder = info.encoder
    space = f"{info.n_space:,} of {info.assembly} ({info.selection}, {info.width_bp} bp), counting {info.counting}"
    sizes = f"width {encoder.width}, {encoder.layers} layers, {encoder.heads} heads of {encoder.head_dim}"
    untrained = "" if info.linformer_trained else "; not trained"
    return [
        f"- made by {info.provenance['made_by']}, preset {info.preset}, seed {info.provenance['seed']}",
        f"- islands: {len(vocabulary):,} of the {space}",
        f"- Linformer: {sizes}, k {encoder.k}, attend {encoder.attend}{untrained}",
        *_pool(info),
        f"- trained on samples: {', '.join(info.provenance['samples'])}",
    ]


def _pool(info: ModelInfo) -> list[str]:
    pool, of = info.pooled_layer, info.provenance.get("svd_cells")
    if pool is None:
        return []
    beside = f" and {of['beside']:,} cells in no split, without labels" if of and of["beside"] else ""
    start = f"; starts from idf and SVD of the {of['training']:,} training cells{beside}" if of else ""
    return [f"- pooled layer: {pool.pooled} channels, reads of the Linformer: {pool.reads}{start}"]


def _figures(name: str, figures: dict[str, Any]) -> list[str]:
    shown = [f"{key} {value:.4g}" for key, value in figures.items() if key not in ("score", "epoch")]
    return [f"- {name}: {', '.join(shown)}"] if shown else []
