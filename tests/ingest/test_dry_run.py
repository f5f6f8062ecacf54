"""What a dry run tells, against what the conversion then does; and that it writes nothing."""

import gzip
from pathlib import Path
from typing import Any

import pytest
from compressed_files import bgzf
from stores import FRAGMENTS, write_lines, write_peaks

from annatac_scale.errors import StoreError
from annatac_scale.ingest import estimate, graph
from annatac_scale.ingest.convert import convert, dry_run
from annatac_scale.ingest.dry_run import ConversionPlan


def planned(inputs: list[Path], chrom_sizes: Path, out: Path, **options: Any) -> ConversionPlan:
    return dry_run(
        inputs,
        assembly="toy",
        out=out,
        **{"select": "all", "chrom_sizes": chrom_sizes, "min_fragments": 0} | options,
    )


def test_it_tells_samples_lines_and_room_and_writes_nothing(tmp_path: Path, chrom_sizes: Path) -> None:
    text = write_lines(tmp_path / "a.tsv", FRAGMENTS).read_bytes()
    (tmp_path / "b.tsv.gz").write_bytes(bgzf(text, 2000))
    before = sorted(tmp_path.rglob("*"))
    plan = planned([tmp_path / "a.tsv", tmp_path / "b.tsv.gz"], chrom_sizes, tmp_path / "s.zarr")
    assert plan.is_sound
    assert [(s.name, s.state, s.form) for s in plan.samples] == [
        ("a", "convert", "text"),
        ("b", "convert", "BGZF"),
    ]
    assert all(abs(s.lines - len(FRAGMENTS)) < 0.05 * len(FRAGMENTS) for s in plan.samples)
    assert all(s.scratch_bytes > 0 and s.store_bytes > 0 for s in plan.samples)
    assert "2 of 2 samples to convert" in plan.text()
    assert sorted(tmp_path.rglob("*")) == before


def test_each_thing_that_is_wrong_is_told_and_the_rest_is_planned(tmp_path: Path, chrom_sizes: Path) -> None:
    good = write_lines(tmp_path / "good.tsv", FRAGMENTS)
    bad = write_lines(tmp_path / "bad.tsv", [*FRAGMENTS[:3], ("chr1", 9, 5, "A")])
    other = write_lines(tmp_path / "other.tsv", [("NC_1", 1, 5, "A")])
    cut = tmp_path / "cut.tsv.gz"
    cut.write_bytes(bgzf(good.read_bytes(), 500)[:-28])
    plan = planned([good, bad, other, cut], chrom_sizes, tmp_path / "s.zarr")
    assert not plan.is_sound
    assert [s.state for s in plan.samples] == ["convert", "refused", "refused", "refused"]
    told = [s.problems[0] for s in plan.samples[1:]]
    assert "bad.tsv, line 4: found 'chr1\\t9\\t5\\tA'" in told[0]
    assert "found fragments on 'NC_1' and none on a chromosome of toy" in told[1]
    assert "without BGZF's empty last block" in told[2]
    assert planned([good, bad], chrom_sizes, tmp_path / "s.zarr", on_invalid="count").is_sound


def test_work_of_a_stopped_run_is_found_and_needs_no_room_again(
    tmp_path: Path, chrom_sizes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = write_lines(tmp_path / "a.tsv", FRAGMENTS).read_bytes()
    inputs = [tmp_path / "b.tsv.gz", tmp_path / "c.tsv.gz"]
    for path in inputs:
        path.write_bytes(gzip.compress(text + path.name.encode().join([b"#", b"\n"])))
    options: dict[str, Any] = {"select": "all", "chrom_sizes": chrom_sizes, "min_fragments": 0, "workers": 4}

    def stop(*_: Any) -> None:
        raise RuntimeError

    with monkeypatch.context() as patched:
        patched.setattr(graph, "commit_fragments", stop)
        with pytest.raises(RuntimeError):
            convert(inputs, assembly="toy", out=tmp_path / "s.zarr", **options)
    plan = planned(inputs, chrom_sizes, tmp_path / "s.zarr", workers=4)
    assert [sample.state for sample in plan.samples] == ["go on", "go on"]
    other = planned(inputs[:1], chrom_sizes, tmp_path / "s.zarr", workers=1)
    assert other.samples[0].state == "convert"

    drafts = {path.name: tmp_path / "s.zarr" / ".incoming" / path.name[0] for path in inputs}
    down = {
        name: sum(file.stat().st_size for file in draft.rglob("*") if file.is_file())
        for name, draft in drafts.items()
    }
    assert all(down.values())
    needed = sum(max(0, s.scratch_bytes - down[Path(s.path).name]) + s.store_bytes for s in plan.samples)
    for free, is_enough in [(needed + 2000, True), (needed // 2, False)]:
        usage = estimate.shutil.disk_usage(tmp_path)._replace(free=free)
        with monkeypatch.context() as patched:
            patched.setattr(estimate.shutil, "disk_usage", lambda _, found=usage: found)
            assert planned(inputs, chrom_sizes, tmp_path / "s.zarr", workers=4).is_sound == is_enough


def test_what_the_store_has_is_skipped_or_told_to_differ(tmp_path: Path, chrom_sizes: Path) -> None:
    a, peaks = write_lines(tmp_path / "a.tsv", FRAGMENTS), write_peaks(tmp_path / "p.bed")
    options: dict[str, Any] = {"select": "all", "chrom_sizes": chrom_sizes, "min_fragments": 0}
    convert(a, assembly="toy", out=tmp_path / "s.zarr", **options)
    assert [s.state for s in planned([a], chrom_sizes, tmp_path / "s.zarr").samples] == ["skip"]
    differing = planned([a], chrom_sizes, tmp_path / "s.zarr", peaks=peaks)
    assert (
        "is in the store already, but it was made without a file for peaks"
        in differing.samples[0].problems[0]
    )
    mixed = planned(
        [write_lines(tmp_path / "b.tsv", FRAGMENTS)], chrom_sizes, tmp_path / "s.zarr", counting="fragment"
    )
    assert "holds counting 'insertion', but 'fragment' was asked for" in mixed.problems[0]


def test_a_disk_with_too_little_room_is_told_before_any_work(
    tmp_path: Path, chrom_sizes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = write_lines(tmp_path / "a.tsv", FRAGMENTS)
    usage = estimate.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda _: usage)
    assert "found 0.0 MB free" in planned([a], chrom_sizes, tmp_path / "s.zarr").problems[0]
    with pytest.raises(
        StoreError, match=r"s\.zarr: found 0\.0 MB free; expected .* the store may need; .*--scratch"
    ):
        convert(
            a, assembly="toy", out=tmp_path / "s.zarr", select="all", chrom_sizes=chrom_sizes, min_fragments=0
        )
    assert not (tmp_path / "s.zarr").exists()
