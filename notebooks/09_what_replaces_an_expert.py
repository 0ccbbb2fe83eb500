# %% [markdown]
# # What replaces an expert
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/bh-routing/blob/main/notebooks/09_what_replaces_an_expert.ipynb)
#
# To run it in Colab, choose Runtime, Run all. It takes about a minute, without a GPU and without a restart. The first cell fetches this workspace and what it requires; anywhere but in Colab it does nothing.
#
# Previous: [What alpha promises](08_what_alpha_promises.ipynb) ([in Colab](https://colab.research.google.com/github/OWNER/bh-routing/blob/main/notebooks/08_what_alpha_promises.ipynb)) · Next: [Training for fewer experts](10_training.ipynb) ([in Colab](https://colab.research.google.com/github/OWNER/bh-routing/blob/main/notebooks/10_training.ipynb))

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
from bhlib.rules import BH, OEA, BatchBH, BatchThreshold, ExFold, Halving, SeqTopK, Threshold, TopK

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
# Eighteen short sequences are no comparison. This is all of the test split, with intervals over documents, for every rule with each of
# these; the last panel selects experts by weight times the norm that their output is guessed to have (`bhlib.fit_norms`), which is
# counted too. (Computed on GPUs, in two runs: `figures.make_figures(only=["compensated"])`.)

# %%
compensated = pd.read_csv("../figures/compensated.csv")
figures.draw_compensated(compensated)

# %%
at = compensated[(compensated["kind"] == "at cost") & compensated["family"].isin(["static top-k", "BH", "threshold", "ExFold", "LDA"])]
at.pivot(index=["family", "stands_in"], columns="cost", values="percent").round(2)

# %% [markdown]
# Three things can be read off. **Means pay** for every rule: for the threshold a fifth of what is lost at three experts and half of it
# at six, more than any selection wins over the threshold. **The map hardly pays for itself**: what it catches besides is worth little more
# than the sixth of an expert that it costs, and for rules that select badly not even that. **Choosing by norms adds up** with them.
# All in all the loss at four experts falls from 2.3 % above top-8 to 1.45 %, and half a per cent is reached at a cost of 5.2 experts
# instead of 5.9. Of the rivals' own corrections LDA and ExFold do better than static top-k alone, and not as well as means do.
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
# Six short texts say little. Over a text for each document of the test split:

# %%
figures.draw_written(pd.read_csv("../figures/written.csv"))

# %% [markdown]
# At three and four experts what stands in brings the prediction nearer to the model's own (KL), most where norms choose. In the text
# itself there is hardly anything to be seen, and from five experts on nothing: 154 texts are too few for so small a difference.
#
# ## A batch's bytes
#
# When some tokens are decoded at once, a step takes as long as it takes to read the weights of their experts. An expert that another
# token of the batch has loaded is then free, so what counts is not how many experts a token takes but how many *different* ones
# the batch takes. A rule that sees all tokens of a step can make use of that:
#
# - **OEA** (arXiv 2511.02237): the best $k_0$ experts of each token are loaded, and each token then takes its best eight of what is
#   loaded.
# - **BH, free experts**: what BH finds for any token is loaded, and each token takes its best eight of that.
# - **BH, batch weights**: weighted BH. An expert that other tokens want gets a larger weight, one that nobody else wants a smaller
#   one, with a mean of exactly 1 for each token. A token has no part in its own weights, so for tokens that are independent of
#   each other the promise of BH stays what it was (Genovese, Roeder & Wasserman 2006). In the first layer, tokens of different
#   documents are; behind it they are not, since what the batch has loaded there changed all of them. And nothing is promised of
#   the experts that a token takes because they are loaded.
# - **Batch threshold**: an expert is loaded if its squared probabilities, summed over the batch, exceed a constant: what all tokens
#   together would miss, against the price of its bytes, which is the same for every expert.
#
# A token alone is routed by each of them as by its plain twin, and so is a long prompt, for which every expert is loaded anyway.

# %%
logits = study.validation_logits[0]
step = logits[:: len(logits) // 16][:16]  # 16 tokens, far apart, decoded together
for rule in (BH(1e-3), OEA(k0=2), BatchBH(1e-3, boost=0), BatchBH(1e-3), BatchThreshold(0.1)):
    routing = rule(step, 0)
    loaded = len({*routing.experts.flatten().tolist()} - {-1})
    print(f"{type(rule).__name__:15} loads {loaded:2}, and a token takes {routing.counts.double().mean():.1f}")

# %% [markdown]
# Measured with teacher forcing: a pass over many sequences in which the tokens at the same place are routed together, which gives
# what single steps on a cache give (tested). Neighbours in a batch are of different domains and documents, as a server's would be.
# Above, what it costs in loss to load fewer experts; below, the difference from OEA at as many loaded experts: below zero is
# better.

# %%
batches = pd.read_csv("../figures/batch_bytes.csv")
figures.draw_batch_bytes(batches)

# %%
served = batches[batches["batch"].isin([16, 32]) & (batches["saved"] >= 0.4) & (batches["saved"] < 0.6)]
served[["batch", "rule", "unique", "saved", "above", "oea", "oea_low", "oea_high"]].round(3)

# %% [markdown]
# Taking what is loaded anyway is worth more than any choice of what to load: BH without it lies far above, and so does static top-k.
# With it, BH loses less than OEA. The weights load fewer experts at the same level, but hardly move the curve. The plain sum over
# the batch, which promises nothing about false discoveries, is better still by a little where 40 % or more of the experts are to be
# saved: what a batch should load is a question of summed value more than of significance for one token. (The rules were chosen
# among some thirty on validation text; this is the test split.)
#
# At 512 tokens nearly every expert is the best one of some token, and there is next to nothing to save.

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
# Previous: [What alpha promises](08_what_alpha_promises.ipynb) ([in Colab](https://colab.research.google.com/github/OWNER/bh-routing/blob/main/notebooks/08_what_alpha_promises.ipynb)) · Next: [Training for fewer experts](10_training.ipynb) ([in Colab](https://colab.research.google.com/github/OWNER/bh-routing/blob/main/notebooks/10_training.ipynb))
