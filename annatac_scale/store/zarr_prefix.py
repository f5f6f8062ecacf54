"""What zarr reads a prefix in object storage by. Unlike zarr's own, it lives through forks and pickling."""

import asyncio
from collections.abc import AsyncIterator, Iterable

from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype

from annatac_scale.errors import StoreError
from annatac_scale.store.objects import Prefix


def zarr_store(url: str) -> "ZarrPrefix":
    """A store of zarr, to read only."""
    return ZarrPrefix(Prefix(url.rstrip("/")))


class ZarrPrefix(Store):
    """A prefix, to read only. It waits for the storage on threads of zarr's event loop."""

    supports_writes = False
    supports_deletes = False
    supports_listing = True

    def __init__(self, prefix: Prefix) -> None:
        super().__init__(read_only=True)
        self.prefix = prefix

    def __eq__(self, value: object) -> bool:
        return isinstance(value, ZarrPrefix) and value.prefix == self.prefix

    def __str__(self) -> str:
        return self.prefix.location

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """As in zarr's Store."""
        try:
            data = await asyncio.to_thread(self._read, key, byte_range)
        except FileNotFoundError:
            return None
        return prototype.buffer.from_bytes(data)

    def _read(self, key: str, byte_range: ByteRequest | None) -> bytes:
        if byte_range is None:
            return self.prefix.read(key)
        if isinstance(byte_range, RangeByteRequest):
            return self.prefix.read_range(key, byte_range.start, byte_range.end - byte_range.start)
        if isinstance(byte_range, OffsetByteRequest):
            return self.prefix.read_from(key, byte_range.offset)
        return self.prefix.read_range(key, -byte_range.suffix, byte_range.suffix)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """As in zarr's Store."""
        return list(
            await asyncio.gather(*(self.get(key, prototype, byte_range) for key, byte_range in key_ranges))
        )

    async def exists(self, key: str) -> bool:
        """As in zarr's Store."""
        return await asyncio.to_thread(self.prefix.size, key) is not None

    async def list(self) -> AsyncIterator[str]:
        """As in zarr's Store."""
        async for key in self.list_prefix(""):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """As in zarr's Store."""
        folder = prefix.rpartition("/")[0]
        for key in await asyncio.to_thread(self.prefix.names, folder):
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """As in zarr's Store."""
        for name in await asyncio.to_thread(self.prefix.listed, prefix.rstrip("/")):
            yield name

    async def set(self, key: str, value: Buffer) -> None:
        """Refused."""
        raise StoreError(f"{self.prefix.location}: opened to be read; found a write to {key}")

    async def delete(self, key: str) -> None:
        """Refused."""
        raise StoreError(f"{self.prefix.location}: opened to be read; found a removal of {key}")
