"""What the tests of predict share: how many cells the samples have, and that two data sets are the same."""

from pathlib import Path

SIZES = {"many": 300, "none": 0, "one": 1, "three": 3}


def assert_same_bytes(left: Path, right: Path) -> None:
    for folder, other in ((left, right), (right, left)):
        for file in folder.glob("*.parquet"):
            assert file.read_bytes() == (other / file.name).read_bytes(), file.name
