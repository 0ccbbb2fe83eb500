"""All figures of a study, one after the other, and the page that shows them; what was stopped goes on."""

import platform
import resource
import sys
import time
import traceback
from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

from bhlib.figures.about import NotForThisModel
from bhlib.figures.folder import StudyFolder
from bhlib.figures.page import write_page
from bhlib.figures.predecessor import compare_with_predecessor
from bhlib.figures.registry import FIGURES, FigureSpec, chosen, each_figure, redraw
from bhlib.figures.study import Study
from bhlib.figures.tables import to_csv, write_whole

__all__ = ["make_study"]


def make_study(
    study: Study, folder: str | Path, only: Iterable[str] | None = None, source: dict | None = None
) -> dict[str, str]:
    """Compute and draw the figures of a study, and write ``index.html``; figures that are finished stay as they are.

    Started by ``accelerate launch``, the processes share the rules of sweeps (`bhlib.evaluation.sweep`). All else each
    of them computes for itself, and the first one writes.

    Parameters
    ----------
    study : Study
        With ``cache`` a folder that outlasts the process, a study that was stopped goes on in the middle of a figure.
    folder : path
        Where tables, pictures and page go.
    only : iterable of str, optional
        Names of figures; by default all but those that take long and those that are of no model.
    source : dict, optional
        Where model and text come from, to be kept in the folder.

    Returns
    -------
    dict of str
        By name, the errors of figures that failed; those that have no meaning for the model are no errors.

    Raises
    ------
    ValueError
        If a name is not registered or that of a figure of no model, or the folder is another study's.
    """
    specs, named = chosen(only), only is not None
    if named and (others := [spec.name for spec in specs if not spec.of_model]):
        raise ValueError(f"{', '.join(others)}: of no model; `python -m bhlib figures` draws them without --model.")
    state = PartialState(cpu=not torch.cuda.is_available())
    place = StudyFolder(folder)
    if state.is_main_process:
        place.claim(study.identity, study.about, source or {}, environment(study))
    failed = {}
    # One process looks what is finished, so that all compute the same rest.
    wanted = [spec for spec in specs if spec.of_model and spec.is_computed(named)]
    (rest,) = broadcast_object_list([[spec.name for spec in wanted if not place.is_finished(spec.name)]])
    for spec in each_figure(chosen(rest), "figures", shown=state.is_main_process):
        if error := _make(study, place, spec, state):
            failed[spec.name] = error
    comparison = compare_with_predecessor(study)
    if state.is_main_process:
        if comparison is not None:
            place.tell("predecessor", comparison.astype(object).where(comparison.notna(), None).to_dict("records"))
        write_page(place, FIGURES)
    return failed


def _make(study: Study, place: StudyFolder, spec: FigureSpec, state: PartialState) -> str:
    """Compute and draw one figure; the error, if it fails."""
    _forget_peak()
    start = time.perf_counter()
    try:
        text = to_csv(spec.compute(study))
        if state.is_main_process:
            write_whole(place.path / f"{spec.name}.csv", text)
            redraw(place.path, spec)
            place.finish(spec.name, {"minutes": round((time.perf_counter() - start) / 60, 3)} | _peak())
    except NotForThisModel as reason:
        if state.is_main_process:
            place.leave_out(spec.name, "refused", str(reason))
            tqdm.write(f"{spec.name} has no meaning for this model: {reason}")
    except Exception as error:
        if state.num_processes > 1:  # the others would wait for this one
            raise
        tqdm.write(traceback.format_exc())
        message = f"{type(error).__name__}: {error}"
        place.leave_out(spec.name, "failed", message)
        return message
    return ""


def environment(study: Study) -> dict[str, str]:
    """Versions and devices, for the page."""
    state = PartialState(cpu=not torch.cuda.is_available())
    if study.device.type == "cuda":
        device = torch.cuda.get_device_name(study.device)
    else:
        device = f"{platform.machine()}, {torch.get_num_threads()} threads"
    return {
        "bhlib": import_module("bhlib").__version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "device": device,
        "processes": str(state.num_processes),
        "dtype": str(study.model.dtype).removeprefix("torch."),
    }


def _forget_peak() -> None:
    if torch.cuda.is_available():
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)


def _peak() -> dict[str, float]:
    """Most memory in GiB: that a figure took on the GPUs, or without one, that the process has taken until now."""
    if torch.cuda.is_available():
        most = sum(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))
    else:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"peak_gib": round(most / 2**30, 3)}
