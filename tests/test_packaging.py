"""What pip needs to know: the requirements, and the wheel that is built from a clone."""

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MEBIBYTE = 2**20


def read_requirements(path):
    """The requirements in a pip file, by canonical name; comments and blank lines are left out."""
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    requirements = [Requirement(line) for line in lines if line]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


REQUIREMENTS = read_requirements(ROOT / "requirements.txt")
COLAB = {
    name: next(iter(requirement.specifier)).version
    for name, requirement in read_requirements(ROOT / "tests" / "colab-versions.txt").items()
}


@pytest.mark.parametrize("name", sorted(REQUIREMENTS.keys() & COLAB.keys()))
def test_colab_keeps_its_version(name):
    assert REQUIREMENTS[name].specifier.contains(COLAB[name]), (
        f"{REQUIREMENTS[name]} would replace the {COLAB[name]} that Colab has preinstalled"
    )


def test_what_colab_must_keep_is_among_the_requirements():
    assert {"torch", "transformers", "numpy", "ipywidgets", "ipykernel"} <= REQUIREMENTS.keys() & COLAB.keys()


@pytest.mark.parametrize(
    ("name", "untested"),
    [("torch", "2.10.0"), ("torch", "2.14.0"), ("transformers", "5.5.4"), ("transformers", "6.0.0")],
)
def test_untested_releases_stay_out(name, untested):
    assert not REQUIREMENTS[name].specifier.contains(untested)


def test_this_environment_meets_the_requirements():
    wrong = {
        name: version(name)
        for name, requirement in REQUIREMENTS.items()
        if not requirement.specifier.contains(version(name), prereleases=True)
    }
    assert wrong == {}


def test_every_library_that_the_package_imports_is_required():
    """Scripts under demo/ are left out: training needs more than using does."""
    providers = packages_distributions()
    missing = {}
    for path in (ROOT / "bhlib").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules = {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = {node.module.partition(".")[0]}
            else:
                continue
            for module in modules - sys.stdlib_module_names - {"bhlib"}:
                names = {canonicalize_name(name) for name in providers.get(module, [module])}
                if module == "triton":  # comes with PyTorch's CUDA builds; imported only where it is
                    continue
                if not names & REQUIREMENTS.keys():
                    missing.setdefault(module, path.name)
    assert missing == {}, "add these to requirements.txt"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the sources, as pip would build it from a clone."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "bhlib", source / "bhlib", ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(folder)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True, timeout=120)
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_holds_every_file_of_the_package(wheel):
    ours = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "bhlib").rglob("*")
        if path.is_file() and not any(part == "__pycache__" or part.startswith(".") for part in path.parts)
    }
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("bhlib/")}
    assert packed == ours, "add the suffix to [tool.setuptools.package-data]"


def test_wheel_names_its_licence_requirements_and_repository(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = archive.read(name).decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert f"Project-URL: Repository, {PYPROJECT['project']['urls']['Repository']}" in metadata
    needed = {
        canonicalize_name(Requirement(line.removeprefix("Requires-Dist: ")).name)
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist: ") and "extra ==" not in line
    }
    assert needed == REQUIREMENTS.keys()


def test_wheel_runs_away_from_the_repository(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    shown = subprocess.run(
        [sys.executable, "-c", "import bhlib; bhlib.load_demo(); print(bhlib.__file__)"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert shown.returncode == 0, shown.stderr
    assert Path(shown.stdout.strip()).is_relative_to(tmp_path)


def test_files_of_the_package_are_small_enough_for_git():
    sizes = {path: path.stat().st_size for path in (ROOT / "bhlib").rglob("*") if path.is_file()}
    assert max(sizes.values()) < 20 * MEBIBYTE
    assert sum(size for path, size in sizes.items() if path.suffix == ".safetensors") <= 45 * MEBIBYTE


def test_licence_is_complete():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    for passage in ("1. Definitions.", "9. Accepting Warranty", "END OF TERMS AND CONDITIONS"):
        assert passage in text
    assert "Copyright 2026 the bhlib authors" in text
