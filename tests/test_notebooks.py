"""The notebooks as files: paired, executed, clean. `--nbval` tests that they run and show the same."""

import re
from pathlib import Path

import jupytext
import nbformat
import pytest
from jupytext.config import load_jupytext_config

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path):
    """The code cells of a notebook, numbered as nbval numbers them."""
    cells = nbformat.read(path, as_version=4).cells
    return list(enumerate(cell for cell in cells if cell.cell_type == "code"))


def outputs_of_type(path, mime):
    """The numbers of the code cells that have an output of a MIME type."""
    return [n for n, cell in code_cells(path) if any(mime in output.get("data", {}) for output in cell.outputs)]


def test_every_notebook_has_a_script_and_every_script_a_notebook():
    scripts = {path.stem for path in FOLDER.glob("[0-9]*.py")}
    assert {path.stem for path in NOTEBOOKS} == scripts


@each_notebook
def test_script_holds_the_same_cells(path):
    config = load_jupytext_config(str(path))
    text = jupytext.writes(jupytext.read(path), fmt="py:percent", config=config)
    assert text == path.with_suffix(".py").read_text(encoding="utf-8"), (
        f"{path.name} differs from its .py: edit the .py, then `make notebooks ARGS=notebooks/{path.stem}.py`"
    )


@each_notebook
def test_every_code_cell_was_executed_in_order(path):
    counts = [cell.execution_count for _, cell in code_cells(path)]
    assert counts == list(range(1, len(counts) + 1)), "nbval compares nothing where a count is missing"


@each_notebook
def test_no_cell_failed_unless_it_is_meant_to(path):
    failed = [
        number
        for number, cell in code_cells(path)
        if any(output.output_type == "error" for output in cell.outputs)
        and "raises-exception" not in cell.metadata.get("tags", [])
    ]
    assert failed == []


@each_notebook
def test_no_widget_state_is_saved(path):
    notebook = nbformat.read(path, as_version=4)
    assert "widgets" not in notebook.metadata, "saved widget state breaks the page that GitHub shows"
    assert outputs_of_type(path, "application/vnd.jupyter.widget-view+json") == [], "it would show as an error"


@each_notebook
def test_opens_with_a_title_and_no_cell_is_empty(path):
    cells = nbformat.read(path, as_version=4).cells
    assert cells[0].cell_type == "markdown"
    assert re.search(r"^# \S", cells[0].source, flags=re.MULTILINE), "the first cell should hold the title"
    assert all(cell.source.strip() for cell in cells)


@each_notebook
def test_svg_is_not_an_output(path):
    """nbval compares an SVG letter by letter, and no two runs write the same one."""
    assert outputs_of_type(path, "image/svg+xml") == []
