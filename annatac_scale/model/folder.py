"""The model folder: weights and all that is needed to use them, without pickle.

    config.json            ModelInfo: what the model was made of and for, and the sha256 of every other file
    weights.safetensors    encoder, pooled layer and head, without positions
    positions.safetensors  the positions, [islands, width]
    islands.tsv.gz         the vocabulary: number in the island space, chrom, start, end, genes
    labels.json            cell types in the order of the logits (fine-tuned models)
    calibration.json       temperature (fine-tuned models)
    README.md              the model card

A folder is written aside and renamed; reading checks every file against config.json, and that against a digest of
its own content. The model card alone may be edited.
"""

import gzip
import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from annatac_scale.config import from_dict, to_dict
from annatac_scale.errors import ConfigError, ModelError
from annatac_scale.genome.islands import IslandSpace
from annatac_scale.model.cell_typer import CellTyper, HeadConfig, build_head
from annatac_scale.model.encoder import Encoder
from annatac_scale.model.linformer import EncoderConfig, Linformer
from annatac_scale.model.pool import IslandPool
from annatac_scale.store.store import IslandStore
from annatac_scale.stream.tokens import TokenLister
from annatac_scale.stream.vocabulary import Vocabulary

FORMAT = "annatac_scale.model"
FORMAT_VERSION = 2
POSITIONS = "positions"
_POSITIONS_KEY = "linformer.positions"
_FILES = frozenset({"weights.safetensors", "positions.safetensors", "islands.tsv.gz"})
_TYPER_FILES = _FILES | {"labels.json", "calibration.json"}


@dataclass(frozen=True)
class PoolConfig:
    """The pooled layer of a pretrained encoder: its channels, and what it reads of the Linformer's states."""

    pooled: int
    reads: str


@dataclass(frozen=True)
class ModelInfo:
    """What a model is of and how it was made."""

    assembly: str
    width_bp: int
    selection: str
    counting: str
    space_sha256: str
    n_space: int
    preset: str
    encoder: EncoderConfig
    pool: PoolConfig | None = None
    """Of a pretrained encoder that has one; a fine-tuned model's is in its head."""
    head: HeadConfig | None = None
    labels: tuple[str, ...] = ()
    temperature: float = 1.0
    novel_threshold: float = 0.5
    linformer_trained: bool = True
    """Whether pretraining or fine-tuning trained the Linformer, or its weights are those that it began with."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """JSON-able: stores and their digests, options, seed, figures, versions."""

    @property
    def pooled_layer(self) -> PoolConfig | None:
        """That of the encoder, or of a fine-tuned model's head; None where there is none."""
        if self.head is None or self.head.kind != "pooled":
            return self.pool
        return PoolConfig(self.head.pooled, self.head.reads)


@dataclass(frozen=True, eq=False)
class Model:
    """A model in memory. ``typer`` is None before fine-tuning; after it shares its parts with ``encoder``."""

    info: ModelInfo
    vocabulary: Vocabulary
    islands: pd.DataFrame
    """chrom, start, end, genes of the vocabulary, one row an island."""
    encoder: Encoder
    typer: CellTyper | None = None
    digest: str = ""
    """sha256 (hex) of config.json, which covers every file; empty for a model not yet written."""
    path: Path | None = None
    """The folder it was read from."""

    @property
    def attend(self) -> str:
        """What tokens its cells list: those that ``info.encoder`` attends to where anything reads them, else "open"."""
        unread = self.typer is not None and not self.typer.head.reads_encoder
        if unread or (self.typer is None and not self.info.linformer_trained):
            return "open"
        return self.info.encoder.attend

    def lister(self, store: IslandStore) -> TokenLister:
        """Lists the tokens that ``encoder`` takes, for batches of a store. Raises ModelError for other islands."""
        return TokenLister(store, self.vocabulary, self.attend)

    def check_store(self, store: IslandStore) -> None:
        """Raise ModelError, listing what differs, unless the store has the islands and counting of the model."""
        expected = {
            "assembly": self.info.assembly,
            "width_bp": self.info.width_bp,
            "selection": self.info.selection,
            "counting": self.info.counting,
            "islands_sha256": self.info.space_sha256,
        }
        differing = [
            f"{key} {store.attributes[key]} (model: {value})"
            for key, value in expected.items()
            if store.attributes[key] != value
        ]
        if store.islands_sha256 != self.info.space_sha256 or store.counting != self.info.counting:
            raise ModelError(
                f"{store.path} does not fit the model: {'; '.join(differing)}; "
                "convert the cells with the model's assembly, selection and counting"
            )


