"""The recipe "Add a null" (CONTRIBUTING.md): one class and one entry, and everything that offers nulls knows it."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import tiny_olmoe, tokens

from bhlib import BHRoutingIntegration, calibrate, load_calibration, load_demo
from bhlib.benchmarks import bench_routing
from bhlib.evidence import candidate_nulls
from bhlib.figures.families import tried_families
from bhlib.figures.nulls import compute_null_calibration, draw_null_calibration
from bhlib.pvalues import NULLS, STATISTICS, FittedNull, NullEntry, PValueMaker, each_statistic, make_pvalues
from bhlib.rules import BH
from bhlib.widgets import Explorer


class TokenLaplace(PValueMaker):
    """The token's background is a Laplace sample."""

    name = "laplace"
    statistic = "standardized"

    def __init__(self, exclude_top=8):
        self.exclude_top = exclude_top

    def statistic_of(self, router_logits, top=None):
        return STATISTICS[self.statistic](router_logits, self.exclude_top, top)

    def survival(self, statistics, layer=None):
        tail = torch.exp(-math.sqrt(2) * statistics.abs()) / 2
        return torch.where(statistics > 0, tail, 1 - tail)


class LogisticNull(FittedNull):
    """The null statistics are a sample of a logistic distribution."""

    name = "logistic"
    parts = ("center", "scale")

    @classmethod
    def fit_layers(cls, columns):
        tensors = {}
        for layer, samples in enumerate(columns):
            tensors[f"center.{layer}"] = torch.tensor([values.mean() for values in samples])
            tensors[f"scale.{layer}"] = torch.tensor([values.std() * math.sqrt(3) / math.pi for values in samples])
        return tensors, {}

    def layer_survival(self, statistics, center, scale):
        return torch.sigmoid((center - statistics) / scale).float()

    @classmethod
    def damage(cls, sizes, center, scale):
        if center.shape != (len(sizes),) or scale.shape != (len(sizes),):
            return "center or scale has another number of rows than the header announces"
        return None if center.isfinite().all() and (scale > 0).all() else "scale is not positive everywhere"


@pytest.fixture(autouse=True)
def entered(monkeypatch):
    laplace = NullEntry(
        TokenLaplace,
        "the token's own Laplace (no calibration)",
        takes=("exclude_top",),
        compared={"Laplace": {}},
        looks={"Laplace": ("#000000", "-.")},
        tried={"Laplace": {}},
    )
    logistic = NullEntry(
        LogisticNull,
        "logistic, fitted",
        compared=each_statistic("logistic"),
        looks={"logistic, logit": ("#F0E442", "-.")},
    )
    monkeypatch.setitem(NULLS, "laplace", laplace)
    monkeypatch.setitem(NULLS, "logistic", logistic)


def noise(layers, num_tokens, num_experts=64):
    return torch.randn(layers, num_tokens, num_experts)


def test_routing_knows_it_by_name():
    assert isinstance(make_pvalues("laplace"), TokenLaplace) and isinstance(BH(pvalues="laplace").pvalues, TokenLaplace)
    model = tiny_olmoe()
    with BHRoutingIntegration(model, pvalues="laplace", alpha=0.3) as patch, torch.no_grad():
        model(tokens(2, 16))
    assert isinstance(patch.rule.pvalues, TokenLaplace) and patch.get_routing_stats()["mean_experts_per_token"] > 1
    with pytest.raises(ValueError, match="'softmax', 'laplace' or a PValueMaker"):
        make_pvalues("magic")


def test_calibration_fits_it_by_name_and_a_file_gives_back_the_same_bits(tmp_path):
    model, ids = tiny_olmoe(), tokens(4, 64)
    null = calibrate(model, ids, null="logistic", progress=False)
    assert isinstance(null, LogisticNull)
    null.save(tmp_path / "null.safetensors")
    loaded, logits = load_calibration(tmp_path / "null.safetensors", model), noise(1, 20)[0]
    assert isinstance(loaded, LogisticNull) and torch.equal(loaded(logits, 1), null(logits, 1))
    with BHRoutingIntegration(model, pvalues=loaded), torch.no_grad():
        model(ids)
    null.tensors["scale.1"].zero_()
    null.save(tmp_path / "null.safetensors")
    with pytest.raises(ValueError, match="in layer 1 scale is not positive"):
        load_calibration(tmp_path / "null.safetensors", model)


def test_the_explorer_offers_it():
    explorer = Explorer(*load_demo(), {"one": "It was a bright morning, and she had nothing to say."})
    assert [label for label, _ in explorer.null.options][-2:] == [NULLS[n].label for n in ("laplace", "logistic")]
    for null, maker in {"laplace": TokenLaplace, "logistic": LogisticNull}.items():
        explorer.null.value = null
        assert isinstance(explorer.rule.pvalues, maker) and explorer.message.value == ""
        assert explorer.rule.pvalues.exclude_top == 8 and explorer.statistic.disabled is (null == "laplace")


def test_the_evidence_tests_it_and_the_figure_draws_it(monkeypatch):
    for name in ("kde", "conformal"):  # they take time
        monkeypatch.delitem(NULLS, name)
    makers = candidate_nulls(noise(2, 256), "noise")
    assert isinstance(makers["Laplace"], TokenLaplace)
    assert {f"logistic, {statistic}" for statistic in STATISTICS} < makers.keys()
    assert not makers["logistic, standardized, per expert"].shared
    study = SimpleNamespace(
        name="tiny", model=tiny_olmoe(), calibration_logits=noise(2, 128), validation_logits=noise(2, 128), window=64
    )
    table = compute_null_calibration(study)
    assert {"Laplace", "logistic, centered"} < set(table["null"])
    drawn = {"Dirichlet", "Gaussian, trimmed", "Gaussian, truncated", "Laplace", "logistic, logit"}
    assert names_in_legend(table) == drawn
    assert names_in_legend(table[table["null"] != "Laplace"]) == drawn - {"Laplace"}  # made before it was entered


def names_in_legend(table):
    return {text.get_text() for text in draw_null_calibration(table).legends[0].get_texts()}


def test_rules_are_tried_with_it_and_routing_is_timed_with_it():
    assert "BH, Laplace" in tried_families({})
    table = bench_routing(64, 16, max_k=4, loop_tokens=8, min_run_time=0.001, devices=["cpu"])
    assert {"laplace", "logistic", "BH, laplace", "BH, logistic"} < set(table["operation"])
    assert np.isfinite(table["ns_per_token"]).all()


def test_an_entry_says_what_it_cannot_mean():
    with pytest.raises(ValueError, match=r"takes has \['alpha'\]"):
        NullEntry(TokenLaplace, "Laplace", takes=("alpha",))
    with pytest.raises(ValueError, match=r"looks has \['Laplace'\]"):
        NullEntry(TokenLaplace, "Laplace", looks={"Laplace": ("#000000", "-")})
