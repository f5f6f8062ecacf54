"""What is wrong with a store, found by found, and the report of a verification."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from annatac_scale.errors import StoreError

MOST_KEPT = 10_000
"""Findings and notes that are kept, each; beyond, they are counted only, so that memory stays bounded."""

_SHOWN = 100

CONVERT_AGAIN = "restore the file from a copy, or remove the store and convert its samples again"
SAMPLE_AGAIN = "restore the file from a copy of the store, or convert the sample again into another store"


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be.

    place: the file, and where in it; advice: what to do
    """

    place: str
    found: str
    expected: str
    advice: str = SAMPLE_AGAIN

    def __str__(self) -> str:
        return f"{self.place}: found {self.found}; expected {self.expected}; {self.advice}"


class DamageError(StoreError):
    """A finding after which what it is about cannot be looked at any further."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(str(finding))
        self.finding = finding


@dataclass
class Found:
    """What was found so far, in the order in which it is added."""

    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    n_findings: int = 0
    n_notes: int = 0

    def add(self, findings: Iterable[Finding] = (), notes: Iterable[str] = ()) -> None:
        """Add some; those beyond ``MOST_KEPT`` are only counted."""
        for finding in findings:
            self.n_findings += 1
            if len(self.findings) < MOST_KEPT:
                self.findings.append(finding)
        for note in notes:
            self.n_notes += 1
            if len(self.notes) < MOST_KEPT:
                self.notes.append(note)


@dataclass(frozen=True)
class VerifyReport:
    """What a verification found.

    digest: of the store as its index says, None where the root or the index is damaged
    n_samples, n_cells: named by the index; n_shards, n_open: shards that were read whole, and open islands in them
    findings: what is wrong, in the order of the store; n_findings: of all, also those beyond the first 10,000
    notes: what is no damage, as the rest of a conversion that was stopped; n_notes: as above
    """

    path: str
    digest: str | None
    n_samples: int
    n_cells: int
    n_shards: int
    n_open: int
    findings: list[Finding]
    n_findings: int
    notes: list[str]
    n_notes: int

    @property
    def is_sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.n_findings

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON-able values."""
        return {"sound": self.is_sound, **asdict(self)}

    def text(self) -> str:
        """All of it for people, a line a finding."""
        cells = f"{self.n_samples:,} samples, {self.n_cells:,} cells"
        lines = [self.path, f"  read      {cells}, {self.n_shards:,} shards, {self.n_open:,} open islands"]
        lines += [f"  digest    {self.digest}"] if self.digest else []
        lines += [f"  note      {note}" for note in _first(self.notes, self.n_notes)]
        lines += [f"  wrong     {finding}" for finding in _first(self.findings, self.n_findings)]
        what = "everything is as it should be" if self.is_sound else f"{self.n_findings:,} findings"
        return "\n".join([*lines, f"  result    {what}"])


def _first(things: list[Any], n: int) -> list[str]:
    shown = [str(thing) for thing in things[:_SHOWN]]
    return shown if n <= _SHOWN else [*shown, f"and {n - _SHOWN:,} more; --json has 10,000 of them"]
