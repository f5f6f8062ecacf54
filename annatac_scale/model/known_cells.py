"""KnownCells as a file of the model folder, known_cells.safetensors.

means, whitening, references        what the distances are taken to
references.code                     int32 [R]: type of each reference
profiles                            float32 [N, C]: log share of each island in the profile of each type
trend.<score>                       float32 [6]: intercept, slope, spread, narrowing, low, high of its depth trend
calib.code, calib.chance            int32, float32 [n]: true type of each calib cell, and its probability
calib.<score>, calib.n_open         float32, int32 [n]: its novelty scores and its open islands
"""

from dataclasses import astuple

import numpy as np
from safetensors.numpy import load, save

from annatac_scale.model.novelty import SCORES, TRENDED, DepthTrend, KnownCells
from annatac_scale.model.profiles import Profiles

KNOWN_FILE = "known_cells.safetensors"
_N_TREND = 6
_MOST_NARROWING = 10.0  # Far from any that was fitted, and no power of a depth overflows.
_INTEGERS = ("references.code", "calib.code", "calib.n_open")


def encoded(known: KnownCells) -> bytes:
    """The bytes of the file."""
    tensors = {
        "means": known.means,
        "whitening": known.whitening,
        "references": known.references,
        "references.code": known.reference_codes,
        "profiles": known.profiles.log_shares,
        "calib.code": known.codes,
        "calib.chance": known.chances,
        "calib.n_open": known.n_open,
        **{f"trend.{name}": np.array(astuple(known.trends[name]), np.float32) for name in TRENDED},
        **{f"calib.{name}": known.scores[name] for name in SCORES},
    }
    data: bytes = save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()})
    return data


def decoded(data: bytes, n_types: int, n_channels: int, n_islands: int) -> KnownCells:
    """What ``encoded`` wrote. Raises ValueError, KeyError or SafetensorError where it is something else."""
    tensors = load(data)
    n_calib, n_references = len(tensors["calib.code"]), len(tensors["references"])
    shapes = {
        "means": (n_types, n_channels),
        "whitening": (n_channels, n_channels),
        "references": (max(n_references, 1), n_channels),
        "references.code": (n_references,),
        "profiles": (n_islands, n_types),
        "calib.code": (n_calib,),
        "calib.chance": (n_calib,),
        "calib.n_open": (n_calib,),
        **{f"trend.{name}": (_N_TREND,) for name in TRENDED},
        **{f"calib.{name}": (n_calib,) for name in SCORES},
    }
    for name, shape in shapes.items():
        kind = "int32" if name in _INTEGERS else "float32"
        found = tensors[name]
        if found.shape != shape or found.dtype != kind:
            raise ValueError(f"{KNOWN_FILE}: {name} is {found.dtype} {found.shape}, expected {kind} {shape}")
    codes, reference_codes = tensors["calib.code"], tensors["references.code"]
    scores = {name: tensors[f"calib.{name}"] for name in SCORES}
    finite = all(np.isfinite(values).all() for values in tensors.values())
    trends = {name: DepthTrend(*map(float, tensors[f"trend.{name}"])) for name in TRENDED}
    possible = (
        all(trend.spread > 0 and abs(trend.narrowing) <= _MOST_NARROWING for trend in trends.values())
        and (tensors["profiles"] <= 0).all()
        and (tensors["calib.n_open"] >= 0).all()
    )
    if (
        not finite
        or not possible
        or not all(((of >= 0) & (of < n_types)).all() for of in (codes, reference_codes))
    ):
        raise ValueError(f"{KNOWN_FILE}: numbers that cannot be, or types that the model does not know")
    return KnownCells(
        means=tensors["means"],
        whitening=tensors["whitening"],
        references=tensors["references"],
        reference_codes=reference_codes,
        profiles=Profiles(tensors["profiles"]),
        trends=trends,
        chances=tensors["calib.chance"],
        codes=codes,
        scores=scores,
        n_open=tensors["calib.n_open"],
    )
