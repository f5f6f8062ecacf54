"""Whether a store has what a model was made for, and in words what it has otherwise."""

from typing import TYPE_CHECKING

from annatac_scale.errors import ModelError
from annatac_scale.genome.assembly import BUILTIN_ASSEMBLIES
from annatac_scale.store.store import IslandStore

if TYPE_CHECKING:
    from annatac_scale.model.folder import ModelInfo

_DIGITS = 12
"""Of a sha256 in messages."""


def fits(info: "ModelInfo", store: IslandStore) -> bool:
    """Whether a store has the islands and the counting of a model."""
    return store.islands_sha256 == info.space_sha256 and store.counting == info.counting


def check_fit(info: "ModelInfo", store: IslandStore, offer_projection: bool = False) -> None:
    """Raise ModelError, with a table of what differs, unless a store has the islands and the counting of a model.

    offer_projection: name --project as well, where it would do
    """
    if fits(info, store):
        return
    remedy = _conversion(info, store)
    if offer_projection and _obstacle(info, store) is None:
        remedy += (
            "; or give --project, which takes the store's islands as peaks of the model's where the two overlap and "
            "tells how much is covered"
        )
    raise _misfit(info, store, remedy)


def check_projectable(info: "ModelInfo", store: IslandStore) -> None:
    """Raise ModelError unless a store has the assembly and the counting of a model: its islands may be others."""
    obstacle = _obstacle(info, store)
    if obstacle is not None:
        raise _misfit(info, store, f"--project does not help here: {obstacle}; {_conversion(info, store)}")


def _misfit(info: "ModelInfo", store: IslandStore, remedy: str) -> ModelError:
    return ModelError(f"{store.path} does not fit the model:\n{_table(info, store)}\n{remedy}")


def _obstacle(info: "ModelInfo", store: IslandStore) -> str | None:
    """Why the islands of a store cannot be projected onto a model's; None where they can be tried."""
    assembly = store.attributes["assembly"]
    if assembly != info.assembly:
        return f"the same coordinates mean other places of the genome in {assembly} and in {info.assembly}"
    if store.counting != info.counting:
        return f"levels that count by {store.counting} and by {info.counting} are different numbers"
    return None


def _table(info: "ModelInfo", store: IslandStore) -> str:
    """One line for each property, aligned, and still to be read where a terminal joins the lines into one."""
    there = store.attributes
    rows = [
        ("assembly", there["assembly"], info.assembly),
        ("width_bp", there["width_bp"], info.width_bp),
        ("selection", there["selection"], info.selection),
        ("counting", store.counting, info.counting),
        ("islands", f"{store.n_islands:,}", f"{info.n_space:,}"),
        ("islands sha256", store.islands_sha256[:_DIGITS], info.space_sha256[:_DIGITS]),
    ]
    cells = [
        (f"{what}:", f"store {found},", f"model {expected}", "" if found == expected else " (differs)")
        for what, found, expected in rows
    ]
    names, stores, models = (max(len(row[i]) for row in cells) for i in range(3))
    return "\n".join(
        f"  {what:{names}}  {found:{stores}}  {f'{expected:{models}}{mark}'.rstrip()};"
        for what, found, expected, mark in cells
    )


def _conversion(info: "ModelInfo", store: IslandStore) -> str:
    """How to make a store that fits."""
    windows = info.selection not in ("tss", "all")
    options = [f"--assembly {info.assembly}"]
    if info.assembly not in BUILTIN_ASSEMBLIES:
        options.append("--chrom-sizes FILE")
    options.append(f"--select {'FILE' if windows else info.selection}")
    if info.selection == "tss" and info.assembly not in BUILTIN_ASSEMBLIES:
        options.append("--tss FILE")
    options.append(f"--counting {info.counting}")
    remedy = f"convert the cells anew, with `annatac convert {' '.join(options)}` and another --out"
    named_alike = all(
        store.attributes[key] == getattr(info, key) for key in ("assembly", "width_bp", "selection")
    )
    if windows:
        return f"{remedy}, where --select is the BED file that the model's islands are from"
    if named_alike and store.islands_sha256 != info.space_sha256:
        return f"{remedy}, with the same TSS table (--tss, --gtf) and chromosome sizes as for the model"
    return remedy
