"""Calibration: the right values, sampled uniformly, in bounded memory; and the model is left as it was."""

import numpy as np
import pytest
import torch
from models import tiny_olmoe, tokens
from scipy.stats import chisquare, norm

from bhlib import BHRoutingIntegration, find_moe_layers
from bhlib.calibration import (
    calibrate,
    collect_router_logits,
    fit_null,
    load_calibration,
    name_of,
    tail_factors,
)
from bhlib.levels import mean_experts
from bhlib.pvalues import STATISTICS, ConformalNull, KDENull, TokenGaussian
from bhlib.rules import BH
from bhlib.sampling import Reservoir


@pytest.fixture(scope="module")
def model():
    return tiny_olmoe()


def router_outputs(model, ids, attention_mask=None):
    """Logits [layers, batch * length, experts] that each gate returns in one forward pass."""
    seen = []
    gates = [layer.mlp.gate for layer in model.model.layers]
    handles = [gate.register_forward_hook(lambda m, a, out: seen.append(out[0])) for gate in gates]
    with torch.no_grad():
        model(input_ids=ids, attention_mask=attention_mask)
    for handle in handles:
        handle.remove()
    return torch.stack(seen)


def null_values_by_hand(logits, statistic, exclude_top):
    """{expert: values} of one layer: a loop over tokens that leaves out the largest logits of each."""
    values = {expert: [] for expert in range(logits.shape[-1])}
    for row in logits:
        statistics = STATISTICS[statistic](row[None], exclude_top)[0]
        for expert in row.argsort()[: len(row) - exclude_top].tolist():
            values[expert].append(statistics[expert].item())
    return values


# -- the right values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("statistic", "exclude_top"), [("standardized", 8), ("logit", 0), ("log_prob", 5)])
def test_the_sample_is_the_null_experts_of_every_token(model, statistic, exclude_top):
    ids = tokens(3, 10)
    null = calibrate(
        model, ids, null="conformal", statistic=statistic, exclude_top=exclude_top, batch_size=2, progress=False
    )
    for layer, logits in enumerate(router_outputs(model, ids)):
        expected = sum(null_values_by_hand(logits, statistic, exclude_top).values(), [])
        torch.testing.assert_close(null.tensors[f"sample.{layer}"][0], torch.tensor(expected).sort().values)
    assert null.header["sample_sizes"] == [30 * (64 - exclude_top)] * 3


def test_each_expert_gets_its_own_values(model):
    ids = tokens(3, 10)
    null = calibrate(model, ids, null=ConformalNull, per_expert=True, batch_size=2, progress=False)
    for layer, logits in enumerate(router_outputs(model, ids)):
        for expert, values in null_values_by_hand(logits, "log_prob", 8).items():
            found = null.tensors[f"sample.{layer}"][expert, : len(values)]
            torch.testing.assert_close(found, torch.tensor(values).sort().values)
            assert null.header["sample_sizes"][layer][expert] == len(values)


def test_the_models_own_top_k_is_left_out_by_default():
    model = tiny_olmoe(num_experts_per_tok=4, num_hidden_layers=1)
    assert calibrate(model, tokens(1, 8), null="conformal", progress=False).exclude_top == 4


def test_padding_is_not_counted(model):
    ids = tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0  # on the left, as for generation
    null = calibrate(model, ids, null="conformal", attention_mask=mask, progress=False)
    for layer, logits in enumerate(router_outputs(model, ids, mask)):
        expected = sum(null_values_by_hand(logits[mask.flatten().bool()], "log_prob", 8).values(), [])
        torch.testing.assert_close(null.tensors[f"sample.{layer}"][0], torch.tensor(expected).sort().values)
        assert len(expected) == 19 * 56


def test_several_texts_are_one(model):
    ids = tokens(4, 10)
    whole = calibrate(model, ids, null="conformal", progress=False)
    parts = calibrate(model, {"first": ids[:3], "second": ids[3:]}, null="conformal", progress=False)
    torch.testing.assert_close(whole.tensors["sample.2"], parts.tensors["sample.2"])


def test_logits_in_memory_give_the_same_null(model):
    ids = tokens(3, 10)
    logits = collect_router_logits(model, ids, batch_size=2, progress=False)
    torch.testing.assert_close(logits, router_outputs(model, ids))
    direct = calibrate(model, ids, batch_size=2, max_values=300, seed=3, progress=False)
    later = fit_null(logits, model_name=name_of(model), max_values=300, seed=3)
    assert isinstance(direct, KDENull) and later.header == direct.header
    assert all(torch.equal(later.tensors[name], tensor) for name, tensor in direct.tensors.items())


