"""Cell types of scATAC-seq atlases: convert, pretrain, fine-tune, annotate. One function a command."""

from annatac_scale.api import convert, demo, evaluate, finetune, info, islands, predict, pretrain

__all__ = ["convert", "demo", "evaluate", "finetune", "info", "islands", "predict", "pretrain"]
