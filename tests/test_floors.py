"""The package is built in floors: a module imports only from the floors above it in `FLOORS`."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "bhlib"

# The one place that states the order. A new module takes its place here.
FLOORS = [
    "procedures",  # multiple testing on tensors of p-values
    "simulations",  # false discovery rate and power by simulation
    "pvalues",  # router logits -> p-values
    "kernels",  # both by Triton, on a CUDA device; the experts by a loop, on a CPU
    "rules",  # p-values -> experts and weights; the rival rules
    "experts",  # the experts' forward pass over selected pairs only
    "passes",  # which tokens of a forward pass are real, and where they stand
    "records",  # what was routed where
    "patching",  # find the routers; patch, analyze, restore
    "calibration",  # one pass over a model -> a fitted null
    "loading",  # the embedded model, the real one, held-out text
    "comparisons",  # the table of a sweep -> means, differences, intervals
    "cells",  # finished rules of a sweep, on disk
    "evaluation",  # loss and sweeps -> tables
    "tuning",  # levels and layer weights, from calibration text
    "evidence",  # are the p-values uniform, and does it matter?
    "figures",  # data -> figures
    "widgets",  # the same drawings behind sliders
    "demo",  # the embedded model and the script that trained it
    "tasks",  # tasks for lm-evaluation-harness, of the held-out text
    "benchmarks",  # how long routing takes
    "speed",  # how fast a patched model is on a GPU
    "colab",  # badges and set-up cells of the notebooks
    "sweep_command",  # python -m bhlib sweep
    "__main__",  # python -m bhlib
]
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def floor_of(path):
    """The floor that a file belongs to: its own name, or the folder's that it lies in."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_floors(source, package):
    """The modules of bhlib that a source text imports, at its top or inside a function.

    Parameters
    ----------
    source : str
        Python source.
    package : list of str
        The package that the text is in, from which relative imports count: ["bhlib"] or ["bhlib", "demo"].

    Returns
    -------
    set of str
        Names of floors; "bhlib" stands for the package itself, which imports all of them.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = above + (node.module.split(".") if node.module else [])
            names = [module + [alias.name] for alias in node.names]
        else:
            continue
        ours = [name for name in names if name[0] == "bhlib"]
        found.update(name[1] if name[1:2] and name[1] in FLOORS else "bhlib" for name in ours)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_run_one_way(path):
    floor = floor_of(path)
    assert floor in FLOORS, f"give {floor} its place in FLOORS"
    package = ["bhlib", *path.relative_to(PACKAGE).parts[:-1]]
    above = {*FLOORS[: FLOORS.index(floor)], floor}
    if floor in ("demo", "__main__"):
        above.add("bhlib")
    wrong = imported_floors(path.read_text(encoding="utf-8"), package) - above
    assert not wrong, f"bhlib/{floor} may import only from the floors above it, not from {sorted(wrong)}"


@pytest.mark.parametrize(
    ("source", "package", "expected"),
    [
        ("import bhlib.rules", ["bhlib"], {"rules"}),
        ("from . import rules, pvalues as p", ["bhlib"], {"rules", "pvalues"}),
        ("def f():\n    from .rules import Routing", ["bhlib"], {"rules"}),
        ("from bhlib.rules import Routing", ["bhlib"], {"rules"}),
        ("from bhlib import rules", ["bhlib"], {"rules"}),
        ("from bhlib import load_demo", ["bhlib"], {"bhlib"}),
        ("import bhlib", ["bhlib"], {"bhlib"}),
        ("from ..rules import Routing", ["bhlib", "demo"], {"rules"}),
        ("from .train import main", ["bhlib", "demo"], {"demo"}),
        ("import torch\nfrom scipy import stats", ["bhlib"], set()),
    ],
)
def test_every_way_to_import_is_seen(source, package, expected):
    assert imported_floors(source, package) == expected
