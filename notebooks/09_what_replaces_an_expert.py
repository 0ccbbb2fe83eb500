# %% [markdown]
# # What replaces an expert
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/bh-routing/blob/main/notebooks/09_what_replaces_an_expert.ipynb)
#
# To run it in Colab, choose Runtime, Run all. It takes about a minute, without a GPU and without a restart. The first cell fetches this workspace and what it requires; anywhere but in Colab it does nothing.
#
# Previous: [What alpha promises](08_what_alpha_promises.ipynb) ([in Colab](https://colab.research.google.com/github/OWNER/bh-routing/blob/main/notebooks/08_what_alpha_promises.ipynb))

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
# A rule that drops an expert saves its arithmetic and loses its output. So far every rule here has put nothing in its place.
# But something is known about the output of an expert before it is computed: on average over a text it is not zero. This
# notebook puts two cheap things in the place of a dropped expert, measures what they catch, and counts what they cost.
#
# For an expert $e$ of its eight the model would have added $w_e E_e(x)$ to the layer's output. A **compensation** adds
#
# $$ w_e \,(m_e + U V x), $$
#
# where $m_e$ is the mean output of the expert, weighted by the router, over tokens of a calibration text for which it was
# dropped, and $UV$ a linear map of small rank that all dropped experts of a layer share. The first is a row of a table for
# each dropped expert, the second two thin products for each token. Both are fitted by least squares, in one pass over a text.
# The weights are those that the model itself would have given.

# %%
import pandas as pd
import torch

from bhlib import BHRoutingIntegration, figures, load_heldout
from bhlib.agreement import text_agreement
from bhlib.calibration import collect_router_logits
from bhlib.compensating import fit_ranks
from bhlib.evaluation import evaluate, sweep
from bhlib.rival_fits import fit_alignment, fit_folding
from bhlib.rules import BH, ExFold, Halving, SeqTopK, Threshold, TopK

study = figures.Study()
model, tokenizer = study.model_and_tokenizer
text = load_heldout("calibration", length=128, max_sequences=6)  # little, so that it takes seconds
fitted = fit_ranks(model, text, (0, 16), progress=False)
means, both = fitted[0], fitted[16]
print(both)

# %% [markdown]
# ## The missing part
#
# How much is missing at all? The figure was computed on validation text, with compensations that were fitted on more text than
# there is here. On the left, each bar is the energy (squared norm) of what the dropped experts would have added, as a
# share of the energy of the layer's output. On the right, how much of that a compensation takes away.

# %%
part = pd.read_csv("../figures/missing_part.csv")
figures.draw_missing_part(part)

# %% [markdown]
# Layer by layer, in per cent of what is missing:

# %%
(100 * part.pivot(index="layer", columns="rank", values="caught")).round(1)

# %% [markdown]
# **What the means catch** is the column of rank 0. **What the map catches besides** is the rest of a row. Two things can be
# seen. Most of what is missing stays missing: the output of an expert depends on its input in a way that neither an average
# nor a thin linear map knows. And layers differ: where the column of rank 0 is large, experts say much the same to
# all tokens that they are given, and where it is small they do not.
#
# ## In three lines
#
# A compensation is an option of the patch, and any rule can have it.

# %%
fresh = load_heldout("validation", length=128, max_sequences=2)
ids = torch.cat([sequences[:1] for sequences in fresh.values()])
with BHRoutingIntegration(model, alpha=0.01, compensation=both) as bh:
    loss = model(input_ids=ids, labels=ids).loss
print(f"{loss:.2f} nats per token with {bh.get_routing_stats()['mean_experts_per_token']:.1f} experts")

# %% [markdown]
# ## What it costs
#
# Arithmetic is counted in experts: the column `cost` is the mean number of experts, and what stands in for the others. A
# dropped expert takes a row of the table, 192 products where the expert itself has 36,864; a map of rank 16 takes as many
# as a sixth of an expert, whether one expert is dropped or seven.

# %%
frames = [
    evaluate(model, fresh, Threshold(0.06), **options).assign(stands_in=name)
    for name, options in {"nothing": {}, "means": {"compensation": means}, "both": {"compensation": both}}.items()
]
pd.concat(frames).groupby("stands_in", sort=False)[["mean_k", "cost", "loss"]].mean().round(3)

