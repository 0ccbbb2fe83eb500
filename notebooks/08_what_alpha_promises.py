# %% [markdown]
# # What alpha promises
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/bh-routing/blob/main/notebooks/08_what_alpha_promises.ipynb)
#
# To run it in Colab, choose Runtime, Run all. It takes about a minute, without a GPU and without a restart. The first cell fetches this workspace and what it requires; anywhere but in Colab it does nothing.
#
# Previous: [Fewer experts, less time](07_speed.ipynb) ([in Colab](https://colab.research.google.com/github/OWNER/bh-routing/blob/main/notebooks/07_speed.ipynb)) · Next: [What replaces an expert](09_what_replaces_an_expert.ipynb) ([in Colab](https://colab.research.google.com/github/OWNER/bh-routing/blob/main/notebooks/09_what_replaces_an_expert.ipynb))

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
# BH at level $\alpha$ promises that of the hypotheses that it rejects, a share of no more than $\alpha$ is expected to be true.
# What does that promise about experts? It depends on the hypothesis. A null fitted to the experts outside the model's own
# top 8 says "this expert is one that the model does not select"; among eight that it does select none is, so the share is 0
# at every $\alpha$, and the promise is kept by saying nothing.
#
# This notebook takes a hypothesis that can be *measured*: **the expert contributes next to nothing**. It measures which
# experts that is true of, compares every level with the truth, and then makes three promises that are theorems:
#
# 1. p-values for this hypothesis (`ContributionNull`);
# 2. a level for any rule, at which a share of at most $\alpha$ of the experts kept is useless (`promise_discoveries`);
# 3. a level for any rule, at which the loss is at most so much above the model's own (`promise_loss`).

# %%
import numpy as np
import pandas as pd
from scipy.stats import beta

from bhlib import figures, load_heldout
from bhlib.contributions import measure_contributions
from bhlib.evidence import realised
from bhlib.guarantees import promise_discoveries, promise_loss
from bhlib.loading import heldout_sequence_documents
from bhlib.pvalues import ContributionNull
from bhlib.rules import BH, Threshold

study = figures.Study()
some = {"length": 64, "max_sequences": 8}  # of each domain: the notebook takes less text than `make figures`

# %% [markdown]
# ## What an expert contributes
#
# The router gives expert $i$ the weight $w_i$, and its output $E_i(x)$ is added to the layer's output $y$ with that weight.
# So its contribution is
#
# $$ r_i = \frac{\lVert w_i E_i(x) \rVert}{\lVert y \rVert}. $$
#
# To know it takes the outputs of all 64 experts, also of those that the model does not select. `measure_contributions`
# computes them, and notes of which document each token is. An expert with $r \le 0.1$ is called **useless** here: a tenth of
# the layer's output is the most that it could change. (Where the line is drawn is a choice, and the second exercise draws
# another.)

# %%
text = load_heldout("calibration", **some)
documents = heldout_sequence_documents("calibration", **some)
seen = measure_contributions(study.model, text, documents=documents, progress=False)
useless = seen.r <= 0.1
print(f"{seen.r.shape[1]:,} tokens of {len(set(seen.units))} documents")
print(f"useless: {useless.float().mean():.2f} of all experts, {useless[seen.selected].float().mean():.2f} of the top 8")

# %% [markdown]
# A good tenth of all experts matters for a token. Of the eight that the model computes, a third does not.
#
# ## How well does the router rank?
#
# Every rule here goes down the router's ranking of a token's experts, and stops somewhere. So before asking where to stop, ask how
# good the ranking is: how well do the router's scores order the experts of one token by what these add? Left, $r$ by rank, and
# what it would be in the best order; then Spearman's correlation within a token, with $r$ layer by layer, and with other measures of
# what an expert adds. For KL and loss one expert at a time is left out, or added if the model does not select it, and the rest of the
# network is computed anew. This is a part of the test split; nothing was chosen by it.

# %%
figures.draw_router_ranking(pd.read_csv("../figures/router_ranking.csv"))

