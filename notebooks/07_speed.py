# %% [markdown]
# # Fewer experts, less time
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/bh-routing/blob/main/notebooks/07_speed.ipynb)
#
# To run it in Colab, choose Runtime, Run all. It takes about a minute, without a GPU and without a restart. The first cell fetches this workspace and what it requires; anywhere but in Colab it does nothing.
#
# Previous: [Quality against compute](06_quality_vs_compute.ipynb) ([in Colab](https://colab.research.google.com/github/OWNER/bh-routing/blob/main/notebooks/06_quality_vs_compute.ipynb)) · Next: [What alpha promises](08_what_alpha_promises.ipynb) ([in Colab](https://colab.research.google.com/github/OWNER/bh-routing/blob/main/notebooks/08_what_alpha_promises.ipynb))

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
# A token that uses half of the experts needs half of the experts' arithmetic. Does it also need half of the time? Seldom: other
# parts of the model take time too, weights have to be read whether one token uses them or a hundred, and a library that
# computes a dropped expert and multiplies the result by zero saves nothing at all. This notebook reads what was
# measured on a GPU. It begins with the call that a user makes, and then takes it apart: with `bhlib`'s kernels and with every
# experts implementation that `transformers` has, it asks of each number how far it is from the best that the hardware allows.
#
# Nothing here needs a GPU: the table comes with the repository. The last section says how to measure on your own.

# %%
import pandas as pd

from bhlib.figures.speed import describe, draw_speed
from bhlib.speed.goals import check_goals
from bhlib.speed.results import COLUMNS, rows_of

pd.set_option("display.max_rows", 100, "display.width", 140, "display.max_colwidth", 90)
table = pd.read_csv("../figures/speed.csv")
print(describe(table[table["median_us"].notna()]))

# %% [markdown]
# The model has OLMoE-1B-7B's shapes and random weights, with routers whose logits spread like a trained router's: times depend on
# the shapes and on how many experts are used, not on what the weights say. (`--model allenai/OLMoE-1B-7B-0924` measures the real
# checkpoint.) The levels of Benjamini–Hochberg are chosen so that tokens use 8, 6, 4, 3 and 2 experts on average.
#
# Each row of the table is one thing measured:

# %%
for column, meaning in COLUMNS.items():
    print(f"{column:22}{meaning}")

# %% [markdown]
# ## The call
#
# This is what you will feel: the lines of the README, with a level that gives tokens four experts on average. `unpatched` is the
# model as it comes, `patched` is `BHRoutingIntegration(model, alpha=...)` as it stands, with its statistics on, and
# `no statistics` is the same with `collect_stats=False`. `no experts` computes none at all: whatever a rule skips, and however
# well, no call can be much faster than that. Times are milliseconds, for a step of `generate()` (all sequences of the batch
# together), or for one pass over a prompt.
#
# Each is called in three ways. `eager` is plain `generate()`: the host launches every kernel of every step. `compiled` is
# `generate(cache_implementation="static")`: `transformers` compiles a step and replays it as one CUDA graph. `prefill` reads a
# prompt and generates nothing.

# %%
call = table[(table["stage"] == "call") & table["median_us"].notna()]
times = call.pivot_table(index=["mode", "tokens"], columns="name", values="median_us", sort=False) / 1000
times.round(2)

# %% [markdown]
# Why three ways, and not one? Because in each something else takes the time.
#
# **Launched from the host**, a step of few sequences is a queue of hundreds of small kernels. To launch one takes the host some
# microseconds, and most are done before the next one comes, so that the GPU waits. The time is the number of launches and the
# Python between them, and an expert that is skipped is no launch less: even `no experts` saves no more than the launches of the
# experts. Here a patch has to save launches, or at least not add any. With more sequences the GPU has more to do for each launch:
# `transformers` decodes by `batched_mm`, which copies the weights of every slot before it multiplies.
#
# **Compiled**, the host launches one graph per step, and only now does the time say what the GPU does. But a graph is one graph only if
# nothing in it asks the host. Statistics that are counted in Python break it into pieces at every layer, and then the whole queue of
# launches is back. Hence the decisions stay in the graph until the step is over, and are handed to one operator that the graph
# leaves out. The host copies them while the GPU is still busy, and counts them in bulk, later or when somebody asks.
#
# **A prompt** of thousands of tokens keeps the GPU busy with large products. Launches cost nothing beside them, and skipping
# shows at once.
#
# The speedup over the unpatched call of the same row:

