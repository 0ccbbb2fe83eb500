# %% [markdown]
# # From logits to p-values
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/bh-routing/blob/main/notebooks/02_router_pvalues.ipynb)
#
# To run it in Colab, choose Runtime, Run all. It takes about a minute, without a GPU and without a restart. The first cell fetches this workspace and what it requires; anywhere but in Colab it does nothing.
#
# Previous: [False discoveries, and how to bound them](01_bh_theory.ipynb) ([in Colab](https://colab.research.google.com/github/OWNER/bh-routing/blob/main/notebooks/01_bh_theory.ipynb)) · Next: [From p-values to experts, and why the statistic decides](03_bh_routing.ipynb) ([in Colab](https://colab.research.google.com/github/OWNER/bh-routing/blob/main/notebooks/03_bh_routing.ipynb))

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
# The Benjamini–Hochberg procedure turns p-values into decisions. A router has no p-values, only 64 numbers per token
# called logits. To get from one to the other takes two choices, and nothing else:
#
# - a **statistic**, which says by what an expert is to stand out: its logit, its probability, its distance from the
#   token's other experts;
# - a **null**, which says what the statistic looks like for an expert that does *not* stand out.
#
# The p-value of an expert is then the probability, under the null, of a statistic at least as large as the one seen. This
# notebook looks at the obvious choice, which cannot work, then at the two choices one by one, and then asks of each
# null whether its p-values are what they claim to be, on text that it has not seen.

# %%
import torch

from bhlib import BHRoutingIntegration, calibrate, figures, load_calibration
from bhlib.procedures import benjamini_hochberg
from bhlib.pvalues import STATISTICS, DirichletNull, TokenGaussian

study = figures.Study()
study.sequences_per_domain = 4  # the notebook takes less text than `make figures`
model, logits = study.model, study.validation_logits
print(f"{logits.shape[0]} layers, {logits.shape[1]:,} tokens of {len(study.validation)} domains, {logits.shape[2]} experts")

# %% [markdown]
# ## The obvious choice
#
# Softmax turns logits into probabilities, and the experts with a large probability are the ones that matter. So why not
# call $p_i = 1 - \mathrm{softmax}(x)_i$ a p-value, and apply BH?

# %%
softmax_pvalues = 1 - torch.softmax(logits, dim=-1)
for alpha in (0.05, 0.5, 0.9):
    counts = benjamini_hochberg(softmax_pvalues.clamp(0, 1), alpha).sum(dim=-1)
    print(f"alpha = {alpha}: experts per token {counts.double().mean():.2f}, at most {counts.max()}")

# %% [markdown]
# At *none* of these levels does it select even two experts for any token. This is not a weakness of the model, but a theorem.
#
# **Theorem.** Let $q_{(1)} \ge \dots \ge q_{(N)}$ be $N \ge 2$ probabilities that sum to one. BH at level $\alpha < 1 - 1/N$ on
# $p_i = 1 - q_i$ rejects at most one hypothesis, and one only if $q_{(1)} \ge 1 - \alpha/N$.
#
# **Proof.** The $k$-th smallest p-value is $1 - q_{(k)}$. If BH rejects exactly $k \ge 1$ hypotheses then
# $1 - q_{(k)} \le \alpha k/N$, that is, $q_{(k)} \ge 1 - \alpha k/N$. But $k$ probabilities that are at least $q_{(k)}$ sum to at
# most 1, so $q_{(k)} \le 1/k$. Together, $1/k \ge 1 - \alpha k/N$, or
#
# $$\alpha \ge \frac{N(k-1)}{k^2}.$$
#
# For $k \ge 2$ the right-hand side falls as $k$ grows, because $(k-1)/k^2$ does, so its least value for $2 \le k \le N$ is at $k = N$:
# it is $(N-1)/N = 1 - 1/N$, which exceeds $\alpha$. So no $k \ge 2$ is possible, and $k = 1$ needs $q_{(1)} \ge 1 - \alpha/N$. $\blacksquare$
#
# With 64 experts and $\alpha = 0.05$ that single expert needs a probability of 0.9992. In the picture, BH asks for a point on
# the coloured curves, arithmetic keeps every router below the black line, and they meet nowhere to the right of $k = 1$.

