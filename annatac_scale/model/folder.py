"""The model folder: weights and all that is needed to use them, without pickle.

    config.json            ModelInfo: what the model was made of and for, and the sha256 of every other file
    weights.safetensors    encoder, pooled layer and head, without positions
    positions.safetensors  the positions, [islands, width]
    islands.tsv.gz         the vocabulary: number in the island space, chrom, start, end, genes
    labels.json            cell types in the order of the logits, and the parents of each where there is a hierarchy
                           (fine-tuned models)
    calibration.json       temperature or vector scaling, novelty rule, calibration errors (fine-tuned models)
    known_cells.safetensors  what novelty scores and prediction sets are measured against (known_cells.py)
    README.md              the model card

It lies on a disk, where it is written aside and renamed, or below a URL in object storage, where config.json is put
last and commits: a folder without it is no model. Reading takes each file once and checks it against config.json, and
that against a digest of its own content. The model card alone may be edited.
"""

import gzip
import hashlib
import io
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from annatac_scale.config import from_dict, to_dict
from annatac_scale.errors import ConfigError, ModelError
from annatac_scale.genome.islands import IslandSpace
from annatac_scale.model.calibration import Scaling
from annatac_scale.model.cell_typer import CellTyper, HeadConfig, build_head
from annatac_scale.model.encoder import Encoder
from annatac_scale.model.hierarchy import Hierarchy
from annatac_scale.model.known_cells import KNOWN_FILE, decoded, encoded
from annatac_scale.model.linformer import EncoderConfig, Linformer
from annatac_scale.model.novelty import KnownCells, checked_score
from annatac_scale.model.pool import IslandPool
from annatac_scale.model.store_fit import check_fit, check_projectable, fits
from annatac_scale.store.files import move
from annatac_scale.store.place import Location, joined, location_of, place_of
from annatac_scale.store.store import IslandStore
from annatac_scale.stream.projection import Projection
from annatac_scale.stream.tokens import TokenLister
from annatac_scale.stream.vocabulary import Vocabulary

FORMAT = "annatac_scale.model"
FORMAT_VERSION = 5
POSITIONS = "positions"
_POSITIONS_KEY = "linformer.positions"
_CONFIG, _CARD = "config.json", "README.md"
_FILES = frozenset({"weights.safetensors", "positions.safetensors", "islands.tsv.gz"})
_TYPER_FILES = _FILES | {"labels.json", "calibration.json"}
_CALIBRATION = (
    "temperature",
    "scales",
    "biases",
    "novel_threshold",
    "novelty",
    "novel_rate",
    "calibration_errors",
)
"""Fields of ModelInfo that are in calibration.json and not in config.json."""


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
    hierarchy: Hierarchy | None = None
    """What lies above the labels, where fine-tuning was given it."""
    temperature: float = 1.0
    scales: tuple[float, ...] = ()
    biases: tuple[float, ...] = ()
    """Of vector scaling; both empty where the temperature alone scales."""
    novel_threshold: float = 0.5
    """Confidence below which a cell is novel, where ``novel_rate`` is None: the paper's rule."""
    novelty: str = "max_probability"
    """The novelty score (model/novelty.py) that a rate is of, unless ``predict`` is asked for another."""
    novel_rate: float | None = None
    """Share of known cells that may be called novel by that score; None: until ``predict`` is asked for one,
    ``novel_threshold`` decides, and the score is 1 - confidence."""
    calibration_errors: dict[str, dict[str, float]] = field(default_factory=dict)
    """Expected calibration error of the calib and test cells, "before" and "after" scaling."""
    linformer_trained: bool = True
    """Whether pretraining or fine-tuning trained the Linformer, or its weights are those that it began with."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """JSON-able: stores and their digests, options, seed, figures, versions."""

    @property
    def scaling(self) -> Scaling:
        """How its logits become probabilities. Raises ModelError for numbers that cannot be."""
        return Scaling(self.temperature, self.scales, self.biases)

    @property
    def pooled_layer(self) -> PoolConfig | None:
        """That of the encoder, or of a fine-tuned model's head; None where there is none."""
        if self.head is None or not self.head.pools:
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
    path: Location | None = None
    """The folder, on a disk or in object storage, that it was read from."""
    known: KnownCells | None = None
    """Of a fine-tuned model; without it there are no prediction sets, no novelty rate and no distances."""

    @property
    def attend(self) -> str:
        """What tokens its cells list: those that ``info.encoder`` attends to where anything reads them, else "open"."""
        unread = self.typer is not None and not self.typer.head.reads_encoder
        if unread or (self.typer is None and not self.info.linformer_trained):
            return "open"
        return self.info.encoder.attend

    def lister(self, store: IslandStore, projection: Projection | None = None) -> TokenLister:
        """Lists the tokens that ``encoder`` takes, for batches of a store.

        projection: that of the store, where it may have other islands. Raises ModelError for these where it is None.
        """
        measured = None if projection is None else projection.measured
        return TokenLister(store, self.vocabulary, self.attend, measured)

    def check_store(self, store: IslandStore) -> None:
        """Raise ModelError, with a table of what differs, unless a store has the model's islands and counting."""
        check_fit(self.info, store)

    def projection(self, store: IslandStore, project: bool = False) -> Projection:
        """How rows of a store get the numbers of the vocabulary.

        project: whether the store may have other islands, of the same assembly

        Raises ModelError, with a table of what differs, for a store that does not fit, and where islands that may be
        others have no place in common with the model's.
        """
        if not fits(self.info, store):
            if not project:
                check_fit(self.info, store, offer_projection=True)
            check_projectable(self.info, store)
        return Projection.of(store, self.vocabulary, self.islands if project else None)


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


