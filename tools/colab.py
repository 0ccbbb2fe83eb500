"""Run the notebooks as Colab does: its versions, its `google.colab`, and the set-up cell on its way from GitHub.

    python tools/colab.py                          # every notebook
    python tools/colab.py 01_bh_theory 04_patching_olmoe

An environment is made in ``.venv-colab`` with the versions of ``tests/colab-versions.txt``. The kernel finds a stand-in
for ``google.colab`` already imported, and git finds this working tree under the repository's address, so the set-up
cell runs as it stands in the notebook. It must leave every version as it was.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from importlib import metadata
from pathlib import Path

from bhlib.colab import read_address

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".venv-colab"
VERSIONS = ROOT / "tests" / "colab-versions.txt"
KEPT = ("torch", "transformers", "numpy", "ipython", "ipywidgets")
PIP = [FOLDER / "bin" / "pip", "--quiet", "--disable-pip-version-check"]


def read_pins() -> dict[str, str]:
    """Colab's version of each package."""
    lines = (line.strip() for line in VERSIONS.read_text().splitlines())
    return dict(line.split("==") for line in lines if "==" in line)


def choices(name: str, pin: str) -> list[str]:
    """What to ask pip for, the best first: Colab's version, else another."""
    if name == "torch":  # the build for CUDA takes gigabytes, and this environment's own is in pip's cache
        return [f"torch=={pin}{'+cpu' if sys.platform == 'linux' else ''}", f"torch=={metadata.version('torch')}"]
    return [f"{name}=={pin}", name]


def build() -> None:
    """Make the environment anew; say which of Colab's versions are not to be had here."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    venv.create(FOLDER, with_pip=True)
    wanted = {name: choices(name, pin) for name, pin in read_pins().items()}
    del wanted["triton"]  # comes with PyTorch's builds for CUDA
    while True:
        command = [*PIP, "install", "--no-compile", "--prefer-binary", *(choice[0] for choice in wanted.values())]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode == 0:
            return
        refused = re.search(r"No matching distribution found for ([\w-]+)==", done.stderr)
        if refused is None or len(wanted.get(refused[1], [])) < 2:
            sys.exit(done.stderr)
        name = refused[1]
        print(f"{wanted[name].pop(0)} is not to be had here; taking {wanted[name][0]}", flush=True)


def installed() -> dict[str, str]:
    """Version of each package in the environment."""
    (packages,) = FOLDER.glob("lib/python*/site-packages")
    return {package.name.lower(): package.version for package in metadata.distributions(path=[str(packages)])}


def prepare(folder: Path) -> dict[str, str]:
    """Fill a folder with a repository to clone and a stand-in for `google.colab`; return the variables for both."""
    origin, stand_in = folder / "origin", folder / "modules" / "google" / "colab"
    stand_in.mkdir(parents=True)
    (stand_in / "__init__.py").touch()
    startup = folder / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "colab.py").write_text("import google.colab\n")  # Colab's kernels have imported it, too

    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for file in filter(None, files.split("\0")):
        if (ROOT / file).is_file():  # not deleted
            (origin / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, origin / file)
    for command in ("init --quiet", "add --all", "-c user.name=colab -c user.email=colab@localhost commit -qm tree"):
        subprocess.run(["git", "-c", "core.safecrlf=false", *command.split()], cwd=origin, check=True)
    return {
        "PATH": f"{FOLDER / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(folder / "modules"),
        "IPYTHONDIR": str(folder / "ipython"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",  # more threads wait for each other where other work runs beside
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.file://{origin}.insteadOf",
        "GIT_CONFIG_VALUE_0": f"https://github.com/{read_address(ROOT)}",
    }


def run(notebook: Path, environment: dict[str, str], timeout: int) -> bool:
    """Whether a notebook runs to its end, as a file in the current folder of a fresh kernel."""
    start = time.perf_counter()
    command = [FOLDER / "bin" / "jupyter-execute", f"--timeout={timeout}", notebook.name]
    done = subprocess.run(command, cwd=notebook.parent, env=os.environ | environment, capture_output=True, text=True)
    print(f"{notebook.stem:24} {time.perf_counter() - start:6.1f} s  {'failed' if done.returncode else ''}", flush=True)
    if done.returncode:
        print(done.stderr.partition("CellExecutionError: ")[2] or done.stderr, file=sys.stderr)
    return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="notebooks to run (default: all)")
    parser.add_argument("--timeout", type=int, default=600, help="seconds a cell may take (default 600)")
    arguments = parser.parse_args()
    os.environ.pop("MPLBACKEND", None)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # what is not compiled at installation, is at the first import

    start = time.perf_counter()
    python = re.search(r"Python [\d.]+\d", VERSIONS.read_text())[0]
    print(f"{python} on Colab, {sys.version.split()[0]} here", flush=True)
    untouched = FOLDER / ".untouched"  # the versions that it was made with, if no set-up has run since
    if not untouched.exists() or untouched.read_text() != VERSIONS.read_text():
        build()
        print(f"environment made in {time.perf_counter() - start:.0f} s", flush=True)
    before = installed()
    untouched.unlink(missing_ok=True)

    with tempfile.TemporaryDirectory() as folder:
        environment = prepare(Path(folder))
        content = Path(folder) / "content"
        content.mkdir()
        sources = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
        sources = [path for path in sources if not arguments.names or path.stem in arguments.names]
        copies = [Path(shutil.copy(path, content)) for path in sources]
        failed = [copy.stem for copy in copies if not run(copy, environment, arguments.timeout)]
        fetched = [path.name for path in content.iterdir() if path.is_dir()]
    after = installed()

    print(f"\n{'':16}{'Colab':>12}{'before':>14}{'after':>14}")
    pins = read_pins()
    for name in KEPT:
        print(f"{name:16}{pins[name]:>12}{before[name]:>14}{after[name]:>14}")
    added = sorted(after.keys() - before.keys())
    print("added by the set-up:", ", ".join(added))
    changed = [name for name, version in before.items() if after.get(name) != version]
    if failed or changed or not fetched:
        sys.exit(f"failed: {failed}; versions changed by the set-up: {changed}; fetched: {fetched}")
    subprocess.run([*PIP, "uninstall", "--yes", *added], check=True)
    untouched.write_text(VERSIONS.read_text())


if __name__ == "__main__":
    main()
