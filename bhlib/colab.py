"""What is the same in every notebook: badge, set-up, and links to the notebooks before and after it.

All of it needs the repository's address, which stands in ``pyproject.toml``. ``python -m bhlib colab`` writes it into
the notebooks and into the README's table, and after a fork ``python -m bhlib colab OWNER/REPO`` writes the new one.
"""

import hashlib
import re
from pathlib import Path

import jupytext
import nbformat
from jupytext.config import load_jupytext_config

ROOT = Path(__file__).resolve().parent.parent
REPOSITORY = re.compile(r'^Repository = "https://github\.com/([^/"]+/[^/"]+)"', re.MULTILINE)
COLAB = "https://colab.research.google.com"
BADGE = r"\[!\[Open in Colab\]\([^)]*\)\]\([^)]*\)"
README_ROW = re.compile(rf"^(\| \[\w+\]\((notebooks/\w+\.ipynb)\))(?: {BADGE})?", re.MULTILINE)

LINKS = re.compile(r"^(Previous|Next): ")

#: The account in an address that was never stamped. Whoever has this name on GitHub is a stranger.
PLACEHOLDER = "OWNER"

NOTE = (
    "To run it in Colab, choose Runtime, Run all. It takes about a minute, without a GPU and without a restart. The "
    "first cell fetches this workspace and what it requires; anywhere but in Colab it does nothing."
)
SETUP = """
import os
import subprocess
import sys

if "google.colab" in sys.modules and not os.path.exists("../bhlib"):  # in Colab, and once only
    for command in (
        "[ -d {folder} ] || git clone --quiet --depth 1 {address}",
        "pip install --quiet --editable ./{folder}",
    ):
        status, said = subprocess.getstatusoutput(command)
        assert status == 0, f"{{command}}: {{said}}"
    sys.path.append(os.path.abspath("{folder}"))
    os.chdir("{folder}/notebooks")
""".strip()
REFUSAL = """
    assert os.path.exists("{folder}"), (
        "This notebook does not know its repository: the address still says {placeholder}. In a clone of yours run "
        "`python -m bhlib colab ACCOUNT/REPOSITORY`, commit, push, and open the notebook from there. Or copy the clone "
        "into Colab's files, as {folder}, and run this cell again."
    )
""".strip("\n")


def read_address(root: Path = ROOT) -> str:
    """``OWNER/REPO``, from the ``Repository`` line of a workspace's ``pyproject.toml``."""
    found = REPOSITORY.search((root / "pyproject.toml").read_text(encoding="utf-8"))
    if not found:
        raise ValueError(
            f"{root / 'pyproject.toml'} must name a repository on GitHub, in a line of [project.urls]: "
            'Repository = "https://github.com/OWNER/REPO"'
        )
    return found[1]


def colab_page(address: str, notebook: str) -> str:
    """Where Colab shows a notebook (its path in the repository) of branch ``main``."""
    return f"{COLAB}/github/{address}/blob/main/{notebook}"


def badge(address: str, notebook: str) -> str:
    """Markdown of the badge that opens a notebook (its path in the repository) in Colab."""
    return f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({colab_page(address, notebook)})"


def setup_code(address: str) -> str:
    """Source of the set-up cell: in Colab, clone the repository, install it, and go to its notebooks.

    While the account is still the placeholder, the cell says what to do instead of fetching from whoever has that name.
    """
    account, _, folder = address.partition("/")
    code = SETUP.format(address=f"https://github.com/{address}", folder=folder)
    if account != PLACEHOLDER:
        return code
    before, condition, after = code.partition("once only\n")
    return before + condition + REFUSAL.format(folder=folder, placeholder=PLACEHOLDER) + "\n" + after


def links(address: str, name: str, titles: dict[str, str]) -> str:
    """Markdown of the way from a notebook to those beside it; relative links are dead in Colab, so each has two.

    Parameters
    ----------
    address : str
        ``OWNER/REPO``.
    name : str
        The notebook's file name without its suffix.
    titles : dict of str to str
        Title of each notebook by name, in the order in which they are read.
    """
    names = list(titles)
    place = names.index(name)
    beside = {"Previous": names[:place][-1:], "Next": names[place + 1 :][:1]}
    return " · ".join(
        f"{word}: [{titles[other]}]({other}.ipynb) ([in Colab]({colab_page(address, f'notebooks/{other}.ipynb')}))"
        for word, others in beside.items()
        for other in others
    )


def cell_id(cell_type: str, source: str, repeat: int = 0) -> str:
    """The id of a notebook's cell, made from what it says; ``repeat`` tells cells apart that say the same."""
    return hashlib.sha256(f"{repeat}\n{cell_type}\n{source}".encode()).hexdigest()[:8]


def stamp_cells(notebook: nbformat.NotebookNode, address: str, name: str, titles: dict[str, str]) -> None:
    """Give a notebook its header, its set-up and its links, in place; outputs stay, and counts stay in order.

    What follows the title in the first cell moves to a cell after the set-up when there was no badge yet.

    Parameters
    ----------
    notebook : NotebookNode
        Its first cell is markdown, and starts with the title.
    address, name, titles
        As for `links`.
    """
    cells, way = notebook.cells, links(address, name, titles)
    title, _, text = cells[0].source.partition("\n\n")
    if text and not re.search(BADGE, text):
        cells.insert(1, nbformat.v4.new_markdown_cell(text))
    cells[0].source = "\n\n".join(filter(None, (title, badge(address, f"notebooks/{name}.ipynb"), NOTE, way)))
    if "google.colab" not in cells[1].source:
        cells.insert(1, nbformat.v4.new_code_cell())
    cells[1].source = setup_code(address)
    if LINKS.match(cells[-1].source):
        cells.pop()
    if way:
        cells.append(nbformat.v4.new_markdown_cell(way))
    for cell in cells[:3] + cells[-1:]:
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

    The links between the notebooks follow the order of their names, and have the titles that their scripts have.

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
    scripts = sorted((root / "notebooks").glob("[0-9]*.py"))
    titles = {path.stem: _script(path).cells[0].source.partition("\n")[0].removeprefix("# ") for path in scripts}
    for suffix in (".py", ".ipynb"):
        for path in (script.with_suffix(suffix) for script in scripts):
            texts[path] = path.read_text(encoding="utf-8")
            stamped[path] = stamp_file(path, address, titles)
    changed = [path for path, text in stamped.items() if text != texts[path]]
    for path in changed:
        path.write_text(stamped[path], encoding="utf-8")
    return changed


def stamp_file(path: Path, address: str, titles: dict[str, str]) -> str:
    """Text of a notebook or of its script, stamped."""
    script = path.suffix == ".py"
    notebook = _script(path) if script else nbformat.read(path, as_version=4)
    stamp_cells(notebook, address, path.stem, titles)
    if script:
        return jupytext.writes(notebook, fmt="py:percent", config=load_jupytext_config(str(path)))
    return nbformat.writes(notebook) + "\n"


def _script(path: Path) -> nbformat.NotebookNode:
    return jupytext.read(path, fmt="py:percent", config=load_jupytext_config(str(path)))