# %%
names = [name for name in ("patched", "no statistics", "no experts") if name in times]
speedups = (1 / times[names]).mul(times["unpatched"], axis=0)
speedups.round(2)

# %% [markdown]
# Compare `patched` with `no experts`: the second is the most that could be reached. And compare `patched` with `no statistics`. What
# statistics cost, in per cent of the time without them:

# %%
(100 * (times["patched"] / times["no statistics"] - 1)).round(1).rename("cost of statistics, %").to_frame()

# %% [markdown]
# Below, all that was measured of it. What is launched from the host takes turns within a round, and a row gives the median of the
# rounds and their quartiles. What is compiled cannot, since a patch that comes or goes resets compiled code: there the whole
# sequence is run twice, everything compiled anew in its turn, and the rounds are the generations of both.
#
# `graphs` counts what the compiler made of a step: 1 is one graph for all of it. `graph_breaks` counts the places at which it had to
# give up, and `recompiled` what had to be compiled anew while counts changed and a second, shorter prompt came. `level moved` is the
# patched model after its level was set to another one, in place, between two generations: its counts are new, its graph is not.

# %%
columns = ("median_us", "q1_us", "q3_us", "speedup", "over_floor", "graphs", "graph_breaks", "recompiled")
rows_of(table, "call", columns)

# %% [markdown]
# ## The floor
#
# Two things take a GPU time, whatever the program: moving bytes from memory, and multiplying matrices. Both rates are measured in the
# same run, by a large copy and a large product. Whatever a computation is, its bytes and its operations, each
# divided by its rate, bound the time from below; the longer of the two is its *floor*.
#
# For one token the bytes decide: every selected expert's weights, 12.6 MB in bfloat16, have to be read, and are used once. For a
# long prompt the operations decide, since each weight that is read serves hundreds of tokens. In between lies an uncomfortable
# place: at 512 tokens with four experts each, an expert gets 32 tokens on average. Hardly any expert is left unused, so all of
# the weights have to be read, and the operations are not yet what takes time. Nobody can save much there by skipping.

# %%
block = table[(table["stage"] == "block") & (table["by"] == "bhlib") & table["median_us"].notna()]
floors = block.pivot_table(index="tokens", columns="k", values="floor_us", aggfunc="min")
floors.columns = [f"k = {k:.0f}" for k in floors.columns]
floors.round(1)

# %% [markdown]
# Along a row you see what skipping can save at best. Compare 1, 512 and 16,384 tokens: the first and the last
# shrink in proportion to k, and 512 does not shrink at all.
#
# ## All of it in one picture
#
# The bars on top are the call once more: each is a share of the time of the unpatched call, whose milliseconds stand below it. Below
# the line is faster, and the green bar is where experts cost nothing.
#
# In the panels beneath, blue circles are the patched model, the dashed red line is its floor. The black square is the fastest of
# `transformers` with its eight experts per token, whichever implementation and mode that is. The dotted line is the naive
# promise: k experts in k / 8 of the time. Where circles lie below the dotted line, the kernels gain more than skipping explains.
# The green diamond computes no expert at all: it is what remains if experts cost nothing, so no circle can get below it, except
# by as much as our kernels leave out beside the experts.

# %%
draw_speed(table)

# %% [markdown]
# Look at a panel for the experts of a layer, then at the one of a whole model below it. The first falls steeply with k. A whole
# model also has attention, norms, rotary embeddings and a head over the vocabulary, and these do not know about experts: its line
# is flatter, the more so the fewer tokens there are, when it is small kernels and their launches that take the time.
#
# ## The router
#
# Deciding must not cost what skipping saves. In plain torch, Benjamini–Hochberg takes a dozen operations, each with a launch of
# its own; the kernel takes one. Times in microseconds; an empty kernel stands beside them, because on a GPU even nothing takes
# time, and for one token that is nearly all there is. `eager` launches from the host, where a launch costs more
# than the computation; `graph` replays from a CUDA graph.

