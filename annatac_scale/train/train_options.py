"""How to optimise, and what follows from that alone: the learning rate of a step, the precision of a forward."""

import math
from dataclasses import dataclass

import torch

from annatac_scale.errors import ConfigError

SCHEDULES = ("step", "cosine")
PRECISIONS = ("auto", "fp32", "bf16")


@dataclass(frozen=True)
class TrainOptions:
    """How to optimise. Raises ConfigError where a value is out of range."""

    epochs: int = 20
    min_steps: int = 0
    """Steps below which training does not stay: a small set is gone through in more epochs than ``epochs``."""
    global_batch_size: int = 64
    """Cells of a step, over all ranks."""
    lanes: int = 0
    """Runs of cells read side by side, a divisor of the global batch, at least the ranks; 0: the one nearest 36."""
    micro_tokens: int = 12_288
    """Tokens of a micro-step: bounds memory; changes the result by rounding only."""
    learning_rate: float = 1e-3
    table_learning_rate: float = 1e-3
    """Rate of tables with a row for each island, which a cell trains few rows of."""
    encoder_learning_rate: float = 1e-3
    """Rate of the encoder where a head is trained with it."""
    weight_decay: float = 0.0
    """Decoupled decay (AdamW) of the tables, and of nothing else."""
    schedule: str = "cosine"
    """"step" multiplies the rate by ``decay`` every ``decay_epochs``; "cosine" falls to 0 over all epochs."""
    warmup_steps: int = 0
    """Steps in which the rate rises from nearly 0, under either schedule."""
    decay_epochs: int = 10
    decay: float = 0.9
    clip: float = 1.0
    """Largest norm of the gradient."""
    patience: int = 10
    """Validations after which training stops when none of them gained ``min_gain`` in score."""
    min_gain: float = 1e-3
    precision: str = "auto"
    """Forward and backward in "fp32" or "bf16" (autocast; weights, sums and optimizer stay in fp32). "auto": bf16 on
    GPUs that compute in it, fp32 elsewhere."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"schedule: found {self.schedule!r}, expected {' or '.join(SCHEDULES)}")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision: found {self.precision!r}, expected {', '.join(PRECISIONS)}")
        for name in ("epochs", "global_batch_size", "micro_tokens", "decay_epochs", "patience"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: found {getattr(self, name)}, expected at least 1")
        for name in ("learning_rate", "table_learning_rate", "encoder_learning_rate", "clip", "decay"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name}: found {getattr(self, name)}, expected more than 0")
        for name in ("min_steps", "lanes", "weight_decay", "warmup_steps", "min_gain", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name}: found {getattr(self, name)}, expected at least 0")


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether forward and backward run in bfloat16 on a device."""
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return precision == "bf16"


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context of a forward of that precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(precision, device))


def rate_factor(options: TrainOptions, step: int, steps_per_epoch: int) -> float:
    """What the learning rates are multiplied by in a step (from 0): a function of the step alone."""
    warm = min(1.0, (step + 1) / (options.warmup_steps + 1))
    if options.schedule == "step":
        return float(warm * options.decay ** (step // steps_per_epoch // options.decay_epochs))
    return warm * 0.5 * (1 + math.cos(math.pi * step / (options.epochs * steps_per_epoch)))
