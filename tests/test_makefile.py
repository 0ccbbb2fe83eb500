"""The targets of the Makefile: each sets itself up, and refuses a Python that is not supported."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed here")

# What a make hands down to those that it starts.
OUTER = {"MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS", "VENV"}


def make(*arguments):
    """Run make in the repository, apart from the make that may have started the tests."""
    environment = {name: value for name, value in os.environ.items() if name not in OUTER}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


@needs_make
@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("figures", "-m bhlib figures"),
        ("test", "-m pytest --nbval"),
        ("browser", "-m pytest tests/test_browser.py"),
        ("colab", "tools/colab.py"),
        ("kernels", "-m pytest tests/test_kernels.py"),
        ("quantized", "-m pytest tests/test_quantized.py"),
        ("tasks", "-m pytest tests/test_tasks.py"),
        ("lab", "-m jupyterlab"),
        ("notebooks", "tools/execute_notebooks.py"),
        ("lint", "-m ruff check"),
        ("lint", "-m ruff format --check"),
        ("lint", "-m mypy"),
    ],
)
def test_target_sets_itself_up_and_then_runs(target, command, tmp_path):
    """`make --dry-run` prints what would run in a folder that has no environment yet."""
    plan = make("--dry-run", target, f"VENV={tmp_path / 'venv'}")
    assert plan.returncode == 0, plan.stderr
    positions = [plan.stdout.find(step) for step in ("-m venv", "-m pip install", command)]
    assert -1 not in positions and positions == sorted(positions), plan.stdout


@needs_make
def test_clean_keeps_figures_and_environment():
    plan = make("--dry-run", "clean").stdout
    assert "rm -rf" in plan
    assert "figures" not in plan and "venv" not in plan


@needs_make
@pytest.mark.parametrize(("script", "shown"), [("echo Python 3.9.1; exit 1", "Python 3.9.1"), ("exit 127", "")])
def test_wrong_python_is_refused_with_what_to_do(script, shown, tmp_path):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    refused = make("figures", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}")
    assert refused.returncode != 0
    assert "bhlib needs Python 3.11, 3.12 or 3.13" in refused.stderr and shown in refused.stderr
    assert "make figures PYTHON=python3.12" in refused.stderr
    assert not (tmp_path / "venv").exists()


@needs_make
def test_help_lists_every_target():
    listed = make("help").stdout
    targets = "figures test kernels browser colab tasks lab notebooks lint clean distclean"
    for target in targets.split():
        assert f"make {target} " in listed


@needs_make
def test_continuous_integration_runs_targets_that_exist():
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    targets = [line.split()[1] for line in lines if line.startswith("make ")]
    assert "test" in targets
    for target in targets:
        assert make("--dry-run", target).returncode == 0