def write_model(location: Location, model: Model, card: str) -> None:
    """Write a model folder, replacing one that is there; ``card`` is the text of its README.md.

    On a disk it is written aside and renamed, so that it is there whole or not at all. In object storage the old model
    ends first, and the new one begins when all of it is there: whoever is stopped between leaves no model.

    Raises ModelError where ``location`` holds something else, StoreError where it cannot be written.
    """
    location = location_of(location)
    if isinstance(location, Path):
        _write_on_disk(location, _encoded(model, card))
    else:
        _write_in_storage(location, _encoded(model, card))


def _write_on_disk(path: Path, files: Mapping[str, bytes]) -> None:
    if path.exists() and not (path / _CONFIG).exists() and not (path.is_dir() and _is_empty(path)):
        raise _something_else(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        place_of(aside).write_all(files)
        if path.exists():
            os.replace(path, old)
        move(aside, path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _is_empty(folder: Path) -> bool:
    return next(folder.iterdir(), None) is None


def _write_in_storage(url: str, files: Mapping[str, bytes]) -> None:
    place = place_of(url)
    ours = {_CONFIG, _CARD, *_TYPER_FILES, KNOWN_FILE}
    there = place.names()
    # Files of a model without config.json are those of a writer that was stopped.
    if _CONFIG not in there and not ours.issuperset(there):
        raise _something_else(url)
    for name in (_CONFIG, *(ours - files.keys())):
        if name in there:
            place.remove(name)
    place.write_all({name: data for name, data in files.items() if name != _CONFIG})
    place.write(_CONFIG, files[_CONFIG])


def _something_else(location: Location) -> ModelError:
    return ModelError(f"{location}: exists and is not a model folder; choose another --out")


def _encoded(model: Model, card: str) -> dict[str, bytes]:
    """The files of a model folder, by name."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in _parts(model).state_dict().items()}
    files = {
        "positions.safetensors": save({POSITIONS: state.pop(_POSITIONS_KEY)}),
        "weights.safetensors": save(state),
        "islands.tsv.gz": _encoded_islands(model),
    }
    if model.typer is not None:
        calibration = {name: getattr(model.info, name) for name in _CALIBRATION}
        files |= {"labels.json": _json(_encoded_labels(model.info)), "calibration.json": _json(calibration)}
        if model.known is not None:
            files[KNOWN_FILE] = encoded(model.known)
    config = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        **{key: value for key, value in asdict(model.info).items() if key not in ("encoder", "pool", "head")},
        "encoder": to_dict(model.info.encoder),
        "pool": None if model.info.pool is None else to_dict(model.info.pool),
        "head": None if model.info.head is None else to_dict(model.info.head),
        "vocabulary_sha256": model.vocabulary.sha256,
        "files": {name: _sha256(files[name]) for name in sorted(files)},
    }
    for key in ("labels", "hierarchy", *_CALIBRATION):
        del config[key]
    config["sha256"] = _content_sha256(config)
    return {**files, _CARD: card.encode(), _CONFIG: _json(config)}


def _encoded_labels(info: ModelInfo) -> dict[str, Any]:
    return {
        "labels": list(info.labels),
        "parents": None if info.hierarchy is None else info.hierarchy.to_json(),
    }


def _read_labels(file: Location, text: bytes) -> dict[str, Any]:
    """The fields of ModelInfo that labels.json holds. ``file``: for messages"""
    said = json.loads(text)
    labels, parents = tuple(said["labels"]), said["parents"]
    return {
        "labels": labels,
        "hierarchy": None if parents is None else Hierarchy.of(labels, parents, str(file)),
    }


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _encoded_islands(model: Model) -> bytes:
    table = model.islands.assign(island=model.vocabulary.islands)[
        ["island", "chrom", "start", "end", "genes"]
    ]
    raw = io.BytesIO()
    with gzip.GzipFile("", "wb", 6, raw, mtime=0) as file:
        file.write(table.to_csv(sep="\t", index=False).encode())
    return raw.getvalue()


def read_model(location: Location, device: torch.device | str = "cpu") -> Model:
    """Read a model folder, on a disk or below a URL of object storage.

    Raises ModelError when a file is missing, cut short or edited, or of a newer format; StoreError when the disk or
    the object storage does not give it; InputError for a URL of something else. Nothing in the folder is executed.
    """
    folder = _Folder(location_of(location))
    try:
        info = _read_info(folder)
        vocabulary, islands = _read_vocabulary(folder, info)
        state = load(folder.read("weights.safetensors"))
        state[_POSITIONS_KEY] = load(folder.read("positions.safetensors"))[POSITIONS]
        model = _new_model(info, vocabulary, islands)
        known = _read_known(folder, model)
    except (OSError, KeyError, TypeError, ValueError, ConfigError, SafetensorError) as error:
        raise ModelError(
            f"{folder.location}: not a whole model folder ({error}); fetch or train it again"
        ) from error
    _load(folder.location, _parts(model), state)
    _parts(model).to(device).eval()
    return replace(model, digest=folder.digest, path=folder.location, known=known)


class _Folder:
    """The files of a model folder, each compared with the sha256 that config.json has of it when it is read.

    config: what config.json says; digest: sha256 (hex) of its bytes
    """

    def __init__(self, location: Location) -> None:
        self.location = location
        self._place = place_of(location)
        try:
            text = self._place.read(_CONFIG)
        except FileNotFoundError as error:
            raise ModelError(
                f"{location}: no model folder here (found no config.json, which is written last); give the folder with "
                "config.json"
            ) from error
        self.digest = _sha256(text)
        self.config = _parsed(joined(location, _CONFIG), text)

    def read(self, name: str) -> bytes:
        """The bytes of a file that config.json was found to list. Raises ModelError where they are others."""
        try:
            data = self._place.read(name)
        except FileNotFoundError:
            data = None
        if data is None or _sha256(data) != self.config["files"][name]:
            raise ModelError(
                f"{joined(self.location, name)}: missing, cut short or edited; fetch or train the model again"
            )
        return data


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


def _parsed(file: Location, text: bytes) -> dict[str, Any]:
    """What config.json says, checked against its own digest. ``file``: for messages"""
    try:
        config: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise ModelError(
            f"{file}: cannot be read as JSON ({error}); fetch or train the model again"
        ) from error
    if not isinstance(config, dict):
        raise ModelError(f"{file}: found no JSON object; fetch or train the model again")
    # Version 5 changed what a model keeps of known cells, and nothing in a model that knows no types yet.
    versions = (FORMAT_VERSION, 4) if config.get("head") is None else (FORMAT_VERSION,)
    if config.get("format") != FORMAT or config.get("version") not in versions:
        raise ModelError(
            f"{file}: format {config.get('format')} {config.get('version')}, expected {FORMAT} {FORMAT_VERSION}; "
            "train the model again, or use the version of annatac_scale that wrote it"
        )
    # Names other than these, which might lead out of the folder, are refused; and only these are ever opened.
    files = config.get("files")
    expected = (_FILES,) if config.get("head") is None else (_TYPER_FILES, _TYPER_FILES | {KNOWN_FILE})
    if (
        not isinstance(files, dict)
        or files.keys() not in expected
        or config.get("sha256") != _content_sha256(config)
    ):
        raise ModelError(f"{file}: cut short or edited; fetch or train the model again")
    return config


def _read_info(folder: _Folder) -> ModelInfo:
    config, head = folder.config, folder.config["head"]
    typing: dict[str, Any] = {}
    if head is not None:
        typing = {
            "head": from_dict(HeadConfig, head, place="head."),
            **_read_labels(joined(folder.location, "labels.json"), folder.read("labels.json")),
            **_read_calibration(folder),
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
    return ModelInfo(
        **{key: config[key] for key in plain},
        encoder=from_dict(EncoderConfig, config["encoder"], place="encoder."),
        pool=None if config["pool"] is None else from_dict(PoolConfig, config["pool"], place="pool."),
        **typing,
    )


def _read_calibration(folder: _Folder) -> dict[str, Any]:
    values = json.loads(folder.read("calibration.json"))
    values = {name: values[name] for name in _CALIBRATION}
    for name in ("scales", "biases"):
        values[name] = tuple(map(float, values[name]))
    checked_score(values["novelty"])
    return values


def _read_known(folder: _Folder, model: Model) -> KnownCells | None:
    if KNOWN_FILE not in folder.config["files"] or model.typer is None:
        return None
    classifier = model.typer.head.classifier
    n_islands = len(model.vocabulary)
    return decoded(folder.read(KNOWN_FILE), classifier.out_features, classifier.in_features, n_islands)


def _read_vocabulary(folder: _Folder, info: ModelInfo) -> tuple[Vocabulary, pd.DataFrame]:
    """The vocabulary, and its islands as in ``Model``."""
    table = pd.read_csv(
        io.BytesIO(folder.read("islands.tsv.gz")),
        sep="\t",
        compression="gzip",
        keep_default_na=False,
        dtype={"chrom": str, "genes": str},
    )
    islands = table["island"].to_numpy(np.int32)
    vocabulary = Vocabulary(info.space_sha256, info.n_space, islands)
    in_order = (np.diff(islands, prepend=-1, append=info.n_space) > 0).all()
    if not in_order or vocabulary.sha256 != folder.config["vocabulary_sha256"]:
        file = joined(folder.location, "islands.tsv.gz")
        raise ModelError(f"{file}: not the vocabulary of the model; fetch or train it again")
    return vocabulary, table[["chrom", "start", "end", "genes"]]


def _load(location: Location, module: nn.Module, state: dict[str, Tensor]) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()
        raise ModelError(f"{location}: the weights do not fit config.json: {first}") from error


def _content_sha256(config: dict[str, Any]) -> str:
    """sha256 (hex) of what config.json says, but for the digest itself."""
    content = json.loads(json.dumps({key: value for key, value in config.items() if key != "sha256"}))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
