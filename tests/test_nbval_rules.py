"""The rules in nbval.cfg hide what differs between two runs, and nothing else."""

import re
from pathlib import Path

import pytest
from nbval.plugin import get_sanitize_patterns

CONFIG = (Path(__file__).parent / "nbval.cfg").read_text(encoding="utf-8")
RULES = get_sanitize_patterns(CONFIG)


def sanitized(text):
    """What nbval compares in the place of `text`."""
    for regex, replacement in RULES:
        text = re.sub(regex, replacement, text)
    return text


def test_nbval_reads_every_rule():
    assert len(RULES) == len(re.findall(r"^regex:", CONFIG, flags=re.MULTILINE))


@pytest.mark.parametrize(
    ("once", "again"),
    [
        (" 12%|#2   | 3/25 [00:01<00:09,  2.4it/s]", "100%|####| 25/25 [00:08<00:00,  3.1it/s]"),
        ("texts: 3it [00:01,  2.4it/s]", "texts: 0it [00:00, ?it/s]"),
        ("  0%|          | 0/25 [00:00<?, ?it/s]", "100%|██████████| 25/25"),
        ("generated 64 tokens in 3.2 s", "generated 64 tokens in 11 s"),
        ("median 812 µs, 1,250 tokens/s", "median 1.3 ms, 980.5 tokens/s"),
        ("<function bh at 0x7f3a5c0d2e80>", "<function bh at 0x7fffe8a11d00>"),
        ("/home/ada/study/figures/sweep.png", "/content/bhlib/figures/sweep.png"),
        ("torch 2.13.0+cpu, transformers==5.23.0", "torch 2.11.0, transformers==5.15.0"),
        ("VBox(children=(FloatSlider(value=0.05),))", "VBox(children=(FloatSlider(value=0.050),), layout=…)"),
        ('<td id="T_0a1b2_row0_col0">4.35</td>', '<td id="T_ffe01_row0_col0">4.35</td>'),
        ("skew -0.00", "skew 0.00"),
    ],
)
def test_what_differs_between_runs_is_hidden(once, again):
    assert sanitized(once) == sanitized(again)


@pytest.mark.parametrize(
    "text",
    [
        "mean 4.35 experts, sd 1.72, alpha 0.05",
        "loss 2.553 at top-8, 2.637 at top-4",
        "    k   loss\n0   1  3.012\n1   8  2.553",
        "tensor([0.2500, -0.1250, 0.0000])",
        "rejects 4 of 15 at 0.05 (Bonferroni 3)",
        "16 layers, 64 experts, sparsity gain 45.6 %",
        "a difference of -0.01 nats",
    ],
)
def test_a_result_is_compared_as_it_stands(text):
    assert sanitized(text) == text