# %%
router = table[(table["stage"] == "router") & table["median_us"].notna()]
router.pivot_table(index=["mode", "tokens"], columns="name", values="median_us", sort=False).round(1)

# %% [markdown]
# ## The experts of one layer
#
# `speedup` is over the fastest of `transformers` in the same mode, `best_speedup` over its fastest in any mode, `over_floor`
# how many times the floor it takes. At k = 8 nothing is skipped: what is gained there is the kernels' own, and what is
# gained from there to k = 4 is skipping's. That way the two are told apart.

# %%
rows_of(table, "block")

# %% [markdown]
# ## A prompt
#
# One forward pass over 512 and 4,096 tokens, and over four prompts of 4,096. For long prompts launching costs nothing beside
# computing, so `eager` is as fast as a graph, or faster: while it is captured or compiled, `transformers` builds an explicit
# causal mask, and attention under a mask is slower than without.

# %%
rows_of(table, "prefill", ("median_us", "speedup", "best_speedup", "over_floor", "peak_gib"))

# %% [markdown]
# ## One step of decoding
#
# A step on a static cache. Launched from the host it takes the same time whatever is skipped: hundreds of small kernels have to be
# launched, and the GPU waits for them. A CUDA graph takes the host out of the way, and only then does skipping show. This is
# the reason why the kernels never ask the device how many pairs there are: a graph holds fixed shapes, so
# counts that change from token to token have to fit into them.

# %%
rows_of(table, "decode", ("median_us", "speedup", "best_speedup", "over_floor", "peak_gib"))

# %% [markdown]
# ## `generate()`, compiled by `transformers`
#
# The compiled call again, without statistics: at several levels, and against more of what `transformers` can do. Left alone, it
# decodes by `batched_mm`, which copies the weights of every slot. That is quick for one sequence and slow for many, so
# `grouped_mm` is measured beside it, under a name that `generate()` does not swap; `name` says what really ran. `graphs` counts
# what the compiler made of a step, and `recompiled` what it had to make anew while counts changed: it should be 0.

# %%
rows_of(table, "generate", ("median_us", "speedup", "over_floor", "peak_gib", "graphs", "recompiled"))

# %% [markdown]
# These rows could not take turns, since what is compiled for one is thrown away for the next, and the host's part in a step of
# one sequence varies by half a millisecond over the minutes between them: a difference of that size, at one sequence, says
# nothing. Against what `transformers` does by default the patch gains more with more sequences, most of it because gathered
# weights are no longer copied; against `grouped_mm` kept, look at 8 sequences.

# %% [markdown]
# ## On a CPU
#
# First the call, by the embedded model in one thread: processor time of `generate()` per token that it makes, and of one prefill.
# A single token leaves a processor nothing to share out: the experts' products are small, so what a patch adds in Python beside
# them shows at once.

# %%
cpu_call = pd.read_csv("../figures/speed_cpu_call.csv")
cpu_call.set_index(["call", "name"])[["mean_k", "cpu_ms", "cpu_q1", "cpu_q3", "ratio", "ratio_iqr", "tokens"]].round(2)

# %% [markdown]
# Then the experts by themselves: two threads, a prefill of 4,096 tokens. Where slots are empty and tokens many, the experts are
# computed one after the other in plain torch (`bhlib.expert_loop`), so that what one makes stays in the cache. Static top-k
# leaves no slot empty and runs by the model's own forward, bit for bit. So the row of BH with seven of eight experts shows what
# the loop gains by itself, and the rows below it what skipping adds. Ratios are to the unpatched model in the same round.

# %%
cpu = pd.read_csv("../figures/speed_cpu.csv")
cpu[["rule", "mean_k", "experts_ms", "experts_ratio", "model_ms", "model_ratio", "model_iqr", "threads"]].round(2)

