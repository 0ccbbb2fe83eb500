# %% [markdown]
# # False discoveries, and how to bound them
#
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
# and rejects the $k^*$ smallest (none if there is no such $k$). Note the maximum: it starts from the largest p-value and
# steps *up* in significance. A p-value above its own line is rejected all the same if a larger one is below its line.
#
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
# **References.** Y. Benjamini and Y. Hochberg (1995), *Controlling the false discovery rate*, J. R. Statist. Soc. B 57,
# 289–300. Y. Benjamini and D. Yekutieli (2001), *The control of the false discovery rate in multiple testing under
# dependency*, Ann. Statist. 29, 1165–1188.
