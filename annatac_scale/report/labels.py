"""The report of a labels data set: what its cells are called, sample by sample, and how sure the model is of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from annatac_scale.annotate.labels_summary import LabelsSummary, Quantiles, SampleSummary
from annatac_scale.model.labels import LOW_DEPTH, NOVEL

_LABELS_IN_TEXT, _LABELS_IN_HTML = 6, 20
"""Labels that have a column of their own in the table of samples."""
_SAMPLES_IN_TEXT, _PAIRS_IN_TEXT = 30, 10
_CONFIDENCE = {"5%": "0.05", "median": "0.5", "95%": "0.95"}
_OPEN = {"open 25%": "0.25", "median": "0.5", "75%": "0.75"}

Row = list[str]


@dataclass(frozen=True)
class TextTable:
    """A table to show. rows: the heads, then the others; n_texts: columns from the left that are no numbers"""

    title: str
    rows: Sequence[Row]
    n_texts: int = 1

    def lines(self) -> list[str]:
        """Aligned, texts to the left and numbers to the right."""
        widths = [max(map(len, column)) for column in zip(*self.rows, strict=True)]
        lines = [self.title]
        for row in self.rows:
            cells = enumerate(zip(row, widths, strict=True))
            aligned = [
                one.ljust(width) if i < self.n_texts else one.rjust(width) for i, (one, width) in cells
            ]
            lines.append("  ".join(aligned).rstrip())
        return lines


@dataclass(frozen=True)
class LabelsReport:
    """A summary of labels, to be shown."""

    summary: LabelsSummary

    def to_dict(self) -> dict[str, Any]:
        """All of it in the types of JSON."""
        return self.summary.to_dict()

    def text(self) -> list[str]:
        """Lines to print."""
        tables = [
            self.label_table(),
            self.sample_table(_LABELS_IN_TEXT, _SAMPLES_IN_TEXT),
            *self.set_tables(_PAIRS_IN_TEXT),
        ]
        lines = list(self.facts())
        for table in tables:
            lines += ["", *table.lines()]
        n_left = len(self.summary.samples) - _SAMPLES_IN_TEXT
        return [*lines, *([f"{n_left:,} more samples: --json or --out has them"] if n_left > 0 else [])]

    def facts(self) -> list[str]:
        """Sentences that stand above the tables."""
        found, manifest = self.summary, self.summary.manifest
        rule = manifest.rule
        facts = [f"{found.location}: {found.n_cells:,} cells of {_plural(len(found.samples), 'sample')}"]
        if found.n_parts_there < found.n_parts:
            facts.append(
                f"not complete: {found.n_parts_there:,} of {found.n_parts:,} parts are there, {found.n_missing:,} of "
                f"{found.n_cells + found.n_missing:,} cells are missing; run the same `annatac predict` again, it goes "
                "on where it stopped"
            )
        facts.append(
            f"model {manifest.model[:12]}, {_plural(len(manifest.classes), 'type')}; store {manifest.store}"
        )
        facts.append(f"{NOVEL}: {self._counted(NOVEL)}; {rule.novel_means}")
        if rule.min_open:
            facts.append(
                f"{LOW_DEPTH}: {self._counted(LOW_DEPTH)}; fewer than {rule.min_open:,} open islands"
            )
        options = [f"{name} {value}" for name, value in manifest.options.items() if value not in (None, "")]
        facts.append(f"options: {', '.join(options)}")
        if found.consensus is not None:
            facts.append(self._on_consensus())
        return facts

    def _counted(self, label: str) -> str:
        n = self.summary.n_of(label)
        return f"{n:,} cells ({self.summary.share(n):.1%})"

    def _on_consensus(self) -> str:
        found = self.summary.consensus
        assert found is not None
        share = found.n_differ / found.n_cells if found.n_cells else 0.0
        median = "" if found.share is None else f"; median share that agrees {found.share['0.5']:.1%}"
        return (
            f"consensus: {found.n_differ:,} of {found.n_cells:,} cells ({share:.1%}) have another label than most of "
            f"their cluster{median}"
        )

    def label_table(self) -> TextTable:
        """A row a label."""
        found = self.summary
        rows = [["label", "cells", "share", *_CONFIDENCE]]
        for one in found.labels:
            shares = _values(one.confidence, _CONFIDENCE, "{:.3f}")
            rows.append(
                [_on_a_line(one.name), f"{one.n_cells:,}", f"{found.share(one.n_cells):.1%}", *shares]
            )
        whole = _values(found.confidence, _CONFIDENCE, "{:.3f}")
        rows.append(["all cells", f"{found.n_cells:,}", "", *whole])
        return TextTable("Labels, and the confidence of the best type of their cells", rows)

    def sample_table(self, n_labels: int = _LABELS_IN_HTML, n_samples: int | None = None) -> TextTable:
        """A row a sample: its cells, their open islands, and the share of each of the most frequent labels."""
        names = [one.name for one in self.summary.labels[:n_labels]]
        has_others = len(self.summary.labels) > n_labels
        heads = [_on_a_line(name) for name in names] + (["others"] if has_others else [])
        partial = self.summary.n_missing > 0
        rows = [["sample", "cells", *(["missing"] if partial else []), *_OPEN, *heads]]
        for sample in self.summary.samples[:n_samples]:
            missing = [f"{sample.n_missing:,}"] if partial else []
            numbers = [f"{sample.n_cells:,}", *missing, *_values(sample.n_open, _OPEN, "{:,.0f}")]
            rows.append([_on_a_line(sample.name), *numbers, *_shares(sample, names, has_others)])
        return TextTable("Samples: open islands of a cell, and the share of each label", rows)

    def set_tables(self, n_pairs: int | None = None) -> list[TextTable]:
        """How large prediction sets are, and which types are a set of two."""
        found = self.summary
        if found.sets is None:
            return []
        sizes = [["types in the set", "cells", "share"]]
        sizes += [
            [f"{size:,}", f"{n:,}", f"{found.share(n):.1%}"] for size, n in found.sets.n_of_size.items()
        ]
        tables = [TextTable("Prediction sets", sizes, 0)]
        if found.sets.pairs:
            pairs = [["type", "type", "cells", "share"]]
            for first, second, n in found.sets.pairs[:n_pairs]:
                pairs.append([_on_a_line(first), _on_a_line(second), f"{n:,}", f"{found.share(n):.1%}"])
            tables.append(TextTable("Types that are most often a set of two, not told apart", pairs, 2))
        return tables


def _shares(sample: SampleSummary, names: Sequence[str], has_others: bool) -> Row:
    n = [sample.labels.get(name, 0) for name in names]
    n += [sample.n_cells - sum(n)] if has_others else []
    return [f"{one / sample.n_cells:.1%}" if sample.n_cells else "-" for one in n]


def _values(quantiles: Quantiles, names: dict[str, str], form: str) -> Row:
    return ["-" if quantiles is None else form.format(quantiles[name]) for name in names.values()]


def _plural(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _on_a_line(name: str) -> str:
    return " ".join(name.split())
