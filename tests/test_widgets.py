"""The explorer, on the real demo model: what moves when a control moves, and what it costs."""

import asyncio
import gc
import re
import time

import numpy as np
import psutil
import pytest
from matplotlib import pyplot

from bhlib import BHRoutingIntegration, load_demo
from bhlib.contributions import measure_token
from bhlib.evaluation import evaluate
from bhlib.procedures import PROCEDURES
from bhlib.pvalues import NULLS, STATISTICS, ContributionNull
from bhlib.rules import BH
from bhlib.widgets import Explorer, heldout_texts

SHORT = {"one": "It was a bright morning, and she had nothing to say.", "two": "def mean(values):\n    return"}


@pytest.fixture(scope="module")
def demo():
    return load_demo()


@pytest.fixture
def explorer(demo):
    """An explorer of short passages, in a script: without an event loop, the loss follows every move at once."""
    return Explorer(*demo, SHORT)


def shown(explorer):
    return explorer.mean.value, explorer.loss.value, explorer.charts.value, explorer.colored.value


def mean_of(explorer):
    return float(re.match(r"<b>([\d.]+)</b>", explorer.mean.value).group(1))


def test_alpha_changes_numbers_and_pictures_and_back_gives_the_first_again(explorer):
    first = shown(explorer)
    explorer.alpha.value = 0.5
    assert all(new != old for new, old in zip(shown(explorer), first, strict=True))
    explorer.alpha.value = 0.05
    assert shown(explorer) == first


def test_the_start_lies_on_a_step_of_the_slider(explorer):
    steps = (np.log10(explorer.alpha.value) - explorer.alpha.min) / explorer.alpha.step
    assert steps == pytest.approx(round(steps), abs=1e-9)
    assert 10**explorer.alpha.max < 1


def test_loss_is_that_of_the_patched_model(demo, explorer):
    explorer.alpha.value, explorer.temperature.value = 0.2, 2.0
    data = {"passage": demo[1](SHORT["one"], return_tensors="pt")["input_ids"]}
    patched = evaluate(demo[0], data, BH(0.2), temperature=2.0)["loss"].item()
    own = evaluate(demo[0], data)["loss"].item()
    assert f"<b>{patched:.3f}</b>" in explorer.loss.value and f": {own:.3f} " in explorer.loss.value


@pytest.mark.parametrize("null", NULLS)
def test_every_null_works_with_every_statistic_that_it_takes(explorer, null):
    before = mean_of(explorer)
    explorer.null.value = null
    fitted = null in ("kde", "conformal")
    assert explorer.statistic.disabled is not fitted
    assert (null == "dirichlet") == (mean_of(explorer) == before)
    assert ("1 - softmax is not a p-value" in explorer.message.value) is (null == "softmax")
    means = set()
    for statistic in STATISTICS if fitted else ():
        explorer.statistic.value = statistic
        means.add(mean_of(explorer))
        assert explorer.rule.pvalues.statistic == statistic and explorer.message.value == ""
    assert not fitted or len(means) == len(STATISTICS)
    assert explorer.busy.value == "" and explorer.loss.value


def test_every_procedure_works(explorer):
    means = {}
    for method in PROCEDURES:
        explorer.method.value = method
        assert explorer.rule.method == method and explorer.message.value == "" and explorer.loss.value
        means[method] = mean_of(explorer)
    assert means["by"] < means["bh"] < means["fixed"] and means["bonferroni"] < means["bh"]


def test_every_layer_and_every_bound_works(explorer):
    for layer in explorer.layer.options:
        explorer.layer.value = layer
        assert ("8 layers" if layer == "all" else f"layer {layer}") in explorer.mean.value
        counts = explorer.routed.counts if layer == "all" else explorer.routed.counts[layer]
        assert mean_of(explorer) == pytest.approx(counts.mean(), abs=0.006)
    for min_k in (0, 8):
        explorer.min_k.value = min_k
        assert explorer.routed.counts.min() >= min_k and explorer.message.value == ""
    explorer.alpha.value, explorer.min_k.value = 0.9, 1
    for max_k in (1, 8, 16):
        explorer.max_k.value = max_k
        assert explorer.routed.counts.max() == max_k


