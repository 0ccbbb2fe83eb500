"""Run the notebooks as Colab does: its versions, its `google.colab`, and the set-up cell on its way from GitHub.

    python tools/colab.py                          # every notebook
    python tools/colab.py 01_bh_theory 04_patching_olmoe

An environment is made in ``.venv-colab`` with the versions of ``tests/colab-versions.txt``: under Colab's Python where
there is one, on the PATH or of pyenv, and PyTorch can be had for it without CUDA; else under the Python that runs this.
The kernel finds a stand-in for ``google.colab`` already imported, and git finds this working tree, stamped as a fork,
under the fork's address, so the set-up cell runs as it stands in the notebook. It must leave every version as it was.
No cell may fail, or write to stderr, where warnings go.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import nbformat

from bhlib.colab import stamp

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".venv-colab"
VERSIONS = ROOT / "tests" / "colab-versions.txt"
KEPT = ("torch", "transformers", "numpy", "ipython", "ipywidgets")
PIP = [FOLDER / "bin" / "python", "-m", "pip", "--quiet", "--disable-pip-version-check"]
CPU = "+cpu" if sys.platform == "linux" else ""  # marks PyTorch's build without CUDA, the only one elsewhere
FORK = "ada/routing-fork"


def read_pins() -> dict[str, str]:
    """Colab's version of each package."""
    lines = (line.strip() for line in VERSIONS.read_text().splitlines())
    return dict(line.split("==") for line in lines if "==" in line)


def colab_python() -> str:
    """Colab's version of Python, such as 3.13.15."""
    return re.search(r"Python ([\d.]+\d)", VERSIONS.read_text())[1]


def find_pythons() -> list[str]:
    """Colab's Python, but for the last digits, where there is one; then the one that runs this."""
    minor = colab_python().rpartition(".")[0]
    if sys.version.startswith(f"{minor}."):
        return [sys.executable]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    places = filter(None, [shutil.which(f"python{minor}"), *map(str, pyenv.glob(f"{minor}.*/bin/python"))])
    for place in places:
        # pyenv puts a python3.13 on the PATH that starts only where that version was chosen.
        if subprocess.run([place, "-c", ""], capture_output=True).returncode == 0:
            return [place, sys.executable]
    print(f"no Python {minor} here, neither on the PATH nor of pyenv", flush=True)
    return [sys.executable]


def torch_choices(python: str) -> list[str]:
    """What to ask pip for, the best first: Colab's version, without CUDA since that takes gigabytes; else this one's.

    This environment's PyTorch may have CUDA, and be in pip's cache. The build for another Python would not be.
    """
    builds = [read_pins()["torch"] + CPU, metadata.version("torch")]
    return [f"torch=={build}" for build in builds if python == sys.executable or build.endswith(CPU)]


def is_available(requirement: str) -> bool:
    """Whether pip would install a package, by itself, into the environment."""
    command = [*PIP, "install", "--dry-run", "--no-deps", requirement]
    return subprocess.run(command, capture_output=True).returncode == 0


def build(pythons: list[str], any_torch: bool) -> None:
    """Make the environment anew, under the first Python that PyTorch is to be had for.

    With `any_torch`, PyTorch may come with CUDA. Says which of Colab's versions are not to be had here.
    """
    for python in pythons:
        shutil.rmtree(FOLDER, ignore_errors=True)
        subprocess.run([python, "-m", "venv", FOLDER], check=True)
        choices = [f"torch=={read_pins()['torch']}"] if any_torch else torch_choices(python)
        torch = next(filter(is_available, choices), None)
        if torch is not None:
            break
        print(f"{python}: {' or '.join(choices)} is not to be had here for it", flush=True)
    else:
        sys.exit("no PyTorch to run the notebooks with")
    if torch != choices[0]:
        print(f"{choices[0]} is not to be had here; taking {torch}", flush=True)

    wanted = {name: f"{name}=={pin}" for name, pin in read_pins().items()} | {"torch": torch}
    del wanted["triton"]  # comes with PyTorch's builds for CUDA
    while True:
        command = [*PIP, "install", "--no-compile", "--prefer-binary", *wanted.values()]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode == 0:
            return
        refused = re.search(r"No matching distribution found for ([\w-]+)==", done.stderr)
        if refused is None:
            sys.exit(done.stderr)
        name = refused[1]
        print(f"{wanted[name]} is not to be had here; taking another", flush=True)
        wanted[name] = name


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
    stamp(FORK, origin)
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
        "GIT_CONFIG_VALUE_0": f"https://github.com/{FORK}",
    }


def run(notebook: Path, environment: dict[str, str], timeout: int) -> bool:
    """Whether a notebook runs to its end without a warning, as a file in the current folder of a fresh kernel."""
    start = time.perf_counter()
    command = [FOLDER / "bin" / "jupyter-execute", "--inplace", f"--timeout={timeout}", notebook.name]
    done = subprocess.run(command, cwd=notebook.parent, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        wrong = ["failed", done.stderr.partition("CellExecutionError: ")[2] or done.stderr]
    else:
        wrong = read_stderr(notebook)
    print(f"{notebook.stem:24} {time.perf_counter() - start:6.1f} s", *wrong, sep="\n    ", flush=True)
    return not wrong


def read_stderr(notebook: Path) -> list[str]:
    """What the cells of an executed notebook wrote to stderr: warnings and logs, each with the number of its cell."""
    return [
        f"cell {number} writes to stderr: {output.text.strip()}"
        for number, cell in enumerate(nbformat.read(notebook, as_version=4).cells)
        for output in cell.get("outputs", [])
        if output.output_type == "stream" and output.name == "stderr"
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="notebooks to run (default: all)")
    parser.add_argument("--timeout", type=int, default=600, help="seconds a cell may take (default 600)")
    parser.add_argument("--python", help="run under this Python; PyTorch may then come with CUDA, in gigabytes")
    arguments = parser.parse_args()
    os.environ.pop("MPLBACKEND", None)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # what is not compiled at installation, is at the first import

    start = time.perf_counter()
    pythons = [arguments.python] if arguments.python else find_pythons()
    made_for = f"{pythons}\n{VERSIONS.read_text()}"
    untouched = FOLDER / ".untouched"  # what it was made for, if no set-up has run since
    if not untouched.exists() or untouched.read_text() != made_for:
        build(pythons, any_torch=arguments.python is not None)
        print(f"environment made in {time.perf_counter() - start:.0f} s", flush=True)
    here = subprocess.run([PIP[0], "--version"], capture_output=True, check=True, text=True).stdout.strip()
    print(f"Python {colab_python()} on Colab, {here} here", flush=True)
    before = installed()
    untouched.unlink(missing_ok=True)

    with tempfile.TemporaryDirectory() as folder:
        environment = prepare(Path(folder))
        content = Path(folder) / "content"
        content.mkdir()
        sources = sorted((Path(folder) / "origin" / "notebooks").glob("[0-9]*.ipynb"))
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
    untouched.write_text(made_for)


if __name__ == "__main__":
    main()
