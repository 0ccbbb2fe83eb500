# %% [markdown]
# # Training for fewer experts
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/bh-routing/blob/main/notebooks/10_training.ipynb)
#
# To run it in Colab, choose Runtime, Run all. It takes about a minute, without a GPU and without a restart. The first cell fetches this workspace and what it requires; anywhere but in Colab it does nothing.
#
# Previous: [What replaces an expert](09_what_replaces_an_expert.ipynb) ([in Colab](https://colab.research.google.com/github/OWNER/bh-routing/blob/main/notebooks/09_what_replaces_an_expert.ipynb)) · Next: [Does it generalize?](11_does_it_generalize.ipynb) ([in Colab](https://colab.research.google.com/github/OWNER/bh-routing/blob/main/notebooks/11_does_it_generalize.ipynb))

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
# Everything so far left the weights of the model alone: a router that was never told that experts may be dropped was asked which
# ones can go. This notebook tells it. A router is a matrix of 64 rows per layer, half a per cent of the demo's weights, and
# training it for a rule takes a minute or two on a CPU. Then comes how settings were chosen, by short trainings on a GPU, of routers
# alone and of every weight, beside static routing that was trained as long.
#
# What is trained, and on what:
#
# - The rule decides in training as it does afterwards. Gradients reach the router through the weights of the experts that are
#   kept; what is dropped has none.
# - The level moves, so that the mean number of experts stays what was asked for, whatever the router becomes.
# - The loss is the divergence from what the model itself says with its own eight experts; the cross-entropy of the text can be
#   mixed in.
# - The text is the calibration split, 220,000 tokens of nine domains. The validation split is for looking and choosing. The test
#   split is not opened here.

# %%
import tempfile
from pathlib import Path

import pandas as pd
import torch

from bhlib import figures, load_demo, load_heldout
from bhlib.training import load_tuned, tune
from bhlib.tune_command import before_and_after

model, tokenizer = load_demo()
text = load_heldout("calibration", length=128)
fresh = load_heldout("validation", length=128, max_sequences=4)
print(f"{sum(part.numel() for part in text.values()):,} tokens to train on")

# %% [markdown]
# ## The routers, live
#
# The routers alone, for four experts of eight. From a shell this is
# `python -m bhlib tune --model demo --mean-k 4 --train router --out tuned.safetensors`.

# %% tags=["nbval-ignore-output"]
tuned = tune(model, text, mean_k=4.0, train="router", tokens=20_000, seed=1, progress=False)
tuned

# %% [markdown]
# What happened, in fifths of the training: the divergence from the model itself in nats per token, and the number of experts,
# which the controller holds. A step reads a thousand tokens and the next one others, so single steps would say little.

