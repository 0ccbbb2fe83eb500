"""The recipe "Add a rule" (CONTRIBUTING.md): one class and one entry, seen wherever rules are seen."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex

from bhlib import figures
from bhlib.__main__ import main
from bhlib.figures.families import rivals, tried_families
from bhlib.levels import mean_experts
from bhlib.looks import Look, free_look
from bhlib.rules import FAMILIES, ProbabilityRule, RuleFamily, register
from bhlib.sweep_command import parse_rules

TABLES = Path(__file__).resolve().parent.parent / "figures"


@dataclass(frozen=True)
class RankedCut(ProbabilityRule):
    """Keep as many experts as have a probability above `cut`, divided by their rank."""

    cut: float = 0.1
    level_name = "cut"

    def count(self, top, probs, layer):
        return (top > self.level_for(top) / torch.arange(1, top.shape[-1] + 1)).sum(dim=-1)


@pytest.fixture
def entry():
    """The rule's entry, as long as a test lasts."""
    look = free_look(family.look for family in FAMILIES.values())
    yield register(RuleFamily("ranked cut", look, RankedCut))
    del FAMILIES["ranked cut"]


def test_the_sweep_command_knows_it_by_name(entry, tmp_path, capsys):
    assert parse_rules("ranked-cut:0.05,0.1") == {"ranked cut 0.05": RankedCut(0.05), "ranked cut 0.1": RankedCut(0.1)}
    with pytest.raises(SystemExit):
        main(["sweep", "--help"])
    assert "ranked-cut" in capsys.readouterr().out
    small = ["--length", "32", "--sequences", "1", "--rules", "ranked-cut:0.1", "--out", str(tmp_path / "table.csv")]
    main(["sweep", *small])
    assert pd.read_csv(tmp_path / "table.csv")["rule"].eq("ranked cut 0.1").all()


def test_it_is_compared(entry):
    assert list(rivals())[-1] == "ranked cut" and "ranked cut" in tried_families({})
    logits = 1.5 * torch.randn(2, 500, 64, generator=torch.Generator().manual_seed(0))
    rule = rivals()["ranked cut"](logits, 4.0)
    assert isinstance(rule, RankedCut) and mean_experts(rule, logits) == pytest.approx(4.0, abs=0.01)
    assert entry.level_of(rule) == rule.cut


def test_its_level_is_moved_and_may_differ_by_sequence():
    logits = 1.5 * torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    rule = RankedCut(0.1, max_k=6)
    assert rule.at(0.2) == RankedCut(0.2, max_k=6)
    both = rule.at([0.05, 0.2])(logits).counts
    assert torch.equal(both, torch.cat([rule.at(0.05)(logits[:10]).counts, rule.at(0.2)(logits[10:]).counts]))
    assert both[:10].sum() > both[10:].sum()


@pytest.mark.parametrize("name", ["loss_vs_experts", "matched_compute", "whole_test_split"])
def test_every_figure_of_families_draws_it(entry, name):
    table = pd.read_csv(TABLES / f"{name}.csv")
    mine = table[table["family"] == "min-p"].assign(family="ranked cut")
    draw = figures.FIGURES[name].draw
    fig = draw(pd.concat([table, mine], ignore_index=True))
    series = {bars.get_label(): bars.lines[0] for bars in fig.axes[0].containers}
    assert set(series) >= {"ranked cut", "BH", "min-p"}
    line = series["ranked cut"]
    assert Look(to_hex(line.get_color()).upper(), line.get_marker(), line.get_linestyle()) == entry.look
    legend = fig.legends[0] if fig.legends else fig.axes[0].get_legend()
    assert "ranked cut" in [text.get_text() for text in legend.get_texts()]


@pytest.mark.parametrize("name", ["loss_vs_experts", "matched_compute", "whole_test_split"])
def test_what_is_not_registered_is_not_left_out_silently(name):
    table = pd.read_csv(TABLES / f"{name}.csv")
    table.loc[table["family"] == "min-p", "family"] = "ranked cut"
    with pytest.raises(ValueError, match=r"no family is registered as \['ranked cut'\]; there are: static top-k, BH"):
        figures.FIGURES[name].draw(table)


def test_a_family_needs_a_look_of_its_own():
    with pytest.raises(TypeError, match="look"):
        RuleFamily("ranked cut")
    with pytest.raises(TypeError, match="'ranked cut' needs a look to be seen in figures, got None: free is"):
        register(RuleFamily("ranked cut", None, RankedCut))
    with pytest.raises(ValueError, match="the look of 'ranked cut' is that of 'top-p': free is for instance Look"):
        register(RuleFamily("ranked cut", FAMILIES["top-p"].look, RankedCut))
    look = free_look(family.look for family in FAMILIES.values())
    for name in ("top-p", "Top p"):
        with pytest.raises(ValueError, match=rf"'{name}' \(top-p\) is registered already"):
            register(RuleFamily(name, look, RankedCut))
    assert "ranked cut" not in FAMILIES


def test_looks_beyond_eight_colours_can_be_told_apart():
    taken = [family.look for family in FAMILIES.values()]
    for _ in range(40):
        taken.append(free_look(taken))
    assert len(set(taken)) == len(taken)
    assert len({(look.color, look.linestyle) for look in taken[:32]}) == 32
    assert len({look.marker for look in taken[:13]}) == 13


def test_a_rival_says_how_it_is_given_more_experts():
    look = free_look(family.look for family in FAMILIES.values())
    register(RuleFamily("ranked cut", look))
    try:
        with pytest.raises(ValueError, match="nothing says how 'ranked cut' gives a wanted number of experts"):
            rivals()
    finally:
        del FAMILIES["ranked cut"]
