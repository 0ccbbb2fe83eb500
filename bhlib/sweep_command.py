"""The command ``python -m bhlib sweep``: loss and cost of rules on text, in one process or in several.

python -m bhlib sweep --rules "top-k:1-8 bh:0.01,0.05 top-p:0.4" --out sweep.csv
python -m bhlib sweep --model allenai/OLMoE-1B-7B-0924 --text my_texts --out sweep.csv
accelerate launch -m bhlib sweep --cache cells --out sweep.csv                  # all GPUs, the same table
torchrun --nproc-per-node 2 -m bhlib sweep --cache cells --out sweep.csv        # two processes on CPUs
"""

import argparse
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState

from bhlib.comparisons import matched_compute, summarize, with_documents
from bhlib.evaluation import sweep
from bhlib.loading import SPLITS, load_demo, load_olmoe
from bhlib.rules import FAMILIES, Rule, RuleFamily
from bhlib.texts import add_text_arguments, check_source, text_of


def rule_families() -> dict[str, RuleFamily]:
    """The families of rules that one number makes, by the name of each in a specification."""
    return {family.command: family for family in FAMILIES.values() if family.make}


def parse_rules(specification: str) -> dict[str, Rule | None]:
    """Rules from a short text.

    Parameters
    ----------
    specification : str
        Entries with spaces between them, each a name in `rule_families`, a colon, and numbers with commas between them;
        ``1-8`` stands for all whole numbers from 1 to 8. ``own`` is the model's own routing. For example
        ``"own top-k:1-8 bh:0.01,0.05"``.

    Returns
    -------
    dict of str to Rule or None
        For `bhlib.evaluation.sweep`.

    Raises
    ------
    argparse.ArgumentTypeError
        If an entry cannot be read, or its rule refuses a number.
    """
    rules: dict[str, Rule | None] = {}
    families = rule_families()
    for entry in specification.split():
        if entry == "own":
            rules["own"] = None
            continue
        name, _, values = entry.partition(":")
        if name not in families:
            raise argparse.ArgumentTypeError(
                f"{entry!r}: no rule is called {name!r}; there are: own, {', '.join(families)}. "
                f'Write for example "top-k:1-8 bh:0.01,0.05".'
            )
        family = families[name]
        assert family.make is not None  # the others are not among `rule_families`
        make = family.make
        try:
            numbers = [number for part in values.split(",") for number in _numbers(part)]
            rules |= {family.written.format(_written(number)): make(number) for number in numbers}
        except (TypeError, ValueError) as error:
            raise argparse.ArgumentTypeError(f"{entry!r}: {error}") from error
    if not rules:
        raise argparse.ArgumentTypeError('no rule is named: write for example "top-k:1-8 bh:0.01,0.05".')
    return rules


def _numbers(part: str) -> list[float]:
    """``0.05`` is one number, ``1-8`` are eight."""
    ends = re.fullmatch(r"(\d{1,4})-(\d{1,4})", part)
    try:
        numbers = [float(k) for k in range(int(ends[1]), int(ends[2]) + 1)] if ends else [float(part)]
    except ValueError:
        numbers = []
    if not numbers or not math.isfinite(numbers[0]):
        raise ValueError(f"{part!r} is neither a finite number nor a range of whole numbers such as 1-8")
    return numbers


def _written(number: float) -> str:
    """The number as people write it, and so that no two numbers are written alike."""
    short = f"{number:g}"
    return short if float(short) == number else repr(number)


def check_writable(path: Path) -> None:
    """Raise a SystemExit unless a file can be written; its folder is made if there is none."""
    try:
        new = not path.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
        if new:
            path.unlink()
    except OSError as error:
        raise SystemExit(f"--out {path} cannot be written ({error.strerror}): name another file.") from error


