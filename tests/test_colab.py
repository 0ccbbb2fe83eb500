"""Badges, set-up cells and the repository's address: that they agree, and that stamping disturbs nothing else."""

import shutil
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest

from bhlib.colab import badge, cell_id, read_address, setup_code, stamp

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
OLD = """\
# %% [markdown]
# # A title
#
# What it is about.

# %%
print(1)
1 + 1

# %% [markdown]
# Prose.

# %% tags=["nbval-ignore-output"]
print(2)
"""


@pytest.fixture
def workspace(tmp_path):
    """A workspace of one executed notebook that has neither badge nor set-up."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "pyproject.toml").write_text('[project.urls]\nRepository = "https://github.com/ada/engine"\n')
    (tmp_path / "README.md").write_text("| | |\n|---|---|\n| [01_one](notebooks/01_one.ipynb) | the first |\n")
    shutil.copy(ROOT / "pyproject.toml", tmp_path / "notebooks" / "pyproject.toml")  # jupytext's settings
    (tmp_path / "notebooks" / "01_one.py").write_text(OLD)
    notebook = jupytext.reads(OLD, fmt="py:percent")
    for count, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), start=1):
        cell.execution_count = count
        cell.outputs = [nbformat.v4.new_output("stream", text=f"{count}\n")]
    result = nbformat.v4.new_output("execute_result", {"text/plain": "2"}, execution_count=1)
    notebook.cells[1].outputs.append(result)
    nbformat.write(notebook, tmp_path / "notebooks" / "01_one.ipynb")
    return tmp_path


def cells(folder):
    """The cells of the workspace's notebook and of its script."""
    notebook = nbformat.read(folder / "notebooks" / "01_one.ipynb", as_version=4)
    script = jupytext.read(folder / "notebooks" / "01_one.py", fmt="py:percent")
    return notebook.cells, script.cells


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_has_the_badge_and_the_setup_of_this_repository(path):
    address = read_address()
    first, second = nbformat.read(path, as_version=4).cells[:2]
    assert badge(address, f"notebooks/{path.name}") in first.source.splitlines()
    assert second.source == setup_code(address), "python -m bhlib colab"
    assert second.outputs == [], "outside Colab the set-up does nothing that one sees"


def test_readme_has_a_badge_for_each_notebook():
    readme, address = (ROOT / "README.md").read_text(encoding="utf-8"), read_address()
    missing = [path.name for path in NOTEBOOKS if badge(address, f"notebooks/{path.name}") not in readme]
    assert missing == [], "list it in the table of notebooks, then: python -m bhlib colab"
    assert readme.count("colab-badge.svg") == len(NOTEBOOKS)


def test_setup_is_short():
    assert len([line for line in setup_code("ada/engine").splitlines() if line]) <= 8


def test_setup_does_nothing_elsewhere(tmp_path):
    """Run in an empty folder it would have to clone, if it took this for Colab."""
    run = subprocess.run([sys.executable, "-c", setup_code("ada/engine")], cwd=tmp_path, capture_output=True)
    assert (run.returncode, run.stdout, run.stderr, list(tmp_path.iterdir())) == (0, b"", b"", [])


def test_setup_in_colab_clones_installs_and_enters(tmp_path):
    """The commands that it runs, in their order, and where it ends; `make colab` runs them for good."""
    log, tools = tmp_path / "log", tmp_path / "tools"
    tools.mkdir()
    for tool, script in {"git": "mkdir -p engine/bhlib engine/notebooks", "pip": "true"}.items():
        (tools / tool).write_text(f'#!/bin/sh\necho {tool} "$@" >> {log}\n{script}\n')
        (tools / tool).chmod(0o755)
    code = (
        "import sys, types; sys.modules['google.colab'] = types.ModuleType('google.colab')\n"
        + f"{setup_code('ada/engine')}\n" * 2  # the second time it is there already
        + "print(os.getcwd(), sys.path[-1])"
    )
    environment = {"PATH": f"{tools}:/usr/bin:/bin"}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.stdout.split() == [str(tmp_path / "engine" / "notebooks"), str(tmp_path / "engine")], run.stderr
    assert log.read_text().splitlines() == [
        "git clone --quiet --depth 1 https://github.com/ada/engine",
        "pip install --quiet --editable ./engine",
    ]


def test_stamping_adds_badge_and_setup_and_keeps_outputs(workspace):
    assert len(stamp(root=workspace)) == 3  # all but pyproject.toml
    executed, script = cells(workspace)
    assert [cell.source for cell in executed] == [cell.source for cell in script]
    assert [cell.cell_type for cell in executed] == ["markdown", "code", "markdown", "code", "markdown", "code"]
    assert executed[0].source.startswith(f"# A title\n\n{badge('ada/engine', 'notebooks/01_one.ipynb')}\n")
    assert executed[2].source == "What it is about."
    assert [cell.execution_count for cell in executed if cell.cell_type == "code"] == [1, 2, 3]
    assert [output.get("text") for output in executed[3].outputs] == ["1\n", None]
    assert executed[3].outputs[1].execution_count == 2
    assert executed[5].metadata.tags == script[5].metadata.tags == ["nbval-ignore-output"]
    assert badge("ada/engine", "notebooks/01_one.ipynb") in (workspace / "README.md").read_text()


def test_stamping_twice_changes_nothing(workspace):
    assert stamp(root=workspace) != []
    assert stamp(root=workspace) == []


def test_a_fork_and_back_leaves_every_byte_as_it_was(workspace):
    stamp(root=workspace)
    before = {path: path.read_bytes() for path in workspace.rglob("*") if path.is_file()}
    assert len(stamp("grace/compiler.fork", workspace)) == 4
    assert read_address(workspace) == "grace/compiler.fork"
    texts = [path.read_text() for path in before if path.parent == workspace or path.name.startswith("01_")]
    assert all("grace/compiler.fork" in text and "ada/engine" not in text for text in texts)
    stamp("ada/engine", workspace)
    assert {path: path.read_bytes() for path in before} == before


def test_ids_of_stamped_cells_are_those_of_a_notebook_made_anew(workspace):
    stamp(root=workspace)
    executed, _ = cells(workspace)
    assert [cell.id for cell in executed[:3]] == [cell_id(cell.cell_type, cell.source) for cell in executed[:3]]


@pytest.mark.parametrize("address", ["engine", "https://github.com/ada/engine", "ada/engine/", "ada/engine; rm -rf ."])
def test_a_bad_address_is_refused(workspace, address):
    with pytest.raises(ValueError, match="must be given as OWNER/REPO.*got '"):
        stamp(address, workspace)


def test_a_workspace_without_an_address_says_what_is_missing(workspace):
    (workspace / "pyproject.toml").write_text("[project]\n")
    with pytest.raises(ValueError, match="must name a repository on GitHub.*Repository = "):
        stamp(root=workspace)