# %%
figures.draw_softmax_theorem(figures.compute_softmax_theorem(study))

# %% [markdown]
# What went wrong: $1 - q$ is a number between 0 and 1 that is small for interesting experts, but no null makes it uniform.
# For an expert that is *not* interesting a p-value should be below 0.05 in 5 % of the cases. `pvalues="softmax"` is kept as
# an option with a warning.
#
# ## The statistic
#
# Four statistics of a logit are in `bhlib.pvalues.STATISTICS`. Within one token all of them put the experts in the same
# order. They differ in what they compare *between* tokens:
#
# | statistic | what it is | blind to a shift of the token's logits | blind to their scale |
# |---|---|---|---|
# | `logit` | the logit itself | no | no |
# | `log_prob` | log-softmax: the logarithm of the weight | yes | no |
# | `centered` | logit minus the mean of the token's background | yes | no |
# | `standardized` | the same, over the background's standard deviation | yes | yes |
#
# The background of a token is what is left without its 8 largest logits. Softmax ignores a shift, and so do the weights of
# the model. The raw logit does not, although routers do shift: how much of the variance of a logit lies between tokens
# rather than within them?

# %%
for name, statistic in STATISTICS.items():
    values = statistic(logits)
    between = values.mean(dim=-1).var(dim=-1) / values.flatten(1).var(dim=-1)
    print(f"{name:12s} share of the variance between tokens, by layer: " + " ".join(f"{b:.2f}" for b in between.tolist()))

# %% [markdown]
# With the raw logit, a part of what is tested is a property of the token, not of the expert. A token whose logits are
# all high gets many experts, for no reason that the model's weights know of. The next notebook measures what that costs.
#
# ## The null
#
# **Without calibration.** `TokenGaussian` takes the background of the token itself for a Gaussian sample. `DirichletNull`,
# the default of the package, takes the 64 probabilities for a division of one into equal shares that fluctuate at random
# (a symmetric Dirichlet distribution; its concentration, 4 by default, says how little). Then each probability is Beta
# distributed, and its p-value an exact sum of four terms. Both need nothing but the logits in hand:

# %%
for maker in (TokenGaussian(), DirichletNull()):
    smallest = maker(logits[3]).sort(dim=-1).values.median(dim=0).values
    print(f"{maker!r}: median of the smallest p-values " + " ".join(f"{p:.2g}" for p in smallest[:4].tolist()))

# %% [markdown]
# **With calibration.** Run the model over a text once, and collect the statistic of all experts outside each token's top 8:
# that is what "not selected" looks like, in each layer. `calibrate` does this with a progress bar and with bounded memory
# (it keeps a random sample of the values, drawn uniformly from all of them). From the sample it makes a null: a kernel
# density estimate (`"kde"`), or the sample itself (`"conformal"`).

# %%
text = {name: ids[:2] for name, ids in study.validation.items()}
null = calibrate(model, text, null="kde", statistic="log_prob", max_values=10_000, seed=0)
print(f"{null.num_layers} layers, {null.smallest_sample:,} values of {null.statistic} each, of the model {null.model_name!r}")
print(f"survival table within 0.1 % of scipy's integral: {null.header['table_error'] < 1e-3}")

# %% [markdown]
# The null is a file of some kilobytes, and knows whose it is. A calibration of another model is refused, by name.

# %%
import tempfile
from pathlib import Path

path = Path(tempfile.mkdtemp()) / "null.safetensors"
null.save(path)
again = load_calibration(path, model)
print(f"{path.stat().st_size / 1024:.0f} kB; same p-values: {torch.equal(again(logits[3], 3), null(logits[3], 3))}")

with BHRoutingIntegration(model, alpha=0.05, pvalues=again) as bh, torch.no_grad():
    model(input_ids=study.validation["drama"].to(model.device))
print(f"experts per token at alpha = 0.05: {bh.get_routing_stats()['mean_experts_per_token']:.1f}")

# %% [markdown]
# ## Are the p-values what they claim to be?
#
# A p-value is *defined* by one property: where the null is true, it is uniform. So we fit every null on the calibration
# split and look at the p-values that it gives to the experts that the model does not select, on the validation split. The
# Kolmogorov–Smirnov (KS) distance is the largest gap between their distribution function and that of the uniform.

