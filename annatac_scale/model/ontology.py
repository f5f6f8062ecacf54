"""Reading a hierarchy of cell types: a table of child and parent, or an ontology as the Cell Ontology."""

import re
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from annatac_scale.errors import ConfigError, InputError
from annatac_scale.genome.rows import complaint, shown
from annatac_scale.model.hierarchy import Hierarchy
from annatac_scale.model.labels import label_text
from annatac_scale.model.pairs import near_misses, read_pairs
from annatac_scale.store.place import Location, on_disk

OPTION = "--hierarchy"
HEADER = ("child", "parent")
_ONTOLOGY = (".obo", ".owl", ".obo.gz", ".owl.gz")
_ID = re.compile(r"([A-Za-z]+)[:_](\d+)")
"""An id, as CL:0000084; in addresses and file names it is written CL_0000084."""


def read_hierarchy(location: Location, labels: Sequence[str]) -> Hierarchy:
    """The hierarchy of some labels from a file on a disk, told by its ending.

    .obo, .owl (or with .gz): an ontology, read with pronto. Labels are ids (CL:0000084), names or exact synonyms of
    terms; what lies above a term is what it "is a". The nodes above are called by their ids where all labels are ids,
    else by their names.
    Anything else: a table of child and parent, separated by tabs or commas. A child may come on several lines, each
    with another parent; an empty parent says that it has none.

    Raises InputError for a file that cannot be read, for labels that it does not have, or has several of, and for a
    circle; ConfigError where pronto is not installed.
    """
    path = on_disk(location, OPTION)
    if path.name.lower().endswith(_ONTOLOGY):
        return _of_ontology(path, labels)
    parents: dict[str, list[str]] = {}
    for number, child, parent in read_pairs(path, OPTION, HEADER):
        if not child:
            raise complaint(
                path, number, "no child", "one in each line; the parent may be empty", "mend the line"
            )
        parents.setdefault(child, []).extend([parent] if parent else [])
    return Hierarchy.of(labels, parents, f"{OPTION} {path}")


def _of_ontology(path: Path, labels: Sequence[str]) -> Hierarchy:
    terms = _Terms.read(path)
    term_of = _resolved(path, labels, terms)
    parents: dict[str, tuple[str, ...]] = {}
    todo = list(term_of.values())
    while todo:
        term = todo.pop()
        if term not in parents:
            parents[term] = terms.parents[term]
            todo += terms.parents[term]
    by_id = all(map(_ID.fullmatch, labels))
    called = {term: label for label, term in term_of.items()}
    taken = set(called.values())
    for term in sorted(parents.keys() - called.keys()):
        name = term if by_id else terms.names[term]
        called[term] = term if name in taken else name
        taken.add(called[term])
    graph = {called[term]: [called[parent] for parent in above] for term, above in parents.items()}
    return Hierarchy.of(labels, graph, f"{OPTION} {path}")


def _resolved(path: Path, labels: Sequence[str], terms: "_Terms") -> dict[str, str]:
    """The id of each label's term. Raises InputError for labels without a term of their own."""
    found = {label: sorted(terms.ids_of(label)) for label in labels}
    unknown = [label for label, ids in found.items() if not ids]
    if unknown:
        known = [*terms.names.values(), *terms.parents]
        raise InputError(
            f"{OPTION} {path}: found no term for {near_misses(unknown, known)}; expected labels that are ids, names "
            "or exact synonyms of terms in use; rename them with --label-map, or add them to a table of child and "
            "parent"
        )
    several = {label: ids for label, ids in found.items() if len(ids) > 1}
    if several:
        told = "; ".join(f"{shown(label)} may be {', '.join(ids)}" for label, ids in several.items())
        raise InputError(
            f"{OPTION} {path}: found labels of several terms: {told}; expected one each; rename them to an id with "
            "--label-map"
        )
    labels_of = defaultdict(list)
    for label, ids in found.items():
        labels_of[ids[0]].append(label)
    same = [
        f"{' and '.join(map(shown, those))} are {term}" for term, those in labels_of.items() if len(those) > 1
    ]
    if same:
        raise InputError(
            f"{OPTION} {path}: found labels of one and the same term: {'; '.join(same)}; expected one each; merge "
            "them with --label-map"
        )
    return {label: ids[0] for label, ids in found.items()}


@dataclass(frozen=True)
class _Terms:
    """Terms of an ontology that are in use.

    names, parents: of each id
    spellings: ids by how they are written: ids and former ids, names, exact synonyms; the last two in lower case
    """

    names: Mapping[str, str]
    parents: Mapping[str, tuple[str, ...]]
    spellings: tuple[Mapping[str, set[str]], ...]

    @classmethod
    def read(cls, path: Path) -> "_Terms":
        names: dict[str, str] = {}
        parents: dict[str, tuple[str, ...]] = {}
        ids: defaultdict[str, set[str]] = defaultdict(set)
        own: defaultdict[str, set[str]] = defaultdict(set)
        synonyms: defaultdict[str, set[str]] = defaultdict(set)
        for term in _ontology(path).terms():
            if term.obsolete:
                continue
            names[term.id] = label_text(term.name or term.id)
            parents[term.id] = tuple(sorted(p.id for p in term.superclasses(1, with_self=False)))
            for former in (term.id, *term.alternate_ids):
                ids[former].add(term.id)
            own[names[term.id]].add(term.id)
            for synonym in term.synonyms:
                if synonym.scope == "EXACT":
                    synonyms[label_text(synonym.description)].add(term.id)
        return cls(names, parents, (ids, own, synonyms, _lower(own), _lower(synonyms)))

    def ids_of(self, label: str) -> set[str]:
        """Ids of the terms that a label may mean: of the first kind of spelling that fits any."""
        ids, own, synonyms, lower_own, lower_synonyms = self.spellings
        is_id = _ID.fullmatch(label)
        looked = [
            (ids, f"{is_id[1]}:{is_id[2]}" if is_id else label),
            (own, label),
            (synonyms, label),
            (lower_own, label.casefold()),
            (lower_synonyms, label.casefold()),
        ]
        return next((spelled[text] for spelled, text in looked if text in spelled), set())


def _lower(spelled: Mapping[str, set[str]]) -> Mapping[str, set[str]]:
    lower: defaultdict[str, set[str]] = defaultdict(set)
    for text, found in spelled.items():
        lower[text.casefold()] |= found
    return lower


def _ontology(path: Path) -> Any:
    try:
        import pronto
    except ImportError as error:
        raise ConfigError(
            f"{OPTION} {path}: an ontology is read with pronto, which is not installed; "
            "pip install 'annatac_scale[ontology]', or give a table of child and parent"
        ) from error
    try:
        path.open("rb").close()  # pronto would fetch what is not there, as it would fetch imports
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of parts that it leaves out, which nobody asks for here
            return pronto.Ontology(str(path.absolute()), import_depth=0, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{OPTION} {path}: cannot be read ({error.strerror or error}); check the path"
        ) from error
    except (ValueError, LookupError, SyntaxError, TypeError, AttributeError) as error:
        raise InputError(
            f"{OPTION} {path}: cannot be read as an ontology ({error!r}); expected OBO or OWL in which all terms are "
            "that others refer to; give cl-basic.obo, another form of it, or a table of child and parent"
        ) from error
