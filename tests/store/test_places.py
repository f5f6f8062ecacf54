"""Places and blobs behave alike on a disk and in object storage."""

import os
import pickle
import resource
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from object_storage import ObjectStorage

from annatac_scale.errors import InputError, StoreError
from annatac_scale.store.place import (
    Place,
    blob_of,
    is_url,
    joined,
    location_of,
    on_disk,
    parent_of,
    place_of,
)

KINDS = ("folder", "prefix")


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """An empty place of each kind."""
    if request.param == "folder":
        return place_of(tmp_path / "place")
    return place_of(f"{request.getfixturevalue('s3').bucket()}/a/place")


def test_what_is_written_is_read_back_listed_and_removed(place: Place) -> None:
    assert place.names() == place.folders() == []
    place.write("b/c/one", b"1")
    place.write("b/two", b"22")
    place.write("bc", b"")
    place.write("b/two", b"twenty-two")
    assert place.read("b/two") == b"twenty-two"
    assert place.read("bc") == b""
    assert place.names() == ["b/c/one", "b/two", "bc"]
    assert place.names("b") == ["b/c/one", "b/two"]
    assert place.sizes() == {"b/c/one": 1, "b/two": 10, "bc": 0}
    assert (place.folders(), place.folders("b")) == (["b"], ["c"])
    assert place.below("b").names("c") == ["c/one"]
    assert pickle.loads(pickle.dumps(place)).below("b").read("two") == b"twenty-two"
    place.remove("b")
    place.remove("b")
    assert place.names() == ["bc"]
    place.remove("")
    assert place.names() == []


def test_what_is_not_there_is_a_file_not_found(place: Place) -> None:
    place.write("folder/file", b"1")
    for name in ("nothing", "folder", "folder/file/below", "no/where"):
        assert place.size(name) is None
        with pytest.raises(FileNotFoundError):
            place.read(name)
        with pytest.raises(FileNotFoundError):
            place.read_range(name, -4, 4)


def test_ranges_are_read_from_both_ends(place: Place) -> None:
    data = bytes(range(256)) * 5
    place.write("file", data)
    for start, length in [(0, 10), (5, 1), (1270, 10), (1275, 100), (0, 1280)]:
        assert place.read_range("file", start, length) == data[start : start + length]
    assert place.read_range("file", -7, 7) == data[-7:]
    assert place.read_range("file", -7, 3) == data[-7:-4]
    assert place.read_range("file", -9999, 9999) == data


def test_files_written_together_are_copied_too(place: Place) -> None:
    place.write("from/x", b"x")
    place.write_all({"to/a": b"1", "to/b/c": b"2" * 100}, {"to/x": "from/x", "to/deep/er/x": "from/x"})
    assert {name: place.read(name) for name in place.names("to")} == {
        "to/a": b"1", "to/b/c": b"2" * 100, "to/deep/er/x": b"x", "to/x": b"x"
    }  # fmt: skip


def test_a_file_written_by_many_at_once_is_one_of_theirs(place: Place) -> None:
    contents = [bytes([i]) * 10_000 for i in range(8)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda data: place.write("file", data), contents))
    assert place.read("file") in contents
    assert place.names() == ["file"]


def test_urls_are_told_from_paths() -> None:
    assert is_url("s3://bucket/a")
    assert not is_url("a/b")
    assert not is_url(Path("s3:/bucket"))
    assert joined("s3://bucket/a/", "b/c") == "s3://bucket/a/b/c"
    assert joined("a", "b/c") == joined(Path("a"), "b/c") == Path("a/b/c")
    assert location_of("s3://bucket/a") == "s3://bucket/a"
    assert location_of("a/b") == location_of(Path("a/b")) == Path("a/b")


def test_what_can_only_lie_on_a_disk_is_refused_as_a_url() -> None:
    assert on_disk("a/b", "--out") == on_disk(Path("a/b"), "--out") == Path("a/b")
    with pytest.raises(InputError, match=r"^--out s3://bucket/a: found an URL; expected a path on a disk"):
        on_disk("s3://bucket/a", "--out")