# %% tags=["nbval-ignore-output"]
fifths = tuned.history.groupby((tuned.history["step"] - 1) * 5 // len(tuned.history) + 1)
fifths[["divergence", "mean_k"]].mean().rename_axis("fifth").round(3)

# %% [markdown]
# Before and after, on text of the validation split, at the same number of experts:

# %% tags=["nbval-ignore-output"]
before_and_after(model, tuned, text, fresh).round(3)

# %% [markdown]
# On so little text that the numbers above are of a small sample: see which way they point, not how far. The
# model is what it was: `tune` gives back what has changed, and takes it out of the model again. A patch brings it along, and
# takes it back to the bit.

# %%
own = {name: value.clone() for name, value in model.named_parameters()}
with tuned.routing(model) as patch, torch.no_grad():
    changed = [name for name, value in model.named_parameters() if not torch.equal(value, own[name])]
    model(input_ids=torch.cat([part[:1] for part in fresh.values()]))
print(len(changed), "tensors changed, such as", changed[0])
print("as before:", all(torch.equal(value, own[name]) for name, value in model.named_parameters()))

# %% [markdown]
# One file holds what has changed, the rule, the levels, and some numbers by which the model is told. It is refused for any other.

# %%
path = Path(tempfile.mkdtemp()) / "tuned.safetensors"
tuned.save(path)
read = load_tuned(path)
print(f"{read.num_bytes / 1e3:.0f} kB, for {list(read.levels)} experts")

# %%
other, _ = load_demo()
torch.nn.init.zeros_(other.model.layers[0].mlp.gate.weight)
try:
    read.routing(other)
except ValueError as refusal:
    print(refusal)

# %% [markdown]
# ## How settings were chosen
#
# On a GPU, from the text that the demo itself was trained on: a million tokens for each training, with one seed, measured on the
# whole validation split at exactly four experts (top-8: eight). These are the trainings that were run to choose the learning
# rate and the loss, of routers and of every weight under BH, and of every weight under static top-4 and top-8 as rivals.

# %%
table = pd.read_csv("../figures/training.csv")
figures.draw_training(table)

# %%
trained = table[table["what"] != "untuned"]
trained.loc[trained.groupby(["what", "method"])["loss"].idxmin(), ["what", "method", "mean_k", "loss", "learning_rate", "distillation"]]

# %% [markdown]
# Without training the demo loses 2.668 nats per token with its own eight experts, 2.731 under BH at four, and 2.746 under static
# top-4 (black lines; measured on a CPU, the trainings on a GPU, both in float32). After a million tokens:
#
# - **Routers alone** bring BH to 2.712: three tenths of what it had lost, by half a per cent of the weights.
# - **Every weight** brings it to 2.691, and static top-4, trained as long and with as many settings tried, to 2.703. BH stays
#   ahead, by 0.011 where it was 0.015 before.
# - That is still 0.9 % above the eight experts of the untrained model. The aim was half a per cent: at this length it is **not
#   met**, nor is that of 0.025 for routers, which gain 0.019.
# - **The model itself is the better teacher.** Distillation alone is best for each of the three at four experts. From
#   the text alone routers learn less at every rate tried, and at the largest they end worse than untrained.
# - **Top-8 is no rival here that was trained fairly.** It was tried at two rates, with the text alone, and got *worse* (2.670): the
#   demo had been trained on this text to the end. So BH is compared with the untrained top-8, which is the stronger.
#
# ## What is not known yet
#
# These numbers chose the settings, so they flatter what was chosen; there is one seed, and no interval was kept. Whether a
# model that was trained for four experts is as good as one that was trained as long for eight is a question for the test split, with
# three seeds, documents as units and the same means of experts, and that comparison **has not been run**. Nor have these: models
# trained for other numbers of experts, elastic ones, longer and shorter trainings, and other ways to give the decision a gradient
# (straight-through gates, a penalty on the number of experts). The runs are written and wait for a GPU:
#
# ```
# python bhlib/demo/tuning_runs.py --corpus .corpus --out runs --part 0 --of 1
# python bhlib/demo/tuning_table.py runs figures/training.csv
# ```
#
# No tuned router comes with the repository until it has been measured.

# %% [markdown]
# ## Exercises
#
# **1.** Ask for nine experts of a model that has rules for one to eight. What happens, and to the model?

# %%
try:
    tune(model, fresh, mean_k=9.0, tokens=1000, progress=False)
except ValueError as refusal:
    print(refusal)

# %% [markdown]
# *Answer.* No level of BH gives nine, and that is found before the first step. The model is untouched, as after any error.
#
# **2.** Why does the controller move the level, and not a term of the loss the number of experts?
#
# *Answer.* The number is a promise of cost, and a penalty trades it for loss, at a rate that has to be guessed. The level is a
# dial that exists anyway. (Whether a penalty beside it helps is among what has not been run.)
#
# **3.** What would a router learn from the text alone, without the model itself as a teacher? Use `distillation=0.0`, and look at the
# left panel of the figure first.

# %% [markdown]
# Previous: [What replaces an expert](09_what_replaces_an_expert.ipynb) ([in Colab](https://colab.research.google.com/github/OWNER/bh-routing/blob/main/notebooks/09_what_replaces_an_expert.ipynb)) · Next: [Does it generalize?](11_does_it_generalize.ipynb) ([in Colab](https://colab.research.google.com/github/OWNER/bh-routing/blob/main/notebooks/11_does_it_generalize.ipynb))