def vocabulary_islands(space: IslandSpace, vocabulary: Vocabulary) -> pd.DataFrame:
    """chrom, start, end, genes of the vocabulary's islands."""
    kept = vocabulary.islands
    return pd.DataFrame(
        {
            "chrom": np.array(space.chromosomes, object)[space.chrom[kept]],
            "start": space.start[kept],
            "end": space.end[kept],
            "genes": space.genes[kept],
        }
    )


def write_model(path: Path | str, model: Model, card: str) -> None:
    """Write a model folder, replacing one that is there; ``card`` is the text of its README.md.

    Raises ModelError where ``path`` holds something else.
    """
    path = Path(path)
    if path.exists() and not (path / "config.json").exists() and not (path.is_dir() and _is_empty(path)):
        raise ModelError(f"{path}: exists and is not a model folder; choose another --out")
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        _write_files(aside, model, card)
        if path.exists():
            os.replace(path, old)
        os.replace(aside, path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _is_empty(folder: Path) -> bool:
    return next(folder.iterdir(), None) is None


def _write_files(folder: Path, model: Model, card: str) -> None:
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in _parts(model).state_dict().items()}
    for name, tensors in (("positions", {POSITIONS: state.pop(_POSITIONS_KEY)}), ("weights", state)):
        # Written as bytes: save_file gives its owner alone the right to read.
        (folder / f"{name}.safetensors").write_bytes(save(tensors))
    _write_islands(folder / "islands.tsv.gz", model)
    if model.typer is not None:
        (folder / "labels.json").write_text(json.dumps(list(model.info.labels), indent=1) + "\n")
        calibration = {"temperature": model.info.temperature, "novel_threshold": model.info.novel_threshold}
        (folder / "calibration.json").write_text(json.dumps(calibration, indent=1) + "\n")
    (folder / "README.md").write_text(card)
    config = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        **{key: value for key, value in asdict(model.info).items() if key not in ("encoder", "pool", "head")},
        "encoder": to_dict(model.info.encoder),
        "pool": None if model.info.pool is None else to_dict(model.info.pool),
        "head": None if model.info.head is None else to_dict(model.info.head),
        "vocabulary_sha256": model.vocabulary.sha256,
        "files": {file.name: _sha256(file) for file in sorted(folder.iterdir()) if file.name != "README.md"},
    }
    for key in ("labels", "temperature", "novel_threshold"):
        del config[key]
    config["sha256"] = _content_sha256(config)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def _write_islands(path: Path, model: Model) -> None:
    table = model.islands.assign(island=model.vocabulary.islands)[
        ["island", "chrom", "start", "end", "genes"]
    ]
    with path.open("wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as file:
        file.write(table.to_csv(sep="\t", index=False).encode())


def read_model(path: Path | str, device: torch.device | str = "cpu") -> Model:
    """Read a model folder.

    Raises ModelError when a file is missing, cut short or edited, or of a newer format. Nothing in the folder is
    executed.
    """
    path = Path(path)
    config = _read_config(path)
    try:
        info, vocabulary = _read_info(path, config)
        table = pd.read_csv(
            path / "islands.tsv.gz", sep="\t", keep_default_na=False, dtype={"chrom": str, "genes": str}
        )
        state = load_file(path / "weights.safetensors")
        state[_POSITIONS_KEY] = load_file(path / "positions.safetensors")[POSITIONS]
    except (OSError, KeyError, TypeError, ValueError, ConfigError, SafetensorError) as error:
        raise ModelError(f"{path}: not a whole model folder ({error}); fetch or train it again") from error
    islands = table[["chrom", "start", "end", "genes"]]
    model = _new_model(info, vocabulary, islands)
    _load(path, _parts(model), state)
    _parts(model).to(device).eval()
    digest = _sha256(path / "config.json")
    return replace(model, digest=digest, path=path)


def _new_model(info: ModelInfo, vocabulary: Vocabulary, islands: pd.DataFrame) -> Model:
    """A model whose weights are still to be read."""
    n_islands, width = len(vocabulary), info.encoder.width
    linformer = Linformer(info.encoder, n_islands)
    if info.head is None:
        pool = IslandPool(n_islands, width, info.pool.pooled, reads=info.pool.reads) if info.pool else None
        return Model(info, vocabulary, islands, Encoder(linformer, pool, info.linformer_trained))
    head = build_head(info.head, info.encoder, n_islands, len(info.labels))
    typer = CellTyper(linformer, head)
    return Model(info, vocabulary, islands, typer.encoder_and_pool(info.linformer_trained), typer)


def _parts(model: Model) -> nn.Module:
    """All that has weights, once."""
    return model.encoder if model.typer is None else model.typer


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path}: no model folder here ({error}); give the folder with config.json"
        ) from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}/config.json: found no JSON object; fetch or train the model again")
    if config.get("format") != FORMAT or config.get("version") != FORMAT_VERSION:
        raise ModelError(
            f"{path}/config.json: format {config.get('format')} {config.get('version')}, expected {FORMAT} "
            f"{FORMAT_VERSION}; train the model again, or use the version of annatac_scale that wrote it"
        )
    # Names other than these, which might lead out of the folder, are never opened.
    files = config.get("files")
    expected = _FILES if config.get("head") is None else _TYPER_FILES
    if (
        not isinstance(files, dict)
        or files.keys() != expected
        or config.get("sha256") != _content_sha256(config)
    ):
        raise ModelError(f"{path}/config.json: cut short or edited; fetch or train the model again")
    for name, sha256 in files.items():
        if not (path / name).is_file() or _sha256(path / name) != sha256:
            raise ModelError(f"{path / name}: missing, cut short or edited; fetch or train the model again")
    return config


