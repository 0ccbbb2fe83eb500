"""What the task files call to get their items: from beside them, wherever the harness is started.

The harness loads this file by its path, so it imports nothing of bhlib.
"""

import json
from pathlib import Path

from datasets import Dataset


def cloze(**_) -> dict[str, Dataset]:
    """The items of bh_cloze, as their only split; arguments are the task's metadata, which nothing depends on."""
    return _read("bh_cloze")


def continuation(**_) -> dict[str, Dataset]:
    """The items of bh_continuation."""
    return _read("bh_continuation")


def _read(name: str) -> dict[str, Dataset]:
    with open(Path(__file__).with_name(f"{name}.jsonl"), encoding="utf-8") as lines:
        return {"test": Dataset.from_list([json.loads(line) for line in lines])}
