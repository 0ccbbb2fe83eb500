# %% [markdown]
# # From p-values to experts, and why the statistic decides
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/bh-routing/blob/main/notebooks/03_bh_routing.ipynb)
#
# To run it in Colab, choose Runtime, Run all. It takes about a minute, without a GPU and without a restart. The first cell fetches this workspace and what it requires; anywhere but in Colab it does nothing.
#
# Previous: [From logits to p-values](02_router_pvalues.ipynb) ([in Colab](https://colab.research.google.com/github/OWNER/bh-routing/blob/main/notebooks/02_router_pvalues.ipynb)) · Next: [Patching OLMoE](04_patching_olmoe.ipynb) ([in Colab](https://colab.research.google.com/github/OWNER/bh-routing/blob/main/notebooks/04_patching_olmoe.ipynb))

# %%
import os
import subprocess
import sys

if "google.colab" in sys.modules and not os.path.exists("../bhlib"):  # in Colab, and once only
    assert os.path.exists("bh-routing"), (
        "This notebook does not know its repository: the address still says OWNER. In a clone of yours run "
        "`python -m bhlib colab ACCOUNT/REPOSITORY`, commit, push, and open the notebook from there. Or copy the clone "
        "into Colab's files, as bh-routing, and run this cell again."
    )
    for command in (
        "[ -d bh-routing ] || git clone --quiet --depth 1 https://github.com/OWNER/bh-routing",
        "pip install --quiet --editable ./bh-routing",
    ):
        status, said = subprocess.getstatusoutput(command)
        assert status == 0, f"{command}: {said}"
    sys.path.append(os.path.abspath("bh-routing"))
    os.chdir("bh-routing/notebooks")

# %% [markdown]
# A statistic and a null give every expert a p-value. The Benjamini–Hochberg procedure now says how many experts the token
# gets, and which. This notebook follows one token through that decision, then the whole of a text, and then asks the
# question that matters: with the same number of experts, is the model better or worse than with the same number for
# every token?

# %%
from bhlib import benjamini_hochberg_routing, figures
from bhlib.calibration import fit_null
from bhlib.evaluation import evaluate
from bhlib.evidence import compare_at_equal_cost, kept_mass
from bhlib.explain import explain
from bhlib.levels import alpha_for_mean_experts
from bhlib.pvalues import STATISTICS, DirichletNull
from bhlib.rules import BH, TopK

study = figures.Study()
study.sequences_per_domain = 6  # the notebook takes less text than `make figures`
model, logits = study.model, study.calibration_logits

# %% [markdown]
# ## One token
#
# `explain` shows what a rule looks at when it decides about a token: here the logits of one token in one layer, its largest
# first, with the probabilities that softmax makes of them, the p-values of the default null, and the thresholds of BH at
# $\alpha = 0.05$. The procedure looks for the *last* row in which the p-value is at most its threshold; that row and all above
# it are found. Of those the token keeps at most `max_k`, and it gets at least `min_k`; the last column says whether one of the two
# bounds decided.

# %%
layer, token, alpha = 4, 1019, 0.05
x = logits[layer, token]
table = explain(BH(alpha), x, layer)
table.head(9).round(4)

# %% [markdown]
# The default p-value depends on nothing but the expert's probability, and falls as that rises. So every threshold for a p-value is
# a threshold for a probability, and the default rule at $\alpha = 0.05$ *is* these eight constants. The best expert's probability
# is compared with the first, the second best's with the second, and so on, and the last one that passes counts: the table has them
# as `probability_threshold`. (There are 64 of them; those from the ninth on matter only for a token of which nine or more experts pass, and that gets eight, the most allowed.)

# %%
constants = table["probability_threshold"].head(8)
print("probability needed, best expert first:", " ".join(f"{constant:.4f}" for constant in constants))

# %% [markdown]
# That is all that the default does: a threshold of about 0.05 on the probability, somewhat lower for each further expert. Another
# $\alpha$ gives another eight numbers.
#
# `benjamini_hochberg_routing` does the same for any number of tokens, and adds what a router needs: at least `min_k` experts,
# at most `max_k`, and weights that sum to one. (Inside a model the weights follow the model's own convention instead.)

