"""Settings of a whole pytest run: of the tests, and of the notebooks that nbval executes."""

import os
from importlib.util import find_spec

# One computing thread for each worker of pytest-xdist: more would only contend for the same cores.
# The kernels of the notebooks inherit the environment.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# The suite is the same with and without a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A backend named in the user's shell would take the place of the one that puts figures into a notebook.
os.environ.pop("MPLBACKEND", None)


# The package of this clone, installed or not, for the kernels of notebooks and whatever else tests start.
ROOT = os.path.dirname(os.path.abspath(__file__))
os.environ["PYTHONPATH"] = os.pathsep.join([ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])

# Where no examples (`>>>`) are looked for, since that imports a file: in the scripts of notebooks, in what
# lm-evaluation-harness calls, and in kernels where there is no Triton.
collect_ignore_glob = ["notebooks/*.py", "bhlib/tasks/read_items.py"]
if find_spec("triton") is None:
    collect_ignore_glob.append("bhlib/kernels/[!_]*.py")


def pytest_collectstart(collector):
    """Let nbval pass over what libraries write to stderr: progress, advice."""
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("stderr",)
