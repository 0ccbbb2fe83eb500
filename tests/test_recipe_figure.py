"""The recipe "A figure" of CONTRIBUTING.md: one new file in the folder of figures, and every command knows it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import bhlib
from bhlib.figures import figure

PACKAGE = Path(bhlib.__file__).resolve().parent

MODULE = '''
"""A throw-away figure: sizes of a study's model."""

import pandas as pd

from bhlib.figures.drawing import Picture
from bhlib.figures.registry import figure

__all__ = ["compute_sizes", "draw_sizes"]


def compute_sizes(study):
    return pd.DataFrame({"k": range(1, study.top_k + 1)}).assign(share=lambda table: table["k"] / study.top_k)


@figure("sizes", compute_sizes)
def draw_sizes(table):
    fig = Picture(figsize=(3, 2))
    fig.subplots().plot(table["k"], table["share"])
    return fig
'''

CALLS = """
from bhlib import figures
from bhlib.__main__ import main

assert figures.compute_sizes and figures.FIGURES["sizes"].draw is figures.draw_sizes
try:
    main(["figures", "--only", "nothing"])
except ValueError as error:
    print(error)
main(["figures", "--folder", "out", "--only", "sizes"])
main(["figures", "--folder", "out", "--only", "sizes", "--redraw"])
main(["figures", "--folder", "out", "--only", "sizes", "--check"])
"""


def test_a_new_file_is_a_new_figure(tmp_path):
    """In a copy of the package, most of it links, so that the file is found as it would be found in the real one."""
    copy = tmp_path / "bhlib"
    (copy / "figures").mkdir(parents=True)
    for folder in (Path(), Path("figures")):
        for path in (PACKAGE / folder).iterdir():
            if path.name not in ("figures", "__pycache__"):
                (copy / folder / path.name).symlink_to(path)
    (copy / "figures" / "sizes.py").write_text(MODULE, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", CALLS]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "there are: " in done.stdout and ", sizes" in done.stdout  # the list of figures
    assert "out: every number is as it was" in done.stdout
    assert (tmp_path / "out" / "sizes.csv").read_text(encoding="utf-8").startswith("k,share\n1,0.125\n")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["sizes.csv", "sizes.pdf", "sizes.png"]


def test_a_name_that_is_taken_is_refused():
    def draw(table):
        raise AssertionError

    with pytest.raises(ValueError, match=r"a figure is called 'speed' already, in bhlib\.figures\.speed"):
        figure("speed", None)(draw)
