"""Telling cell types, as the training loop sees it: the module with its loss, and the task with its validation."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.special import logsumexp
from sklearn.metrics import accuracy_score, f1_score
from torch import nn
from torch.nn import functional

from annatac_scale.model.cell_typer import CellTyper
from annatac_scale.model.encoder import batch_tokens
from annatac_scale.model.heads import LossSum
from annatac_scale.model.novelty import Outputs
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.store import IslandStore
from annatac_scale.stream.batch import Batch
from annatac_scale.stream.selection import sequential
from annatac_scale.stream.tokens import TokenLister
from annatac_scale.train.loop import micro_batches
from annatac_scale.train.presets import FinetuneConfig
from annatac_scale.train.ranks import Ranks
from annatac_scale.train.splits import LabelledCells
from annatac_scale.train.train_options import TrainOptions


class CellTypeModel(nn.Module):
    """A cell typer that maps labelled batches to summed, weighted cross-entropy.

    weights: float32 [n], of each labelled cell; label_smoothing: share of a target that is spread over all types
    """

    def __init__(
        self,
        typer: CellTyper,
        weights: NDArray[np.float32],
        labelled: LabelledCells,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.typer = typer
        self._weights = weights
        self._labelled = labelled
        self._label_smoothing = label_smoothing

    def weights_of(self, cells: NDArray[np.int64]) -> NDArray[np.float32]:
        """Weights of the given labelled cells."""
        return self._weights[np.searchsorted(self._labelled.cells, cells)]

    def forward(self, batch: Batch) -> dict[str, LossSum]:
        """The loss named "type" over the cells of a batch; all of them have a code of at least 0."""
        device = self.typer.head.classifier.weight.device
        logits = self.typer(*batch_tokens(batch, device)).float()
        target = torch.from_numpy(self._labelled.codes_of(batch.cell_ids)).to(device)
        weights = torch.from_numpy(self.weights_of(batch.cell_ids)).to(device)
        losses = functional.cross_entropy(
            logits, target, reduction="none", label_smoothing=self._label_smoothing
        )
        loss = (losses * weights).sum()
        count = torch.tensor(len(target), device=device)
        return {"type": LossSum(loss, count, (logits.argmax(1) == target).sum())}


class FinetuneTask:
    """Fine-tuning as the loop sees it."""

    def __init__(
        self,
        module: CellTypeModel,
        config: FinetuneConfig,
        lister: TokenLister,
        store: IslandStore,
        labelled: LabelledCells,
    ) -> None:
        self.module = module
        self.loss_weights = {"type": 1.0}
        self._config = config
        self._lister = lister
        self._store = store
        self._labelled = labelled

    @property
    def n_islands(self) -> int:
        """Islands of the model."""
        return len(self._lister.vocabulary)

    def parameter_groups(self, options: TrainOptions) -> list[dict[str, Any]]:
        """The head, its tables, and the encoder with what reads it, each at its rate."""
        typer = self.module.typer
        tables, reading = typer.head.table_parameters(), typer.head.reading_parameters()
        apart = {id(p) for p in (*tables, *reading)}
        encoder = [p for p in typer.linformer.parameters() if p.requires_grad]
        return [
            {
                "params": [p for p in typer.head.parameters() if id(p) not in apart],
                "lr": options.learning_rate,
            },
            {"params": tables, "lr": options.table_learning_rate, "weight_decay": options.weight_decay},
            {"params": reading + encoder, "lr": options.encoder_learning_rate},
        ]

    def prepare(self, batch: Batch, epoch: int) -> Batch:
        """List the tokens to attend to."""
        return self._lister(batch)

    def counts(self, batch: Batch) -> dict[str, int]:
        """Every cell is a target."""
        return {"type": len(batch)}

    def validate(self, ranks: Ranks, after_batch: Callable[[], None]) -> dict[str, float]:
        """Figures of the val cells; score is macro F1, the loss breaking ties."""
        cells = self._labelled.of("val")
        figures = figures_of(self.outputs(cells, after_batch).logits, self._labelled.codes_of(cells))
        return {"score": figures["macro_f1"] - 0.01 * figures["loss"], **figures}

    def outputs(self, cells: NDArray[np.int64], after_batch: Callable[[], None] = lambda: None) -> Outputs:
        """What the model says of cells, in order of their ids."""
        typer = self.module.typer
        logits = [np.empty((0, typer.head.classifier.out_features), np.float32)]
        embedding = [np.empty((0, typer.head.classifier.in_features), np.float32)]
        n_open = [np.empty(0, np.int64)]
        for piece, of_piece in self._pieces(cells, after_batch):
            said = typer.predict_with_embedding(piece)
            logits.append(said[0])
            embedding.append(said[1])
            n_open.append(of_piece)
        return Outputs(np.concatenate(logits), np.concatenate(embedding), np.concatenate(n_open))

    def vectors(self, cells: NDArray[np.int64]) -> NDArray[np.float32]:
        """z of the pooled layer [n, channels] of some cells, in order of their ids, for a head that has one."""
        return np.concatenate([self.module.typer.pooled(piece) for piece, _ in self._pieces(cells)])

    def unit_rows(self, cells: NDArray[np.int64]) -> sparse.csr_array:
        """Binary x idf in rows of length 1, [n, N], of some cells, in order of their ids, for a head that pools."""
        rows = [self.module.typer.unit_rows(piece) for piece, _ in self._pieces(cells)]
        return sparse.csr_array(sparse.vstack(rows, format="csr"))

    def opened(self, cells: NDArray[np.int64]) -> Iterator[OpenIslands]:
        """The open islands of cells in order of their ids, by the model's numbers, some cells at a time."""
        return (rows for _, rows in self._read(cells))

    def _read(self, cells: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], OpenIslands]]:
        new_of_old = self._lister.vocabulary.new_of_old()
        return ((ids, rows.renumber(new_of_old)) for ids, rows in sequential(self._store, cells))

    def _pieces(
        self, cells: NDArray[np.int64], after_batch: Callable[[], None] = lambda: None
    ) -> Iterator[tuple[Batch, NDArray[np.int64]]]:
        """The cells in order of their ids, some at a time, with their tokens listed, and the n_open of each."""
        for ids, read in self._read(cells):
            batch, start = self._lister(Batch.from_open(ids, read)), 0
            for piece in micro_batches(batch, self._config.train.micro_tokens):
                yield piece, read.n_open[start : start + len(piece)]
                start += len(piece)
            after_batch()


def figures_of(logits: NDArray[np.floating], truth: NDArray[np.int64]) -> dict[str, float]:
    """accuracy, macro_f1 over the types in the truth, and loss over the cells of types that the model knows.

    truth: codes; those below 0 are types that the model does not know, whose cells are errors. Empty without cells.
    """
    if not len(truth):
        return {}
    best = logits.argmax(axis=1)
    macro_f1 = f1_score(truth, best, labels=np.unique(truth), average="macro", zero_division=0)
    figures = {"accuracy": float(accuracy_score(truth, best)), "macro_f1": float(macro_f1)}
    known = np.flatnonzero(truth >= 0)
    if len(known):
        scores = logits[known].astype(np.float64)
        own = scores[np.arange(len(known)), truth[known]]
        figures["loss"] = float(np.mean(logsumexp(scores, axis=1) - own))
    return figures
