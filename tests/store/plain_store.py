"""docs/store-format.md, taken apart, and an island store read by its words: plain Python, zstd and nothing else."""

import hashlib
import itertools
import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numcodecs.zstd import Zstd

DOCUMENT = (Path(__file__).parents[2] / "docs/store-format.md").read_text()

Row = list[tuple[int, int]]


# The document


def section(title: str) -> str:
    """The text below a heading, up to the next heading."""
    after = re.split(rf"^#+ {re.escape(title)}$", DOCUMENT, flags=re.M)[1]
    return re.split(r"^#+ ", after, maxsplit=1, flags=re.M)[0]


def fenced(language: str) -> list[str]:
    """The blocks of code in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCUMENT, flags=re.M | re.S)


def table(title: str) -> list[list[str]]:
    """The rows of a section's table, without its head."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def keys(title: str) -> list[str]:
    """What the first column of a section's table names."""
    return [key for row in table(title) for key in re.findall(r"`([^`]+)`", row[0])]


@dataclass(frozen=True)
class Node:
    """A line of the document's tree: path with placeholders, and what stands behind it."""

    path: tuple[str, ...]
    says: str

    @property
    def pattern(self) -> str:
        return "/".join("[^/]+" if part.startswith("<") else re.escape(part) for part in self.path)

    @property
    def shape(self) -> list[str] | None:
        found = re.match(r"\[(.*)\] ", self.says)
        return found[1].split(", ") if found else None

    @property
    def dtypes(self) -> list[str]:
        return self.says.split("] ")[1].split(" | ")


