"""Cell types of scATAC-seq atlases: convert, pretrain, fine-tune, annotate. One function a command."""

import os
import tempfile
from pathlib import Path

if not (os.access(Path(__file__).parent, os.W_OK) or os.access(Path.home(), os.W_OK)):
    # numba refuses to import a cached kernel where it can write its cache nowhere: give it a place for this process.
    os.environ.setdefault("NUMBA_CACHE_DIR", tempfile.mkdtemp(prefix="annatac-numba-"))

from annatac_scale.api import convert, demo, evaluate, export, finetune, info, islands, predict, pretrain

__all__ = ["convert", "demo", "evaluate", "export", "finetune", "info", "islands", "predict", "pretrain"]
