"""Run the tests of the patch against other versions of transformers than the installed one.

    python tools/test_versions.py                 # the oldest supported, Colab's, and two that are too old
    python tools/test_versions.py 5.9.0 5.20.0    # these

Each version is installed into a folder of its own, ``.venv-versions/VERSION``, together with those of its requirements
that this environment meets in another version only, and put first on the path. PyTorch and all else are this
environment's. Of a version that is too old it is tested that patching says so.
"""

import argparse
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".venv-versions"
TESTS = ["tests/test_experts.py", "tests/test_patching.py", "tests/test_records.py"]
TOO_OLD = ["4.57.6", "5.4.0"]

PATCH_SOMETHING = """
import torch, transformers
import bhlib
try:
    bhlib.BHRoutingIntegration(torch.nn.Linear(2, 2))
except ImportError as error:
    assert transformers.__version__ in str(error) and "bhlib needs transformers" in str(error), error
    print("refused:", error)
else:
    raise SystemExit(f"transformers {transformers.__version__} was not refused")
"""


def supported_versions() -> list[str]:
    """The oldest version that requirements.txt admits, and Colab's."""
    oldest = re.search(r"^transformers>=([\d.]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)[1]
    colab = re.search(r"^transformers==(\S+)", (ROOT / "tests" / "colab-versions.txt").read_text(), re.MULTILINE)[1]
    return [oldest if oldest.count(".") > 1 else f"{oldest}.0", colab]


def install(version: str) -> Path:
    """Folder with a version of transformers and what it needs beyond this environment, installed on first use."""
    folder = FOLDER / version
    if not (folder / "transformers").exists():
        pip_install(folder, [f"transformers=={version}"])
    requirements = [Requirement(line) for line in next(found(folder, "transformers")).requires or []]
    missing = [
        requirement
        for requirement in requirements
        if not requirement.marker  # no extra, nothing for other platforms
        and not any(found(folder, requirement.name))
        and not any(one.version in requirement.specifier for one in found(None, requirement.name))
    ]
    if missing:
        pip_install(folder, [f"{requirement.name}{requirement.specifier}" for requirement in missing], alone=False)
    if not any(found(folder, "httpx")) and not any(found(None, "httpx")):
        pip_install(folder, ["httpx"], alone=False)  # imported, but declared only by older versions of huggingface_hub
    return folder


def found(folder: Path | None, name: str):
    """Distributions of a name in a folder, or in this environment."""
    return metadata.distributions(name=name, **({} if folder is None else {"path": [str(folder)]}))


def pip_install(folder: Path, requirements: list[str], alone: bool = True) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, *["--no-deps"] * alone, "--target", str(folder), *requirements], check=True)


def run(version: str) -> bool:
    """Whether a version passes its tests, or is refused if it is older than any supported."""
    path = os.pathsep.join([str(install(version)), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    print(f"--- transformers {version}", flush=True)
    old = Version(version) < Version(supported_versions()[0])
    arguments = ["-c", PATCH_SOMETHING] if old else ["-m", "pytest", "-q", "-m", "not timing", *TESTS]
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", help="default: the oldest supported, Colab's, and two that are too old")
    versions = parser.parse_args().versions or [*supported_versions(), *TOO_OLD]
    failed = [version for version in versions if not run(version)]
    if failed:
        sys.exit(f"failed with transformers {', '.join(failed)}")


if __name__ == "__main__":
    main()
