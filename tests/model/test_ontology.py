"""Hierarchies from tables and from ontologies, the latter a small piece of the Cell Ontology written here."""

import gzip
import sys
from pathlib import Path

import pytest

from annatac_scale.errors import ConfigError, InputError
from annatac_scale.model.hierarchy import Hierarchy
from annatac_scale.model.ontology import read_hierarchy

TABLE = {
    "tabs.tsv": "child\tparent\nCD4 T\tT cell\nCD8 T\tT cell\nCD8 T\tkiller\nT cell\t\nkiller\t\nx\tT cell\n",
    "commas.csv": "CD4 T,T cell\nCD8 T,T cell\nCD8 T,killer\nCD8 T,killer\n",
}

OBO = """\
format-version: 1.2
ontology: cl
import: http://127.0.0.1:9/never.obo

[Term]
id: CL:0000000
name: cell

[Term]
id: CL:0000738
name: leukocyte
synonym: "white blood cell" EXACT []
synonym: "weißes Blutkörperchen" EXACT []
is_a: CL:0000000 ! cell

[Term]
id: CL:0000542
name: lymphocyte
is_a: CL:0000738 ! leukocyte

[Term]
id: CL:0000084
name: T cell
alt_id: CL:0000804
synonym: "T-lymphocyte" EXACT []
synonym: "killer" BROAD []
is_a: CL:0000542 ! lymphocyte

[Term]
id: CL:0000624
name: CD4-positive, alpha-beta T cell
is_a: CL:0000084 ! T cell

[Term]
id: CL:0000910
name: cytotoxic T cell
synonym: "CTL" EXACT []
is_a: CL:0000084 ! T cell
is_a: CL:0009999 ! cytotoxic cell

[Term]
id: CL:0009999
name: cytotoxic cell
is_a: CL:0000000 ! cell

[Term]
id: CL:0000623
name: natural killer cell
synonym: "NK cell" EXACT []
synonym: "CTL" EXACT []
is_a: CL:0000542 ! lymphocyte
relationship: part_of CL:0009999

[Term]
id: CL:0000001
name: old T cell
is_obsolete: true
replaced_by: CL:0000084

[Typedef]
id: part_of
name: part of
"""


@pytest.fixture
def obo(tmp_path: Path) -> Path:
    pytest.importorskip("pronto")
    (tmp_path / "cl.obo").write_text(OBO)
    return tmp_path / "cl.obo"


def edges(hierarchy: Hierarchy) -> dict[str, set[str]]:
    return {name: set(above) for name, above in zip(hierarchy.nodes, hierarchy.parents, strict=True)}


@pytest.mark.parametrize("name", TABLE)
def test_a_table_of_child_and_parent_is_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(TABLE[name])
    found = read_hierarchy(tmp_path / name, ("CD4 T", "CD8 T"))
    assert found.labels == ("CD4 T", "CD8 T")
    assert edges(found) == {
        "CD4 T": {"T cell"},
        "CD8 T": {"T cell", "killer"},
        "T cell": set(),
        "killer": set(),
    }


def test_a_label_above_which_nothing_lies_has_a_line_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("T\tlymphocyte\nB\tlymphocyte\nneuron\t\n")
    assert edges(read_hierarchy(tmp_path / "a.tsv", ("T", "neuron")))["neuron"] == set()
    with pytest.raises(
        InputError, match=r"--hierarchy .*a.tsv: found no line for 'glia'; .*with an empty parent"
    ):
        read_hierarchy(tmp_path / "a.tsv", ("T", "glia"))


def test_lines_without_a_child_and_circles_of_a_table_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("child\tparent\nT\tL\n\tL\n")
    with pytest.raises(InputError, match=r"a.tsv, line 3: found no child"):
        read_hierarchy(tmp_path / "a.tsv", ("T",))
    (tmp_path / "b.tsv").write_text("T\tL\nL\tT\n")
    with pytest.raises(InputError, match=r"b\.tsv: found a circle"):
        read_hierarchy(tmp_path / "b.tsv", ("T",))