# %% [markdown]
# ## What was aimed at, and what was reached
#
# Each goal was set before the code that was to reach it. Those of the call are the later ones, with statistics on; they stand in
# the place of two for a compiled `generate()` without statistics, which had asked for 2 and 3 times the speed of what comes, and
# of one for a CPU with two threads. `at_most` is what running at the floor would reach, `without_experts` what a model reaches
# that computes no expert at all. Where one of them is below what was wanted, the goal cannot be reached on this GPU by skipping
# experts.

# %%
goals = check_goals(table, cpu_call)
goals.round(2)

# %%
missed = goals[~goals["met"]]
out_of_reach = missed[(missed["at_most"] < missed["wanted"]) | (missed["without_experts"] < missed["wanted"])]
print(f"{goals['met'].sum()} of {len(goals)} reached; out of reach for anybody: {len(out_of_reach)}")
print("\n".join(f"- {goal}" for goal in missed["goal"]))

# %% [markdown]
# Five things stand in the way where a goal is missed.
#
# *All weights must be read.* With 512 tokens every expert is used by someone. The floor does not move with k, and to run at
# the floor is all that a kernel can do.
#
# *Products come in tiles.* A program multiplies up to 128 pairs of one expert at a time. What an expert has left over fills its last
# tile only in part: with four experts for each of 4,096 tokens, tiles hold about a quarter more rows than there are pairs. And between
# two tiles a program has to write one and to fetch the next. So the products of 16,384 tokens with eight experts run at some
# four fifths of the rate of a single large product.
#
# *A launch takes its time.* One call of the router from the host costs some tens of microseconds, whatever is computed; `softmax` and
# `topk` are two launches that do not cost much more. In a CUDA graph, where decoding belongs, the kernel alone counts.
#
# *The rest of the model.* The step that computes no expert shows what `generate()` needs for everything else. Dividing by that
# gives the largest speedup that any way of skipping experts can have there.
#
# *A map reads every token once more.* The means of dropped experts cost next to nothing, since their rows are in the cache where
# outputs are added up anyway. A map of rank 16 takes another product of each hidden state, and one for each sum: 6 % from 4,096 tokens on, and at
# one token, where all is two short launches, a quarter. What it gives ([notebook 09](09_what_replaces_an_expert.ipynb)) hardly pays for that.
#
# And the goal for memory is set against the least that any implementation of `transformers` takes: since `eager` was measured too,
# that is its loop over experts, which is several times slower. Beside `grouped_mm` the patched model takes less.
#
# What failed, if anything, is in the table too:

# %%
table.loc[table["median_us"].isna(), ["stage", "mode", "tokens", "name", "error"]]

# %% [markdown]
# ## On your own GPU
#
# With an NVIDIA GPU of compute capability 8.0 or newer and 20 GB of memory (40 GB for the longest prompt):
#
# ```bash
# python -m bhlib bench speed --folder results                          # everything, about 20 minutes on an H100
# python -m bhlib bench speed --folder results --only call --quick      # one stage, a few minutes
# python -m bhlib bench call --csv results/speed_cpu_call.csv           # on the CPU, with the embedded model
# python -m bhlib bench experts --csv results/speed_cpu.csv
# ```
#
# A stage that is measured again takes the place of its old rows in `results/speed.csv`; the others stay. Then
# `draw_speed(pd.read_csv("results/speed.csv"))` draws it as above. To use the kernels there is nothing to do: on such a GPU
# `BHRoutingIntegration(model)` takes them by itself.

# %% [markdown]
# Previous: [Quality against compute](06_quality_vs_compute.ipynb) ([in Colab](https://colab.research.google.com/github/OWNER/bh-routing/blob/main/notebooks/06_quality_vs_compute.ipynb)) · Next: [What alpha promises](08_what_alpha_promises.ipynb) ([in Colab](https://colab.research.google.com/github/OWNER/bh-routing/blob/main/notebooks/08_what_alpha_promises.ipynb))
