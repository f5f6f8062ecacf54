"""Serves a folder as S3 over a slow and narrow link: its subfolders are the buckets, read only, path-style addresses.

    python benchmarks/slow_s3.py --folder FOLDER [--latency-ms 50] [--mb-per-s 40] [--port 0]

Prints its URL, serves until it is sent SIGTERM, then prints one line of JSON: requests, bytes of bodies. Every request
waits for the latency before its first byte; the bodies of all requests share the link, a piece of one after a piece of
another. It knows GET (whole, ``bytes=a-b``, ``bytes=a-``, ``bytes=-n``, If-Match), HEAD and ListObjectsV2
(prefix, delimiter), which is what reading a store takes. Signatures are not looked at.
"""

import argparse
import asyncio
import json
import os
import re
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

_PIECE = 1 << 16
_BURST_S = 0.01
_MOST_HEAD = 1 << 16
_REASONS = {
    200: "OK",
    206: "Partial Content",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    412: "Precondition Failed",
    416: "Range Not Satisfiable",
}


class Request(NamedTuple):
    """headers: names in lower case"""

    method: str
    bucket: str
    key: str
    query: Mapping[str, str]
    headers: Mapping[str, str]


@dataclass
class Answer:
    """A status and a body: ``data``, or bytes ``start`` to ``stop`` of a file."""

    status: int
    data: bytes = b""
    path: Path | None = None
    start: int = 0
    stop: int = 0
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return len(self.data) if self.path is None else self.stop - self.start

    def head(self) -> bytes:
        headers = {"Content-Length": str(self.length), "Content-Type": "binary/octet-stream", **self.headers}
        lines = [
            f"HTTP/1.1 {self.status} {_REASONS[self.status]}",
            *(f"{k}: {v}" for k, v in headers.items()),
        ]
        return "\r\n".join([*lines, "", ""]).encode()

    def pieces(self) -> Iterator[bytes]:
        if self.path is None:
            yield from ([self.data] if self.data else [])
            return
        with self.path.open("rb", buffering=0) as file:
            for start in range(self.start, self.stop, _PIECE):
                yield os.pread(file.fileno(), min(_PIECE, self.stop - start), start)


class Link:
    """What all bodies go through, one piece at a time. rate: bytes a second, None without bound"""

    def __init__(self, rate: float | None) -> None:
        self._rate = rate
        self._free_at = 0.0

    async def send(self, n_bytes: int) -> None:
        """Wait until the link has taken a piece; a link that was idle does not make up for it."""
        if self._rate is None:
            return
        now = time.monotonic()
        self._free_at = max(self._free_at, now - _BURST_S) + n_bytes / self._rate
        if self._free_at > now:
            await asyncio.sleep(self._free_at - now)


class Server:
    """folder: holds a folder a bucket; latency_s: of each request"""

    def __init__(self, folder: Path, latency_s: float, rate: float | None) -> None:
        self.folder = folder.resolve()
        self.latency_s = latency_s
        self.link = Link(rate)
        self.requests = self.bytes = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A connection: request after request, until the client closes it."""
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                request = _parsed(await reader.readuntil(b"\r\n\r\n"))
                if self.latency_s:
                    await asyncio.sleep(self.latency_s)
                await self._send(writer, request.method, self.answer(request))
        writer.close()

    async def _send(self, writer: asyncio.StreamWriter, method: str, answer: Answer) -> None:
        self.requests += 1
        writer.write(answer.head())
        if method != "HEAD":
            for piece in answer.pieces():
                await self.link.send(len(piece))
                writer.write(piece)
                self.bytes += len(piece)
                await writer.drain()
        await writer.drain()

    def answer(self, request: Request) -> Answer:
        if request.method not in ("GET", "HEAD"):
            return _error(405, "MethodNotAllowed")
        bucket = self.folder / request.bucket
        if not request.bucket or not bucket.is_dir():
            return _error(404, "NoSuchBucket")
        if not request.key:
            return _listing(bucket, request)
        path = (bucket / request.key).resolve()
        if not path.is_relative_to(bucket) or not path.is_file():
            return _error(404, "NoSuchKey")
        return _object(path, request)


def _parsed(head: bytes) -> Request:
    line, *rest = head.decode("latin-1").split("\r\n")
    method, target, _ = line.split(" ", 2)
    url = urlsplit(target)
    bucket, _, key = unquote(url.path).lstrip("/").partition("/")
    headers = dict(entry.split(":", 1) for entry in rest if ":" in entry)
    query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
    return Request(method, bucket, key, query, {k.strip().lower(): v.strip() for k, v in headers.items()})


def _object(path: Path, request: Request) -> Answer:
    stat = path.stat()
    etag = f'"{stat.st_mtime_ns:x}-{stat.st_size:x}"'
    headers = {
        "ETag": etag,
        "Last-Modified": formatdate(stat.st_mtime, usegmt=True),
        "Accept-Ranges": "bytes",
    }
    if request.headers.get("if-match", etag) not in (etag, "*"):
        return _error(412, "PreconditionFailed")
    wanted = request.headers.get("range")
    if wanted is None:
        return Answer(200, path=path, stop=stat.st_size, headers=headers)
    found = byte_range(wanted, stat.st_size)
    if found is None:
        return _error(416, "InvalidRange")
    start, stop = found
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{stat.st_size}"
    return Answer(206, path=path, start=start, stop=stop, headers=headers)


def byte_range(header: str, size: int) -> tuple[int, int] | None:
    """Where a Range header begins and ends in an object of ``size`` bytes, half-open; None where it holds nothing."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header)
    if match is None or match.group() == "bytes=-":
        return None
    first, last = match.groups()
    if not first:
        start, stop = max(0, size - int(last)), size
    else:
        start, stop = int(first), min(int(last) + 1, size) if last else size
    return (start, stop) if start < stop else None