def documented_tree() -> list[Node]:
    nodes: list[Node] = []
    path: list[str] = []
    for line in fenced("tree")[0].splitlines()[1:]:
        indent, name, says = re.fullmatch(r"( +)(\S+) +(.*)", line).groups()  # type: ignore[union-attr]
        path = [*path[: len(indent) // 2 - 1], name.rstrip("/")]
        nodes.append(Node(tuple(path), says))
    return nodes


# The store, read without zarr


def metadata(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "zarr.json").read_text())


def attributes(folder: Path) -> dict[str, Any]:
    return metadata(folder)["attributes"]


def plain_array(folder: Path) -> list[Any]:
    """A one-dimensional array of numbers or strings."""
    meta = metadata(folder)
    assert [codec["name"] for codec in meta["codecs"]][1:] == ["zstd"]
    (n,), (size,) = meta["shape"], meta["chunk_grid"]["configuration"]["chunk_shape"]
    values: list[Any] = []
    for chunk in range(-(-n // size)):
        file = folder / meta["chunk_key_encoding"]["configuration"]["separator"].join(["c", str(chunk)])
        some = plain_chunk(Zstd().decode(file.read_bytes()), meta) if file.exists() else []
        values += some or [meta["fill_value"]] * size
    return values[:n]


FORMATS = {"bool": "?", "int8": "b", "uint8": "B", "int64": "q", "float32": "f"}
KINDS = {"bool": "|b1", "int8": "|i1", "uint8": "|u1", "int64": "<i8", "float32": "<f4"}


def plain_chunk(data: bytes, meta: dict[str, Any]) -> list[Any]:
    if meta["data_type"] != "string":
        letter = FORMATS[meta["data_type"]]
        return list(struct.unpack(f"<{len(data) // struct.calcsize(letter)}{letter}", data))
    assert meta["codecs"][0]["name"] == "vlen-utf8"
    strings, at = [], 4
    for _ in range(int.from_bytes(data[:4], "little")):
        end = at + 4 + int.from_bytes(data[at : at + 4], "little")
        strings.append(data[at + 4 : end].decode())
        at = end
    return strings


def plain_column(folder: Path) -> list[Any]:
    """A column of a data frame; missing text is None."""
    if metadata(folder)["node_type"] == "array":
        return plain_array(folder)
    categories = plain_array(folder / "categories")
    return [None if code < 0 else categories[code] for code in plain_array(folder / "codes")]


def crc32c(data: bytes) -> bytes:
    """CRC-32C bit by bit: reflected polynomial 0x82F63B78, as uint32 little-endian."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    return (crc ^ 0xFFFFFFFF).to_bytes(4, "little")


def checked(data: bytes) -> bytes:
    assert crc32c(data[:-4]) == data[-4:]
    return data[:-4]


def plain_block(encoded: bytes, n_rows: int, n_islands: int) -> list[Row]:
    """The island codec, from the words of the document."""
    ends = struct.unpack_from(f"<{n_rows + 1}I", encoded)
    body = encoded[4 * (n_rows + 1) :]
    assert ends[0] == 0
    assert ends[-1] == len(body)
    return [plain_row(body[a:b], n_islands) for a, b in itertools.pairwise(ends)]


def plain_row(data: bytes, n_islands: int) -> Row:
    row, island, left = [], -1, iter(data)
    for byte in left:
        number = byte
        if byte == 255:
            groups = [next(left)]
            while groups[-1] & 128:
                groups.append(next(left))
            more = sum((group & 127) << 7 * i for i, group in enumerate(groups))
            assert len(groups) == max(1, -(-more.bit_length() // 7)) <= 5
            number += more
        gap, level = divmod(number, 5)
        island += gap + 1
        assert island < n_islands
        row.append((island, level + 1))
    return row


def plain_shard(file: Path) -> list[bytes | None]:
    """The 16 blocks of a shard in the island codec, None where left out."""
    data = file.read_bytes()
    pairs = list(struct.iter_unpack("<2Q", checked(data[-260:])))
    absent = (2**64 - 1, 2**64 - 1)
    return [
        None if pair == absent else Zstd().decode(checked(data[pair[0] : pair[0] + pair[1]]))
        for pair in pairs
    ]


CLOSED = bytes(4 * 251)


def plain_blocks(x: Path, n_cells: int) -> Iterator[list[bytes]]:
    """For each shard, the blocks that it has cells for, in the island codec."""
    for shard in range(-(-n_cells // 4000)):
        file = x / "c" / str(shard) / "0"
        blocks = plain_shard(file) if file.exists() else [None] * 16
        n_blocks = -(-min(4000, n_cells - 4000 * shard) // 250)
        assert blocks[n_blocks:] == [None] * (16 - n_blocks)
        yield [block or CLOSED for block in blocks[:n_blocks]]


def plain_islands_sha256(root: dict[str, Any], frame: Path) -> str:
    columns = (plain_column(frame / name) for name in ("chrom", "start", "end"))
    lines = [f"{chrom}\t{start}\t{end}\n" for chrom, start, end in zip(*columns, strict=True)]
    text = f"{root['assembly']}\t{root['width_bp']}\n" + "".join(lines)
    return hashlib.sha256(text.encode()).hexdigest()


def plain_x_sha256(x: Path, n_cells: int) -> str:
    shards = [hashlib.sha256(b"".join(blocks)).hexdigest() for blocks in plain_blocks(x, n_cells)]
    return hashlib.sha256("".join(shards).encode()).hexdigest()


def plain_digest(islands_sha256: str, x_sha256: str, sample: Path) -> str:
    obs = sample / "obs"
    bits = "".join("01"[flag] for flag in plain_array(sample / "var/measured"))
    data = f"{islands_sha256}\n{x_sha256}\n".encode()
    data += bytes(int(bits[i : i + 8].ljust(8, "0"), 2) for i in range(0, len(bits), 8))
    for name in ["barcode", *attributes(obs)["column-order"]]:
        values, kind = plain_column(obs / name), "str"
        if name == "barcode" or metadata(obs / name)["node_type"] == "group":
            column = "\n".join(json.dumps(value) for value in values).encode()
        else:
            data_type = metadata(obs / name)["data_type"]
            kind = KINDS[data_type]
            column = struct.pack(f"<{len(values)}{FORMATS[data_type]}", *values)
        data += f"\n{json.dumps(name)} {kind} {len(column)}\n".encode() + column
    return hashlib.sha256(data).hexdigest()
