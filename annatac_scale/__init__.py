"""Cell types of scATAC-seq atlases: convert, pretrain, fine-tune, annotate. One function a command, and the stream."""

import importlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if not (os.access(Path(__file__).parent, os.W_OK) or os.access(Path.home(), os.W_OK)):
    # numba refuses to import a cached kernel where it can write its cache nowhere: give it a place for this process.
    os.environ.setdefault("NUMBA_CACHE_DIR", tempfile.mkdtemp(prefix="annatac-numba-"))

import annatac_scale.report  # noqa: F401 (the folder; imported later, it would take the place of the function)
from annatac_scale.api import (
    convert,
    demo,
    evaluate,
    export,
    finetune,
    info,
    islands,
    predict,
    pretrain,
    report,
)

if TYPE_CHECKING:
    from annatac_scale.model.encoder import Encoder
    from annatac_scale.model.folder import read_model
    from annatac_scale.store.cache import BlockCache
    from annatac_scale.store.store import IslandStore
    from annatac_scale.stream.dataset import IslandStream
    from annatac_scale.stream.device import to_device
    from annatac_scale.stream.loader import BatchStream
    from annatac_scale.stream.split import Split

_PARTS = {
    "BatchStream": "stream.loader",
    "BlockCache": "store.cache",
    "Encoder": "model.encoder",
    "IslandStore": "store.store",
    "IslandStream": "stream.dataset",
    "Split": "stream.split",
    "read_model": "model.folder",
    "to_device": "stream.device",
}
"""Parts for programs of one's own, by their modules; imported when they are asked for, since some bring torch."""

__all__ = [
    "BatchStream",
    "BlockCache",
    "Encoder",
    "IslandStore",
    "IslandStream",
    "Split",
    "convert",
    "demo",
    "evaluate",
    "export",
    "finetune",
    "info",
    "islands",
    "predict",
    "pretrain",
    "read_model",
    "report",
    "to_device",
]


def __getattr__(name: str) -> object:
    if name not in _PARTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PARTS[name]}"), name)