def _listing(bucket: Path, request: Request) -> Answer:
    """ListObjectsV2, all in one answer."""
    prefix, delimiter = request.query.get("prefix", ""), request.query.get("delimiter", "")
    contents, common = [], set()
    for path in _below(bucket, prefix):
        key = path.relative_to(bucket).as_posix()
        rest = key[len(prefix) :]
        if delimiter and delimiter in rest:
            common.add(prefix + rest.split(delimiter)[0] + delimiter)
            continue
        stat = path.stat()
        modified = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(stat.st_mtime))
        contents.append(
            f"<Contents><Key>{escape(key)}</Key><LastModified>{modified}</LastModified>"
            f"<ETag>&quot;{stat.st_mtime_ns:x}&quot;</ETag><Size>{stat.st_size}</Size></Contents>"
        )
    folders = [f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in sorted(common)]
    body = (
        '<?xml version="1.0" encoding="UTF-8"?>'
        '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Name>{escape(bucket.name)}</Name><Prefix>{escape(prefix)}</Prefix><MaxKeys>1000000</MaxKeys>"
        f"<KeyCount>{len(contents) + len(folders)}</KeyCount><IsTruncated>false</IsTruncated>"
        f"{''.join(contents)}{''.join(folders)}</ListBucketResult>"
    )
    return Answer(200, body.encode(), headers={"Content-Type": "application/xml"})


def _below(bucket: Path, prefix: str) -> list[Path]:
    """Files whose key begins with a prefix, sorted."""
    above = bucket / prefix.rpartition("/")[0]
    files = (path for path in above.rglob("*") if path.is_file()) if above.is_dir() else iter(())
    return sorted(path for path in files if path.relative_to(bucket).as_posix().startswith(prefix))


def _error(status: int, code: str) -> Answer:
    body = (
        f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{code}</Message></Error>'
    )
    return Answer(status, body.encode(), headers={"Content-Type": "application/xml"})


async def run(server: Server, port: int) -> None:
    """Serve until SIGTERM or SIGINT."""
    over = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, over.set)
    listener = await asyncio.start_server(server.serve, "127.0.0.1", port, limit=_MOST_HEAD)
    print(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}", flush=True)
    await over.wait()
    listener.close()
    print(json.dumps({"requests": server.requests, "bytes": server.bytes}), flush=True)


@contextmanager
def running(folder: Path, latency_ms: float, mb_per_s: float | None) -> Iterator[dict[str, str]]:
    """The server in a process of its own; gives the environment by which a client finds it."""
    import subprocess
    import sys

    options = ["--folder", str(folder), "--latency-ms", str(latency_ms), "--mb-per-s", str(mb_per_s or 0)]
    with subprocess.Popen(
        [sys.executable, "-S", __file__, *options], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            if not url:
                raise SystemExit("slow_s3.py: found no address; expected the URL that it serves")
            yield {
                "AWS_ENDPOINT_URL": url,
                "AWS_ALLOW_HTTP": "true",
                "AWS_ACCESS_KEY_ID": "test",
                "AWS_SECRET_ACCESS_KEY": "test",
                "AWS_REGION": "us-east-1",
                "NO_PROXY": "127.0.0.1",
            }
        finally:
            process.terminate()
            process.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--latency-ms", type=float, default=50)
    parser.add_argument("--mb-per-s", type=float, default=40, help="megabytes (10^6) a second; 0: no bound")
    parser.add_argument("--port", type=int, default=0, help="default 0: a free one")
    options = parser.parse_args()
    rate = options.mb_per_s * 1e6 or None
    asyncio.run(run(Server(options.folder, options.latency_ms / 1e3, rate), options.port))


if __name__ == "__main__":
    main()