def test_a_token_is_explained(explorer):
    """All layers: what it gets in each. One layer: the decision, which follows the token and the controls."""
    explorer.alpha.value, explorer.token.value = 0.2, 3
    assert explorer.token.max == len(explorer.routed.tokens) - 1
    counts = " ".join(map(str, explorer.routed.counts[:, 3]))
    assert f"token 3, <code>{explorer.routed.tokens[3]!r}" in explorer.why.value.replace("&#x27;", "'")
    assert f"experts by layer: {counts}. Choose a layer" in explorer.why.value
    explorer.layer.value, explorer.max_k.value = 4, 16
    seen = set()
    for token in range(explorer.token.max + 1):
        explorer.token.value = token
        count = explorer.routed.counts[4, token]
        assert f"layer 4: the procedure finds <b>{count}</b><table>" in explorer.why.value
        assert explorer.why.value.count("background:#deebf7") == count
        seen.add(count)
    assert len(seen) > 3
    explorer.alpha.value, explorer.max_k.value = 0.9, 2
    assert re.search(r"the procedure finds <b>\d+</b>, and max_k makes it 2<table>", explorer.why.value)
    explorer.min_k.value, explorer.max_k.value = 6, 3
    assert explorer.why.value == ""
    explorer.token.value = 0
    assert "min_k must not exceed max_k" in explorer.message.value and explorer.why.value == ""


def test_the_null_of_measured_contributions_follows_max_k(explorer):
    """It is fitted to what experts add among the best max_k of a token; what was measured is measured once."""
    notes = []
    explorer.busy.observe(lambda change: notes.append(change["new"]), "value")
    explorer.null.value = "contribution"
    null = explorer.rule.pvalues
    assert isinstance(null, ContributionNull) and null.largest == 0.1 and null.header["max_k"] == 8
    assert null.smallest_sample == 62 and explorer.statistic.disabled and explorer.message.value == ""
    assert any("fitting the contribution null on calibration text" in note for note in notes)
    seen, mean = explorer._fits._contributions, mean_of(explorer)
    explorer.max_k.value = 4
    assert explorer.rule.pvalues.header["max_k"] == 4 and explorer._fits._contributions is seen
    explorer.max_k.value = 8
    assert explorer.rule.pvalues is null and mean_of(explorer) == mean
    explorer.alpha.value = 0.01  # fewer than 99 documents
    assert "62 calibration documents give no p-value below" in explorer.message.value


def test_what_each_expert_adds_stands_beside_the_decision(demo, explorer):
    explorer.alpha.value, explorer.token.value = 0.2, 3
    assert "the kept ones make" not in explorer.why.value
    explorer.layer.value = 4
    measured = measure_token(demo[0], demo[1](SHORT["one"], return_tensors="pt")["input_ids"], 3)
    rows = re.findall(r"<tr style=\"[^\"]*\">(.+?)</tr>", explorer.why.value)[1:]
    for row in rows:
        cells = re.findall(r"<td[^>]*>(.*?)</td>", row)
        expert = int(cells[1])
        assert cells[-2].endswith(f"</span>{measured.r[4, 0, expert]:.3f}")
        assert cells[-1] == f"{measured.along[4, 0, expert]:+.3f}"
    own = set(measured.selected[4, 0].nonzero().flatten().tolist())
    assert own <= {int(re.findall(r"<td[^>]*>(.*?)</td>", row)[1]) for row in rows}


def test_a_token_is_measured_when_its_slider_rests_and_once(explorer, monkeypatch):
    calls = []
    monkeypatch.setattr("bhlib.widgets.measure_token", lambda *args: (calls.append(args[2]), measure_token(*args))[1])
    explorer.layer.value = 4
    assert calls == [0]

    async def drag():
        for token in (1, 2, 3):
            explorer.token.value = token
            await asyncio.sleep(0.01)
        assert "token 3" in explorer.why.value and "the kept ones make" not in explorer.why.value
        assert "when the slider rests" in explorer.busy.value and calls == [0]
        await asyncio.sleep(1.0)
        assert "token 3" in explorer.why.value and "the kept ones make" in explorer.why.value
        explorer.alpha.value, explorer.layer.value = 0.1, 5  # known by now
        assert "the kept ones make" in explorer.why.value
        await asyncio.sleep(1.0)

    asyncio.run(drag())
    assert calls == [0, 3] and explorer.busy.value == ""
    explorer.passage.value = "two"
    assert calls == [0, 3, 3] and "the kept ones make" in explorer.why.value


