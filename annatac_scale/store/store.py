"""Open, check and read an island store.

Rows are read encoded and decoded to open islands, never to dense rows. pandas, anndata and pyarrow are imported only
where obs or the islands are looked at: someone who streams needs none of them, and they take 90 MB.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from numpy.typing import NDArray

from annatac_scale.errors import StoreError
from annatac_scale.store import schema
from annatac_scale.store.cache import BlockCache
from annatac_scale.store.elements import read_elem
from annatac_scale.store.encoded_rows import EncodedRows
from annatac_scale.store.files import INCOMING
from annatac_scale.store.metadata import read_index, read_root
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.store.place import Location, is_url, joined, open_group, place_of
from annatac_scale.store.shards import ShardReader

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from annatac_scale.genome.islands import IslandSpace


@dataclass(frozen=True)
class Block:
    """A run of up to 250 cells of one sample: the unit of reading.

    sample: its name; index: the block's number within the sample; first_cell: cell id of its first row
    """

    sample: str
    index: int
    first_cell: int
    n_cells: int


class Sample:
    """One committed sample of a store."""

    def __init__(
        self,
        path: Location,
        entry: dict[str, Any],
        first_cell: int,
        n_islands: int,
        cache: BlockCache | None = None,
    ) -> None:
        self.path = path
        self.name: str = entry["name"]
        self.n_cells: int = entry["n_cells"]
        self.n_open: int = entry["n_open"]
        self.digest: str = entry["digest"]
        self.x_sha256: str = entry["x_sha256"]
        self.first_cell = first_cell
        x = place_of(path).below("X")
        self._reader = ShardReader(x, self.n_cells, n_islands, self.x_sha256, entry["shard_open"], cache)

    @cached_property
    def conversion(self) -> dict[str, Any]:
        """Where it came from. Raises StoreError when it is not complete or gone."""
        place = place_of(self.path)
        try:
            attributes = json.loads(place.read(f"{schema.CONVERSION}/zarr.json"))["attributes"]
            complete, conversion = attributes["complete"], dict(attributes["conversion"])
        except FileNotFoundError as error:
            if place.size("zarr.json") is None:
                raise StoreError(
                    f"{self.path}: the store's index names this sample, but it is gone"
                ) from error
            complete, conversion = False, {}
        except (ValueError, KeyError, TypeError):
            complete, conversion = False, {}
        if not complete:
            raise StoreError(f"{self.path}: the sample is not complete; convert it again")
        return conversion

    @cached_property
    def group(self) -> zarr.Group:
        """The Zarr group of a complete sample."""
        _ = self.conversion
        return open_group(self.path)

    @cached_property
    def measured(self) -> NDArray[np.bool_]:
        """bool [n_islands]: islands that hold at least one peak of this sample's peak set; kept."""
        return self.read_measured()

    def read_measured(self) -> NDArray[np.bool_]:
        """The same, read anew and not kept."""
        return np.asarray(read_elem(self.group["var/measured"]), bool)

    @property
    def _obs(self) -> zarr.Group:
        obs = self.group.get("obs")
        if not isinstance(obs, zarr.Group):
            raise StoreError(f"{self.path}: found no obs; open the store again, or convert the sample again")
        return obs

    def obs(self) -> "pd.DataFrame":
        """One row a cell, indexed by barcode. Raises StoreError where it is gone."""
        return read_elem(self._obs)

    def barcodes(self) -> "pa.StringArray":
        """The barcode of each cell, and nothing else of obs. Raises StoreError where it is gone."""
        import pyarrow as pa

        index = str(self._obs.attrs["_index"])
        return pa.array(read_elem(self._obs[index]).tolist(), pa.string())

    @property
    def n_blocks(self) -> int:
        """Blocks of 250 cells, the last one maybe shorter."""
        return -(-self.n_cells // schema.BLOCK_CELLS)

    def read_block(self, block: int) -> OpenIslands:
        """The cells of block ``block``, islands numbered as in the store's island space."""
        _ = self.conversion
        return self._reader.read_block(block)

    def read_chunks(self, blocks: Sequence[int]) -> list[bytes | None]:
        """The given blocks as they lie on disk, for ``decompress``; None where no island is open."""
        _ = self.conversion
        return self._reader.read_chunks(blocks)

    def decompress(self, block: int, chunk: bytes | None) -> EncodedRows:
        """The cells of a block that was read, encoded, and numbered as the store's islands are."""
        return self._reader.decompress(block, chunk)


class IslandStore:
    """A store opened for reading. Cell ids count over all samples in order of commit."""

    def __init__(
        self,
        path: Location,
        attributes: dict[str, Any],
        index: Sequence[dict[str, Any]],
        cache: BlockCache | None = None,
    ) -> None:
        self.path = path
        self._index, self._cache = index, cache
        self.attributes = attributes
        self.counting: str = attributes["counting"]
        self.islands_sha256: str = attributes["islands_sha256"]
        self.n_islands: int = attributes["n_islands"]
        self.samples: dict[str, Sample] = {}
        self.n_cells = 0
        for entry in index:
            folder = joined(path, f"{schema.SAMPLES}/{entry['name']}")
            self.samples[entry["name"]] = Sample(folder, entry, self.n_cells, self.n_islands, cache)
            self.n_cells += entry["n_cells"]

    @classmethod
    def open(cls, path: Location, cache: BlockCache | None = None) -> "IslandStore":
        """Open the store at ``path``, a folder or an URL. cache: where to put down the blocks that are read.

        Raises StoreError when there is none, or it is of another major version, or a sample is incomplete, or the obs
        of one has to be settled where the store cannot be written. In object storage, where each look costs a request,
        samples are looked at when they are first read.
        """
        path = path if is_url(path) else Path(path)
        attributes = read_root(path)
        if place_of(path).folders(INCOMING):
            from annatac_scale.store.obs import finish_obs

            finish_obs(path)
        store = cls(path, attributes, read_index(path), cache)
        if not is_url(path):
            for sample in store.samples.values():
                _ = sample.conversion
        return store

    def first(self, n_samples: int) -> "IslandStore":
        """The store as it was when it held its first ``n_samples`` samples: ids stay what they are."""
        return IslandStore(self.path, self.attributes, self._index[:n_samples], self._cache)

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of the islands and of the samples' names and digests, in order of commit.

        Two stores are identical if and only if their digests are equal.
        """
        digest = hashlib.sha256(f"{self.islands_sha256}\n".encode())
        for name, sample in self.samples.items():
            digest.update(f"{name} {sample.digest}\n".encode())
        return digest.hexdigest()

    @cached_property
    def space(self) -> "IslandSpace":
        """The store's islands. Raises StoreError when they do not fit the recorded sha256."""
        from annatac_scale.genome.islands import IslandSpace

        frame = read_elem(open_group(joined(self.path, schema.ISLANDS)))
        space = IslandSpace(
            assembly=self.attributes["assembly"],
            chromosomes=tuple(self.attributes["chromosomes"]),
            width_bp=self.attributes["width_bp"],
            selection=self.attributes["selection"],
            chrom=frame["chrom"].cat.codes.to_numpy(np.int32),
            start=frame["start"].to_numpy(np.int64),
            end=frame["end"].to_numpy(np.int64),
            genes=frame["genes"].to_numpy(object),
        )
        if space.sha256 != self.islands_sha256:
            raise StoreError(
                f"{self.path}/islands: sha256 {space.sha256}, recorded {self.islands_sha256}: damaged"
            )
        return space

    def obs(self, columns: list[str] | None = None) -> "pd.DataFrame":
        """One row a cell, row i = cell id i: sample, barcode and the given columns (all when None).

        A column that a sample lacks is missing there; one that no sample has raises InputError, as does any column
        of a store without samples.
        """
        from annatac_scale.store.columns import obs_frame

        return obs_frame(self, columns)

    def name_of(self, cell: int) -> str:
        """A cell in words, by barcode and sample; reads the obs of its sample alone."""
        sample = next(one for one in self.samples.values() if cell < one.first_cell + one.n_cells)
        return f"barcode {sample.obs().index[cell - sample.first_cell]} of sample {sample.name}"

    def blocks(self) -> list[Block]:
        """All blocks in order of cell ids."""
        size = schema.BLOCK_CELLS
        return [
            Block(s.name, i, s.first_cell + i * size, min(size, s.n_cells - i * size))
            for s in self.samples.values()
            for i in range(s.n_blocks)
        ]

    def read_block(self, block: Block) -> OpenIslands:
        """The cells of a block."""
        return self.samples[block.sample].read_block(block.index)

    def read(self, cells: NDArray[np.int64]) -> OpenIslands:
        """The given cells (ids, int64 [m], any order, repeats allowed) in the given order."""
        cells = np.asarray(cells, np.int64)
        wrong = cells[(cells < 0) | (cells >= self.n_cells)]
        if len(wrong):
            raise StoreError(f"{self.path}: cell ids run from 0 to {self.n_cells - 1}, asked for {wrong[0]}")
        blocks = self.blocks()
        owner = np.searchsorted([b.first_cell for b in blocks], cells, side="right") - 1
        parts, places = [], []
        for number in np.unique(owner):
            where = np.flatnonzero(owner == number)
            block = blocks[number]
            parts.append(self.read_block(block).take(cells[where] - block.first_cell))
            places.append(where)
        if not parts:
            return OpenIslands.empty()
        return OpenIslands.concatenate(parts).take(np.argsort(np.concatenate(places)))
