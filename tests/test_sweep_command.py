"""``python -m bhlib sweep``: what it reads, what it writes; in two processes, and after it was killed."""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from bhlib import load_demo, load_heldout
from bhlib.__main__ import main
from bhlib.evaluation import sweep
from bhlib.rules import BH, MinP, Threshold, TopK, TopP, WeightRatio
from bhlib.sweep_command import parse_rules

SMALL = ["--sequences", "1", "--length", "48"]
ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def test_rules_by_name():
    """Compared as they are written: two nulls are equal only if they are the same object."""
    assert str(parse_rules("own top-k:1-3,6  bh:0.01,1e-1")) == str(
        {
            "own": None,
            **{f"top-{k}": TopK(k) for k in (1, 2, 3, 6)},
            "BH 0.01": BH(0.01),
            "BH 0.1": BH(0.1),
        }
    )
    assert parse_rules("threshold:0.05 top-p:0.4 min-p:0.3 weight-ratio:0.2") == {
        "threshold 0.05": Threshold(0.05),
        "top-p 0.4": TopP(0.4),
        "min-p 0.3": MinP(0.3),
        "weight ratio 0.2": WeightRatio(0.2),
    }


def test_levels_that_print_alike_stay_two_rules():
    rules = parse_rules("threshold:0.05,5e-2,0.0500000001 top-k:10")
    assert rules == {
        "threshold 0.05": Threshold(0.05),
        "threshold 0.0500000001": Threshold(0.0500000001),
        "top-10": TopK(10),
    }


@pytest.mark.parametrize(
    ("specification", "message"),
    [
        ("topk:4", r"'topk:4': no rule is called 'topk'; there are: own, top-k, bh, threshold"),
        ("bh", "'bh': '' is neither a finite number nor a range of whole numbers such as 1-8"),
        ("bh:0.1,x", "'bh:0.1,x': 'x' is neither a finite number nor a range"),
        ("top-k:1-b", "'top-k:1-b': '1-b' is neither a finite number nor a range"),
        ("top-k:8-1", "'top-k:8-1': '8-1' is neither a finite number nor a range"),
        ("top-k:inf", "'top-k:inf': 'inf' is neither a finite number nor a range"),
        ("bh:nan", "'bh:nan': 'nan' is neither a finite number nor a range"),
        ("top-k:1-99999999999", "'1-99999999999' is neither a finite number nor a range"),
        ("top-k:2.5", "'top-k:2.5': k must be an int of 1 or more, got 2.5"),
        ("bh:2", "'bh:2': alpha=2.0 must lie strictly between 0 and 1"),
        ("  ", 'no rule is named: write for example "top-k:1-8'),
    ],
)
def test_rules_that_cannot_be_read(specification, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        parse_rules(specification)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sequences", "0"], "argument --sequences: must be 1 or more, got 0"),
        (["--length", "long"], "argument --length: invalid whole number value: 'long'"),
        (["--alphas", "2"], "argument --alphas: 'bh:2': alpha=2.0 must lie strictly between 0 and 1"),
        (["--split", "train"], "argument --split: invalid choice: 'train'"),
    ],
)
def test_arguments_that_cannot_be_read(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["sweep", *arguments])
    assert message in capsys.readouterr().err


def test_sequences_longer_than_the_model_reads():
    with pytest.raises(SystemExit, match="--length must be at most 1024, the longest text .* got 2000"):
        main(["sweep", "--length", "2000"])


@pytest.mark.parametrize("option", ["--out", "--cache"])
@pytest.mark.parametrize("place", ["file/below.csv", "folder", "x" * 300])
def test_what_cannot_be_written_is_said_before_computing(option, place, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    if (option, place) == ("--cache", "folder"):
        place = "file"
    with pytest.raises(SystemExit, match=f"cannot be .*{place}|{place}.* cannot be written"):
        main(["sweep", *SMALL, "--rules", "top-k:2", option, str(tmp_path / place)])
    assert "seq" not in capsys.readouterr().err  # the progress bar, with the first rule
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_an_earlier_table_stays_until_there_is_a_new_one(tmp_path):
    out = tmp_path / "table.csv"
    out.write_text("earlier", encoding="utf-8")
    with pytest.raises(SystemExit, match="--length must be at most"):
        main(["sweep", "--length", "2000", "--out", str(out)])
    assert out.read_text(encoding="utf-8") == "earlier"
    with pytest.raises(SystemExit, match="--length must be at most"):
        main(["sweep", "--length", "2000", "--out", str(tmp_path / "new.csv")])
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]