# %%
weights, experts, counts = benjamini_hochberg_routing(x[None], alpha=alpha, min_k=1, max_k=8)
print("experts:", experts[0].tolist())
print("weights:", [round(w, 2) for w in weights[0, experts[0, : counts[0]]].tolist()])

# %% [markdown]
# ## Many tokens
#
# The number of experts is no longer a setting: it comes out of the logits, token by token. What is set is $\alpha$.

# %%
for alpha in (0.01, 0.05, 0.3):
    counts = benjamini_hochberg_routing(logits, alpha)[2].double()
    shares = " ".join(f"{100 * (counts == k).double().mean():2.0f}" for k in range(1, 9))
    print(f"alpha = {alpha:4}: mean {counts.mean():.1f}, standard deviation {counts.std():.1f}; % with 1 ... 8: {shares}")

# %% [markdown]
# To compare different kinds of p-values, not $\alpha$ but the *cost* must be the same: `alpha_for_mean_experts` finds the
# level at which a rule spends, say, 4 experts per token on average. Different nulls need very different levels, since "one
# chance in a hundred" means something else under each. Below: a kernel density estimate of each statistic over the experts
# that the model does not select, one of the raw logit over *all* experts, and the default.

# %%
fit = {"model_name": "demo", "null": "kde", "max_values": 10_000}
makers = {"logit, null of all experts": fit_null(logits, statistic="logit", exclude_top=0, **fit)}
makers |= {name: fit_null(logits, statistic=name, exclude_top=8, **fit) for name in STATISTICS}
makers |= {"Dirichlet": DirichletNull()}

for name, maker in makers.items():
    print(f"{name:27s} alpha = {alpha_for_mean_experts(maker, logits, 4.0):.2g}")

# %% [markdown]
# ## Why the statistic decides
#
# All these rules put the experts of a token in the same order, the model's own. They spend the same number of experts. They
# differ only in *which tokens get more, and which fewer*. Here is the loss of each on held-out text, minus the loss
# of static top-k with the same mean number of experts (interpolated between whole numbers), paired by sequence.

# %%
table = compare_at_equal_cost(model, makers, logits, study.validation, mean_experts=(4.0,), static_k=(3, 4, 5))
figures.draw_statistic_matters(table)

# %%
table[["pvalues", "mean_k", "difference", "low", "high"]].round(2)

# %% [markdown]
# The differences between statistics are much larger than anything that one could gain by a cleverer procedure:
#
# - **The raw logit loses**, clearly, and worst with a null of all experts. It gives many experts to tokens whose logits are
#   all high, and a single one to tokens whose logits are all low, although softmax, and so the model, sees no difference
#   between the two.
# - **`centered` and `standardized`** do not see the shift, and come close to static top-k. But they call an expert
#   significant for standing out of the *background*, even where one still larger expert leaves it next to no weight.
# - **`log_prob`** and the **Dirichlet** null ask about the probability itself, which is the weight that the expert
#   would get. They are the ones that can be better than static top-k.
#
# The picture `figures/statistic_matters.png` shows the same for three numbers of experts, on more text and with narrower
# intervals: there both of the last are below zero, and both of `centered` and `standardized` above.
#
# There is a reason behind it. The model sums the outputs of the selected experts with their probabilities as weights,
# so the weight that is *not* selected is, roughly, what is lost (roughly, since outputs differ in size). Of all rules that spend the same number of experts in total, the
# one that keeps every expert above one common probability loses the least weight: exchanging an expert that it keeps for one that
# it drops can only lower the sum. A test of the probability comes close to that; a test of anything else does not. How much of
# the weight of the model's own top 8 does each rule keep, at 4 experts per token? (Weight kept over weight of the top 8, each
# summed over all tokens and layers.)

# %%
static = kept_mass(TopK(4), logits)
print(f"{'static top-4':27s} keeps {100 * static['share']:.1f} %; in the worst 5 % of tokens {100 * static['worst_5_percent']:.0f} %")
for name, maker in makers.items():
    kept = kept_mass(BH(alpha_for_mean_experts(maker, logits, 4.0), maker), logits)
    print(f"{name:27s} keeps {100 * kept['share']:.1f} %; in the worst 5 % of tokens {100 * kept['worst_5_percent']:.0f} %")

