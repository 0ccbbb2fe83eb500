# %% [markdown]
# # What alpha and temperature do
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/bh-routing/blob/main/notebooks/05_alpha_sweeps.ipynb)
#
# To run it in Colab, choose Runtime, Run all. It takes about a minute, without a GPU and without a restart. The first cell fetches this workspace and what it requires; anywhere but in Colab it does nothing.
#
# Previous: [Patching OLMoE](04_patching_olmoe.ipynb) ([in Colab](https://colab.research.google.com/github/OWNER/bh-routing/blob/main/notebooks/04_patching_olmoe.ipynb)) · Next: [Quality against compute](06_quality_vs_compute.ipynb) ([in Colab](https://colab.research.google.com/github/OWNER/bh-routing/blob/main/notebooks/06_quality_vs_compute.ipynb))

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
# The rule has two dials. The level $\alpha$ decides *how many* experts a token gets, and the temperature decides *with which
# weights* the chosen ones are added up. Here you can turn both, on a real text and a real (small) model, and watch. After that
# the same questions are asked of all the held-out text at once.

# %%
import pandas as pd

from bhlib import figures, load_demo
from bhlib.explain_token import explain_token
from bhlib.levels import alpha_for_mean_experts
from bhlib.pvalues import DirichletNull, TokenGaussian
from bhlib.rules import BH
from bhlib.widgets import Explorer, heldout_texts

model, tokenizer = load_demo()

# %% [markdown]
# ## The explorer
#
# Pick one of the passages, none of which the model was trained on, or type a text of your own (it is read when you click
# outside the box). You see
#
# - the passage, each token on a colour that says how many experts it would get (rest the pointer on a token for its number),
# - how often each number of experts occurs, and the mean,
# - the number by layer,
# - the router weights of the experts that are kept, from each token's best to its last, with black marks for the model's own
#   eight,
# - the loss of the model under this rule, beside its own, in *nats* per token: the mean of −log of the probability
#   that the model gave to the token that came next, by the natural logarithm. A loss higher by 0.01 nats means that this
#   probability was 1 % lower, in the geometric mean.
#
# One thing to know: while a slider moves, the numbers say what the rule *would* select from the logits of the model's own
# routing. When the slider has rested for half a second, the model is run with the rule in place, and the line with the loss
# gives the number of experts that were really used. The two differ a little, since layers that get other inputs choose
# other experts.
#
# **Do you see a picture and no sliders?** Then no kernel has run the cells yet, and the picture is what the explorer had when
# this notebook was saved. In Colab choose Runtime, Run all; in JupyterLab Run, Run All Cells. GitHub and nbviewer only show
# pictures: for the sliders open the notebook by the badge at the top, or in a clone of the repository with `make lab`.

# %%
explorer = Explorer(model, tokenizer)
explorer.passage.value = "novels"  # a control can be moved from code, too
explorer

# %% [markdown]
# ### Move α
#
# When the cells above have run, drag $\alpha$ from left to right, slowly. The histogram moves to the right and the text
# darkens, but not evenly: look for the tokens that are dark already at a small $\alpha$, and for those that stay pale at a large
# one. Then let go and compare the losses. On the left the model loses something; how much depends on the passage. On the right
# it is close to its own loss, with fewer than eight experts. On a single passage the difference may even be negative: a few
# hundred tokens are a small sample. Put $\alpha$ back to 0.05 (the slider has a step there): everything is as it was, to the
# last digit.
#
# The views of the explorer are functions, so the same can be done without sliders. A `Passage` is read once; `route` asks a rule
# what it would make of it. This is where the histogram should stand at $\alpha = 0.5$:

# %%
passage = figures.Passage.read(model, tokenizer, heldout_texts()["novels"])
figures.draw_passage_histogram(passage.route(BH(alpha=0.5)))

# %% [markdown]
# ### Look at one layer
#
# Choose layer 0, then the others one after the other. In the first layer few experts stand out, whatever the text. With a layer
# chosen, the text shows whole numbers, and neighbouring tokens differ more than their averages over the layers did.

# %%
figures.draw_passage_layers(passage.route(BH(alpha=0.05)), layer=0)

# %% [markdown]
# ### Ask about one token
#
# With a layer chosen, move the slider *why? token*. The table below the text has a row for each expert: what the router says of
# it, its p-value, and what its rank needs. When the slider rests, all experts of the token are computed, and the bars show what
# each of them *adds*, blue where the rule keeps it and orange where it does not. A long orange bar is an expert that the rule
# should have kept, a blue one that can hardly be seen is one that it could have spared. The same table without sliders:

# %%
table = explain_token(model, BH(alpha=0.05), passage.token_ids, position=12, layer=4)
table.loc[table["own"], ["rank", "expert", "probability", "pvalue", "kept", "r", "along"]].round(3)

# %% [markdown]
# ### Put something in the place of what is dropped
#
# The menu *for dropped* adds the mean output of each dropped expert, weighted as the expert would have been, or these and a
# linear map that all share (it is fitted in seconds, the first time). The experts stay the same; the line with the loss says what
# it makes of them, and what the loss is with nothing. Try it at a small $\alpha$.

