"""The package is built in floors, from the ground up: a module imports only from the floors below its own.

Inside a floor that is a package, imports run one way too: there is no circle among its modules.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "bhlib"

# The one place that states the order, the ground floor first. A new module takes its place here.
FLOORS = [
    "looks",  # colours, markers and lines of series in figures
    "procedures",  # multiple testing on tensors of p-values
    "simulations",  # false discovery rate and power by simulation
    "pvalues",  # router logits -> p-values
    "weighting",  # router logits -> scores; scores of the kept experts -> weights
    "penalties",  # what may be added to the loss in training
    "expert_loop",  # the experts one after the other, on a CPU
    "kernels",  # routing and experts by Triton, on a CUDA device
    "sorted_pairs",  # the experts with gradients, on a CUDA device
    "layer_files",  # one file of what was fitted to each layer
    "norms",  # how large the outputs of experts are
    "rules",  # p-values -> experts and weights; the rival rules
    "compensation",  # what stands in for dropped experts
    "alignment",  # a rival of the compensation: the output, stretched and shifted
    "levels",  # the level at which a rule gives this many experts
    "experts",  # the experts' forward pass over selected pairs only
    "hooks",  # hooks that copies of a module leave behind
    "discovery",  # the MoE layers of a model: find, watch, choose implementations
    "router_hooks",  # what a patch puts on a router
    "passes",  # which tokens of a forward pass are real, and where they stand
    "compiled_passes",  # recording inside compiled code
    "recorded_passes",  # decisions about tokens, pass by pass
    "stats",  # counts -> the statistics of a run
    "records",  # what was routed where
    "explain",  # a rule and a token's logits -> why these experts
    "patching",  # patch, analyze, restore
    "text_pass",  # a text in batches, for a model that is not patched
    "layer_passes",  # what one layer makes of tokens, and each of its experts alone
    "contributions",  # what each expert adds, measured
    "explain_token",  # the same beside a decision
    "sampling",  # samples of the logits that a pass shows
    "calibration",  # one pass over a model -> a fitted null
    "compensating",  # one pass over a model -> what stands in for its experts
    "fitting_norms",  # one pass over a model -> the norms of its experts
    "documents",  # texts of one's own, document by document
    "sequences",  # documents as tokens -> sequences of equal length
    "loading",  # the embedded model, the real one, held-out text
    "texts",  # held-out text or one's own, in three splits by document
    "comparisons",  # the table of a sweep -> means, differences, intervals
    "pooling",  # the same difference in several models -> what is expected of the next
    "cells",  # finished rules of a sweep, on disk
    "evaluation",  # loss and sweeps -> tables
    "agreement",  # does a patched model write what the model itself writes
    "measures",  # accuracy, calibration, the worst of a text
    "specialization",  # saturation, co-activation and specialization, after the OLMoE paper
    "tuning",  # what each layer gets, from calibration text
    "training",  # train a model for a rule, and keep what has changed
    "rival_fits",  # what rival rules and corrections are fitted with
    "guarantees",  # levels with a promise about documents not seen yet
    "evidence",  # are the p-values uniform, and does it matter?
    "figures",  # data -> figures
    "replication",  # the same measurements on other models
    "small_fits",  # nulls and compensations on a little text, for a first look
    "widgets",  # the same drawings behind sliders
    "demo",  # the embedded model and the script that trained it
    "tasks",  # tasks for lm-evaluation-harness, of the held-out text
    "benchmarks",  # how long routing takes
    "speed",  # how fast a patched model is on a GPU
    "colab",  # badges and set-up cells of the notebooks
    "sweep_command",  # python -m bhlib sweep
    "figures_command",  # python -m bhlib figures
    "tune_command",  # python -m bhlib tune
    "__main__",  # python -m bhlib
]


def name_of(path):
    """The module that a file is: ["bhlib", "figures", "study"], and ["bhlib", "figures"] for an ``__init__.py``."""
    parts = [*path.relative_to(PACKAGE.parent).with_suffix("").parts]
    return parts[:-1] if parts[-1] == "__init__" else parts


MODULES = {".".join(name_of(path)): path for path in sorted(PACKAGE.rglob("*.py"))}
PACKAGES = [name for name, path in MODULES.items() if path.name == "__init__.py" and name != "bhlib"]


def floor_of(module):
    """The floor of a module: "figures" of "bhlib.figures.study"; "bhlib" of the package itself, which is above all."""
    return module.split(".")[1] if "." in module else module


def imported(source, package):
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
        Dotted names.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = above + (node.module.split(".") if node.module else [])
            found += [module + [alias.name] for alias in node.names]
    prefixes = ([".".join(name[:n]) for n in range(len(name), 0, -1)] for name in found if name[0] == "bhlib")
    return {next(prefix for prefix in longest_first if prefix in MODULES) for longest_first in prefixes}


def imports_of(module):
    """The modules of bhlib that a module imports."""
    path = MODULES[module]
    return imported(path.read_text(encoding="utf-8"), ["bhlib", *path.relative_to(PACKAGE).parts[:-1]])


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"bhlib"}))
def test_imports_run_one_way(module):
    floor = floor_of(module)
    assert floor in FLOORS, f"give {floor} its place in FLOORS"
    below = {*FLOORS[: FLOORS.index(floor)], floor}
    if floor in ("demo", "__main__"):
        below.add("bhlib")
    wrong = {name for name in imports_of(module) if floor_of(name) not in below}
    assert not wrong, f"{module} may import only from the floors below it, not from {sorted(wrong)}"


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way_inside_a_package(package):
    """A package may gather the names of its modules, or its modules may use what it defines, but not both."""
    inside = {name for name in MODULES if f"{name}.".startswith(f"{package}.")}
    try:
        TopologicalSorter({name: imports_of(name) & inside for name in inside}).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


def test_no_figure_depends_on_another():
    """A module that registers figures can go, or come, alone: what two of them need has a module of its own."""
    themes = {name for name in MODULES if "\n@figure(" in MODULES[name].read_text(encoding="utf-8")}
    assert len(themes) > 5
    assert not {(name, theme) for name in MODULES for theme in imports_of(name) & themes}


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
    assert {floor_of(module) for module in imported(source, package)} == expected
