"""Presets: tiny, small, and paper, the published model, objective and rules."""

from dataclasses import dataclass, replace
from typing import Any

from annatac_scale.errors import ConfigError
from annatac_scale.model.cell_typer import HeadConfig
from annatac_scale.model.folder import PoolConfig
from annatac_scale.model.heads import objectives_of
from annatac_scale.model.linformer import EncoderConfig
from annatac_scale.model.novelty import checked_score
from annatac_scale.model.pool import READS
from annatac_scale.stream.masking import MaskingOptions
from annatac_scale.train.cell_weights import CLASS_WEIGHTS, GROUP_WEIGHTS
from annatac_scale.train.positions import VALUES
from annatac_scale.train.train_options import TrainOptions

PRESETS = ("tiny", "small", "paper")
MOST_FITTED = 12_000
"""Training cells up to which the linear head is the default: it was tried on up to 10,335 of them."""
CALIBRATIONS = ("temperature", "vector")
PAPER_NOVEL_THRESHOLD = 0.5
"""annATAC's rule: a cell whose largest probability is below it is of a novel type."""


@dataclass(frozen=True)
class PretrainConfig:
    """All of a pretraining run. Raises ConfigError where a value is out of range."""

    preset: str
    encoder: EncoderConfig
    train: TrainOptions
    objective: str
    """What is asked of masked islands, joined by "+": their "level"; whether they are "open", among sampled closed
    ones; the same of the whole "cell", from the pooled vector of the islands that are not masked; or, from that, the
    "vector" of the masked open islands."""
    reads: str = "gate"
    """What the pooled layer takes from the encoder: a "gate" on each island, "gate+sum", or "none"."""
    mask_fraction: float = 0.5
    """Share of a cell's open islands that are masked."""
    mask_keep: float = 0.0
    """Share of the masked islands that stay visible."""
    mask_level_cap: float = 0.5
    """Most of a level's islands in a cell that are masked."""
    negatives: int = 1
    """Closed islands drawn for each hidden open one, where "open" or "cell" is asked."""
    nearby: float = 0.0
    """Share of them that are drawn among the neighbours of hidden islands, and not by frequency."""
    pooled: int = 64
    """Channels of the pooled layer that "cell" and "vector" train."""
    position_values: str = "idf"
    """What an open island counts in the SVD of the positions: "levels" or "idf"."""
    min_cells: int = 3
    """Training cells in which an island must be open to be in the model's vocabulary."""
    validation_share: float = 0.05

    def __post_init__(self) -> None:
        if self.reads not in READS:
            raise ConfigError(f"reads: found {self.reads!r}, expected {', '.join(READS)}")
        if self.pooled < 2:
            raise ConfigError(f"pooled: found {self.pooled}, expected at least 2")
        if self.asks_closed and self.negatives < 1:
            raise ConfigError(
                f"negatives: found {self.negatives}, expected at least 1 where open or cell is asked"
            )
        if self.position_values not in VALUES:
            raise ConfigError(
                f"position_values: found {self.position_values!r}, expected {' or '.join(VALUES)}"
            )
        if not 0 < self.validation_share < 1:
            raise ConfigError(f"validation_share: found {self.validation_share}, expected between 0 and 1")
        if self.min_cells < 1:
            raise ConfigError(f"min_cells: found {self.min_cells}, expected at least 1")
        _ = self.masking  # checks its values

    @property
    def masking(self) -> MaskingOptions:
        """The masking rule."""
        negatives = self.negatives if self.asks_closed else 0
        return MaskingOptions(self.mask_fraction, self.mask_keep, self.mask_level_cap, negatives, self.nearby)

    @property
    def objectives(self) -> tuple[str, ...]:
        """The names in ``objective``."""
        return objectives_of(self.objective)

    @property
    def asks_closed(self) -> bool:
        """Whether closed islands are asked too."""
        return "open" in self.objectives or "cell" in self.objectives

    @property
    def runs_encoder(self) -> bool:
        """Whether a loss looks at the encoder's states."""
        return self.asks_tokens or self.reads != "none"

    @property
    def asks_tokens(self) -> bool:
        """Whether a loss is of the states of tokens."""
        return "level" in self.objectives or "open" in self.objectives

    @property
    def asks_cells(self) -> bool:
        """Whether a loss is of the vectors of cells."""
        return "cell" in self.objectives or "vector" in self.objectives


