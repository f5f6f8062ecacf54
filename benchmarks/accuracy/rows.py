"""Rows: what was run and what it gave, one JSON file each, named by the digest of its configuration."""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

LIBRARIES = ("annatac_scale", "torch", "numpy", "scikit-learn")

Config = Mapping[str, Any]


def digest(config: Config) -> str:
    """Hex digest of a configuration of plain values."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Rows:
    """The rows in a folder."""

    folder: Path

    def path(self, config: Config) -> Path:
        """The file of a configuration."""
        return self.folder / f"{digest(config)}.json"

    def has(self, config: Config) -> bool:
        return self.path(config).exists()

    def write(
        self, config: Config, figures: Mapping[str, Any], seconds: Mapping[str, float], failed: str = ""
    ) -> None:
        """Write a row whole or not at all; ``failed``: the reason where it gave no figures."""
        row: dict[str, Any] = {
            "config": config,
            "figures": figures,
            "seconds": seconds,
            "versions": versions(),
        }
        if failed:
            row["failed"] = failed
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(config)
        aside = path.with_suffix(".part")
        aside.write_text(json.dumps(row, indent=1) + "\n")
        os.replace(aside, path)

    def read(self, config: Config) -> dict[str, Any]:
        """The row of a configuration."""
        row: dict[str, Any] = json.loads(self.path(config).read_text())
        return row

    def all(self) -> list[dict[str, Any]]:
        """Every row that is there."""
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("*.json"))]

    def failed(self, config: Config) -> bool:
        """Whether there is a row, of a run that failed."""
        return self.has(config) and "failed" in self.read(config)


def versions() -> dict[str, str]:
    """Commit, Python, libraries and machine."""
    root = Path(__file__).parent
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False
    )
    return {
        "commit": found.stdout.strip(),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        **{name: version(name) for name in LIBRARIES},
    }