# %% [markdown]
# By $r$ the router ranks well among all experts, and less well among the eight best, where a rule has to decide; worst in the first
# layer. With the part of the contribution that points along the output the correlation over all experts is lower: what the model does
# not select may point anywhere. The change of the prediction (KL) follows the ranking, too. The *loss* hardly does: whether a
# token's next word becomes more probable with one expert more is next to chance, and only many tokens together tell what experts
# are worth. So a truth by loss, expert by expert, is out of reach for a router, and the hypotheses below are about $r$ and KL.
#
# ## Which unit?
#
# 64 experts of thousands of tokens are many pairs. But what are they a sample *of*? Tokens of one document resemble each
# other, so that a thousand tokens of one novel say little about the next manual. Whoever wants to say something about a new
# document has as many observations as there are documents: here some fifty.
#
# That is few, and it decides what can be promised. If nothing but exchangeability is assumed, fifty documents cannot tell an
# error rate of 0 from one of 1/51: the new document may be the one in 51 that is all wrong.
#
# ## P-values of a measured hypothesis
#
# *Conformal selection* (Jin and Candès 2023) compares an expert with those calibration experts of which the hypothesis is
# known to be true. `ContributionNull` does it with documents as units: $p(s) = \bigl(u(s) + \sum_d G_d(s)\bigr) / (D + 1)$, where
# $G_d(s)$ is the share of document $d$'s pairs that are useless and have a log-probability of at least $s$, and $u(s)$ is the
# largest share that the new document may have. The usual conformal p-value has $u = 1$. Then $p \ge 1/(D+1)$, which BH with 64
# hypotheses never rejects alone. But probabilities add up to one: no more than $e^{-s}$ experts of a token have a probability
# of $e^s$ or more, and so $u(s) = \min(e^{-s}, 8)/64$ will do.

# %%
null = ContributionNull.from_contributions(seen.r, seen.logits, seen.units, model_name=study.name)
print(null)

# %% [markdown]
# **Theorem.** Let the new document be exchangeable with the calibration documents. Of a token drawn from it and an expert drawn
# from the 64, $P(\text{useless, among the 8 best, and } p \le a) \le a$ for every $a$.
#
# **Proof.** Let $M(s)$ be the share of useless pairs with a log-probability of $s$ or more, averaged over *all* $D + 1$
# documents. Since the new one's share is at most $u(s)$, $M \le p$. Given the $D + 1$ documents, each is equally likely to be the
# new one. So the probability in question is at most the share of useless pairs, over all of them, at which $M \le a$; and these
# are the ones with the largest log-probabilities, a share of no more than $a$. ∎
#
# Nothing was assumed about the tokens of a document, nor about the experts of a token. For BH over a token's eight best it
# follows, as in Benjamini and Yekutieli's proof for dependent p-values, that the expected share of useless experts among
# those kept is at most $\alpha (1 + 1/2 + \dots + 1/8) = 2.72\,\alpha$. So BH at $\alpha/2.72$ ($\alpha/H$ in the figure) is *proven* to keep to $\alpha$. BH at
# $\alpha$ itself is not, and the next figure says what it does.
#
# ## Realised against nominal
#
# All that was fitted or found, was so on the calibration split; this is the test split.

# %%
table = pd.read_csv("../figures/realised_alpha.csv")
figures.draw_realised_alpha(table)

# %% [markdown]
# Upper left, the line is where the share of useless experts equals $\alpha$; a rule keeps its promise on or below it. Beside it
# the same for whichever of nine domains is the worst: about that no theorem here says anything. Lower right is what is paid:
# the share of useful experts that a rule keeps, at the number that it keeps.
#
# Look at three things. The default's points do not follow the line: it has too many useless experts at small levels and few at
# large ones, since its null hypothesis is another one. What is proven without a factor, risk control, lies close below the
# line. And lower right all rules lie on nearly one curve: a null decides what $\alpha$ *means*, and how many experts are
# kept, and hardly which.
#
# Lower left another truth is asked for: an expert is useless if the model's prediction moves by less than 0.001 nats when it
# alone is left out. By that measure far more of the experts kept are useless, and what was promised by contribution does not
# hold: **a promise is about the hypothesis that was measured, and about no other.** Risk control can be had for this one too
# (`promise_effects`), but with so few documents not at 0.05 or 0.1: even of the best experts of tokens some go unnoticed.

# %%
whole = table[(table["part"] == "all") & table["alpha"].isin([0.05, 0.1, 0.2])]
whole.pivot(index="method", columns="alpha", values=["fdp", "power", "mean_k"]).round(3)

# %% [markdown]
# ## A promise about any rule
#
# *Conformal risk control* (Angelopoulos and others 2024) needs no p-values. It measures the share of useless experts of every
# calibration document at one level after the other, adds one document that is all wrong, and takes the last level at which
# the mean is still at most $\alpha$. What it promises includes `min_k` and `max_k`, which no theorem about BH does.

