# %% [markdown]
# # False discoveries, and how to bound them
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/bh-routing/blob/main/notebooks/01_bh_theory.ipynb)
#
# To run it in Colab, choose Runtime, Run all. It takes about a minute, without a GPU and without a restart. The first cell fetches this workspace and what it requires; anywhere but in Colab it does nothing.
#
# Next: [From logits to p-values](02_router_pvalues.ipynb) ([in Colab](https://colab.research.google.com/github/OWNER/bh-routing/blob/main/notebooks/02_router_pvalues.ipynb))

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
# A router that decides which of 64 experts a token needs asks 64 questions at once. So does a geneticist with 20 000
# genes, or a physicist with 1000 bins of a spectrum. Statistics has an answer for them, the *false discovery rate*, and
# a procedure of three lines that controls it. This notebook is about that procedure; the next two apply it to a router.
#
# ## One test, and many
#
# A *p-value* is the probability that pure chance gives a result at least as extreme as the one that was seen. If there
# is nothing to be found (the *null hypothesis* is true), it is uniform between 0 and 1: below 0.05 in 5 % of the cases.
# One test at the level 0.05 is therefore wrong once in twenty times. Sixty-four of them are wrong about three times
# *each time*, as we can see by drawing p-values where there is nothing to find.

# %%
import torch

from bhlib import figures
from bhlib.procedures import adjusted_pvalues, benjamini_hochberg, bonferroni, critical_values, fixed_cut

generator = torch.Generator().manual_seed(1995)
nothing_to_find = torch.rand(10_000, 64, generator=generator, dtype=torch.float64)

false_discoveries = fixed_cut(nothing_to_find, alpha=0.05).sum(dim=-1).double()
print(f"tests called significant per experiment: {false_discoveries.mean():.1f}")
print(f"experiments with at least one:           {100 * (false_discoveries > 0).double().mean():.0f} %")

# %% [markdown]
# Every procedure in `bhlib.procedures` has this one signature: p-values in, along the last axis, and out comes a boolean
# tensor that says which hypotheses are rejected. Any number of experiments are decided in one call.
#
# The classical cure is *Bonferroni's*: test each of the $m$ hypotheses at $\alpha/m$. Then even one false discovery among
# all $m$ is improbable (at most $\alpha$). The price is power: with 64 hypotheses a p-value has to be below 0.0008.

# %%
wrong = bonferroni(nothing_to_find, alpha=0.05).any(dim=-1).double()
print(f"experiments with at least one false discovery: {100 * wrong.mean():.0f} %")

# %% [markdown]
# ## The false discovery rate
#
# Benjamini and Hochberg (1995) asked for less, and for what one often wants: not that *no* discovery be false, but that
# *few of them* be. Let $R$ be the number of rejected hypotheses and $V$ the number of those that were true nulls. The
# **false discovery rate** is the expected fraction of false ones among the discoveries,
#
# $$\mathrm{FDR} = \mathbb{E}\left[\frac{V}{\max(R, 1)}\right].$$
#
# Their procedure sorts the p-values, $p_{(1)} \le \dots \le p_{(m)}$, finds
#
# $$k^* = \max\left\{k : p_{(k)} \le \alpha\,\frac{k}{m}\right\},$$
#
# and rejects the $k^*$ smallest (none if there is no such $k$). These are the three lines:

# %%
def step_up(pvals, alpha):
    ranks = torch.arange(1, len(pvals) + 1, dtype=pvals.dtype)
    k = (ranks * (pvals.sort().values <= alpha * ranks / len(pvals))).max()
    return pvals <= alpha * k / len(pvals)

# %% [markdown]
# The second line is the maximum: of the ranks whose p-value is at or below its line the largest, or 0. It starts from the largest
# p-value and steps *up* in significance: a p-value above its own line is rejected all the same if a larger one is below its
# line. The third line rejects whatever is as small as the line is at $k^*$, and that is exactly the $k^*$ smallest: if there were
# one more, rank $k^* + 1$ would be below its line, too.
#
# `benjamini_hochberg` does the same for any number of experiments at once. On experiments with many small p-values, the cubes of
# those above, they agree:

