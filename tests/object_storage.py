"""A real S3 server over HTTP, in this process, for tests: moto behind werkzeug.

The fixture ``s3`` (conftest.py) gives one that all tests of a run share, and points AWS_* of the environment at it;
``s3.bucket()`` makes a bucket of the test's own. Processes that a test starts find it by the same environment.
"""

import logging
import threading
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server


@dataclass
class ObjectStorage:
    """The server. requests: "METHOD /path" of all it was asked; it can be told to fail."""

    url: str = ""
    requests: list[str] = field(default_factory=list)
    failing: int = 0

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
        }

    @property
    def boto(self) -> Any:
        """A client of another make."""
        return boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id="test",
            aws_secret_access_key="test",
            region_name="us-east-1",
        )

    def bucket(self) -> str:
        """The URL of a new bucket, as s3://name."""
        name = f"test-{uuid.uuid4().hex}"
        self.boto.create_bucket(Bucket=name)
        return f"s3://{name}"

    def keys(self, url: str) -> list[str]:
        """All keys below a URL, relative to it."""
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        prefix = f"{prefix}/" if prefix else ""
        pages = self.boto.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return sorted(
            entry["Key"].removeprefix(prefix) for page in pages for entry in page.get("Contents", [])
        )

    def put(self, url: str, data: bytes) -> None:
        """Write an object."""
        bucket, _, key = url.removeprefix("s3://").partition("/")
        self.boto.put_object(Bucket=bucket, Key=key, Body=data)

    def get(self, url: str) -> bytes:
        """Read an object."""
        bucket, _, key = url.removeprefix("s3://").partition("/")
        return self.boto.get_object(Bucket=bucket, Key=key)["Body"].read()


@contextmanager
def running() -> Iterator[ObjectStorage]:
    """A server that runs until the block is left."""
    storage, moto = ObjectStorage(), DomainDispatcherApplication(create_backend_app)
    one_at_a_time = threading.Lock()  # moto looks and writes in two steps: its conditional writes need a lock

    def answer(environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        with one_at_a_time:
            storage.requests.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}")
            if storage.failing:
                storage.failing -= 1
                start("503 Slow Down", [("Content-Type", "text/plain")])
                return [b"slow down"]
            return list(moto(environ, start))

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = make_server("127.0.0.1", 0, answer, threaded=True)
    storage.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield storage
    finally:
        server.shutdown()
        thread.join()
