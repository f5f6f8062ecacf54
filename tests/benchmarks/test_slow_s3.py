"""The benchmarks' S3 server gives what a client of S3 expects, and a store is read through it as from disk."""

import importlib
import sys
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from botocore.exceptions import ClientError
from hypothesis import given
from hypothesis import strategies as st

from annatac_scale.store.store import IslandStore

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))
slow_s3: Any = importlib.import_module("slow_s3")
stores: Any = importlib.import_module("store_writer")

DATA = bytes(range(256)) * 1_000
KEYS = ("a/one.bin", "a/b/two.bin", "a/b/three.bin", "ab.bin", "odd name & <tag>.bin")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    folder = tmp_path_factory.mktemp("buckets")
    for number, key in enumerate(KEYS):
        path = folder / "bucket" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(DATA[number:])
    (folder / "secret").write_text("no bucket holds this")
    with slow_s3.running(folder, 1, 100) as environment:
        yield folder, environment


@pytest.fixture
def client(server: tuple[Path, dict[str, str]]) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=server[1]["AWS_ENDPOINT_URL"],
        aws_access_key_id="test",
        aws_secret_access_key="test",
        region_name="us-east-1",
    )


def test_objects_are_whole_and_named_by_any_key(client: Any) -> None:
    for number, key in enumerate(KEYS):
        found = client.get_object(Bucket="bucket", Key=key)
        assert found["Body"].read() == DATA[number:]
        head = client.head_object(Bucket="bucket", Key=key)
        assert head["ContentLength"] == len(DATA) - number
        assert head["ETag"] == found["ETag"]
        assert head["LastModified"] == found["LastModified"]


@pytest.mark.parametrize(
    ("header", "expected", "place"),
    [
        ("bytes=0-0", DATA[:1], f"bytes 0-0/{len(DATA)}"),
        ("bytes=100-70099", DATA[100:70_100], f"bytes 100-70099/{len(DATA)}"),
        ("bytes=255990-", DATA[255_990:], f"bytes 255990-255999/{len(DATA)}"),
        ("bytes=-260", DATA[-260:], f"bytes 255740-255999/{len(DATA)}"),
        ("bytes=255990-999999", DATA[255_990:], f"bytes 255990-255999/{len(DATA)}"),
    ],
)
def test_ranges_are_what_they_ask_for(client: Any, header: str, expected: bytes, place: str) -> None:
    found = client.get_object(Bucket="bucket", Key=KEYS[0], Range=header)
    assert found["Body"].read() == expected
    assert found["ContentRange"] == place


@given(st.integers(0, 50), st.integers(0, 60), st.integers(0, 60))
def test_byte_ranges_agree_with_slices(size: int, first: int, last: int) -> None:
    data = bytes(range(size))

    def cut(header: str) -> bytes:
        found = slow_s3.byte_range(header, size)
        return b"" if found is None else data[slice(*found)]

    assert cut(f"bytes={first}-{last}") == data[first : last + 1]
    assert cut(f"bytes={first}-") == data[first:]
    assert cut(f"bytes=-{last}") == data[max(0, size - last) :]
    assert slow_s3.byte_range("bytes=-", size) is None
    assert slow_s3.byte_range("lines=1-2", size) is None


@pytest.mark.parametrize(
    ("bucket", "key", "more", "code"),
    [
        ("bucket", "none.bin", {}, "NoSuchKey"),
        ("bucket", "a", {}, "NoSuchKey"),
        ("none", "a", {}, "NoSuchBucket"),
        ("bucket", "../secret", {}, "NoSuchKey"),
        ("bucket", KEYS[0], {"Range": "bytes=300000-"}, "InvalidRange"),
        ("bucket", KEYS[0], {"IfMatch": '"other"'}, "PreconditionFailed"),
    ],
)
def test_what_is_not_there_is_refused_as_s3_does(
    client: Any, bucket: str, key: str, more: dict[str, str], code: str
) -> None:
    with pytest.raises(ClientError) as error:
        client.get_object(Bucket=bucket, Key=key, **more)
    assert error.value.response["Error"]["Code"] == code


def test_no_path_leads_out_of_the_buckets(server: tuple[Path, dict[str, str]]) -> None:
    connection = HTTPConnection(server[1]["AWS_ENDPOINT_URL"].removeprefix("http://"))
    for path in ("/bucket/../secret", "/bucket/%2e%2e/secret", "/../secret", "/bucket//etc/passwd"):
        connection.request("GET", path)
        answer = connection.getresponse()
        assert (answer.status, b"holds" in answer.read()) == (404, False)
    connection.close()


def test_listings_are_cut_at_the_delimiter(client: Any) -> None:
    flat = client.list_objects_v2(Bucket="bucket")
    assert [entry["Key"] for entry in flat["Contents"]] == sorted(KEYS)
    assert [entry["Size"] for entry in flat["Contents"]] == [
        len(DATA) - KEYS.index(key) for key in sorted(KEYS)
    ]
    top = client.list_objects_v2(Bucket="bucket", Delimiter="/")
    assert [entry["Prefix"] for entry in top["CommonPrefixes"]] == ["a/"]
    assert [entry["Key"] for entry in top["Contents"]] == [KEYS[3], KEYS[4]]
    below = client.list_objects_v2(Bucket="bucket", Prefix="a/", Delimiter="/")
    assert [entry["Prefix"] for entry in below["CommonPrefixes"]] == ["a/b/"]
    assert [entry["Key"] for entry in below["Contents"]] == ["a/one.bin"]
    assert client.list_objects_v2(Bucket="bucket", Prefix="none/")["KeyCount"] == 0


def test_headers_are_dates_and_lengths(server: tuple[Path, dict[str, str]]) -> None:
    connection = HTTPConnection(server[1]["AWS_ENDPOINT_URL"].removeprefix("http://"))
    for method in ("HEAD", "GET", "HEAD"):
        connection.request(method, f"/bucket/{KEYS[0]}")
        answer = connection.getresponse()
        assert answer.getheader("Content-Length") == str(len(DATA))
        assert parsedate_to_datetime(answer.getheader("Last-Modified", "")).year > 2000
        assert answer.read() == (DATA if method == "GET" else b"")
    connection.request("PUT", f"/bucket/{KEYS[0]}")
    assert connection.getresponse().status == 405
    connection.close()


def test_a_store_is_read_as_from_disk(
    server: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, environment = server
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    spec = stores.Spec(cells=600, islands=300, open=20, types=3, samples=2)
    path = stores.make_store(folder / "stores", spec)
    there, here = IslandStore.open(f"s3://stores/{path.name}"), IslandStore.open(path)
    ids = np.random.default_rng(0).permutation(spec.cells)
    np.testing.assert_array_equal(there.read(ids).islands, here.read(ids).islands)
    assert there.obs(["cell_type"]).equals(here.obs(["cell_type"]))