def test_labels_that_are_ids_lie_below_ids(obo: Path) -> None:
    found = read_hierarchy(obo, ("CL:0000910", "CL_0000623"))
    assert edges(found) == {
        "CL:0000910": {"CL:0000084", "CL:0009999"},
        "CL_0000623": {"CL:0000542"},
        "CL:0000084": {"CL:0000542"},
        "CL:0009999": {"CL:0000000"},
        "CL:0000542": {"CL:0000738"},
        "CL:0000738": {"CL:0000000"},
        "CL:0000000": set(),
    }


def test_labels_that_are_names_and_synonyms_lie_below_names_and_keep_their_own(obo: Path) -> None:
    labels = ("CD4-positive, alpha-beta T cell", "T-lymphocyte", "nk CELL", "CL:0000910")
    found = read_hierarchy(obo, labels)
    assert found.labels == labels
    assert edges(found) == {
        "CD4-positive, alpha-beta T cell": {"T-lymphocyte"},
        "T-lymphocyte": {"lymphocyte"},
        "nk CELL": {"lymphocyte"},
        "CL:0000910": {"T-lymphocyte", "cytotoxic cell"},
        "cytotoxic cell": {"cell"},
        "lymphocyte": {"leukocyte"},
        "leukocyte": {"cell"},
        "cell": set(),
    }


def test_synonyms_in_other_scripts_are_read(obo: Path) -> None:
    assert edges(read_hierarchy(obo, ("weißes Blutkörperchen",))) == {
        "weißes Blutkörperchen": {"cell"},
        "cell": set(),
    }


def test_a_former_id_is_its_terms(obo: Path) -> None:
    assert edges(read_hierarchy(obo, ("CL:0000804", "CL:0000623")))["CL:0000804"] == {"CL:0000542"}


def test_a_zipped_ontology_is_read(obo: Path) -> None:
    zipped = obo.with_suffix(".obo.gz")
    zipped.write_bytes(gzip.compress(OBO.encode()))
    labels = ("NK cell", "T cell")
    assert read_hierarchy(zipped, labels) == read_hierarchy(obo, labels)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            ("T cell", "natural kiler cell"),
            r"found no term for 'natural kiler cell' \(did you mean 'natural killer",
        ),
        (("T cell", "old T cell"), r"found no term for 'old T cell'"),
        (("T cell", "killer"), r"found no term for 'killer'"),
        (("T cell", "CL:7777777"), r"found no term for 'CL:7777777'"),
        (
            ("T cell", "CTL"),
            r"labels of several terms: 'CTL' may be CL:0000623, CL:0000910; expected one each",
        ),
        (("T cell", "CL:0000084"), r"one and the same term: 'T cell' and 'CL:0000084' are CL:0000084"),
    ],
    ids=["misspelt", "obsolete", "broad", "id", "ambiguous", "same"],
)
def test_labels_without_a_term_of_their_own_are_refused(
    obo: Path, labels: tuple[str, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read_hierarchy(obo, labels)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.obo", "not what it should be\n"),
        ("a.owl", "not what it should be\n"),
        ("a.obo", OBO.replace("is_a: CL:0000738 ! leukocyte", "is_a: CL:5555555")),
        ("a.obo", OBO[: len(OBO) // 2] + "id: ::"),
        ("a.obo", ""),
    ],
    ids=["obo", "owl", "dangling", "cut", "empty"],
)
def test_what_is_no_ontology_is_refused(tmp_path: Path, name: str, text: str) -> None:
    pytest.importorskip("pronto")
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=rf"--hierarchy .*{name}"):
        read_hierarchy(tmp_path / name, ("T cell", "NK cell"))


def test_an_ontology_that_is_not_there_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pronto")
    with pytest.raises(InputError, match=r"cl.obo: cannot be read \(No such file"):
        read_hierarchy(tmp_path / "cl.obo", ("T cell",))


def test_without_pronto_an_ontology_says_what_to_install_and_a_table_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pronto", None)
    (tmp_path / "cl.obo").write_text(OBO)
    (tmp_path / "a.tsv").write_text(TABLE["tabs.tsv"])
    with pytest.raises(ConfigError, match=r"pip install 'annatac_scale\[ontology\]', or give a table"):
        read_hierarchy(tmp_path / "cl.obo", ("T cell",))
    assert read_hierarchy(tmp_path / "a.tsv", ("CD4 T",)).nodes == ("CD4 T", "T cell")