def test_a_damaged_cell_is_named_and_computed_again(tmp_path):
    command = ["sweep", *SMALL, "--rules", "top-k:1,2", "--cache", str(tmp_path / "cells"), "--out"]
    main([*command, str(tmp_path / "one.csv")])
    (cell,) = (tmp_path / "cells").glob("top-1-*.csv")
    cell.write_text("".join(cell.read_text(encoding="utf-8").splitlines(keepends=True)[:3]), encoding="utf-8")
    with pytest.warns(UserWarning, match=f"{cell.name} is not as it was written"):
        main([*command, str(tmp_path / "two.csv")])
    one, two = (pd.read_csv(tmp_path / name).drop(columns="seconds") for name in ("one.csv", "two.csv"))
    pd.testing.assert_frame_equal(one, two)


def test_the_table_is_that_of_a_sweep(tmp_path, capsys):
    out = tmp_path / "new" / "table.csv"
    main(["sweep", *SMALL, "--split", "test", "--rules", "own top-k:4-6", "--alphas", "0.05", "--out", str(out)])
    model, _ = load_demo()
    rules = {"own": None, **{f"top-{k}": TopK(k) for k in (4, 5, 6)}, "BH 0.05": BH(0.05)}
    wanted = sweep(model, rules, load_heldout("test", 48, 1))
    found = pd.read_csv(out, keep_default_na=False)
    pd.testing.assert_frame_equal(found.drop(columns="seconds"), wanted.drop(columns="seconds"))
    printed = capsys.readouterr().out
    means, _, matched = printed.partition("against static top-k")
    assert means.count("top-") == 3 and "BH 0.05" in means
    assert matched.splitlines()[-1].split()[:2] == ["BH", "0.05"]


def test_another_model_reads_the_text_in_its_own_tokens(tmp_path):
    model, tokenizer = load_demo(torch.bfloat16)
    letters = tokenizer.train_new_from_iterator([""], vocab_size=257)
    model.save_pretrained(tmp_path / "model")
    letters.save_pretrained(tmp_path / "model")
    out = tmp_path / "table.csv"
    options = ["--model", str(tmp_path / "model"), "--dtype", "float32", "--rules", "top-k:2", "--out", str(out)]
    main(["sweep", *SMALL, *options])
    data = load_heldout("validation", 48, 1, letters)
    wanted = sweep(load_demo()[0], {"top-2": TopK(2)}, data)
    assert pd.read_csv(out)["loss"].tolist() == pytest.approx(wanted["loss"].tolist())


def test_a_rule_that_fails_is_said_at_the_end(tmp_path, capsys):
    out = tmp_path / "table.csv"
    with pytest.raises(SystemExit, match="top-65 failed: ValueError: k must not exceed the number of experts"):
        main(["sweep", *SMALL, "--rules", "top-k:65,8", "--out", str(out)])
    assert pd.read_csv(out)["rule"].tolist() == ["top-65"] + 9 * ["top-8"]
    said = capsys.readouterr()
    assert "top-8" in said.out and "Not compared at equal cost: static top-k is needed at two" in said.err
    with pytest.raises(SystemExit, match="top-65 failed"):
        main(["sweep", *SMALL, "--rules", "top-k:65"])


# -- processes -------------------------------------------------------------------------------------------------

RULES = ["--rules", "top-k:1-4", "--alphas", "0.01,0.1"]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """What one process makes of `RULES`, undisturbed."""
    return shell_sweep(tmp_path_factory.mktemp("one"), [sys.executable, "-m"])


def shell_sweep(folder, launcher):
    """The table that a sweep writes, but for the seconds."""
    command = [*launcher, "bhlib", "sweep", *SMALL, *RULES, "--cache", str(folder / "cells"), "--out", "table.csv"]
    ended = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("against static top-k") == 1  # one process speaks for all
    return pd.read_csv(folder / "table.csv", keep_default_na=False).drop(columns="seconds")


def test_two_processes_write_the_same_table(table, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    pd.testing.assert_frame_equal(shell_sweep(tmp_path, launch), table, rtol=1e-6)
    assert len(list((tmp_path / "cells").iterdir())) == 6


def test_killed_and_resumed(table, tmp_path):
    cells = tmp_path / "cells"
    command = [sys.executable, "-m", "bhlib", "sweep", *SMALL, *RULES, "--cache", str(cells)]
    with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL) as process:
        stop = time.monotonic() + 200
        while len(list(cells.glob("*.csv"))) < 2 and time.monotonic() < stop:
            time.sleep(0.01)
        process.kill()
    finished = {path: path.stat().st_mtime_ns for path in cells.glob("*.csv")}
    assert 2 <= len(finished) < 6
    pd.testing.assert_frame_equal(shell_sweep(tmp_path, [sys.executable, "-m"]), table, check_exact=True)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert len(list(cells.glob("*.csv"))) == 6