def test_half_precision_models_are_calibrated_in_float32():
    model = tiny_olmoe(num_hidden_layers=1).to(torch.bfloat16)
    null = calibrate(model, tokens(2, 10), null="conformal", progress=False)
    sample = null.tensors["sample.0"]
    assert sample.dtype == torch.float32 and len(sample.unique()) > 500  # bfloat16 has fewer values to give


# -- the sample ----------------------------------------------------------------------------------------------


def test_reservoir_is_uniform_over_the_stream():
    """Each of 60 values is kept equally often, early or late, in small batches or in large ones."""
    rng = np.random.default_rng(0)
    stream = np.arange(60, dtype=np.float32)
    kept = np.zeros(60)
    for _ in range(3000):
        reservoir = Reservoir(10)
        for batch in np.split(stream, [3, 30, 35]):
            reservoir.add(batch, rng.random(len(batch)))
        sample = reservoir.sample()
        assert len(np.unique(sample)) == 10
        kept[sample.astype(int)] += 1
    # Without replacement the counts vary less than a multinomial's, so the test is cautious.
    assert chisquare(kept).pvalue > 0.01
    assert abs(kept[:30].sum() - kept[30:].sum()) < 4 * np.sqrt(3000 * 10 / 4)


def test_reservoir_keeps_everything_if_it_can_and_never_more_than_its_size():
    rng = np.random.default_rng(0)
    reservoir = Reservoir(50)
    reservoir.add(np.arange(50, dtype=np.float32), rng.random(50))
    assert sorted(reservoir.sample()) == list(range(50))
    for _ in range(20):
        reservoir.add(np.ones(1000, np.float32), rng.random(1000))
        assert len(reservoir.sample()) == 50


@pytest.mark.parametrize("per_expert", [False, True])
def test_the_sample_depends_on_the_seed_and_not_on_the_batch_size(model, per_expert):
    ids = tokens(6, 10)
    options = dict(null="conformal", per_expert=per_expert, max_values=20, progress=False)
    first = calibrate(model, ids, batch_size=6, seed=1, **options).tensors["sample.1"]
    again = calibrate(model, ids, batch_size=1, seed=1, **options).tensors["sample.1"]
    other = calibrate(model, ids, batch_size=6, seed=2, **options).tensors["sample.1"]
    assert first.shape == (64 if per_expert else 1, 20)
    torch.testing.assert_close(first, again)
    assert not torch.isclose(first, other).all()


# -- the model is left as it was -----------------------------------------------------------------------------


def hooks(model):
    return [hook for module in model.modules() for hook in module._forward_hooks.values()]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_hooks_go_whatever_is_raised(error, monkeypatch):
    model = tiny_olmoe(num_hidden_layers=2)
    ids = tokens(2, 6)
    before = model(input_ids=ids).logits

    def interrupted(*args, **kwargs):
        raise error("in the middle of the pass")

    monkeypatch.setattr(model.model.layers[1].self_attn, "forward", interrupted)
    with pytest.raises(error, match="in the middle of the pass"):
        calibrate(model, ids, progress=False)
    monkeypatch.undo()
    assert hooks(model) == []
    assert torch.equal(model(input_ids=ids).logits, before)


def test_logits_that_are_not_finite_are_refused_and_hooks_go():
    model = tiny_olmoe(num_hidden_layers=1)
    ids = tokens(1, 6)
    with torch.no_grad():
        model.model.embed_tokens.weight[ids[0, 2]] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        calibrate(model, ids, progress=False)
    assert hooks(model) == []


