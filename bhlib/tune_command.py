"""The command ``python -m bhlib tune``: train a model for a rule, in one process or in several.

python -m bhlib tune                                                       # the demo's routers, two minutes on a CPU
python -m bhlib tune --model demo --text my_texts --mean-k 4 --train router --out tuned.safetensors
accelerate launch -m bhlib tune --model allenai/OLMoE-1B-7B-0924 --dtype bfloat16 --text my_texts --checkpoint state.pt
"""

import argparse
import re
from pathlib import Path

import pandas as pd
import torch
from accelerate import PartialState
from torch import Tensor, nn

from bhlib.comparisons import summarize
from bhlib.evaluation import evaluate
from bhlib.loading import load_demo, load_olmoe
from bhlib.patching import RoutingPatch
from bhlib.rules import BH, Rule, Threshold
from bhlib.sweep_command import at_least, check_writable
from bhlib.texts import add_text_arguments, check_source, text_of
from bhlib.training import LevelController, Plan, Tuned, settle, tune
from bhlib.training.weights import PARTS

#: Rules that can be trained for by their name.
RULES: dict[str, type[Rule]] = {"bh": BH, "threshold": Threshold}

#: Sequences of each domain of the validation split that the command reports on.
REPORTED = 4


def mean_k_of(text: str) -> float | tuple[float, float]:
    """``4`` is one mean number of experts, ``2-7`` a range for an elastic model."""
    found = re.fullmatch(r"(\d+\.?\d*)(?:-(\d+\.?\d*))?", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number such as 4 nor a range such as 2-7.")
    return float(found[1]) if found[2] is None else (float(found[1]), float(found[2]))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command understands."""
    parser.add_argument("--model", default="demo", help="hub id or folder; demo for the embedded one (default: demo)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: the model's own, demo float32"
    )
    add_text_arguments(parser)
    parser.add_argument("--rule", choices=tuple(RULES), default="bh", help="what to train for (default: bh)")
    parser.add_argument(
        "--mean-k",
        type=mean_k_of,
        default=4.0,
        metavar="K",
        help="experts per token; 2-7 for any of these (default: 4)",
    )
    parser.add_argument(
        "--train", choices=PARTS, default="router", help="what is trained: routers; those and adapters on the "
        "attention; every weight (default: router)",
    )  # fmt: skip
    parser.add_argument("--tokens", type=at_least(1), default=50_000, metavar="N", help="to train on (default: 50000)")
    parser.add_argument(
        "--length", type=at_least(2), default=128, metavar="N", help="tokens per sequence (default: 128)"
    )
    parser.add_argument(
        "--batch-size", type=at_least(1), default=8, metavar="N", help="sequences per step (default: 8)"
    )
    parser.add_argument("--learning-rate", type=float, metavar="X", help="its peak (default: by what is trained)")
    parser.add_argument(
        "--distillation", type=float, default=Plan.distillation, metavar="X",
        help="weight of the divergence from the model itself, in [0, 1] (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the order of the text (default: 0)")
    parser.add_argument("--checkpoint", metavar="FILE", help="the state is kept here; the same command goes on from it")
    parser.add_argument(
        "--out", default="tuned.safetensors", metavar="FILE", help="what has changed goes here (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Run the command; of several processes, the first one writes and prints.

    It trains on the calibration split of the text and reports on some of its validation split.

    Raises
    ------
    SystemExit
        With the reason: a file that cannot be written, a text that cannot be read or is too short, a mean that no level
        gives, a checkpoint of another training.
    """
    state = PartialState(cpu=not torch.cuda.is_available())
    if state.is_main_process:
        check_writable(Path(arguments.out))
    check_source(arguments)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    if arguments.model == "demo":
        model, tokenizer = load_demo(dtype or torch.float32)
    else:
        model, tokenizer = load_olmoe(arguments.model, dtype or "auto", device_map=None)
    model.to(state.device)  # each process has a GPU to itself
    rule = RULES[arguments.rule]()
    names = ("mean_k", "train", "tokens", "batch_size", "learning_rate", "distillation", "seed")
    try:
        text = text_of(arguments, tokenizer)
        training = text.sequences("calibration", arguments.length)
        reported = text.sequences("validation", arguments.length, REPORTED)
        plan = {name: getattr(arguments, name) for name in names}
        tuned = tune(model, training, rule, checkpoint=arguments.checkpoint, **plan)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    if state.is_main_process:
        tuned.save(arguments.out)
        table = before_and_after(model, tuned, training, reported)
        print(table.to_string(index=False, float_format="{:.4f}".format))
        print(f"{arguments.out}: {Path(arguments.out).stat().st_size / 1e3:,.0f} kB")
    state.wait_for_everyone()
    state.destroy_process_group()


def before_and_after(
    model: nn.Module, tuned: Tuned, training: dict[str, Tensor], reported: dict[str, Tensor]
) -> pd.DataFrame:
    """Loss on a text of the model itself, and under the rule before and after training, at the means trained for.

    Parameters
    ----------
    model : nn.Module
        Not patched, with its own weights.
    tuned : Tuned
    training : dict of str to Tensor [sequences, length]
        The levels that the model itself would need are found on some of this.
    reported : dict of str to Tensor [sequences, length]

    Returns
    -------
    pandas.DataFrame
        A row for the model itself and two for each mean: ``rule``, ``mean_k``, ``loss``, ``tokens``.
    """
    some = {name: sequences[:: max(len(sequences) // 2, 1)] for name, sequences in training.items()}
    untuned = LevelController.on(model, tuned.rule, list(tuned.levels), some)
    with RoutingPatch(model, tuned.rule, collect_stats=False) as patch:
        settle(patch, untuned, some)
    frames = [evaluate(model, reported).assign(rule="the model itself")]
    for mean_k, level in zip(tuned.levels, untuned.levels, strict=True):
        frames.append(evaluate(model, reported, tuned.rule.at(level)).assign(rule=f"{mean_k:g} experts, before"))
        with tuned.in_place(model):
            after = evaluate(model, reported, tuned.rule_at(mean_k))
        frames.append(after.assign(rule=f"{mean_k:g} experts, after"))
    return summarize(pd.concat(frames, ignore_index=True))[["rule", "mean_k", "loss", "tokens"]]