# %%
small = nothing_to_find[:1000] ** 3
same = torch.stack([step_up(pvals, 0.05) for pvals in small]) == benjamini_hochberg(small, alpha=0.05)
print(f"decisions that agree: {100 * same.double().mean():.0f} % of {same.numel():,}")

# %% [markdown]
# ## The example of 1995
#
# The paper illustrates this on the 15 p-values of a study of a treatment of heart attacks.

# %%
table = figures.compute_stepup(alpha=0.05)
figures.draw_stepup(table)

# %% [markdown]
# On the right, the fourth p-value, 0.0095, is below its line, $0.05 \cdot 4/15 = 0.0133$, and no later one is below its
# own: four rejections. Bonferroni, at $0.05/15 = 0.0033$, stops after three. In numbers:

# %%
table.head(6).round(4)

# %%
pvals = torch.tensor(figures.PVALUES_1995, dtype=torch.float64)
print("Benjamini-Hochberg:", int(benjamini_hochberg(pvals, alpha=0.05).sum()))
print("Bonferroni:        ", int(bonferroni(pvals, alpha=0.05).sum()))
print("no correction:     ", int(fixed_cut(pvals, alpha=0.05).sum()))

# %% [markdown]
# The same decision can be read from *adjusted p-values*: the smallest $\alpha$ at which a hypothesis is rejected.

# %%
print(" ".join(f"{p:.3f}" for p in adjusted_pvalues(pvals, method="bh").tolist()))

# %% [markdown]
# ## What is guaranteed
#
# If the p-values of the true nulls are independent of each other and of the rest, and uniform, then
# $\mathrm{FDR} = \alpha\, m_0/m$ exactly, where $m_0$ is the number of true nulls: never above $\alpha$, whatever the others
# look like. The bound survives a kind of positive dependence (Benjamini & Yekutieli 2001) and is lost in general only
# by a factor of $1 + 1/2 + \dots + 1/m$.
#
# Let us watch it. Of 64 hypotheses, 56 are true nulls; the other 8 have a real effect of three standard deviations.

# %%
num_tests, num_effects, alpha = 64, 8, 0.05
z = torch.randn(20_000, num_tests, generator=generator, dtype=torch.float64)
z[:, :num_effects] += 3.0
pvals = torch.special.ndtr(-z)

for name, procedure in {"BH": benjamini_hochberg, "Bonferroni": bonferroni, "no correction": fixed_cut}.items():
    rejected = procedure(pvals, alpha)
    false = rejected[:, num_effects:].sum(-1)
    fdr = (false / rejected.sum(-1).clamp(min=1)).mean()
    power = rejected[:, :num_effects].double().mean()
    print(f"{name:14s} false discovery rate {fdr:.3f}   effects found {100 * power:.0f} %")

print(f"promised for BH: {alpha * (num_tests - num_effects) / num_tests:.3f}")

# %% [markdown]
# BH keeps its promise, and finds many more of the effects than Bonferroni does; without a correction, a much larger
# part of all "discoveries" is false.
#
# ## When the tests depend on each other
#
# The 64 experts of a token are not independent, so it matters how much of the promise survives dependence. Below, the
# procedures of `bhlib.procedures` face 48 true nulls and 16 effects, once with independent scores and once with a common
# component in all of them (a correlation of 0.5 between any two). What is drawn is the false discovery rate divided by
# $\alpha$: in the grey part it exceeds what was asked for.

# %%
import pandas as pd

from bhlib.simulations import simulate_fdr, simulate_power_1995

dependences = ("independent", "equicorrelated")
realised = pd.concat([simulate_fdr(dependence=name, repetitions=4000) for name in dependences])
figures.draw_fdr_simulation(realised)

# %% [markdown]
# Look for three things. *No correction* is in the grey everywhere: its promise is about single tests, not about
# discoveries. *BH* lies on $m_0/m = 0.75$ on the left, as the theorem says, and below it on the right: a common component
# with positive weights is the kind of dependence under which the bound is proved. *Storey's* procedure, which estimates
# $m_0$ and spends what BH leaves unspent, is exact on the left and breaks on the right, where the p-values of one
# experiment rise and fall together and the estimate with them. It is the one to be careful with. Benjamini and
# Yekutieli's is safe under any dependence, and pays for it with a factor of 4.7.