def test_a_patched_model_is_refused(model):
    with BHRoutingIntegration(model), pytest.raises(RuntimeError, match="is patched.*unpatch_model"):
        calibrate(model, tokens(1, 6), progress=False)
    with BHRoutingIntegration(model, mode="analyze"):  # changes nothing, so that it may be there
        calibrate(model, tokens(1, 6), progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"null": "gauss"}, "null is 'gauss', but must be one of 'kde', 'conformal'"),
        ({"statistic": "rank"}, "statistic is 'rank'"),
        ({"exclude_top": 63}, r"exclude_top is 63, but must lie in 0\.\.62"),
        ({"max_values": 1}, "max_values is 1, but must be 2 or more"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"token_ids": torch.zeros(5)}, r"token_ids must be an integer tensor \[sequences, length\], got shape \(5,\)"),
        ({"token_ids": {"poem": [1, 2]}}, "poem must be an integer tensor .* got list"),
        ({"token_ids": tokens(0, 4)}, "token_ids holds no token"),
        ({"attention_mask": torch.ones(1, 5)}, r"attention_mask of token_ids has shape \(1, 5\), its ids \(1, 6\)"),
        ({"attention_mask": {"poem": torch.ones(1, 6)}}, r"there for \['poem'\], but token_ids for \['token_ids'\]"),
    ],
)
def test_bad_arguments_are_named(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        calibrate(model, **{"token_ids": tokens(1, 6), "progress": False} | arguments)
    assert hooks(model) == []


def test_training_mode_is_refused():
    model = tiny_olmoe(num_hidden_layers=1).train()
    with pytest.raises(ValueError, match=r"in training mode.*call model.eval\(\) first"):
        calibrate(model, tokens(1, 6), progress=False)


# -- whose calibration it is ---------------------------------------------------------------------------------


def test_saved_and_loaded_for_its_own_model_only(model, tmp_path):
    path = tmp_path / "null.safetensors"
    null = calibrate(model, tokens(4, 10), progress=False)
    null.save(path)
    loaded = load_calibration(path, model)
    logits = collect_router_logits(model, tokens(2, 10, seed=1), progress=False)
    for layer in range(3):
        assert torch.equal(loaded(logits[layer], layer), null(logits[layer], layer))
    renamed = tiny_olmoe()
    renamed.config.name_or_path = "someone/another-model"
    with pytest.raises(ValueError, match="model_name 'OlmoeForCausalLM', but model_name 'someone/another-model'"):
        load_calibration(path, renamed)
    with pytest.raises(ValueError, match="num_layers 3, but num_layers 2 is expected"):
        load_calibration(path, tiny_olmoe(num_hidden_layers=2))
    with pytest.raises(ValueError, match="num_experts 64, but num_experts 16 is expected"):
        load_calibration(path, tiny_olmoe(num_experts=16))


@pytest.mark.parametrize("change", [{"num_hidden_layers": 2}, {"num_experts": 16}])
def test_a_patch_refuses_the_calibration_of_another_model(model, change):
    null = calibrate(model, tokens(4, 10), progress=False)
    other = tiny_olmoe(**change)
    with pytest.raises(ValueError, match="the calibration of 'OlmoeForCausalLM' is for 3 layers of 64 experts"):
        BHRoutingIntegration(other, pvalues=null)
    null.check_model(3, 64)
    TokenGaussian().check_model(2, 16)  # needs no calibration, so that any model will do


def test_names(tmp_path):
    model = tiny_olmoe(num_hidden_layers=1)
    assert name_of(model) == "OlmoeForCausalLM"
    model.config.name_or_path = "allenai/OLMoE-1B-7B-0924"
    assert name_of(model) == "allenai/OLMoE-1B-7B-0924"
    model.config.name_or_path = str(tmp_path / "finetuned")
    assert name_of(model) == "finetuned"


def test_a_calibrated_model_routes_adaptively(model):
    null = calibrate(model, tokens(8, 16), progress=False)
    with BHRoutingIntegration(model, alpha=0.2, pvalues=null) as bh, torch.no_grad():
        model(input_ids=tokens(4, 16, seed=1))
    stats = bh.get_routing_stats()
    assert 1 < stats["mean_experts_per_token"] < 8 and stats["std_experts_per_token"] > 0
    assert stats["total_tokens"] == 64 and len(find_moe_layers(model)) == null.num_layers


# -- alpha for a number of experts ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::bhlib.pvalues.ResolutionWarning")
@pytest.mark.parametrize(
    ("null", "per_expert", "near"), [("kde", False, 0.2), ("kde", True, 0.5), ("conformal", False, 0.5)]
)
def test_a_null_brings_its_level(null, per_expert, near, model, tmp_path):
    """On other text: closely if all experts share the null, roughly with 700 values per expert or steps of 2e-5."""
    fitted = calibrate(model, tokens(20, 40), null=null, per_expert=per_expert, progress=False)
    logits = collect_router_logits(model, tokens(15, 60, seed=1), progress=False)
    fitted.save(tmp_path / "null.safetensors")
    loaded = load_calibration(tmp_path / "null.safetensors", model)
    for wanted in (2.0, 3.7, 6.25):
        alpha = loaded.alpha_for(wanted)
        assert alpha == fitted.alpha_for(wanted)
        assert mean_experts(BH(alpha, loaded), logits) == pytest.approx(wanted, abs=near)
    assert mean_experts(BH(0.05, loaded), logits) > 4


def test_levels_come_from_a_bounded_sample_of_tokens(monkeypatch):
    monkeypatch.setattr("bhlib.sampling.TOKENS_FOR_LEVELS", 100)
    logits = 2 * torch.randn(2, 4000, 64)
    few, again, other = (fit_null(logits, model_name="noise", seed=seed).alpha_for(4.0) for seed in (0, 0, 1))
    monkeypatch.undo()
    assert few == again and few != other
    assert few == pytest.approx(fit_null(logits, model_name="noise").alpha_for(4.0), rel=0.3)


def test_levels_of_a_model_with_few_experts():
    logits = torch.randn(1, 500, 4)
    null = fit_null(logits, model_name="noise", exclude_top=1)
    assert null.header["levels"]["mean_experts"][-1] <= 3.5
    assert mean_experts(BH(null.alpha_for(2.0), null, max_k=4), logits) == pytest.approx(2, abs=0.05)


def test_levels_that_a_null_does_not_bring():
    logits = torch.randn(1, 500, 64)
    with pytest.raises(ValueError, match=r"mean_experts is 8, but the levels of this null are for 1\.5 to 7\.5"):
        fit_null(logits, model_name="noise").alpha_for(8)
    bare = KDENull.fit([torch.randn(50)], model_name="noise", num_experts=64)
    with pytest.raises(ValueError, match=r"brings no levels.*alpha_for_mean_experts\(null, router_logits, 4\)"):
        bare.alpha_for(4)


# -- the tail ------------------------------------------------------------------------------------------------


def clumped_logits(tokens, seed):
    """Gaussian logits, one in a thousand of them in a narrow clump: what several layers of the real OLMoE look like."""
    rng = np.random.default_rng(seed)
    shape = (1, tokens, 64)
    logits = np.where(rng.random(shape) < 1e-3, rng.normal(4.5, 0.03, shape), rng.normal(size=shape))
    return torch.from_numpy(logits)


def tail_of(bw_method):
    options = dict(model_name="clump", statistic="logit", exclude_top=0, bw_method=bw_method)
    null = fit_null(clumped_logits(2000, seed=0), **options)
    return tail_factors(null, clumped_logits(60_000, seed=1), (1e-3, 1e-4), statistic="logit", exclude_top=0).loc[0]


def test_a_bandwidth_for_the_survival_function_smears_a_clump_less():
    scott, survival, narrow = tail_of(None), tail_of("survival"), tail_of(0.02)
    assert scott[1e-3] > 1.25 and scott[1e-4] > 3
    assert survival[1e-3] < 1.15 and survival[1e-4] < 3
    assert narrow[1e-3] < 1.15 and narrow[1e-4] < 2


def test_tail_factors_by_hand():
    """P-values twice too small below a tenth, and right above it."""
    logits = torch.linspace(-1, 1, 1001)[:, None].expand(-1, 2)[None]

    class Own(TokenGaussian):
        def __call__(self, router_logits, layer=None):
            p = (1001 - torch.arange(1001.0)) / 1001
            return torch.where(p < 0.1, p / 2, p)[:, None].expand(-1, 2)

    found = tail_factors(Own(), logits, (0.5, 0.1, 0.05, 0.01), exclude_top=0).loc[0]
    np.testing.assert_allclose(found, [1, 1, 2, 2], rtol=1e-5)


def test_the_bandwidth_for_the_survival_function_is_the_best_for_a_gaussian():
    """Against bandwidths half and twice as wide: mean squared error over 200 samples of 500 values."""
    rng = np.random.default_rng(0)
    points = np.linspace(-4, 4, 81)
    factor = (4 / 500) ** (1 / 3)
    errors = {width: 0.0 for width in (0.5, 1, 2)}
    for _ in range(200):
        sample = rng.normal(size=500)
        for width in errors:
            tails = norm.sf(points[:, None], sample, width * factor * sample.std(ddof=1)).mean(axis=1)
            errors[width] += ((tails - norm.sf(points)) ** 2).sum()
    assert errors[1] < errors[0.5] and errors[1] < errors[2]
