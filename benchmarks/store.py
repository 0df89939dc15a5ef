"""The results of one device: a file that a later run completes."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import fastkd

from .cases import Case
from .environment import environment, slug
from .figures import Record
from .measure import Settings
from .providers import unavailable

RESULTS = Path(__file__).parent / "results"
# What must be equal for results to stand side by side.
SAME = ("processor", "gpu", "versions", "commit", "settings")


class Store:
    """Results in memory, and after every case in DIR/<device>/<device type>.json."""

    def __init__(self, device: str, settings: Settings, folder: Path | None, command: str) -> None:
        if reasons := fastkd.backends()["cpu"]:
            raise RuntimeError(f"nothing to measure: {'; '.join(reasons)}")
        self.settings = settings
        self.results: dict[str, Any] = environment(command, device) | {
            "settings": asdict(settings),
            "unavailable": unavailable(device),
            "cases": [],
        }
        name = (self.results["gpu"] or self.results["processor"])["name"]
        self.path = folder / slug(name) / f"{device}.json" if folder else None
        if self.path and self.path.exists():
            before = json.loads(self.path.read_text())
            if all(_identity(before.get(key)) == _identity(self.results[key]) for key in SAME):
                self.results = before
            else:
                print(f"{self.path} is of another commit, machine or version: begun anew")

    def __contains__(self, case: Case) -> bool:
        return any(asdict(case).items() <= record.items() for record in self.results["cases"])

    def add(self, record: Record) -> None:
        self.results["cases"].append(record)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_suffix(
                ".part"
            )  # so that a run that is killed leaves a whole file
            part.write_text(json.dumps(self.results, indent=1) + "\n")
            part.replace(self.path)


def _identity(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: item for key, item in value.items() if key != "load_before"}
    return value