# %%
at = realised[realised["alpha"] == 0.05].pivot(index="method", columns="dependence", values="fdr")
at.loc[["fixed", "storey", "tsbky", "bh", "by", "hochberg", "bonferroni"], list(dependences)].round(2)

# %% [markdown]
# The next notebook adds a third dependence: the one that the router of a real model shows.
#
# ## What it buys: power
#
# The paper of 1995 measured power, the fraction of the effects that are found, for 4 to 64 tests, for effects of four
# sizes in three mixtures, and for four fractions of true nulls. Here is its setting again, with two procedures added that
# did not exist then.

# %%
figures.draw_power_1995(simulate_power_1995(repetitions=4000))

# %% [markdown]
# Follow Bonferroni's line from left to right: the more tests, the less it finds, since each has to bear the burden of all.
# BH's line is nearly flat. What counts for BH is which *fraction* of the hypotheses is false, not how many there are. And
# from top to bottom, the more there is to be found, the larger its lead.
#
# ## Why this suits a router
#
# The thresholds of BH are a line through $\alpha/m$, $2\alpha/m$, …: the more hypotheses are significant, the more lenient it
# is to the next one. The number of rejections is not fixed in advance but read from the data.

# %%
print("thresholds of the smallest eight of 64:", [round(c, 4) for c in critical_values(64, 0.05).tolist()[:8]])

# %% [markdown]
# For a router the hypotheses are "this expert does not stand out for this token". A token for which three experts stand
# out gets three, one for which ten do gets ten, at one and the same $\alpha$. What is left to say is where p-values come
# from when all there is are 64 numbers called logits. That is the hard part, and the subject of the next notebook.
#
# ## Exercises
#
# **1.** In the simulation BH's false discovery rate was 0.04 where 0.05 was allowed. Why, and how could one spend the
# rest if one knew how many nulls are true?
#
# *Answer.* The rate is $\alpha m_0/m$, here $0.05 \cdot 48/64 \approx 0.04$. Running BH at $\alpha m/m_0$ makes it $\alpha$. Storey's
# procedure does this with an estimate of $m_0$.

# %%
spent = simulate_fdr([0.05 * 64 / 48], ["bh"], num_null=48, repetitions=4000)
print(f"BH at alpha m/m0: false discovery rate {spent['fdr'][0]:.2f}, standard error {spent['fdr_se'][0]:.3f}")

# %% [markdown]
# **2.** What does the false discovery rate mean where there is nothing at all to be discovered?
#
# *Answer.* Then every discovery is false, so $V/R$ is 1 as soon as there is one, and the false discovery rate is the
# probability of *any* discovery: BH controls the familywise error rate in this case, as Bonferroni always does.

# %%
nothing = simulate_fdr([0.05], ["bh", "bonferroni"], num_null=64, repetitions=4000)
nothing[["method", "fdr", "fwer"]].round(2)

# %% [markdown]
# **3.** Benjamini and Yekutieli's procedure is BH at a smaller level. Which one, for 64 tests? At which level does it
# decide as BH does at 0.05?
#
# *Answer.* It divides by $1 + 1/2 + \dots + 1/64 = 4.74$. So at $0.05 \cdot 4.74 = 0.24$ the decisions are those of BH.

# %%
from bhlib.procedures import benjamini_yekutieli

harmonic = sum(1 / k for k in range(1, 65))
same = benjamini_yekutieli(pvals, alpha=0.05 * harmonic) == benjamini_hochberg(pvals, alpha=0.05)
print(f"divisor {harmonic:.2f}; decisions that agree: {100 * same.double().mean():.0f} % of {same.numel():,}")

# %% [markdown]
# **References.** Y. Benjamini and Y. Hochberg (1995), *Controlling the false discovery rate*, J. R. Statist. Soc. B 57,
# 289–300. Y. Benjamini and D. Yekutieli (2001), *The control of the false discovery rate in multiple testing under
# dependency*, Ann. Statist. 29, 1165–1188.

# %% [markdown]
# Next: [From logits to p-values](02_router_pvalues.ipynb) ([in Colab](https://colab.research.google.com/github/OWNER/bh-routing/blob/main/notebooks/02_router_pvalues.ipynb))