def test_compensation_changes_the_loss_and_what_is_generated_and_is_fitted_once(demo, explorer):
    explorer.alpha.value = 0.005
    before, notes = shown(explorer), []
    explorer.busy.observe(lambda change: notes.append(change["new"]), "value")
    data = {"passage": demo[1](SHORT["one"], return_tensors="pt")["input_ids"]}
    own, plain = (evaluate(demo[0], data, rule)["loss"].item() for rule in (None, BH(0.005)))
    losses = {None: plain}
    for rank, words in ((0, "their mean outputs"), (16, "means and a map of rank 16")):
        explorer.compensation.value = words
        losses[rank] = evaluate(demo[0], data, BH(0.005), compensation=explorer._standing_in())["loss"].item()
        assert (
            f"<b>{losses[rank]:.3f}</b>" in explorer.loss.value and f"{words} for dropped ones" in explorer.loss.value
        )
        assert (
            f"(difference {losses[rank] - own:+.3f}, with nothing for them {plain - own:+.3f}, " in explorer.loss.value
        )
        assert explorer._standing_in().rank == rank and explorer.message.value == explorer.busy.value == ""
    assert len(set(losses.values())) == 3
    fits = [note for note in notes if "fitting what stands in for experts on calibration text" in note]
    assert len(fits) == 2
    explorer.alpha.value = 0.05
    assert len([note for note in notes if "fitting" in note]) == 2
    explorer.button.click()
    assert "means and a map of rank 16 for dropped ones: " in explorer.bh_text.value
    explorer.alpha.value, explorer.compensation.value = 0.005, "nothing"
    assert shown(explorer) == before


def test_a_shorter_passage_takes_the_token_along(explorer):
    explorer.layer.value = 2
    explorer.token.value = explorer.token.max
    explorer.passage.value = "two"
    assert explorer.token.value == explorer.token.max == len(explorer.routed.tokens) - 1
    assert f"token {explorer.token.value}, " in explorer.why.value and explorer.message.value == ""
    explorer.text.value = ""
    assert explorer.why.value == ""


def test_bounds_that_contradict_each_other_are_reported_and_take_the_numbers_away(explorer):
    first = shown(explorer)
    explorer.min_k.value, explorer.max_k.value = 6, 3
    assert "min_k must not exceed max_k, got min_k=6 and max_k=3" in explorer.message.value
    assert explorer.mean.value == explorer.loss.value == ""
    explorer.min_k.value, explorer.max_k.value = 1, 8
    assert explorer.message.value == "" and shown(explorer) == first


@pytest.mark.parametrize("text", ["", "a"])
def test_a_passage_with_nothing_to_predict_is_reported(explorer, text):
    first = shown(explorer)
    explorer.text.value = text
    assert "but needs 2 or more: type a few words, or pick a passage" in explorer.message.value
    assert explorer.mean.value == explorer.colored.value == "" and explorer.charts.layout.display == "none"
    explorer.alpha.value = 0.5  # nothing to redraw
    explorer.button.click()
    explorer.alpha.value, explorer.passage.value = 0.05, "one"
    assert explorer.message.value == "" and shown(explorer) == first and explorer.charts.layout.display == ""


def test_a_typed_passage_is_read(explorer):
    explorer.text.value = "She said <i>nothing</i>."
    assert explorer.passage.value == "typed below"
    assert "".join(explorer.routed.tokens) == explorer.text.value and "<i>" not in explorer.colored.value
    explorer.passage.value = "two"
    assert explorer.text.value == SHORT["two"] and "".join(explorer.routed.tokens) == SHORT["two"]


def test_an_explorer_can_start_with_no_passage(demo):
    explorer = Explorer(*demo, passages={})
    assert "type a few words" in explorer.message.value and "image/png" not in explorer._repr_mimebundle_()


def test_generate_shows_two_texts(demo, explorer):
    explorer.alpha.value = 0.0005
    explorer.button.click()
    assert "on average</div>" in explorer.bh_text.value and "own top-8</div>" in explorer.own_text.value
    parts = (explorer.bh_text.value, explorer.own_text.value)
    texts = [re.search(r"</div><div[^>]*>(.+)</div>", part, re.DOTALL).group(1) for part in parts]
    assert texts[0] != texts[1] and explorer.busy.value == "" and explorer.button.disabled is False
    explorer.passage.value = "two"
    assert explorer.bh_text.value == explorer.own_text.value == ""


