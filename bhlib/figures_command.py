"""The command ``python -m bhlib figures``: those of the embedded model, or of any model that can be patched.

python -m bhlib figures                                                        # the embedded model's, to figures/
python -m bhlib figures --model allenai/OLMoE-1B-7B-0924 --folder olmoe        # another model's, and a page of them
python -m bhlib figures --folder olmoe                                         # go on where that was stopped
accelerate launch -m bhlib figures --model … --folder olmoe                    # sweeps on all GPUs
"""

import argparse
from typing import Any

import torch
from accelerate import PartialState

from bhlib.loading import load_demo, load_olmoe
from bhlib.sweep_command import at_least
from bhlib.texts import add_text_arguments, check_source, text_of

#: What a study is made with, where neither the command nor its folder says otherwise.
DEFAULTS: dict[str, Any] = {
    "model": "demo", "dtype": None, "text": None, "text_field": "text", "text_separator": None, "sequences": 16,
    "length": 512, "tokens_per_pass": 4096,
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command understands."""
    parser.add_argument("--folder", default="figures", help="where pictures and tables go (default: figures)")
    parser.add_argument("--only", action="append", metavar="NAME", help="draw this figure only; may be repeated")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--redraw", action="store_true", help="draw from the CSV tables in the folder, without the model")
    how.add_argument("--check", action="store_true", help="recompute, write nothing, fail if a number has moved")
    parser.add_argument(
        "--model", metavar="NAME",
        help="hub id or folder of another model, demo for the embedded one with another text or size; --folder is then "
        "its own, and keeps these options and what is finished",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: the model's own, demo float32"
    )
    add_text_arguments(parser)
    parser.add_argument("--sequences", type=at_least(2), metavar="N", help="of each domain (default: 16)")
    parser.add_argument("--length", type=at_least(16), metavar="N", help="tokens of each (default: 512)")
    parser.add_argument(
        "--tokens-per-pass", type=at_least(1), metavar="N", help="fewer take less memory (default: 4096)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Run the command.

    Raises
    ------
    SystemExit
        With the reason: numbers that have moved, a model or a text that cannot be read, a folder that is another
        study's, or, after all the rest, figures that failed.
    """
    from bhlib.figures import registry  # imports matplotlib, which other commands do not need
    from bhlib.figures.folder import StudyFolder

    folder = StudyFolder(arguments.folder)
    given = {name: value for name in DEFAULTS if (value := getattr(arguments, name)) is not None}
    if given["text_field"] == DEFAULTS["text_field"]:  # as argparse leaves it
        del given["text_field"]
    if arguments.redraw:
        _print_paths(registry.redraw_figures(arguments.folder, arguments.only))
    elif given or folder.is_there:
        if "model" not in given and not folder.is_there:
            raise SystemExit(
                f"--{', --'.join(given).replace('_', '-')}: name the model as well, --model demo for the embedded one, "
                f"and a folder for it."
            )
        _run_study(arguments, folder, DEFAULTS | folder.facts.get("source", {}) | given)
    elif arguments.check:
        _check(arguments, None)
    else:
        _print_paths(registry.make_figures(arguments.folder, arguments.only))


def _run_study(arguments: argparse.Namespace, folder, source: dict[str, Any]) -> None:
    """Make or check the figures of a study; of several processes, the first one writes and prints."""
    from bhlib.figures.report import make_study
    from bhlib.figures.study import Study

    state = PartialState(cpu=not torch.cuda.is_available())
    options = argparse.Namespace(**source)
    check_source(options)
    model, tokenizer = _load(source, state)
    text = text_of(options, tokenizer)
    sizes = {name: source[name] for name in ("sequences", "length", "tokens_per_pass")}
    try:
        study = Study(
            cache=None if arguments.check else folder.path / "cells", folder=folder.path, model=model,
            tokenizer=tokenizer, text=text, **sizes,
        )  # fmt: skip
        study.check_text()
        if arguments.check:
            folder.check_same(study.identity, study.about)
            _check(arguments, study)
            return
        failed = make_study(study, folder.path, arguments.only, source)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    if state.is_main_process:
        print(folder.path / "index.html")
    state.destroy_process_group()
    if failed:
        raise SystemExit("\n".join(f"{name} failed: {error}" for name, error in failed.items()))


def _load(source: dict[str, Any], state: PartialState) -> tuple:
    """The model and its tokenizer: spread over what there is, or in each of several processes whole on its own GPU."""
    dtype = getattr(torch, source["dtype"]) if source["dtype"] else None
    if source["model"] == "demo":
        model, tokenizer = load_demo(dtype or torch.float32)
        return model.to(state.device), tokenizer
    spread = torch.cuda.is_available() and state.num_processes == 1
    try:
        model, tokenizer = load_olmoe(source["model"], dtype or "auto", device_map="auto" if spread else None)
    except OSError as error:
        raise SystemExit(str(error)) from error
    return (model if spread else model.to(state.device)), tokenizer


def _check(arguments: argparse.Namespace, study) -> None:
    from bhlib.figures import registry, tables

    moved = registry.check_figures(arguments.folder, arguments.only, study)
    if len(moved):
        raise SystemExit(tables.report(moved))
    print(f"{arguments.folder}: every number is as it was, within its tolerance")


def _print_paths(paths) -> None:
    for path in paths:
        print(f"{path.with_suffix('.png')}  {path}")
