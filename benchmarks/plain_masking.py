"""Masking as others would write it: row by row and class by class, and with NumPy's sorts. No part of the package."""

import math

import numpy as np
import torch
from numpy.typing import NDArray

from annatac_scale.stream.batch import MASK_TOKEN, NOT_COUNTED, Batch

FRACTION, KEEP, N_LEVELS = 0.15, 0.1, 5


def dense(batch: Batch, n_islands: int) -> torch.Tensor:
    """A batch as the published code takes it: a token for every island, uint8 [B, n_islands] (there int64)."""
    rows = np.zeros((len(batch), n_islands), np.uint8)
    rows[np.repeat(np.arange(len(batch)), np.diff(batch.offsets)), batch.islands] = batch.tokens
    return torch.from_numpy(rows)


def by_rows(rows: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """What the published code does: a loop over rows and their classes, dealing evenly over the classes.

    A class that has too few lowers what all later ones give, as published, so that fewer are chosen than asked for.
    Returns tokens, uint8, and targets, int16, both [B, n_islands].
    """
    tokens = rows.clone()
    targets = torch.full(rows.shape, NOT_COUNTED, dtype=torch.int16)
    for row in range(len(rows)):
        levels = torch.unique(rows[row][rows[row] > 0])
        if not len(levels):
            continue
        quota = math.ceil(int((rows[row] > 0).sum()) * FRACTION) // len(levels)
        for level in levels:
            places = (rows[row] == level).nonzero().squeeze(1)
            quota = max(1, min(quota, len(places)))
            chosen = places[torch.randperm(len(places), generator=generator)[:quota]]
            targets[row, chosen] = level.to(torch.int16) - 1
            hidden = chosen[torch.rand(len(chosen), generator=generator) >= KEEP]
            tokens[row, hidden] = MASK_TOKEN
    return tokens, targets


def by_sorting(batch: Batch, rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.int16]]:
    """Our quotas with NumPy alone: all open islands of a batch sorted by cell, level and a random number."""
    cell = np.repeat(np.arange(len(batch)), np.diff(batch.offsets))
    group = cell * N_LEVELS + batch.tokens - 1
    held = np.bincount(group, minlength=len(batch) * N_LEVELS)
    order = np.lexsort((rng.random(len(group)), group))
    rank = np.arange(len(group)) - np.repeat(np.cumsum(held) - held, held)
    chosen = order[rank < quotas(held.reshape(-1, N_LEVELS)).ravel()[group[order]]]
    targets = np.full(len(group), NOT_COUNTED, np.int16)
    targets[chosen] = batch.tokens[chosen] - 1
    tokens = batch.tokens.copy()
    tokens[chosen[rng.random(len(chosen)) >= KEEP]] = MASK_TOKEN
    return tokens, targets


def quotas(held: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many of each level, int64 [B, 5], are chosen: the rarest gives first, and the others what is left."""
    left = np.ceil(held.sum(axis=1).astype(np.float32) * np.float32(FRACTION)).astype(np.int64)
    given = np.zeros_like(held)
    rows, order = np.arange(len(held)), np.argsort(held, axis=1, kind="stable")
    for position in range(N_LEVELS):
        level = order[:, position]
        given[rows, level] = np.minimum(held[rows, level], left // (N_LEVELS - position))
        left -= given[rows, level]
    return given


def with_closed_by_sorting(
    batch: Batch, tokens: NDArray[np.uint8], counts: NDArray[np.int64], rng: np.random.Generator
) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Islands and tokens with a closed island drawn by its count for each hidden one, cell by cell."""
    islands, merged = [], []
    for cell in range(len(batch)):
        own = slice(batch.offsets[cell], batch.offsets[cell + 1])
        weights = counts.astype(np.float64)
        weights[batch.islands[own]] = 0
        wanted = np.count_nonzero(tokens[own] == MASK_TOKEN)
        drawn = rng.choice(len(weights), wanted, replace=False, p=weights / weights.sum())
        both = np.concatenate([batch.islands[own], drawn.astype(np.int32)])
        order = np.argsort(both)
        islands.append(both[order])
        merged.append(np.concatenate([tokens[own], np.full(wanted, MASK_TOKEN, np.uint8)])[order])
    return np.concatenate(islands), np.concatenate(merged)