def at_least(least: int) -> Callable[[str], int]:
    """Reads a whole number that is not smaller, for `argparse`."""

    def read(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be {least} or more, got {value}")
        return value

    read.__name__ = "whole number"  # as argparse calls it in its message about a text that is not one
    return read


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command understands."""
    parser.add_argument("--model", default="demo", metavar="NAME", help="hub id or folder (default: the embedded one)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: the model's own, demo float32"
    )
    parser.add_argument("--split", choices=SPLITS, default="validation", help="of the text (default: validation)")
    add_text_arguments(parser)
    parser.add_argument("--sequences", type=at_least(1), default=16, metavar="N", help="per domain (default: 16)")
    parser.add_argument("--length", type=at_least(2), default=512, metavar="N", help="tokens of each (default: 512)")
    parser.add_argument(
        "--batch-size",
        type=at_least(1),
        default=8,
        metavar="N",
        help="sequences in a pass; fewer take less memory (default: 8)",
    )
    parser.add_argument(
        "--rules", type=parse_rules, default="own top-k:1-8 bh:0.01,0.05,0.1,0.3", metavar="SPEC",
        help=f'"NAME:NUMBERS ...", NAME one of {", ".join(rule_families())} (default: "%(default)s")',
    )  # fmt: skip
    parser.add_argument(
        "--alphas", type=lambda text: parse_rules(f"bh:{text}"), default={}, metavar="A,B,...",
        help="further levels of BH: --alphas 0.02,0.2 adds bh:0.02,0.2 to the rules",
    )  # fmt: skip
    parser.add_argument("--cache", metavar="FOLDER", help="finished rules are kept here, and not computed again")
    parser.add_argument("--out", metavar="FILE.csv", help="write the table, a row per rule and sequence")


def run(arguments: argparse.Namespace) -> None:
    """Run the command; of several processes, the first one writes and prints.

    Raises
    ------
    SystemExit
        With the reason, if `--out` or `--cache` cannot be written to, if sequences are longer than the model reads, if
        the text cannot be read or is too short, or, after all the rest, if a rule failed.
    """
    state = PartialState(cpu=not torch.cuda.is_available())
    if state.is_main_process and arguments.out:
        check_writable(Path(arguments.out))
    check_source(arguments)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    if arguments.model == "demo":
        model, tokenizer = load_demo(dtype or torch.float32)
    else:
        model, tokenizer = load_olmoe(arguments.model, dtype or "auto", device_map=None)
    longest = model.config.max_position_embeddings
    if arguments.length > longest:
        raise SystemExit(
            f"--length must be at most {longest}, the longest text that this model reads; got {arguments.length}."
        )
    text = text_of(arguments, tokenizer)
    size = (arguments.length, arguments.sequences)
    try:
        data = text.sequences(arguments.split, *size)
        if state.is_main_process:
            text.check(*size, splits=[arguments.split])
    except ValueError as error:
        raise SystemExit(str(error)) from error
    model.to(state.device)  # each process has a GPU to itself
    try:
        rules = arguments.rules | arguments.alphas
        frame = sweep(model, rules, data, cache=arguments.cache, batch_size=arguments.batch_size)
    except OSError as error:
        raise SystemExit(str(error)) from error
    if state.is_main_process:
        if arguments.out:
            Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
            frame.to_csv(arguments.out, index=False, lineterminator="\n")
        _print(frame, text.documents(arguments.split, *size))
    state.destroy_process_group()
    failed = frame[frame["error"] != ""]
    if len(failed) and state.is_main_process:
        raise SystemExit("\n".join(f"{row.rule} failed: {row.error}" for row in failed.itertuples()))


def _print(frame: pd.DataFrame, documents: dict[str, np.ndarray]) -> None:
    """The means, and the comparison with static top-k, with intervals over the documents of the sequences."""
    if (frame["error"] != "").all():
        return
    frame = with_documents(frame, documents)
    print(summarize(frame).to_string(index=False, float_format="{:.4g}".format))
    try:
        matched = matched_compute(frame)
    except ValueError as reason:
        print(f"Not compared at equal cost: {reason}", file=sys.stderr)
    else:
        print("\nagainst static top-k at the same mean_k, 95 % intervals over documents:")
        print(matched.to_string(index=False, float_format="{:.4f}".format))