# %%
promise = promise_discoveries(seen, alpha=0.1, rule=BH(), levels=(0.001, 0.003, 0.01, 0.03, 0.06, 0.1, 0.2, 0.4))
print(promise.text, f"({promise.documents} documents)")
promise.tried.round(3)

# %% [markdown]
# The default rule has to be run at another level than 0.1 to keep to 0.1. With too few documents nothing is promised, and the
# message says how many it takes:

# %%
try:
    promise_discoveries(seen, alpha=0.01)
except ValueError as error:
    print(error)

# %% [markdown]
# ## A promise about the loss
#
# What one wants to know in the end is another thing: how much worse does the model become? *Learn then Test* takes levels from
# the most cautious on, and tests of each the hypothesis that a document loses more than is allowed. Few documents and no
# assumption on their losses but a cap: the test is a bet, and its p-value is one over what a gambler has won.

# %%
loss = promise_loss(
    study.model, text, documents=documents, rule=Threshold(), levels=(0.002, 0.01, 0.02, 0.04, 0.08), percent=1.0
)
print(loss.text, f"({loss.documents} documents)")
loss.tried.round(3)

# %% [markdown]
# The last row is the first level that failed; the one before it is promised. `percent` is what documents lost on average: to
# be *sure* of 1 % with a probability of 0.9, fifty documents have to lose a good deal less. This is the price of a promise, and
# more documents lower it.
#
# What none of these promises covers: a single token; a text of another kind than the calibration documents; and, for the first
# two, what happens to later layers when earlier ones compute fewer experts, since contributions were measured in the model as
# it is. The loss is measured with the rule in place, and so includes it.
#
# ## What each ingredient adds
#
# A promise says how bad a rule may be. How *good* it is, at the same number of experts, is another matter, and what a rule is made of
# should be credited part by part. There are four parts, and one can leave out any of them:
#
# | ingredient | without it | with it |
# |---|---|---|
# | null per layer | one null for all layers: a cut on it is a threshold on the probability | a null fitted to each layer's log-probabilities |
# | norms | the statistic is the weight | weight times norm of the output, guessed from the token's logits (`bhlib.fit_norms`); with "mean norms" one number for each expert |
# | layer weights | none | a weight per layer on the odds of the level, chosen at each number of experts, if it helps on calibration documents that were held out |
# | step-up | a fixed cut on the p-values | BH on the same p-values, with the same weights |
#
# Everything is fitted and chosen on the calibration split; the title says which split was measured. The upper tables have every
# Everything is fitted and chosen on the calibration split; the title says which split was measured. The upper tables have every
# combination, against static top-k and against the plain threshold, at the number of experts that was really spent. Below, each
# ingredient is added to every rule that can have it: a line below zero says that it helped that rule. Weights of the layers take
# twenty searches, longer than all the rest (`compute_ablations(study, layer_weights=True)`), and are not in the table: what was not
# measured is left out. The figure `whole_test_split` has weights that were chosen at one number of experts.

# %%
ablations = pd.read_csv("../figures/ablations.csv")
figures.draw_ablations(ablations)

# %% [markdown]
# In numbers: of the rules that have an ingredient, which share is better for it, with the whole interval below zero, and which worse?

# %%
added = ablations[ablations["against"].str.startswith("without")]
added = added.assign(better=added["joint_high"] < 0, worse=added["joint_low"] > 0)
added.groupby(["against", "wanted_k"])[["better", "worse"]].mean().unstack().round(2)

# %% [markdown]
# A rule with three ingredients that is far below the threshold says nothing about any one of them; its difference from the same rule
# without that one does. So BH with a null per layer is compared with a cut on that null before the step-up gets any credit.
#
# Norms are worth most, and they and the null per layer find much the same: each alone helps more than it adds to the other. **The
# step-up never helps.** Why?
#
# ## Which way should the cut move?
#
# BH keeps the largest $k$ for which the $k$-th smallest p-value is at most $\alpha k/N$. Let the p-value be any decreasing function
# $f$ of the expert's probability, the same for all tokens, as it is for every p-value here that needs no calibration and looks at
# nothing but the probability. Then BH keeps the largest $k$ for which
#
# $$ \text{the } k\text{-th largest probability} \;\ge\; c(k) = f^{-1}(\alpha k / N), $$
#
# and $c$ **falls** with $k$, whatever $f$ and $\alpha$ are: since $\alpha k/N$ rises and $f$ falls. A token of which many experts
# pass is given a lower bar for the next. A threshold has the same bar for all. So whether *any* such p-value can be better than a
# threshold depends on one thing, which can be measured without p-values: at the same mean number of experts, does the model want
# a bar that falls with $k$, or one that rises? Below, $c(k) \propto k^{-\gamma}$. For $\gamma > 0$ it is BH on the p-value
# $p^{-1/\gamma}$, up to a factor; $\gamma = 0$ is the threshold; $\gamma < 0$ no p-value gives.

