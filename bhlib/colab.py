"""The way from a repository into Colab: badges and set-up cells, stamped with the repository's address.

The address stands in ``pyproject.toml``. From there it goes into the badges of the README and of the notebooks, and
into the set-up cell of each notebook: ``python -m bhlib colab``, or after a fork ``python -m bhlib colab OWNER/REPO``.
"""

import hashlib
import re
from pathlib import Path

import jupytext
import nbformat
from jupytext.config import load_jupytext_config

ROOT = Path(__file__).resolve().parent.parent
REPOSITORY = re.compile(r'^Repository = "https://github\.com/([^/"]+/[^/"]+)"', re.MULTILINE)
BADGE = r"\[!\[Open in Colab\]\([^)]*\)\]\([^)]*\)"
README_ROW = re.compile(rf"^(\| \[\w+\]\((notebooks/\w+\.ipynb)\))(?: {BADGE})?", re.MULTILINE)

NOTE = "The first cell fetches this workspace and what it requires into Colab. Anywhere else it does nothing."
SETUP = """
import os
import subprocess
import sys

if "google.colab" in sys.modules and not os.path.exists("../bhlib"):  # in Colab, and once only
    subprocess.run("[ -d {folder} ] || git clone --quiet --depth 1 {address}", shell=True, check=True)
    subprocess.run("pip install --quiet --editable ./{folder}", shell=True, check=True)
    sys.path.append(os.path.abspath("{folder}"))
    os.chdir("{folder}/notebooks")
""".strip()


def read_address(root: Path = ROOT) -> str:
    """``OWNER/REPO``, from the ``Repository`` line of a workspace's ``pyproject.toml``."""
    found = REPOSITORY.search((root / "pyproject.toml").read_text(encoding="utf-8"))
    if not found:
        raise ValueError(
            f'{root / "pyproject.toml"} must name a repository on GitHub, in a line of [project.urls]: '
            'Repository = "https://github.com/OWNER/REPO"'
        )
    return found[1]


def badge(address: str, notebook: str) -> str:
    """Markdown of the badge that opens a notebook (its path in the repository) of branch ``main`` in Colab."""
    colab = "https://colab.research.google.com"
    return (
        f"[![Open in Colab]({colab}/assets/colab-badge.svg)]"
        f"({colab}/github/{address}/blob/main/{notebook})"
    )


def setup_code(address: str) -> str:
    """Source of the set-up cell: in Colab, clone the repository, install it, and go to its notebooks."""
    return SETUP.format(address=f"https://github.com/{address}", folder=address.partition("/")[2])


def cell_id(cell_type: str, source: str, repeat: int = 0) -> str:
    """The id of a notebook's cell, made from what it says; ``repeat`` tells cells apart that say the same."""
    return hashlib.sha256(f"{repeat}\n{cell_type}\n{source}".encode()).hexdigest()[:8]


def stamp_cells(notebook: nbformat.NotebookNode, address: str, path: str) -> None:
    """Give a notebook its badge below the title and its set-up cell, in place; outputs stay, and counts stay in order.

    What follows the title in the first cell moves to a cell behind the set-up when the badge is new.

    Parameters
    ----------
    notebook : NotebookNode
        Its first cell is markdown, and starts with the title.
    address : str
        ``OWNER/REPO``.
    path : str
        Where the notebook lies in the repository.
    """
    cells, link = notebook.cells, badge(address, path)
    if re.search(BADGE, cells[0].source):
        cells[0].source = re.sub(BADGE, lambda _: link, cells[0].source)
    else:
        title, _, text = cells[0].source.partition("\n\n")
        cells[0].source = f"{title}\n\n{link}\n\n{NOTE}"
        if text:
            cells.insert(1, nbformat.v4.new_markdown_cell(text))
    if "google.colab" not in cells[1].source:
        cells.insert(1, nbformat.v4.new_code_cell())
    cells[1].source = setup_code(address)
    for cell in cells[:3]:
        cell.id = cell_id(cell.cell_type, cell.source)

    executed = [cell for cell in cells if cell.cell_type == "code"]
    if any(cell.execution_count for cell in executed):
        for count, cell in enumerate(executed, start=1):
            cell.execution_count = count
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = count


def stamp(address: str | None = None, root: Path = ROOT) -> list[Path]:
    """Write a repository's address into ``pyproject.toml``, the README's table, and every notebook and its script.

    Parameters
    ----------
    address : str, optional
        ``OWNER/REPO`` on GitHub. By default the one that ``pyproject.toml`` has, for badges that are missing or stale.
    root : Path
        Folder of the workspace.

    Returns
    -------
    list of Path
        The files that changed.

    Raises
    ------
    ValueError
        If the address is not of the form ``OWNER/REPO``.
    """
    address = address or read_address(root)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", address):
        raise ValueError(f"the repository must be given as OWNER/REPO, such as 'ada/bh-routing'; got {address!r}.")
    texts = {path: path.read_text(encoding="utf-8") for path in (root / "pyproject.toml", root / "README.md")}
    project, readme = texts
    stamped = {
        project: REPOSITORY.sub(f'Repository = "https://github.com/{address}"', texts[project]),
        readme: README_ROW.sub(lambda row: f"{row[1]} {badge(address, row[2])}", texts[readme]),
    }
    for suffix in (".py", ".ipynb"):
        for path in sorted((root / "notebooks").glob(f"[0-9]*{suffix}")):
            texts[path] = path.read_text(encoding="utf-8")
            stamped[path] = stamp_file(path, address)
    changed = [path for path, text in stamped.items() if text != texts[path]]
    for path in changed:
        path.write_text(stamped[path], encoding="utf-8")
    return changed


def stamp_file(path: Path, address: str) -> str:
    """Text of a notebook or of its script, stamped."""
    config = load_jupytext_config(str(path))
    script = path.suffix == ".py"
    notebook = jupytext.read(path, fmt="py:percent", config=config) if script else nbformat.read(path, as_version=4)
    stamp_cells(notebook, address, f"notebooks/{path.stem}.ipynb")
    return jupytext.writes(notebook, fmt="py:percent", config=config) if script else nbformat.writes(notebook) + "\n"
