"""The folder of a study: whose tables are in it, which figures are finished, and what each took."""

import hashlib
import json
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from bhlib.cells import hash_source
from bhlib.figures.about import About
from bhlib.figures.tables import write_whole

__all__ = ["StudyFolder"]

#: Of the package as it was imported, computing and drawing.
_CODE = hash_source(Path(__file__).parents[1], drawing=True)


class StudyFolder:
    """Tables and pictures of one study, and ``study.json``, which says whose they are.

    Parameters
    ----------
    path : path
        It need not exist.

    Attributes
    ----------
    facts : dict
        What ``study.json`` says, empty if there is none: ``identity`` (`Study.identity`), ``about`` (`About`),
        ``source`` (options of the command that made it), ``environment`` (versions and devices), ``figures`` (by name:
        minutes and memory of those that are finished, or why there is none) and ``predecessor``, if there is one.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        file = self.path / "study.json"
        self.facts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    @property
    def is_there(self) -> bool:
        """Whether the folder is that of a study; that of the embedded model's figures is not."""
        return bool(self.facts)

    @cached_property
    def about(self) -> About:
        """The model and the text."""
        return About(**self.facts["about"])

    def claim(self, identity: dict, about: About, source: dict, environment: dict) -> None:
        """Make it the folder of a study, or go on with it.

        Raises
        ------
        ValueError
            If it is that of another one, or holds tables that no study has made. The message names both, and the mend.
        """
        if self.is_there:
            self.check_same(identity, about)
        elif tables := sorted(path.name for path in self.path.glob("*.csv")):
            raise ValueError(
                f"{str(self.path)!r} holds tables that no study has made ({', '.join(tables[:3])}"
                f"{', ...' if len(tables) > 3 else ''}), such as figures of the embedded model: name another folder."
            )
        self.path.mkdir(parents=True, exist_ok=True)
        self.facts = {"identity": identity, "about": asdict(about), "source": source, "environment": environment} | {
            key: self.facts[key] for key in ("figures", "predecessor") if key in self.facts
        }
        self._write()

    def check_same(self, identity: dict, about: About) -> None:
        """Raise a ValueError if the folder is of another study."""
        mine = self.facts["identity"]
        if mine == identity:
            return
        differs = [name for name in identity if mine.get(name) != identity[name]]
        raise ValueError(
            f"{str(self.path)!r} is the folder of another study, with another {' and '.join(differs)}: it holds "
            f"{_sized(self.about, mine)}, and this one would be {_sized(about, identity)}. Name another folder, or "
            f"delete this one."
        )

    def is_finished(self, name: str) -> bool:
        """Whether this code has left a figure out for good, or drawn it, its table being as it was written."""
        entry, path = self.facts.get("figures", {}).get(name, {}), self.path / f"{name}.csv"
        there = path.exists() and path.with_suffix(".png").exists() and entry.get("table") == _hash(path)
        return entry.get("code") == _CODE and (there or "refused" in entry)

    def finish(self, name: str, cost: dict[str, float]) -> None:
        """Say that the table of a figure is there, and what it took."""
        self._enter(name, {"code": _CODE, "table": _hash(self.path / f"{name}.csv")} | cost)

    def leave_out(self, name: str, why: str, reason: str) -> None:
        """Say that there is no table of a figure, ``"refused"`` or ``"failed"``, and the reason."""
        self._enter(name, {"code": _CODE, why: reason})

    def tell(self, key: str, value: object) -> None:
        """Enter another fact."""
        self.facts[key] = value
        self._write()

    def _enter(self, name: str, entry: dict) -> None:
        self.tell("figures", self.facts.get("figures", {}) | {name: entry})

    def _write(self) -> None:
        write_whole(self.path / "study.json", json.dumps(self.facts, indent=1) + "\n")


def _sized(about: About, identity: dict) -> str:
    return f"{about.line()}, {identity['sequences']} sequences of {identity['length']} tokens per domain"


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
