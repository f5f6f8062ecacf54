"""The report of labels: its tables, its JSON, and one HTML page that holds all of it and believes no name."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from drawn_labels import RULE, draw_part, manifest_of, write_labels

import annatac_scale as ats
from annatac_scale.annotate.labels import LabelsFolder
from annatac_scale.errors import InputError
from annatac_scale.model.labels import LOW_DEPTH, NOVEL

SIZES = {"z": 4100, "none": 0, "a": 300}
EVIL = ('<script>alert("x")</script>', "_hidden & $x^{", "a\nb", "T|B")


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "labels"
    write_labels(path, SIZES)
    return path


def squeezed(lines: list[str]) -> list[str]:
    return [" ".join(line.split()) for line in lines]


class Page(HTMLParser):
    """Tags, texts and the sources of pictures of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.sources: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_text_has_each_label_each_sample_the_sets_and_the_rule(labels: Path) -> None:
    report = ats.report(labels)
    summary, lines = report.summary, squeezed(report.text())
    assert lines[0] == f"{labels}: 4,400 cells of 3 samples"
    assert lines[1] == "model mmmmmmmmmmmm, 5 types; store atlas.zarr"
    n_novel, n_low = summary.n_of(NOVEL), summary.n_of(LOW_DEPTH)
    assert lines[2] == f"{NOVEL}: {n_novel} cells ({n_novel / 4400:.1%}); {RULE.novel_means}"
    assert lines[3] == f"{LOW_DEPTH}: {n_low} cells ({n_low / 4400:.1%}); fewer than 50 open islands"
    for one in summary.labels:
        values = [f"{one.confidence[name]:.3f}" for name in ("0.05", "0.5", "0.95")]
        row = [one.name, f"{one.n_cells:,}", f"{one.n_cells / 4400:.1%}", *values]
        assert " ".join(row) in lines
    first, none, last = (line for line in lines if line.split()[:1] and line.split()[0] in SIZES)
    assert first.startswith("z 4,100 ")
    assert none.startswith("none 0 - - -")
    shares = [f"{summary.samples[2].labels[one.name] / 300:.1%}" for one in summary.labels[:6]]
    assert f" {' '.join(shares)} " in f"{last} "
    for size, n in summary.sets.n_of_size.items():
        assert f"{size} {n:,} {n / 4400:.1%}" in lines
    assert not any("missing" in line for line in lines)


def test_a_partial_data_set_says_what_is_missing(tmp_path: Path) -> None:
    write_labels(tmp_path / "labels", SIZES)
    (tmp_path / "labels/z-00000.parquet").unlink()
    report = ats.report(tmp_path / "labels")
    lines = squeezed(report.text())
    assert lines[0].endswith(": 400 cells of 3 samples")
    assert lines[1].startswith(
        "not complete: 3 of 4 parts are there, 4,000 of 4,400 cells are missing; run the same `annatac predict`"
    )
    assert any(line.startswith("z 100 4,000 ") for line in lines)
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert (values["n_cells"], values["n_missing"], values["n_parts_there"]) == (400, 4000, 3)


def test_many_samples_are_cut_short_in_the_text_alone(tmp_path: Path) -> None:
    write_labels(tmp_path / "labels", {f"sample{i}": 3 for i in range(33)})
    report = ats.report(tmp_path / "labels", out=tmp_path / "r.html")
    assert report.text()[-1] == "3 more samples: --json or --out has them"
    assert sum(line.startswith("sample") for line in report.text()) == 1 + 30
    assert len(report.to_dict()["by_sample"]) == 33
    assert "sample32" in Page((tmp_path / "r.html").read_text()).texts


def test_the_page_needs_no_other_file_and_is_the_same_each_time(labels: Path, tmp_path: Path) -> None:
    report = ats.report(labels, out=tmp_path / "r.html")
    ats.report(labels, out=str(tmp_path / "again.html"))
    text = (tmp_path / "r.html").read_text()
    assert text == (tmp_path / "again.html").read_text()
    page = Page(text)
    assert page.tags.count("img") == len(page.sources) == 2
    for source in page.sources:
        kind, data = source.split(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")
    assert not re.search(r"https?://|@import|<link", text)
    for table in (report.label_table(), report.sample_table(), *report.set_tables()):
        for row in table.rows:
            assert set(filter(None, row)) <= set(page.texts)
    for fact in report.facts():
        assert fact in page.texts


def test_names_from_files_are_text_and_nothing_else(tmp_path: Path) -> None:
    folder = LabelsFolder(tmp_path, manifest_of({"s": 60}, hierarchy=False, classes=EVIL))
    folder.write(folder.manifest.parts[0], draw_part(folder.manifest, folder.manifest.parts[0]))
    folder.write_manifest(complete=True)
    report = ats.report(tmp_path, out=tmp_path / "r.html")
    page = Page((tmp_path / "r.html").read_text())
    assert "script" not in page.tags
    assert {EVIL[0], EVIL[1], "a b", EVIL[3]} <= set(page.texts)
    assert any(line.startswith("a b ") for line in report.text())


def test_without_a_cell_there_is_a_page_without_pictures(tmp_path: Path) -> None:
    write_labels(tmp_path / "labels", {"none": 0})
    report = ats.report(tmp_path / "labels", out=tmp_path / "r.html")
    assert report.text()[0].endswith(": 0 cells of 1 sample")
    assert "img" not in Page((tmp_path / "r.html").read_text()).tags
    json.dumps(report.to_dict(), allow_nan=False)


def test_the_page_lies_on_a_disk(labels: Path) -> None:
    with pytest.raises(InputError, match=r"--out s3://b/r\.html: found an URL"):
        ats.report(labels, out="s3://b/r.html")


def test_a_consensus_is_told_where_there_is_one(labels: Path, tmp_path: Path) -> None:
    from test_labels_summary import with_consensus

    with_consensus(tmp_path / "voted", labels)
    report = ats.report(tmp_path / "voted")
    found = report.summary.consensus
    said = f"consensus: {found.n_differ:,} of {found.n_cells:,} cells ({found.n_differ / found.n_cells:.1%}) have"
    assert any(line.startswith(said) for line in report.facts())