# %%
table = figures.compute_null_calibration(study)
figures.draw_null_calibration(table)

# %%
layers = table[table["kind"] == "ks"]
worst = layers.loc[layers.groupby("null", sort=False)["ks"].idxmax()].set_index("null")
columns = ["tail_01", "tail_01_reference", "inflation", "inflation_reference"]
summary = worst[["layer", "ks"]].astype({"layer": int}).join(layers.groupby("null", sort=False)[columns].mean())
summary.columns = ["worst layer", "KS there", "P(p ≤ 0.01)/0.01", "of a true null", "inflation", "its inflation"]
summary.round({"KS there": 2, "P(p ≤ 0.01)/0.01": 1, "of a true null": 1, "inflation": 1, "its inflation": 1})

# %% [markdown]
# What to notice:
#
# - The **fitted** nulls are uniform on new text, to about a hundredth. This holds for the raw logit as for any other
#   statistic: uniformity *on average over tokens* is what a fit provides, whatever it is that was fitted.
# - The **KDE** is cautious in the tail, where it matters most: a kernel estimate is wider than the sample by its bandwidth.
#   The conformal null has no such bias, but no p-value below $1/(n+1)$ either.
# - The **Gaussian** of the token's own background is right in the middle and wrong at the ends. The trimmed one is cautious,
#   since a background without its top has no upper tail. The truncated one, which corrects for that, has a tail that is
#   too light for these routers, so its small p-values come too often.
# - The **Dirichlet** p-values are far from uniform. A router with a preference for a few experts leaves less to most of the others
#   than a random division would, and more to some. Their lower tail is several times that of a true null (1.7 against 0.5 at
#   p = 0.01). This null is a convention, with a meaning (*as if at random*), not a description.
# - **Inflation** is the variance of a token's mean p-value over what independent p-values would have. It is not 1 even where
#   the null is true, because the experts outside the top 8 were selected for being low; so the table shows what a true null
#   gives, by simulation (1.3 and 1.2 for `logit` and `log_prob`, 0.04 and 0.02 for `centered` and `standardized`, 0.2 for
#   Dirichlet). For `logit` and `log_prob` it is many times that: the p-values of a token rise and fall together. For
#   `centered` and `standardized` it is near 0 in both, since subtracting the token's mean makes them balance each other. No
#   single-expert check, such as the KS distance, can see this.
#
# ## What dependence does to the promise
#
# The theorem of Benjamini and Hochberg asks for independent p-values. Those of a token are not. So here is the simulation of
# the last notebook again, now with scores that are as dependent as the experts of the layer where these are most so: rank
# correlations of all pairs of experts over the calibration text, once of the standardized and once of the raw logits.

# %%
realised = figures.compute_fdr_simulation(study, repetitions=4000)
figures.draw_fdr_simulation(realised)

# %%
at = realised[realised["alpha"] == 0.05].pivot(index="method", columns="dependence", values="fdr")
at.loc[["fixed", "storey", "bh", "by", "bonferroni"], list(realised["dependence"].unique())].round(2)

