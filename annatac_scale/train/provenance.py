"""What a model keeps of where it comes from."""

from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

from annatac_scale.store.store import IslandStore


def made_by() -> str:
    """Name and version of this package."""
    return f"annatac_scale {version('annatac_scale')}"


def store_identity(store: IslandStore) -> dict[str, Any]:
    """The fields of ModelInfo that say which stores a model fits."""
    attributes = store.attributes
    return {
        **{key: attributes[key] for key in ("assembly", "width_bp", "selection")},
        "counting": store.counting,
        "space_sha256": store.islands_sha256,
        "n_space": store.n_islands,
    }


def run_inputs(store: IslandStore) -> dict[str, Any]:
    """What of a store decides a run: its islands and the cells of its samples, not their labels."""
    return {
        "islands_sha256": store.islands_sha256,
        "samples": {name: sample.x_sha256 for name, sample in store.samples.items()},
    }


def sample_facts(store: IslandStore) -> dict[str, dict[str, Any]]:
    """Each sample as it was in training. ``digest`` covers labels too, ``x_sha256`` does not."""
    return {
        name: {"n_cells": s.n_cells, "x_sha256": s.x_sha256, "digest": s.digest}
        for name, s in store.samples.items()
    }


def earlier_sight(provenance: Mapping[str, Any], store: IslandStore) -> str:
    """What a model with this provenance saw of the store's cells, in a sentence."""
    own = [sample.x_sha256 for sample in store.samples.values()]
    seen_with_labels, seen = False, set()
    for facts in _history(provenance):
        samples = {sample["x_sha256"] for sample in facts["samples"].values()}
        seen_with_labels |= facts["kind"] == "finetuned" and not samples.isdisjoint(own)
        seen |= samples
    n_seen = sum(sha256 in seen for sha256 in own)
    if seen_with_labels:
        return (
            "an earlier fine-tuning trained on cells of these samples with their labels: test cells may be among "
            "them, and the test figures too good"
        )
    if not n_seen:
        return "pretraining saw none of these cells"
    which = "these samples" if n_seen == len(own) else f"{n_seen} of the {len(own)} samples"
    return f"pretraining saw all cells of {which} without their labels, the test cells among them"


def _history(provenance: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The provenance of a model, then of the model that it was trained from, and so on."""
    facts: Mapping[str, Any] | None = provenance
    while facts is not None:
        yield facts
        facts = facts.get("pretrained")
