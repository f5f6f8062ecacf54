"""Model cards, generated from what was run."""

from typing import Any

from annatac_scale.model.folder import ModelInfo
from annatac_scale.stream.vocabulary import Vocabulary

_CONFIDENCE = (
    "A confidence is the largest softmax probability after temperature scaling. The model knows only the types "
    "above: a cell of another type gets one of them, or `Novel_cell_type` when its confidence is low."
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
    return "\n".join(
        [
            "# Cell-type model",
            "",
            *_common(info, vocabulary),
            f"- head: {head}; labels from obs column `{facts['labels']}`, held out: {facts['holdout']}",
            f"- cells: {', '.join(f'{n:,} {split}' for split, n in facts['split'].items())}",
            f"- temperature {info.temperature:.3f}, fitted on the val cells; novel below {info.novel_threshold}",
            *_figures("val", facts["validation"]),
            *_figures("test (cells that fine-tuning never saw)", facts["test"]),
            f"- {facts['pretraining_cells']}",
            "",
            *_types(facts),
            "",
            *[f"{sentence}\n" for sentence in facts.get("confusions", ())],
            _CONFIDENCE,
            "",
        ]
    )


def _types(facts: dict[str, Any]) -> list[str]:
    """A table of the types, with the figures of their test cells."""
    figures = {row["cell_type"]: row for row in facts.get("test_types", ())}
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
        lines.append(f"| {name} | {n:,} | {' | '.join(shown)} |")
    return lines


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
    pool = info.pooled_layer
    return (
        []
        if pool is None
        else [f"- pooled layer: {pool.pooled} channels, reads of the Linformer: {pool.reads}"]
    )


def _figures(name: str, figures: dict[str, Any]) -> list[str]:
    shown = [f"{key} {value:.4g}" for key, value in figures.items() if key not in ("score", "epoch")]
    return [f"- {name}: {', '.join(shown)}"] if shown else []