# %% [markdown]
# BH keeps below $\alpha$ under all of them; Storey's procedure does not, where the logits share a common component.
#
# ## What is guaranteed, and what is only heuristic
#
# For one token, BH at level $\alpha$ keeps the expected share of true nulls among the selected experts at or below
# $\alpha m_0/m$ *if* the p-values of the true nulls are each uniform or larger than uniform, and independent of each other and
# of the rest, or positively dependent in the sense of PRDS (*positive regression dependence on a subset*, that of the true
# nulls: the larger the p-value of one of them, the larger all the other p-values tend to be).
# Without the assumption on dependence the bound is larger by a factor of up to 4.74 for 64 experts, and BY restores it. A
# conformal p-value satisfies the first assumption, at any sample size and on average over calibration samples, *if* the
# statistic of the null expert is exchangeable with the calibration values. Where many calibration values come from one token,
# they are not exchangeable with a new token's, so this fails here, too. A kernel p-value satisfies it as far as the density is
# right; the Gaussian and the Dirichlet p-values *if* the token's logits are what these nulls say.
# For a router, each of these is an approximation at best. "Null" is not a fact about an expert here but our definition, by the
# rank of the very logit that is tested: among the eight experts that the model selects none is null, so no discovery among them
# could be false, whatever the level. The text to be
# routed is exchangeable with the calibration text only if it is of the same kind, and tokens of one text are not
# independent. The dependence between experts has both signs, and is not known to be PRDS. Finally, a patched model
# feeds its later layers with hidden states that it did not produce when it was calibrated. So $\alpha$ is a dial with a
# meaning, "how surprising must an expert be", on a scale that is the same for all tokens and, with a fitted null, for all
# layers. It is not a proven error rate. What a setting of the dial is worth has to be measured, by loss, on held-out text:
# that is the next notebook. There *is* a hypothesis with a truth behind it, that an expert adds next to nothing to its layer's output.
# What it adds can be measured, the levels of this notebook do not follow it, and p-values and levels that do are made in
# `08_what_alpha_promises`.
#
# ## Exercises
#
# **1.** Does temperature rescue `1 - softmax`? Try temperatures from 0.1 to 10 at $\alpha = 0.5$.
#
# *Answer.* No. Temperature changes the probabilities, and the theorem is about any probabilities. A low one makes the
# largest probability reach $1 - \alpha/N$ in more tokens, so that there is *one* expert more often, but never two.

# %%
for temperature in (0.1, 1.0, 10.0):
    pvals = (1 - torch.softmax(logits / temperature, dim=-1)).clamp(0, 1)
    counts = benjamini_hochberg(pvals, alpha=0.5).sum(dim=-1)
    print(f"temperature {temperature:4}: tokens with one expert {100 * (counts == 1).double().mean():.0f} %, most {counts.max()}")

# %% [markdown]
# **2.** How many calibration values does a conformal null need, so that a lone expert can be selected at $\alpha = 0.05$?
#
# *Answer.* Its smallest p-value is $1/(n+1)$, and the first threshold of BH is $\alpha/64$: so $n \ge 64/\alpha - 1 = 1279$, and
# one more to be safe from rounding. With fewer, the package warns, and says how many are needed.

# %%
import warnings

from bhlib.calibration import fit_null

for n in (500, 1278, 1280):
    conformal = fit_null(logits, model_name="demo", null="conformal", max_values=n)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        enough = conformal.check_resolution(0.05, num_experts=64)
    print(n, "enough" if enough else str(caught[0].message))

# %% [markdown]
# **3.** The KDE is cautious in the tail because its bandwidth widens the sample. Make the bandwidth smaller (`bw_method`, in
# standard deviations of the sample) and watch $P(p \le 0.001)/0.001$. What is the price?
#
# *Answer.* It approaches 1. The price is noise: with a small bandwidth the far tail follows single values of the sample,
# and beyond the last of them p falls steeply to 0.

# %%
from bhlib.evidence import uniformity

for bandwidth in (None, 0.05, 0.02):
    kde = fit_null(study.calibration_logits, model_name="demo", null="kde", max_values=20_000, bw_method=bandwidth)
    tail = uniformity(kde, logits, sequence_length=study.window)["tail_001"].mean()
    print(f"bandwidth {bandwidth or 'by Scott’s rule'}: P(p ≤ 0.001)/0.001 = {tail:.1f} (mean of the layers)")

# %% [markdown]
# **References.** B. Efron (2004), *Large-scale simultaneous hypothesis testing: the choice of a null hypothesis*, JASA 99,
# 96–104. S. Bates, E. Candès, L. Lei, Y. Romano and M. Sesia (2023), *Testing for outliers with conformal p-values*, Ann.
# Statist. 51, 149–178. Y. Benjamini and D. Yekutieli (2001), Ann. Statist. 29, 1165–1188.

# %% [markdown]
# Previous: [False discoveries, and how to bound them](01_bh_theory.ipynb) ([in Colab](https://colab.research.google.com/github/OWNER/bh-routing/blob/main/notebooks/01_bh_theory.ipynb)) · Next: [From p-values to experts, and why the statistic decides](03_bh_routing.ipynb) ([in Colab](https://colab.research.google.com/github/OWNER/bh-routing/blob/main/notebooks/03_bh_routing.ipynb))