# %%
slopes = pd.read_csv("../figures/cut_slope.csv")
figures.draw_cut_slope(slopes)

# %% [markdown]
# The loss rises with $\gamma$, from below 0 on, at every number of experts: the bar should rise a little. A token that has many good
# experts can do without one more; the others make up for it. BH moves the bar the other way. How far does the default move it?

# %%
default = slopes[slopes["slope"].isna()].set_index("wanted_k")
few, many = (beta.isf(default["level"] * k / 64, 4, 63 * 4) for k in (2, 8))  # Dirichlet null of concentration 4
pd.DataFrame({"slope of the default's cut": np.log(few / many) / np.log(8 / 2), "1000 nats": 1000 * default["difference"]}).round(2)

# %% [markdown]
# By a small slope, which costs it a thousandth of a nat, as the curves say. So no p-value of this kind, however well chosen, brings BH
# below the threshold on this model: the best that it can do is to be so steep that BH becomes the threshold. (A family of curves was
# measured; a bar that falls in one place and rises in another is not excluded.) What helps is to look at more than the
# probability: at the layer, and at how large the outputs of experts are.
#
# ## Exercises
#
# **1.** Pretend that tokens are units: pass each token's number for its document. What becomes of the p-values, and why is that
# no proof?

# %%
by_token = ContributionNull.from_contributions(seen.r, seen.logits, range(seen.r.shape[1]), model_name=study.name)
fresh = load_heldout("validation", **some)
fresh_documents = heldout_sequence_documents("validation", **some)
new = measure_contributions(study.model, fresh, documents=fresh_documents, progress=False)
rules = {"documents": BH(0.1, null), "tokens": BH(0.1, by_token)}
realised(new, rules).query("part == 'all'")[["rule", "fdp", "low", "high", "power", "mean_k"]].round(3)

# %% [markdown]
# *Answer.* The price of a document to come, $u(s)/(D+1)$, becomes that of a token to come, next to nothing; p-values fall, and
# the realised share rises towards $\alpha$. It is still near it here, because the demo's documents are alike in this respect.
# That was *seen*, on these documents; nothing would have warned us if the next one were different.
#
# **2.** Call an expert useless only if it contributes less than a twentieth. What happens to the null, and to the default?

# %%
rules = {
    "BH, default": BH(0.1),
    "BH, contribution null": BH(
        0.1, ContributionNull.from_contributions(seen.r, seen.logits, seen.units, model_name=study.name, largest=0.05)
    ),
}
realised(new, rules, largest=0.05).query("part == 'all'")[["rule", "fdp", "low", "high", "power", "mean_k"]].round(3)

# %% [markdown]
# *Answer.* Fewer experts are useless then. The default knows nothing of that and keeps what it kept, of which a smaller share is
# useless. The contribution null keeps about one expert more, nearly all of them useful, and stays far below 0.1: it counts the
# experts beyond a token's eighth as useless whatever they contribute, which is on the safe side.
#
# **3.** Why is `min_k=1` harmless for the share of useless experts, though no theorem about BH covers it?

# %%
best = seen.logits.topk(1).indices
print(f"useless: {useless.gather(-1, best).float().mean():.4f} of the best experts of tokens")

# %% [markdown]
# *Answer.* It keeps a token's best expert where none is significant, and the best expert of a token is hardly ever useless.

# %% [markdown]
# Previous: [Fewer experts, less time](07_speed.ipynb) ([in Colab](https://colab.research.google.com/github/OWNER/bh-routing/blob/main/notebooks/07_speed.ipynb)) · Next: [What replaces an expert](09_what_replaces_an_expert.ipynb) ([in Colab](https://colab.research.google.com/github/OWNER/bh-routing/blob/main/notebooks/09_what_replaces_an_expert.ipynb))
