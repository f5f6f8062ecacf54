"""Labels data sets of any size, drawn and written as `predict` would, without a model; and stores of their cells."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from small_atlas import small_space

from annatac_scale.annotate.confidence import ConfidenceRule, named
from annatac_scale.annotate.labels import PART_CELLS, LabelsFolder, Manifest, Part, SampleRecord, Written
from annatac_scale.annotate.table import LabelRule
from annatac_scale.model.calibration import Scaling
from annatac_scale.model.hierarchy import Hierarchy
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.place import Location
from annatac_scale.store.writer import SampleWriter, create_store

CLASSES = ("B cell", "NK", "T cell", "mono", "plasma")
PARENTS = {
    **{name: ["lymphocyte"] for name in ("B cell", "NK", "T cell", "plasma")},
    **{name: ["leukocyte"] for name in ("lymphocyte", "mono")},
}
TRUTHS = (*CLASSES, "lymphocyte", "glia")
RULE = ConfidenceRule(0.9, True, "joint", 0.05, None, False, 50)


def manifest_of(
    sizes: dict[str, int], hierarchy: bool = True, classes: tuple[str, ...] = CLASSES
) -> Manifest:
    parents = PARENTS if hierarchy else None
    known = Hierarchy.of(classes, parents, "drawn") if parents else None
    columns = LabelRule(classes, Scaling(1.0), RULE, None, known).schema.names
    samples = {name: SampleRecord(n, f"x-{name}", f"d-{name}") for name, n in sizes.items()}
    return Manifest(
        "m" * 64, "atlas.zarr", samples, RULE, "", classes, tuple(columns), Written(), True, parents,
        0.8 if hierarchy else None,
    )  # fmt: skip


def draw_part(manifest: Manifest, part: Part, seed: int = 0) -> pa.Table:
    """The rows of a part: a function of the part and the seed."""
    rng = np.random.default_rng([seed, part.unit, *part.sample.encode()])
    n, classes = part.n_cells, np.array(manifest.classes, object)
    chances = rng.dirichlet(np.full(len(classes), 0.3), n).astype(np.float32)
    order = np.argsort(-chances, axis=1)
    ranked = np.take_along_axis(chances, order, axis=1)
    n_open = rng.lognormal(6, 1.2, n).astype(np.int32)
    low = n_open < manifest.rule.min_open
    novel = (rng.random(n) < 0.05) & ~low
    sizes = np.minimum((ranked.cumsum(axis=1) < 0.9).sum(axis=1) + 1, len(classes))
    sizes[rng.random(n) < 0.01] = 0
    sets = [classes[order[i, : sizes[i]]].tolist() for i in range(n)]
    best = classes[order[:, 0]]
    schema = LabelRule(manifest.classes, Scaling(1.0), manifest.rule, None, manifest.hierarchy).schema
    columns = {
        "sample": [part.sample] * n,
        "barcode": [f"{part.sample}-{part.first + i:07d}-ACGTACGT" for i in range(n)],
        "best": best,
        "label": named(best, novel, low),
        "confidence": ranked[:, 0],
        "second": classes[order[:, 1]],
        "second_confidence": ranked[:, 1],
        "novel": novel,
        "novelty_score": rng.normal(size=n).astype(np.float32),
        "novelty_p": rng.random(n, np.float32),
        "set": sets,
        "set_size": sizes.astype(np.int32),
        "n_open": n_open,
        "split": rng.choice(np.array(["train", "val", "calib", "test", None], object), n),
        "lineage": rng.choice(np.array(["leukocyte", "lymphocyte", *classes, None], object), n),
        "lineage_confidence": rng.random(n, np.float32),
    }
    return pa.table({name: pa.array(columns[name], schema.field(name).type) for name in schema.names})


def write_labels(location: Location, sizes: dict[str, int], seed: int = 0, **options: object) -> LabelsFolder:
    """A complete data set; options: as of ``manifest_of``."""
    folder = LabelsFolder(location, manifest_of(sizes, **options))  # type: ignore[arg-type]
    if isinstance(location, Path):
        location.mkdir(parents=True)
    for part in folder.manifest.parts:
        folder.write(part, draw_part(folder.manifest, part, seed))
    folder.write_manifest(complete=True)
    return folder


def write_store(path: Path, sizes: dict[str, int], seed: int = 0) -> None:
    """A store of closed cells with these barcodes: obs truth (of TRUTHS, some missing), donor."""
    create_store(path, small_space(), "insertion")
    for name, n in sizes.items():
        rng = np.random.default_rng([seed, *name.encode()])
        barcodes = [f"{name}-{i:07d}-ACGTACGT" for i in range(n)]
        truth = rng.choice(np.array([*TRUTHS, None], object), n)
        donor = rng.choice(np.array([*(f"D{i}" for i in range(7)), None], object), n)
        obs = pd.DataFrame({"truth": truth, "donor": donor}, index=barcodes)
        with SampleWriter(path, name, n) as writer:
            for shard in range(-(-n // PART_CELLS)):
                writer.write_shard(shard, OpenIslands.empty(min(PART_CELLS, n - shard * PART_CELLS)))
            writer.commit(obs, np.ones(len(small_space()), np.bool_), {"kind": "fragments"})