# %% [markdown]
# So a rule with a map has to be compared with a rule that spends a sixth of an expert more on experts. All that follows is
# at counted cost.
#
# ## Rivals
#
# In the year before this was written others looked for the same. Three make up for what they drop in another way:
#
# - **Halving** (arXiv:2609.04575) changes no expert, only the sum that weights are divided by. OLMoE does not divide its
#   weights; what carries over is in the docstring of `Halving`.
# - **LDA** (arXiv:2609.09241) stretches and shifts each dimension of the layer's output, until its mean and deviation are
#   what they are in the model itself.
# - **ExFold** (arXiv:2608.24938) adds the weight of a dropped expert, times a number, to the kept expert whose output is most
#   like it.
#
# Others drop other experts. In **SeqTopK** (arXiv:2511.06494) a sequence has one budget, for which its tokens compete; it looks
# ahead, and so refuses to decode. `AllocMoE` (arXiv:2604.08133), `MoDES` (arXiv:2511.15690) and `ACE` (arXiv:2609.05228) are
# rules too. All seven were written here from abstracts, from summaries by others, and for ExFold and ACE from their authors'
# code; none was checked against the numbers that its paper reports, which are of other models.

# %%
folding = fit_folding(model, text)
rules = {"top-8": TopK(8), "top-4": TopK(4), "halving": Halving(TopK(4), 8, 16), "ExFold": ExFold(TopK(4), 8, **folding)}
rules |= {"SeqTopK, mean 4": SeqTopK(4.0, max_k=6)}
corrections = {"LDA": fit_alignment(model, text, {"top-4": TopK(4)})["top-4"], "means": means, "means and map": both}
table = pd.concat(
    [sweep(model, rules, fresh)]
    + [evaluate(model, fresh, TopK(4), compensation=one).assign(rule=f"top-4, {name}") for name, one in corrections.items()]
)
mean = table.groupby("rule", sort=False)[["cost", "loss"]].mean()
mean.assign(percent=100 * (mean["loss"] / mean["loss"]["top-8"] - 1))[["cost", "percent"]].round(2)

# %% [markdown]
# Eighteen short sequences are no comparison: the figure `compensated` makes it on part of the test split, with intervals over
# documents, for every rule with each of the three: `figures.make_figures(only=["compensated"])`, which wants a GPU.
#
# ## Does the text stay the same?
#
# The loss is an average. Does the model also write what it would have written? Below, greedily: `same` is the share of tokens
# that are equal to the model's own in the same place, `until` how many come before the first that differs. After it the two
# texts go their own ways, so that `kl` and `top1_agreement` are read along the model's own text instead.

# %% tags=["nbval-ignore-output"]
prompts = torch.cat([sequences[:1, :24] for sequences in fresh.values()])
agreement = {
    name: text_agreement(model, prompts, BH(0.01), 30, **options).mean()
    for name, options in {"nothing": {}, "means": {"compensation": means}, "both": {"compensation": both}}.items()
}
pd.DataFrame(agreement).T.round(3)

# %% [markdown]
# ## Exercises
#
# **1.** Use the compensation where nothing is dropped. What does it add?

# %%
with BHRoutingIntegration(model, alpha=0.999, min_k=8, compensation=both), torch.no_grad():
    patched = model(input_ids=ids).logits
with torch.no_grad():
    print(torch.equal(patched, model(input_ids=ids).logits))

# %% [markdown]
# *Answer.* Nothing, not even a zero: the logits are the model's own, bit for bit.
#
# **2.** The compensation was fitted with a threshold that keeps half. Drop the *best* four of a token's experts instead of the
# last four. Why can the means not be expected to help as much?
#
# *Answer.* $m_e$ is the mean output over tokens for which $e$ was dropped, and those are tokens that $e$ got a small weight
# for. What an expert says to the tokens that it is best for is another average.
#
# **3.** Why does the compensation use the model's own weights, and not weights that add up to one over what is kept?

# %%
logits = collect_router_logits(model, ids, progress=False)[0]
kept, own = (rule(logits).weights.sum(dim=-1).mean() for rule in (BH(0.01), TopK(8)))
print(f"on average the weights of what is kept add up to {kept:.2f}, those of the top 8 to {own:.2f}")

# %% [markdown]
# *Answer.* OLMoE was trained with weights that do not add up to one. Dividing by what is kept would make the kept experts louder
# than they ever were, and leave no room for what stands in for the others.

# %% [markdown]
# Previous: [What alpha promises](08_what_alpha_promises.ipynb) ([in Colab](https://colab.research.google.com/github/OWNER/bh-routing/blob/main/notebooks/08_what_alpha_promises.ipynb))
