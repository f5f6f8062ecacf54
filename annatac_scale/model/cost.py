"""What an encoder costs, by arithmetic: FLOPs and memory of a cell, parameters and bytes of its tables.

A multiply-add counts as two FLOPs, as is usual; only products of matrices are counted, which are nearly all of it.
"""

from dataclasses import dataclass

from annatac_scale.model.linformer import N_TOKENS, EncoderConfig

FLOAT_BYTES = 4
"""Weights, gradients and optimizer states are fp32 at every precision."""


@dataclass(frozen=True)
class CellTokens:
    """A mean cell: tokens that it lists, and those of them that the last layer computes."""

    listed: float
    asked: float

    @classmethod
    def to_train(
        cls, attend: str, n_open: float, n_islands: int, masked: float, negatives: float = 0.0
    ) -> "CellTokens":
        """In pretraining on the states of masked tokens.

        n_open: open islands of a cell; n_islands: of the vocabulary; masked: share of the open islands that is asked;
        negatives: closed islands asked for each of those
        """
        closed = min(n_open * masked * negatives, n_islands - n_open)
        listed = n_islands if attend == "all" else n_open + closed
        return cls(listed, n_open * masked + closed)

    @classmethod
    def to_predict(cls, attend: str, n_open: float, n_islands: int) -> "CellTokens":
        """Where all states are looked at."""
        listed = n_islands if attend == "all" else n_open
        return cls(listed, listed)


def forward_flops(config: EncoderConfig, tokens: CellTokens) -> float:
    """FLOPs of a forward of one cell. What ``closed`` adds is once a call, not once a cell, and left out."""
    return (config.layers - 1) * _layer_flops(config, tokens.listed, tokens.listed) + _layer_flops(
        config, tokens.listed, tokens.asked
    )


def training_flops(config: EncoderConfig, tokens: CellTokens) -> float:
    """FLOPs of forward and backward of one cell: each product has two gradients, and a third forward if recomputed."""
    return (4 if config.checkpoint else 3) * forward_flops(config, tokens)


def _layer_flops(config: EncoderConfig, listed: float, asked: float) -> float:
    """Of one layer that reads ``listed`` tokens and computes ``asked`` of them."""
    inner, rows = config.heads * config.head_dim, config.heads * config.k
    projected = 2 * listed * config.k * config.width
    keys_and_values = 2 * (2 * config.k * config.width * inner)
    folded = 2 * (2 * config.k * inner * config.width)
    attention = 2 * (2 * asked * config.width * rows)
    feed_forward = 2 * (2 * asked * config.width * config.ff)
    return projected + keys_and_values + folded + attention + feed_forward


def parameters(config: EncoderConfig, n_islands: int) -> int:
    """Trained parameters of a ``Linformer``."""
    width, inner = config.width, config.heads * config.head_dim
    attention = 3 * width * inner + inner * width + width
    feed_forward = width * config.ff + config.ff + config.ff * width + width
    norms = 4 * width * config.layers + (2 * width if config.norm == "pre" else 0)
    tables = table_parameters(config, n_islands)
    rest = N_TOKENS * width + config.k + (width if config.depth else 0)
    return config.layers * (attention + feed_forward) + norms + tables + rest


def table_parameters(config: EncoderConfig, n_islands: int) -> int:
    """Those in tables with a row for each island: E, and positions where they are learned."""
    return n_islands * (config.k + (config.width if config.positions == "learned" else 0))


def training_bytes(config: EncoderConfig, n_islands: int) -> dict[str, int]:
    """Bytes held all through training: weights with frozen positions, gradients, AdamW's two moments, the tables alone.

    The gradients' are also what ranks exchange in a step.
    """
    trained = parameters(config, n_islands) * FLOAT_BYTES
    frozen = n_islands * config.width * FLOAT_BYTES if config.positions == "frozen" else 0
    tables = table_parameters(config, n_islands) * FLOAT_BYTES
    return {"weights": trained + frozen, "gradients": trained, "optimizer": 2 * trained, "tables": tables}


def activation_bytes(config: EncoderConfig, tokens: CellTokens) -> float:
    """Bytes that one cell takes in training in fp32: what a backward needs, and the gradients of one layer with it.

    bf16 takes less. Recomputed layers keep what goes into them, and one layer's own.
    """
    kept = 4 * config.width + config.heads * config.k + 2 * config.ff
    passing = config.width + 2 * config.ff
    whole = tokens.listed * (kept + passing)
    if config.checkpoint:
        floats = (config.layers - 1) * tokens.listed * config.width + whole
    else:
        others = max(config.layers - 2, 0) * tokens.listed * kept + tokens.asked * kept
        floats = others + (whole if config.layers > 1 else 0)
    return floats * FLOAT_BYTES
