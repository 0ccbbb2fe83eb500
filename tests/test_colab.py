"""Badges, set-up cells and links between notebooks: that they agree, and that stamping disturbs nothing else."""

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest

from bhlib.colab import NOTE, badge, cell_id, colab_page, read_address, setup_code, stamp

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
    assert badge(address, f"notebooks/{path.name}") in first.source.splitlines() and NOTE in first.source.splitlines()
    assert second.source == setup_code(address), "python -m bhlib colab"
    assert second.outputs == [], "outside Colab the set-up does nothing that one sees"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_leads_to_those_beside_it_here_and_in_colab(path):
    place, address = NOTEBOOKS.index(path), read_address()
    cells = nbformat.read(path, as_version=4).cells
    line = cells[-1].source
    assert line == cells[0].source.splitlines()[-1], "the same at both ends: python -m bhlib colab"
    beside = NOTEBOOKS[max(place - 1, 0) : place] + NOTEBOOKS[place + 1 : place + 2]
    targets = [(other.name, colab_page(address, f"notebooks/{other.name}")) for other in beside]
    assert re.findall(r"\]\(([^)]+)\)", line) == [target for pair in targets for target in pair]
    titles = [nbformat.read(other, as_version=4).cells[0].source.splitlines()[0].removeprefix("# ") for other in beside]
    assert all(f"[{title}]" in line for title in titles)


def test_readme_has_a_badge_for_each_notebook():
    readme, address = (ROOT / "README.md").read_text(encoding="utf-8"), read_address()
    missing = [path.name for path in NOTEBOOKS if badge(address, f"notebooks/{path.name}") not in readme]
    assert missing == [], "list it in the table of notebooks, then: python -m bhlib colab"
    assert readme.count("colab-badge.svg") == len(NOTEBOOKS)


def test_setup_is_short():
    assert len([line for line in setup_code("ada/engine").splitlines() if line]) <= 12


def test_setup_does_nothing_elsewhere(tmp_path):
    """Run in an empty folder it would have to clone, if it took this for Colab."""
    run = subprocess.run([sys.executable, "-c", setup_code("ada/engine")], cwd=tmp_path, capture_output=True)
    assert (run.returncode, run.stdout, run.stderr, list(tmp_path.iterdir())) == (0, b"", b"", [])


def run_in_colab(folder, address, times=1, **tools):
    """Run the set-up cell where `google.colab` is imported, with shell scripts for tools; the process and their log."""
    log, path = folder / "log", folder / "tools"
    path.mkdir()
    for tool, script in tools.items():
        (path / tool).write_text(f'#!/bin/sh\necho {tool} "$@" >> {log}\n{script}\n')
        (path / tool).chmod(0o755)
    code = (
        "import sys, types; sys.modules['google.colab'] = types.ModuleType('google.colab')\n"
        + f"{setup_code(address)}\n" * times
        + "print(os.getcwd(), sys.path[-1])"
    )
    environment = {"PATH": f"{path}:/usr/bin:/bin"}
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    return run, log.read_text().splitlines() if log.exists() else []


def test_setup_in_colab_clones_installs_and_enters(tmp_path):
    """The commands that it runs, in their order, and where it ends; `make colab` runs them for real."""
    clone = "mkdir -p engine/bhlib engine/notebooks"
    run, log = run_in_colab(tmp_path, "ada/engine", times=2, git=clone, pip="true")  # the second time it is there
    assert run.stdout.split() == [str(tmp_path / "engine" / "notebooks"), str(tmp_path / "engine")], run.stderr
    assert log == [
        "git clone --quiet --depth 1 https://github.com/ada/engine",
        "pip install --quiet --editable ./engine",
    ]


def test_a_failed_clone_says_what_git_said(tmp_path):
    run, log = run_in_colab(tmp_path, "ada/engine", git="echo fatal: repository not found >&2; exit 128", pip="true")
    assert run.returncode == 1 and len(log) == 1
    assert "github.com/ada/engine: fatal: repository not found" in run.stderr.splitlines()[-1]