# %% [markdown]
# The order of the list is nearly that of the losses, and where it is not there is something to learn. The null of `log_prob` is
# fitted to each layer, so its threshold on the probability differs from layer to layer, and it keeps slightly less weight in total
# than the Dirichlet null does. On more text it still loses less (`figures/whole_test_split.png`): weight is not worth the same in
# every layer. Nor is it for every expert, since the outputs that it multiplies differ in size, from expert to expert and from token
# to token. Rules that know these sizes are in `bhlib.norms`, and what they add is measured in `08_what_alpha_promises`.
#
# Note what this says about validity: the p-values of `standardized` were
# at least as uniform as those of `log_prob`, and much less entangled with each other (previous notebook). A valid test of the
# wrong question is still the wrong question. Validity says what $\alpha$ means; the statistic says what is asked.
#
# ## What it is worth
#
# At 4 of 8 experts the gain over static top-k is of the order of a hundredth of a nat, on this small model, and the default
# null reaches it without any calibration. It is not much, and it is the right comparison: no rule is better
# than the model's own top-8 at no cost, and a rule that is compared with a static rule of *another* cost proves nothing.
#
# ## Exercises
#
# **1.** Choose $\alpha$ for 3 experts per token with the `log_prob` null, and compare the loss with that of static top-3.
#
# *Answer.* The fewer experts, the more it matters which tokens get them.

# %%
three = makers["log_prob"]
less = {name: ids[:2] for name, ids in study.validation.items()}
row = compare_at_equal_cost(
    model, {"log_prob": three}, logits, less, mean_experts=(3.0,), static_k=(2, 3, 4)
).iloc[0]
print(f"{row['mean_k']:.1f} experts: {row['difference']:+.2f} nats, 95 % interval {row['low']:+.2f} to {row['high']:+.2f}")

# %% [markdown]
# **2.** A router that activates whatever has a p-value below a fixed cut needs no Benjamini and no Hochberg. Compare the two
# at equal cost, by the weight that they keep. What does BH's line add?
#
# *Answer.* Next to nothing. With one null for all layers (Dirichlet) a fixed cut *is* one threshold on the probability, which keeps
# the most weight of all; BH, whose threshold loosens with each expert found, keeps almost as much. With a null per layer a
# fixed cut is a threshold of its own in each layer: it keeps less than the one threshold, and as much as BH with the same null.
# (Bonferroni's is a fixed cut, too, with its level under another name.) In loss it is the same: with the same null the fixed cut is
# level with BH or better (next notebooks, `06_quality_vs_compute`). Nor does the line add a guarantee. For p-values that are
# uniform under a null that one can check, BH's $\alpha$ bounds the expected share of false discoveries among what is selected. Here
# "null" is our own convention, and no share of useless experts is bounded by it: $\alpha$ is a dial. (Useless experts can be
# measured, and how many of them each level keeps; a null of that hypothesis is in `08_what_alpha_promises`.)

# %%
one = DirichletNull()
for name, maker in {"one null": one, "null per layer": three}.items():
    for method in ("fixed", "bh", "bonferroni"):
        alpha = alpha_for_mean_experts(maker, logits, 4.0, method=method)
        kept = kept_mass(BH(alpha, maker, method=method), logits)
        print(f"{name:14s} {method:10s} at alpha = {alpha:.2g} keeps {100 * kept['share']:.2f} %")

# %% [markdown]
# **3.** The model was trained with 8 experts. What happens if BH may select up to 16?
#
# *Answer.* It uses them, at a large $\alpha$, but the loss does not become better than that of the model's own top 8 by more
# than the noise: the experts after the eighth have next to no weight.

# %%
few = {name: ids[:1] for name, ids in study.validation.items()}
own = evaluate(model, few)["loss"].mean()
for max_k in (8, 16):
    frame = evaluate(model, few, BH(alpha=0.2, pvalues=three, max_k=max_k))
    print(f"max_k = {max_k:2}: {frame['mean_k'].mean():.1f} experts, loss {frame['loss'].mean() - own:+.2f} against top-8")

# %% [markdown]
# Previous: [From logits to p-values](02_router_pvalues.ipynb) ([in Colab](https://colab.research.google.com/github/OWNER/bh-routing/blob/main/notebooks/02_router_pvalues.ipynb)) · Next: [Patching OLMoE](04_patching_olmoe.ipynb) ([in Colab](https://colab.research.google.com/github/OWNER/bh-routing/blob/main/notebooks/04_patching_olmoe.ipynb))