@dataclass(frozen=True)
class FinetuneConfig:
    """All of a fine-tuning run. Raises ConfigError where a value is out of range."""

    head: HeadConfig
    train: TrainOptions
    class_weights: str = "balanced"
    """"balanced": 1 / frequency; "paper": (1 - frequency)^2; "none"."""
    group_weights: str = "none"
    """"balanced": of the cells of a type, all groups together weigh the same; "none". See ``train.cell_weights``."""
    label_smoothing: float = 0.0
    """Share of each cell's target that is spread over all types."""
    freeze_encoder: bool = False
    lora: int = 0
    """Rank of the adapters that are trained in place of the Linformer's weights, at its rate; 0: the weights are."""
    linear_up_to: int = 0
    """Training cells up to which a pooled head becomes a linear one."""
    validation_share: float = 0.1
    """Of the cells that are not held out: for early stopping and the scaling of the logits."""
    calibration_share: float = 0.1
    """Of the cells that are not held out: for thresholds."""
    calibration: str = "temperature"
    """How cells that the fit did not see scale the logits: by one "temperature", or "vector", where they are enough."""
    novelty: str = "max_probability"
    """The score that a rate is of: one of model.novelty.SCORES."""
    novel_rate: float | None = None
    """Share of known cells that the model calls novel by it, where ``predict`` is not asked for another rate; None:
    ``novel_threshold`` decides there."""
    novel_threshold: float = PAPER_NOVEL_THRESHOLD
    """Confidence below which the model calls a cell novel, where there is no rate."""

    def __post_init__(self) -> None:
        checked_score(self.novelty)
        if self.calibration not in CALIBRATIONS:
            raise ConfigError(
                f"calibration: found {self.calibration!r}, expected {' or '.join(CALIBRATIONS)}"
            )
        rate = self.novel_rate
        if not 0 <= self.novel_threshold <= 1 or (rate is not None and not 0 < rate < 1):
            raise ConfigError(
                f"novel_threshold, novel_rate: found {self.novel_threshold}, {rate}, expected shares"
            )
        if self.class_weights not in CLASS_WEIGHTS:
            raise ConfigError(
                f"class_weights: found {self.class_weights!r}, expected {', '.join(CLASS_WEIGHTS)}"
            )
        if self.group_weights not in GROUP_WEIGHTS:
            raise ConfigError(
                f"group_weights: found {self.group_weights!r}, expected {' or '.join(GROUP_WEIGHTS)}"
            )
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(
                f"label_smoothing: found {self.label_smoothing}, expected at least 0 and under 1"
            )
        if min(self.lora, self.linear_up_to) < 0:
            raise ConfigError(
                f"lora, linear_up_to: found {self.lora}, {self.linear_up_to}, expected at least 0"
            )
        if self.lora and self.freeze_encoder:
            raise ConfigError(
                f"lora: found {self.lora} with --freeze-encoder, expected one of both; leave one out"
            )
        if self.head.kind == "linear" and (self.lora or self.label_smoothing):
            raise ConfigError(
                "head linear: found lora or label_smoothing, expected neither: it is fitted, not trained; leave them "
                "out, or choose another --head"
            )
        if not (0 < self.validation_share < 1 and 0 <= self.calibration_share < 1 - self.validation_share):
            raise ConfigError(
                "validation_share and calibration_share: expected shares that leave cells to train on"
            )


_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"width": 32, "layers": 2, "heads": 2, "head_dim": 16, "k": 16, "ff": 128},
    "small": {"width": 128, "layers": 4, "heads": 4, "head_dim": 32, "k": 64, "ff": 512},
    "paper": {"width": 200, "layers": 4, "heads": 4, "head_dim": 128, "k": 64, "ff": 800},
}


def pretrain_preset(name: str) -> PretrainConfig:
    """The pretraining configuration of a preset. Raises ConfigError for a name that is none."""
    if name not in PRESETS:
        raise ConfigError(f"--preset {name}: expected {', '.join(PRESETS)}; choose one of these")
    published = name == "paper"
    encoder = EncoderConfig(
        **_SIZES[name],
        attend="all" if published else "open",
        norm="post" if published else "pre",
        positions="frozen",
    )
    if not published:
        tiny = name == "tiny"
        train = TrainOptions(
            epochs=6 if tiny else 10,
            global_batch_size=64,
            learning_rate=1e-3,
            table_learning_rate=1e-3,
            warmup_steps=50,
        )
        # What paid, and what did not, on real sets: docs/accuracy.md.
        return PretrainConfig(name, encoder, train, "vector", "none" if tiny else "gate")
    train = TrainOptions(
        epochs=99,
        global_batch_size=900,
        learning_rate=1e-4,
        table_learning_rate=1e-4,
        schedule="step",
        decay_epochs=10,
        decay=0.9,
        clip=100.0,
    )
    return PretrainConfig(
        name,
        encoder,
        train,
        "level",
        mask_fraction=0.15,
        mask_keep=0.1,
        mask_level_cap=1.0,
        position_values="levels",
        validation_share=0.01,
    )


def finetune_preset(name: str, head: str | None = None, pool: PoolConfig | None = None) -> FinetuneConfig:
    """The fine-tuning configuration for a model of preset ``name``.

    head: another kind than the preset's own, which is "linear" up to MOST_FITTED training cells
    pool: the model's pooled layer, which a pooled or linear head goes on from
    """
    if name != "paper":
        chosen = HeadConfig(head or "pooled", island_dropout=0.5)
        if pool is not None:
            chosen = replace(chosen, pooled=pool.pooled, reads=pool.reads)
        # The pooled head starts as a linear model with a good table: its few other parameters may move fast.
        pooled = chosen.kind == "pooled"
        train = TrainOptions(
            epochs=6 if pooled else 20,
            min_steps=200,
            global_batch_size=32,
            learning_rate=1e-2 if pooled else 1e-3,
            table_learning_rate=1e-3,
            encoder_learning_rate=1e-4 if pooled else 1e-3,
            weight_decay=0.1,
            warmup_steps=10,
            patience=6,
        )
        linear_up_to = MOST_FITTED if head is None else 0
        return FinetuneConfig(chosen, train, linear_up_to=linear_up_to, novelty="joint")
    train = TrainOptions(
        epochs=99,
        global_batch_size=450,
        learning_rate=1e-4,
        table_learning_rate=1e-4,
        encoder_learning_rate=1e-4,
        schedule="step",
        decay_epochs=4,
        decay=0.3,
        clip=1e6,
    )
    published = HeadConfig(head or "cnn")
    if pool is not None and published.pools:
        published = replace(published, pooled=pool.pooled, reads=pool.reads)
    return FinetuneConfig(published, train, class_weights="paper")


def with_tokens_per_cell(config: PretrainConfig, tokens_per_cell: float) -> PretrainConfig:
    """The configuration with the encoder's expected tokens filled in where they were left open."""
    if config.encoder.attend == "all" or config.encoder.tokens_per_cell:
        return config
    return replace(config, encoder=replace(config.encoder, tokens_per_cell=tokens_per_cell))
