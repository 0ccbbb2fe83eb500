"""Make each notebook anew from the script that it is paired with, and execute it.

The script (`notebooks/NN_name.py`, in jupytext's percent format) is the source. What is written beside it as
`.ipynb` holds the same cells and their outputs, and nothing that changes from one run or machine to the next:
no random cell ids, no times of execution, no Python version, no widget state.

    python tools/execute_notebooks.py                                # all of them
    python tools/execute_notebooks.py notebooks/01_bh_theory.py      # one
"""

import argparse
import json
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jupytext
import nbformat
from jupytext.config import load_jupytext_config
from nbclient import NotebookClient

from bhlib.colab import cell_id

ROOT = Path(__file__).resolve().parent.parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
# As in conftest.py, so that nbval finds what is written here: one computing thread, and no network.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
EMPTY_BAR = re.compile(r"  0%\|\s*\| 0/(\S+) \[.*\]$")
FULL_BAR = r"100%|██████████| \1/\1"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


def read_script(path):
    """Read a percent script as a notebook without outputs, each cell's id derived from what the cell says."""
    notebook = jupytext.read(path, fmt="py:percent", config=load_jupytext_config(str(path)))
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat_minor = 5
    seen = set()
    for cell in notebook.cells:
        repeat = 0
        while (name := cell_id(cell.cell_type, cell.source, repeat)) in seen:
            repeat += 1
        seen.add(name)
        cell.id = name
    return notebook


def execute(notebook, timeout):
    """Run all cells in place, in a fresh kernel whose working directory is notebooks/."""
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        store_widget_state=False,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(ROOT / "notebooks")}},
    )
    client.execute()


def strip_outputs(notebook):
    """Leave what still means something once the kernel has gone.

    A live widget's id goes, and its text stays. The text of a progress bar is written when the bar starts; here
    the cell has run to its end, and so has the bar.
    """
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            data.pop(WIDGET_VIEW, None)
            if "text/plain" in data:
                data["text/plain"] = EMPTY_BAR.sub(FULL_BAR, data["text/plain"])


def check_paths(notebook):
    """Refuse outputs that name a folder of this machine: they are noise to every other reader."""
    folders = {str(ROOT), sys.prefix, str(Path.home())} - {"/"}
    for number, cell in enumerate(notebook.cells):
        for folder in folders:
            if folder in json.dumps(cell.get("outputs", [])):
                raise ValueError(
                    f"the output of cell {number} contains {folder!r}; "
                    "print a path relative to the repository, or silence the warning that names the file"
                )


def remake(script, timeout):
    """Write the executed notebook beside its script, and return the seconds that it took."""
    start = time.perf_counter()
    notebook = read_script(script)
    execute(notebook, timeout)
    strip_outputs(notebook)
    check_paths(notebook)
    nbformat.write(notebook, script.with_suffix(".ipynb"))
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("scripts", nargs="*", type=Path, help="default: every notebooks/NN_*.py")
    parser.add_argument("--jobs", type=int, default=1, help="notebooks at the same time (default 1)")
    parser.add_argument("--timeout", type=int, default=600, help="seconds a cell may take (default 600)")
    args = parser.parse_args()

    os.environ.update(ENVIRONMENT)
    os.environ.pop("MPLBACKEND", None)

    scripts = [path.resolve() for path in args.scripts] or sorted((ROOT / "notebooks").glob("[0-9]*.py"))
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = {script: pool.submit(remake, script, args.timeout) for script in scripts}
    failed = False
    for script, run in runs.items():
        name = script.relative_to(ROOT)
        if run.exception():
            failed = True
            print(f"{name}: {run.exception()}", file=sys.stderr)
        else:
            print(f"{name}  {run.result():.1f} s")
    sys.exit(failed)


if __name__ == "__main__":
    main()