@pytest.mark.parametrize(
    ("location", "parent"),
    [
        ("s3://bucket/a/b", "s3://bucket/a"),
        ("gs://bucket/a/b/", "gs://bucket/a"),
        ("s3://bucket/a", "s3://bucket"),
        ("s3://bucket", None),
        ("s3://bucket/", None),
        ("/a/b", Path("/a")),
        (Path("/a/b"), Path("/a")),
        ("b", Path.cwd()),
    ],
)
def test_a_location_is_in_a_folder_but_for_a_whole_bucket(
    location: Path | str, parent: Path | str | None
) -> None:
    assert parent_of(location) == parent


@pytest.mark.parametrize("url", ["ftp://host/a", "s3://", "s3:///a", "https://host/a"])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(InputError, match="expected s3://bucket/name"):
        place_of(url)
    with pytest.raises(InputError, match="expected s3://bucket/name"):
        blob_of(url)


@pytest.fixture(params=KINDS)
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path | str:
    """A file of each kind."""
    folder = tmp_path if request.param == "folder" else request.getfixturevalue("s3").bucket()
    place_of(folder).write("file", bytes(range(200)))
    return joined(folder, "file")


def put(file: Path | str, data: bytes) -> None:
    folder, _, name = str(file).rpartition("/")
    place_of(folder).write(name, data)


def test_a_blob_is_read_in_ranges_by_many_threads(file: Path | str) -> None:
    blob = pickle.loads(pickle.dumps(blob_of(file)))
    assert (blob.location, blob.size) == (str(file), 200)
    with ThreadPoolExecutor(4) as threads:
        parts = list(threads.map(lambda start: blob.read(start, 7), range(0, 210, 7)))
    assert b"".join(parts) == bytes(range(200))
    assert blob.read(190, 99) == bytes(range(190, 200))
    assert blob.read(200, 5) == blob.read(3, 0) == b""
    assert blob.stamp == blob_of(file).stamp


def test_a_blob_that_changes_while_it_is_read_is_refused(file: Path | str) -> None:
    blob = blob_of(file)
    put(file, bytes(99))
    with pytest.raises(InputError, match="file: changed"):
        blob.read(0, 10)


def test_blobs_that_cannot_be_read_are_refused(s3: ObjectStorage, tmp_path: Path) -> None:
    bucket = s3.bucket()
    with pytest.raises(InputError, match=f"{bucket}/nothing: found no such object"):
        blob_of(f"{bucket}/nothing")
    with pytest.raises(InputError, match="no-such-bucket-1/x: found no such"):
        blob_of("s3://no-such-bucket-1/x")
    with pytest.raises(InputError, match=r"nothing: cannot be read .No such file"):
        blob_of(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        opened = threading.Thread(
            target=lambda: os.close(os.open(tmp_path / "pipe", os.O_WRONLY)), daemon=True
        )
        opened.start()
        with pytest.raises(InputError, match=r"cannot be read|found no plain file"):
            blob_of(path)


def test_a_busy_server_is_asked_again(s3: ObjectStorage) -> None:
    place = place_of(s3.bucket())
    s3.failing = 3
    place.write("file", b"1")
    s3.failing = 2
    assert place.read("file") == b"1"


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        pytest.param({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "error sending request", id="nobody there"),
        pytest.param({"AWS_ENDPOINT_URL": "https://127.0.0.1:9"}, "error sending request", id="https"),
    ],
)
def test_a_server_that_does_not_answer_is_named_with_what_to_do(
    s3: ObjectStorage, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], found: str
) -> None:
    monkeypatch.setattr("annatac_scale.store.clients.RETRIES", {"max_retries": 1})
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        StoreError, match=rf"^s3://bucket/a/x: cannot be written .*{found}.*AWS_ENDPOINT_URL.*again$"
    ):
        place_of("s3://bucket/a").write("x", b"")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)
    with pytest.raises(StoreError, match="no such bucket; make it"):
        place_of("s3://no-such-bucket-2/a").write("x", b"")


def test_a_full_disk_is_told_and_leaves_no_piece_of_a_file(tmp_path: Path) -> None:
    place = place_of(tmp_path)
    place.write("file", b"before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(
            StoreError, match=rf"{tmp_path}/file: cannot be written .*free some.*what is whole is kept"
        ):
            place.write("file", bytes(9999))
        with pytest.raises(StoreError, match=rf"{tmp_path}/b: cannot be written"):
            place.write_all({"a": b"1", "b": bytes(9999)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert place.read("file") == b"before"
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "file"]