def _read_info(path: Path, config: dict[str, Any]) -> tuple[ModelInfo, Vocabulary]:
    head = config["head"]
    typing: dict[str, Any] = {}
    if head is not None:
        typing = {
            "head": from_dict(HeadConfig, head, place="head."),
            "labels": tuple(json.loads((path / "labels.json").read_text())),
            **json.loads((path / "calibration.json").read_text()),
        }
    plain = (
        "assembly",
        "width_bp",
        "selection",
        "counting",
        "space_sha256",
        "n_space",
        "preset",
        "linformer_trained",
        "provenance",
    )
    info = ModelInfo(
        **{key: config[key] for key in plain},
        encoder=from_dict(EncoderConfig, config["encoder"], place="encoder."),
        pool=None if config["pool"] is None else from_dict(PoolConfig, config["pool"], place="pool."),
        **typing,
    )
    table = pd.read_csv(path / "islands.tsv.gz", sep="\t", usecols=["island"])
    islands = table["island"].to_numpy(np.int32)
    vocabulary = Vocabulary(info.space_sha256, info.n_space, islands)
    in_order = (np.diff(islands, prepend=-1, append=info.n_space) > 0).all()
    if not in_order or vocabulary.sha256 != config["vocabulary_sha256"]:
        raise ModelError(f"{path}/islands.tsv.gz: not the vocabulary of the model; fetch or train it again")
    return info, vocabulary


def _load(path: Path, module: nn.Module, state: dict[str, Tensor]) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()
        raise ModelError(f"{path}: the weights do not fit config.json: {first}") from error


def _content_sha256(config: dict[str, Any]) -> str:
    """sha256 (hex) of what config.json says, but for the digest itself."""
    content = json.loads(json.dumps({key: value for key, value in config.items() if key != "sha256"}))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