def test_a_model_that_is_patched_elsewhere_is_reported(demo, explorer):
    with BHRoutingIntegration(demo[0]):
        explorer.alpha.value = 0.5
    assert "is patched already" in explorer.message.value and explorer.busy.value == ""


def test_the_loss_waits_until_the_slider_rests(explorer):
    """In a kernel an event loop runs: many moves make one pass over the model, with a sign while it is due."""
    losses, signs = [], []
    explorer.loss.observe(lambda change: losses.append(change["new"]), "value")
    explorer.busy.observe(lambda change: signs.append(change["new"]), "value")

    async def drag():
        for alpha in (0.1, 0.2, 0.3, 0.4):
            explorer.alpha.value = alpha
            await asyncio.sleep(0.01)
        assert losses == [] and "when the slider rests" in explorer.busy.value
        await asyncio.sleep(1.0)

    asyncio.run(drag())
    assert len(losses) == 1 and explorer.busy.value == ""
    assert [bool(sign) for sign in signs] == [True, False, True, False]


def test_what_a_notebook_saves_is_a_view_a_picture_and_a_line(explorer):
    bundle = explorer._repr_mimebundle_()
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == explorer.widget.model_id
    assert bundle["image/png"].startswith("iVBOR") and len(bundle["image/png"]) > 20_000
    assert bundle["text/plain"] == "Explorer of demo: run the cells above and this one for its sliders"


def test_the_picture_says_that_it_is_one(explorer):
    """It stands where a reader looks for sliders: in Colab before the first run, and on GitHub for good."""
    dials, note = explorer.draw().get_suptitle().splitlines()
    assert dials.startswith("benjamini hochberg; Dirichlet (no calibration); α = 0.05")
    assert note == "A picture, without sliders: run the cells above and this one, in Colab or JupyterLab, to get them."


def test_every_part_can_be_found_by_its_class(explorer):
    found = set()

    def walk(part):
        assert type(part).__module__.startswith("ipywidgets.")
        found.update(part._dom_classes)
        for child in getattr(part, "children", ()):
            walk(child)

    walk(explorer.widget)
    parts = (
        "explorer passage input alpha temperature null statistic method layer min-k max-k compensation "
        "mean loss busy message charts colored token why generate text own-text"
    )
    assert found == {f"bh-{name}" for name in parts.split()}


def test_heldout_texts_are_short_texts_of_every_domain():
    texts = heldout_texts("calibration", length=32)
    assert len(texts) == 9 and all(text.strip() and "<|endoftext|>" not in text for text in texts.values())


@pytest.mark.timing
def test_500_moves_leave_nothing_behind(explorer):
    process = psutil.Process()

    async def move(times):
        for i in range(times):
            explorer.alpha.value = 0.001 * 1.05 ** (i % 100 + 1)
            await asyncio.sleep(0)

    asyncio.run(move(100))  # matplotlib keeps the layout of some thousand texts
    gc.collect()
    objects, memory = len(gc.get_objects()), process.memory_info().rss
    asyncio.run(move(500))
    gc.collect()
    assert len(gc.get_objects()) - objects < 100
    assert process.memory_info().rss - memory < 10e6
    assert pyplot.get_fignums() == []


@pytest.mark.timing
def test_time_of_a_slider_move_at_512_tokens(demo, capsys):
    """Prints it; a time is not asserted."""
    explorer = Explorer(*demo, {"novels": heldout_texts(length=512)["novels"]})
    assert len(explorer.routed.tokens) == 512

    async def drag(times):
        for i in range(100):
            start = time.perf_counter()
            explorer.alpha.value = 0.0005 * 1.07 ** (i + 1)
            times.append(1000 * (time.perf_counter() - start))
            await asyncio.sleep(0)

    lines = []
    for null in ("dirichlet", "gaussian", "kde", "conformal"):
        explorer.null.value = null
        for layer in ("all", 4):  # of one layer, with a token's table
            explorer.layer.value = layer
            asyncio.run(drag(times := []))
            median, late = np.percentile(times, [50, 95])
            where = f"{null}, layer {layer}"
            lines.append(f"{where:20s} median {median:5.1f} ms, 95th percentile {late:5.1f} ms")
    with capsys.disabled():
        print("", "a slider move at 512 tokens:", *lines, sep="\n")