# %% [markdown]
# ### Change the procedure
#
# Leave $\alpha$ at 0.05. *Bonferroni* tests every expert at $\alpha/64$ and finds fewer experts than *Benjamini–Hochberg*; *fixed
# cut* does not correct at all and finds more. *Benjamini–Yekutieli*, which is proved under any dependence between the p-values,
# is BH at a level almost five times smaller, and you can find that level with the slider.

# %%
for method in ("bonferroni", "by", "bh", "fixed"):
    print(f"{method:10s} {passage.route(BH(alpha=0.05, method=method)).counts.mean():.2f} experts per token")

# %% [markdown]
# ### Change the null
#
# The same $\alpha$ means something else under each null, so the number of experts jumps. That says nothing against the null: move
# $\alpha$ until the means agree, and only then compare the losses. The *fitted* nulls look at some calibration text when you
# choose them for the first time, and let you choose the statistic. The one of *contributions* takes some seconds: it computes
# all experts for the beginning of every calibration document, and its hypothesis is that an expert adds next to nothing
# (notebook 08). Try *1 − softmax*, too: it never selects more than one
# expert, which is a theorem (for every $\alpha$ below $63/64$), and the explorer says so.
#
# For the two nulls that need no calibration, these levels give four experts per token on this passage:

# %%
for null in (DirichletNull(), TokenGaussian()):
    print(f"{null.name:10s} alpha {alpha_for_mean_experts(null, passage.router_logits, 4.0):.2g}")

# %% [markdown]
# ### Move the bounds
#
# Set `max_k` to 16, twice what the model was trained with, and $\alpha$ to 0.9: the rule takes more than eight experts for
# about half of the pairs, and the loss hardly changes. Go back to 8 and 0.05, and set `min_k` to 4: the tokens that had
# fewer are lifted to 4, and no others change.

# %%
figures.draw_passage_histogram(passage.route(BH(alpha=0.9, max_k=16)))

# %% [markdown]
# ### Move the temperature
#
# Keep an eye on the weights, and on the number of experts. The weights change at once: a low temperature gives most to the
# best expert, a high one spreads the weight over all 64, so that those that are kept share less. The *number* of experts
# that would be selected does not change at all, since the p-values are made from the logits as they are. (The exception is
# *1 − softmax*, whose p-values come from the weights.) The loss is lowest near temperature 1, at which the model was trained.

# %%
for temperature in (0.5, 1.0, 2.0):
    routed = passage.route(BH(alpha=0.05), temperature)
    kept, own = routed.weights.sum(axis=-1).mean(), routed.own_weights.sum(axis=-1).mean()
    print(f"temperature {temperature}: {routed.counts.mean():.1f} experts with {kept:.2f} of the weight; own top-8: {own:.2f}")

# %%
figures.draw_passage_weights(passage.route(BH(alpha=0.05), temperature=2.0))

# %% [markdown]
# OLMoE does not rescale the weights of the experts that it keeps so that they sum to one, and neither does the patch. What is
# dropped is therefore missing from the sum: the layer adds less to the residual stream. A temperature below 1 gives some of
# it back to the best experts. This looks like a repair but is not one, since it also changes the proportions among those that
# are kept: try 0.84 in the explorer, one step below 1, and compare the losses.
#
# ### Generate
#
# The button continues the passage with the rule and with the model's own routing, always taking the most likely token. The
# two texts often begin alike and part at some token, after which each follows its own path. It is not a measurement.

# %% [markdown]
# ## What alpha does, on all of the text
#
# One passage is an anecdote. Here is the number of experts against $\alpha$ for every domain of the held-out test text, from
# the table that `make figures` computes.

# %%
table = pd.read_csv("../figures/experts_vs_alpha.csv")
figures.draw_experts_vs_alpha(table)

# %% [markdown]
# Two things are worth seeing. The axis of $\alpha$ is logarithmic, and the curves rise slowly on it: to change the number of
# experts noticeably takes a *factor* in $\alpha$, not a few hundredths. And the domains run side by side: they differ by much
# less than the tokens within each of them do.

# %%
means = table.pivot(index="alpha", columns="domain", values="mean_k")
means.assign(spread=means.max(axis=1) - means.min(axis=1)).round(1)

# %% [markdown]
# The spread between tokens is in the next figure: the share of (token, layer) pairs with each number of experts. A static rule
# would be a single bar. The bar at the right end of each panel includes the pairs that the bound `max_k = 8` holds back.

# %%
figures.draw_count_distribution(pd.read_csv("../figures/count_distribution.csv"))

# %% [markdown]
# Previous: [Patching OLMoE](04_patching_olmoe.ipynb) ([in Colab](https://colab.research.google.com/github/OWNER/bh-routing/blob/main/notebooks/04_patching_olmoe.ipynb)) · Next: [Quality against compute](06_quality_vs_compute.ipynb) ([in Colab](https://colab.research.google.com/github/OWNER/bh-routing/blob/main/notebooks/06_quality_vs_compute.ipynb))
