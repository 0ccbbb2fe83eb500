"""Every code block of the README works as it stands there, and so do the contributor's commands and map.

Python blocks run in one fresh interpreter, top to bottom, so that a later block may use what an earlier
one made. A shell block is read line by line: a make target has to exist, and so has a command of
`python -m bhlib`; pytest has to collect what it is asked to run. What the README says about quality is held against
the table that it shows.
"""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
if not README.exists():
    pytest.skip("there is no README.md yet", allow_module_level=True)

TEXT = README.read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
BLOCKS = FENCE.findall(TEXT)
SHELL_LINES = [
    line.partition("#")[0].strip()
    for language, body in BLOCKS + FENCE.findall(CONTRIBUTING)
    if language in ("bash", "sh", "shell", "console")
    for line in body.splitlines()
    if line.partition("#")[0].strip()
]
# Fetching the repository and installing it is what CI does before it comes here.
FETCHING = ("git clone ", "cd ", "pip install ", "python -m pip install ")


def finish(command, cwd=ROOT):
    """Run a command to its end, and return the finished process."""
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_every_block_names_its_language():
    known = {"python", "bash", "sh", "shell", "console", "text", "bibtex"}
    assert {language for language, _ in BLOCKS} <= known


def test_python_blocks_run_in_order(tmp_path):
    code = "\n".join(body for language, body in BLOCKS if language == "python")
    assert code, "the README shows how the package is called"
    run = finish([sys.executable, "-c", code], cwd=tmp_path)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("line", SHELL_LINES)
def test_shell_line_is_a_command_that_exists(line):
    if line.startswith("make "):
        if shutil.which("make") is None:
            pytest.skip("make is not installed here")
        plan = finish([*line.split(), "--dry-run"])
        assert plan.returncode == 0, plan.stderr
    elif line.removeprefix(".venv/bin/").startswith("python -m bhlib"):
        command = [sys.executable, *shlex.split(line)[1:], "--help"]
        shown = finish(command)
        assert shown.returncode == 0, shown.stderr
    elif line.startswith("pytest"):
        collected = finish([sys.executable, "-m", *shlex.split(line), "--collect-only", "-q"])
        assert collected.returncode == 0, collected.stdout
    else:
        assert line.startswith(FETCHING), f"no test knows how to run {line!r}"


def test_files_that_the_readme_links_to_exist():
    targets = re.findall(r"\]\(([^)#\s]+)", TEXT) + re.findall(r'(?:src|href)="([^"#]+)"', TEXT)
    local = [target for target in targets if "://" not in target and not target.startswith("mailto:")]
    assert [target for target in local if not (ROOT / target).exists()] == []


def test_the_map_has_a_place_for_every_module():
    mapped = re.findall(r"`bhlib/(\w+)(?:\.py|/)`", CONTRIBUTING.partition("## Recipes")[0])
    there = [path.stem for path in (ROOT / "bhlib").iterdir() if path.suffix == ".py" or any(path.glob("*.py"))]
    assert sorted(mapped) == sorted({*there} - {"__init__", "__main__"})


def test_what_is_said_of_the_main_figure_is_what_its_table_says():
    """Of BH, the threshold and the weights per layer; in thousandths of a nat."""
    table = 1000 * pd.read_csv(ROOT / "figures/whole_test_split.csv", index_col=["family", "wanted_k"])
    assert (table.loc["BH", "high"] < 0).all(), "BH loses less than static top-k from three to seven"
    for rival in ("top-p", "min-p", "entropy"):
        assert (table.loc["BH", "difference"] < table.loc[rival, "difference"]).all()
    behind = table.loc["BH", "threshold_difference"]
    assert behind.loc[3:6].between(0.7, 1.5).all() and 0 < behind[7] < 0.7, "the threshold is about a thousandth better"
    fitted = table.loc["BH, fitted null"]
    assert (fitted.loc[[3, 4], "threshold_high"] < 0).all() and (fitted.loc[[6, 7], "threshold_difference"] < 0.4).all()
    weighted = {"BH, layer weights": "BH", "threshold, layer weights": "threshold"}
    best = table["difference"].groupby("wanted_k").idxmin()
    assert all(best[k][0] in weighted for k in (3, 4, 5, 6)), "weights per layer gain most from three to six"
    loss = table["difference"].xs(7, level="wanted_k")
    assert all(loss[plain] - loss[name] < 0.2 for name, plain in weighted.items()), "and nothing at seven"