def test_without_a_repository_setup_says_what_to_do_and_fetches_nothing(tmp_path):
    """Whoever is called OWNER on GitHub must not be asked for code."""
    run, log = run_in_colab(tmp_path, "OWNER/engine", git="mkdir engine", pip="true")
    assert (run.returncode, log) == (1, [])
    assert "run `python -m bhlib colab ACCOUNT/REPOSITORY`, commit, push" in run.stderr.splitlines()[-1]


def test_without_a_repository_a_folder_that_was_put_there_is_enough(tmp_path):
    (tmp_path / "engine" / "notebooks").mkdir(parents=True)
    run, log = run_in_colab(tmp_path, "OWNER/engine", git="exit 128", pip="true")
    assert run.stdout.split()[0] == str(tmp_path / "engine" / "notebooks"), run.stderr
    assert log == ["pip install --quiet --editable ./engine"]


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


def test_links_follow_a_notebook_that_is_added_or_taken_away(workspace):
    """They are made anew, not added to, and a notebook alone has none."""
    stamp(root=workspace)
    notebooks = workspace / "notebooks"
    before = {path: path.read_bytes() for path in notebooks.glob("01_one.*")}
    for suffix in (".py", ".ipynb"):
        text = (notebooks / f"01_one{suffix}").read_text().replace("# A title", "# Another").replace("01_one", "02_two")
        (notebooks / f"02_two{suffix}").write_text(text)
    assert {path.stem for path in stamp(root=workspace)} == {"01_one", "02_two"}
    assert stamp(root=workspace) == []
    page = "https://colab.research.google.com/github/ada/engine/blob/main/notebooks/02_two.ipynb"
    for part in cells(workspace):
        sources = [cell.source for cell in part]
        assert sources[-1] == f"Next: [Another](02_two.ipynb) ([in Colab]({page}))"
        assert sum(source.count("Next: ") for source in sources) == 2, "above and below"
    for path in notebooks.glob("02_two.*"):
        path.unlink()
    stamp(root=workspace)
    assert {path: path.read_bytes() for path in before} == before


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


# -- tools/colab.py, which `make colab` runs ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tool():
    """The names that the tool defines."""
    return runpy.run_path(str(ROOT / "tools" / "colab.py"))


def test_a_warning_in_a_cell_is_seen(tool, tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient, as `make notebooks` does")
    sources = "print('fine')", "import warnings; warnings.warn('in a later release', FutureWarning)", "'a value'"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    nbclient.NotebookClient(notebook, kernel_name="python3").execute()
    nbformat.write(notebook, tmp_path / "one.ipynb")
    (said,) = tool["read_stderr"](tmp_path / "one.ipynb")
    assert said.startswith("cell 1 writes to stderr") and "FutureWarning: in a later release" in said


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebooks_as_they_are_committed_hold_no_warning(tool, path):
    assert tool["read_stderr"](path) == []


@pytest.mark.skipif(sys.version_info[:2] == (3, 13), reason="this is Colab's Python, so no other is looked for")
def test_colabs_python_is_taken_where_it_starts(tool, tmp_path, monkeypatch, capsys):
    """pyenv leaves a script on the PATH that fails where the version was not chosen."""
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    script, version = tmp_path / "python3.13", tmp_path / "versions" / "3.13.1" / "bin" / "python"
    version.parent.mkdir(parents=True)
    for path in (script, version):
        path.write_text("#!/bin/sh\nexit 127\n")
        path.chmod(0o755)
    assert tool["find_pythons"]() == [sys.executable]
    assert "no Python 3.13 here" in capsys.readouterr().out
    version.write_text("#!/bin/sh\n")
    assert tool["find_pythons"]() == [str(version), sys.executable]
    script.write_text("#!/bin/sh\n")
    assert tool["find_pythons"]() == [str(script), sys.executable]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere PyTorch comes without CUDA")
def test_another_python_gets_pytorch_without_cuda_only(tool):
    choices = tool["torch_choices"]
    assert all(choice.endswith("+cpu") for choice in choices("another"))
    assert choices("another")[0] == choices(sys.executable)[0] == f"torch=={tool['read_pins']()['torch']}+cpu"
