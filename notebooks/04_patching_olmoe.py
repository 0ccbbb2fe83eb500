# %% [markdown]
# # Patching OLMoE
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/bh-routing/blob/main/notebooks/04_patching_olmoe.ipynb)
#
# To run it in Colab, choose Runtime, Run all. It takes about a minute, without a GPU and without a restart. The first cell fetches this workspace and what it requires; anywhere but in Colab it does nothing.
#
# Previous: [From p-values to experts, and why the statistic decides](03_bh_routing.ipynb) ([in Colab](https://colab.research.google.com/github/OWNER/bh-routing/blob/main/notebooks/03_bh_routing.ipynb)) · Next: [What alpha and temperature do](05_alpha_sweeps.ipynb) ([in Colab](https://colab.research.google.com/github/OWNER/bh-routing/blob/main/notebooks/05_alpha_sweeps.ipynb))

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
# A mixture-of-experts layer has a *router*: a small matrix that gives each token one logit per expert. OLMoE activates
# the eight experts with the largest logits, for every token, easy or hard. Here we replace this "always eight" by a
# decision per token, without touching a weight and without editing the installed `transformers`:
#
# 1. find the routers,
# 2. patch them, so that a token gets the experts that the Benjamini–Hochberg procedure finds significant,
# 3. generate text, read what happened token by token,
# 4. watch the model without changing it,
# 5. restore it, to the last bit,
# 6. count what was really computed, and replay a recorded routing.

# %%
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from bhlib import BHRoutingIntegration, RoutingPatch, figures, find_moe_layers, load_demo, load_heldout, load_olmoe
from bhlib.rules import BH, Replay, TopK

# %% [markdown]
# ## Which model
#
# Everything here runs on the small OLMoE that comes with this repository (64 experts, top 8, trained on the texts
# described in `bhlib/demo/README.md`), on any machine and without a download. It stays on the CPU, even where there is a GPU,
# which it does not need; `model.to("cuda")` would move it. With a GPU you can take the real one, which
# has 6.9 billion parameters: set the switch to `True`, and run all cells. The rest stays as it is, except for the numbers
# that the text mentions. Its weights take 12.9 GiB in 16 bits, and computing takes a few GiB more:
#
# | runtime in Colab | memory of the GPU | |
# |---|---|---|
# | A100 | 40 GiB or 80 GiB | fits |
# | L4 | 22 GiB | fits |
# | T4 | 15 GiB | short prompts only, and in float16, since it has no arithmetic in bfloat16: `load_olmoe(dtype="float16")` |
# | no GPU | | stay with the small model: the weights do not fit into the memory of the free runtime |

# %%
REAL_OLMOE = False  # True downloads 13.8 GB: on an L4, an A100 or better
model, tokenizer = load_olmoe() if REAL_OLMOE else load_demo()

# %% [markdown]
# ## The routers
#
# `find_moe_layers` recognizes a mixture-of-experts layer by what it does: an experts module that goes through
# `transformers`' dispatch, and beside it a router that returns its logits, the weights and the indices of the chosen
# experts. It also runs each router on a few random inputs, to learn how the model turns logits into weights. OLMoE takes
# the softmax over all 64 experts and does **not** rescale the eight that it keeps, so neither will we.

# %%
for layer in find_moe_layers(model):
    print(layer.index, layer.name, f"{layer.num_experts} experts, top {layer.top_k}, weights: {layer.weighting}")

# %% [markdown]
# ## Patch, generate, read
#
# A patch is a context manager. Inside the block the model routes by BH at level `alpha`; after it, the model is as before.
# `generate()` knows nothing of it: prompt and generated tokens are routed alike, each on its own.

# %%
prompts = {
    "code": "def mean(values):",
    "prose": "It was a bright morning, and she had",
}


def continue_text(prompt, tokens=40):
    """The model's most likely continuation of a prompt."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, repetition_penalty=1.2)
    return tokenizer.decode(output[0], skip_special_tokens=True)


# %% tags=["nbval-ignore-output"]
for name, prompt in prompts.items():
    with BHRoutingIntegration(model, alpha=0.05) as bh:
        text = continue_text(prompt)
    print(f"--- {name}: {bh.get_routing_stats()}\n{text}\n")

# %% [markdown]
# The same prompts under the model's own routing, for comparison. The texts part ways at some token: a model with
# fewer experts is a slightly different model. How much worse it is, is measured on held-out text in the figure
# `loss_vs_experts`, not judged from one sample.

# %% tags=["nbval-ignore-output"]
for name, prompt in prompts.items():
    print(f"--- {name}, top-8\n{continue_text(prompt)}\n")

# %% [markdown]
# ## The statistics
#
# `get_routing_stats()` is a mapping. Its numbers are integer counts divided once, over all (token, layer) pairs, and
# padding is not among them. `sparsity_gain` is the fraction of the model's expert computations that was saved.

# %%
texts = load_heldout("test", length=256, max_sequences=4, tokenizer=tokenizer)
domains = list(texts)

with BHRoutingIntegration(model, alpha=0.05) as bh, torch.no_grad():
    model(input_ids=torch.cat([texts[name] for name in domains]).to(model.device))

stats = bh.get_routing_stats()
print(f"tokens                 {stats['total_tokens']}")
print(f"experts per token      {stats['mean_experts_per_token']:.1f} ± {stats['std_experts_per_token']:.1f}")
print(f"computations saved     {100 * stats['sparsity_gain']:.0f} %")
print("experts by layer       " + " ".join(f"{mean:.1f}" for mean in stats["mean_experts_per_layer"]))

# %% [markdown]
# Underneath lie the decisions themselves, one row per token and layer, as a data frame. Here the tokens that were
# given the most experts and the fewest, on average over the layers, among those that occur often enough to tell.

# %%
frame = bh.records.to_frame()
frame.drop(columns="weights").head(3)

# %% tags=["nbval-ignore-output"]
by_token = frame.groupby("token_id")["count"].agg(["mean", "size"]).query("size >= 160").sort_values("mean")
by_token.index = [repr(tokenizer.decode([token])) for token in by_token.index]
print("fewest:", ", ".join(by_token.index[:12]))
print("most:  ", ", ".join(by_token.index[-12:]))

# %% [markdown]
# ## Why did this token get six experts?
#
# With `record_logits=True` a patch keeps the logits that it decided on, too (more memory than the decisions themselves), and
# `explain` answers for any token that was routed. A row of the data frame names it: by its sequence, its position and the
# layer. Here the first generated token that was given six experts.

# %% tags=["nbval-ignore-output"]
with BHRoutingIntegration(model, alpha=0.05, record_logits=True) as explained:
    continue_text(prompts["code"])

row = explained.records.to_frame().query("generated and count == 6").iloc[0]
print(f"position {row['position']}, {tokenizer.decode([row['token_id']])!r}, layer {row['layer']}: {row['count']} experts")
explained.explain((row["sequence"], row["position"]), row["layer"]).head(9).round(4)

# %% [markdown]
# The token gets every expert down to the last whose p-value is at most the threshold of its rank; with the default null that is
# the same as a threshold on its probability. `found` says what the procedure rejected, `kept` what was left of it, and
# `bound` whether `min_k` or `max_k` made the difference. `bhlib.explain.explain` gives the same table for any rule and any logits.
#
# ## A picture of one passage
#
# Rows are layers, columns are tokens; the colour is the number of experts. Look for vertical stripes: tokens that are
# given many experts, or few, in every layer. The lowest row is darker than the others: in the first layer few experts
# stand out, whatever the token.

# %%
passage = texts[domains[0]][:1, :48].to(model.device)
figures.draw_token_layer_map(figures.passage_counts(model, tokenizer, passage, alpha=0.05))

# %% [markdown]
# ## Another level, without patching anew
#
# The level can be moved while the patch is in place: the next forward pass goes by it, and a model that is compiled is not
# compiled anew. It can also be one number for each sequence of a batch. Each is then routed as it would be alone.

# %%
several = torch.cat([passage, passage])
with BHRoutingIntegration(model, alpha=0.01) as bh, torch.no_grad():
    for alpha in (0.01, 0.2, (0.01, 0.2)):
        bh.alpha = alpha
        bh.reset_stats()
        model(input_ids=several)
        by_sequence = bh.records.to_frame().groupby("sequence")["count"].mean()
        print(f"alpha = {alpha}: " + " and ".join(f"{mean:.2f}" for mean in by_sequence) + " experts per token")

# %% [markdown]
# ## Watching without touching
#
# With `mode="analyze"` the model computes what it always computes, and the patch only writes down what BH *would* have
# selected. The outputs are the same bits.

# %%
with torch.no_grad():
    before = model(input_ids=passage).logits
    with BHRoutingIntegration(model, alpha=0.05, mode="analyze") as watcher:
        during = model(input_ids=passage).logits

print("largest difference:", (during - before).abs().max().item())
print(f"BH would select {watcher.get_routing_stats()['bh_would_select_mean']:.1f} experts per token")

# %% [markdown]
# Under the patch the number differs a little: with fewer experts in one layer, the next layers see other inputs.
#
# ## Restored
#
# However the block ends, the hooks are gone and the configuration is as it was. And the patch itself adds
# no error: with a rule that selects exactly the model's own top 8, the outputs under the patch are the model's own.

# %%
with torch.no_grad():
    try:
        with BHRoutingIntegration(model, alpha=0.05):
            raise RuntimeError("something went wrong inside the block")
    except RuntimeError:
        pass
    restored = model(input_ids=passage).logits
    with RoutingPatch(model, TopK(8)):
        own_rule = model(input_ids=passage).logits

print("after an exception: ", (restored - before).abs().max().item())
print("top-8 as a rule:    ", (own_rule - before).abs().max().item())

# %% [markdown]
# ## Dropped experts are not computed
#
# `transformers` gives every token eight slots. A dropped expert that keeps its slot, with weight 0, still costs its share
# of every matrix product. Under the patch the experts see the selected (token, expert) pairs only. This can be counted:
# PyTorch's own counter adds up the operations inside each experts module, and divided by the cost of one pair they must
# give the number of pairs that the rule selected. (The counter looks into the `eager` implementation only; the tests
# count rows in `grouped_mm` and `batched_mm` too, in the prompt and in every decoding step.)

# %%
model.set_experts_implementation("eager")
per_pair = 2 * 3 * model.config.hidden_size * model.config.intermediate_size  # gate, up and down

for name, rule in {"top-8": TopK(8), "BH": BH(alpha=0.05)}.items():
    with torch.no_grad(), RoutingPatch(model, rule) as patch, FlopCounterMode(display=False) as counter:
        model(input_ids=passage)
    operations = sum(
        sum(by_kind.values())
        for module, by_kind in counter.get_flop_counts().items()
        if module.endswith("mlp.experts")
    )
    pairs = patch.records.counts().sum()
    print(f"{name:6} pairs computed / pairs selected = {operations / per_pair / pairs:.2f}")

model.set_experts_implementation("grouped_mm")

# %% [markdown]
# How much time that saves on this machine is printed by `python -m bhlib bench experts`.
#
# ## Which experts, and how evenly
#
# The records also say how the work is shared out: the busiest expert's load over the mean, the entropy of the load
# (1 if even), and the experts that no token used. `coactivation()` counts, for each layer, the tokens that used two
# experts together.

# %%
bh.records.load_balance().round({"max_over_mean": 1, "entropy": 2})

# %% [markdown]
# ## Record and replay
#
# What was recorded in one run can be imposed on another. `Replay` selects the recorded experts, pass by pass, and takes
# their weights from the logits of the moment; on the same input that gives the same logits, to the last bit. On other
# weights, say after fine-tuning, it answers the question of what the change did apart from the routing.

# %%
with torch.no_grad():
    with BHRoutingIntegration(model, alpha=0.05) as recorded:
        first = model(input_ids=passage).logits
    with RoutingPatch(model, Replay(recorded.records)):
        again = model(input_ids=passage).logits

print("replayed, largest difference:", (again - first).abs().max().item())
print(f"memory of the records: {recorded.records.nbytes / passage.numel():.0f} bytes per token")

# %% [markdown]
# ## Other families
#
# Nothing here knows the name OLMoE: a layer is recognized by what it does. So other families can be patched as well, each
# with its own way to make weights of logits; and a model that cannot be patched is refused, with the reason.
# `bhlib/models.md` has the whole table. Here are small random models of some families.

# %% tags=["nbval-ignore-output"]
sizes = {"hidden_size": 64, "intermediate_size": 32, "moe_intermediate_size": 32, "num_hidden_layers": 1}
sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128}
sizes |= {"num_experts_per_tok": 4, "first_k_dense_replace": 0, "pad_token_id": 0, "eos_token_id": None}

for family in ("olmoe", "flex_olmo", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"):
    other = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    try:
        layer = find_moe_layers(other)[0]
        print(f"{family:12} top {layer.top_k} of {layer.num_experts}, weights: {layer.weighting}")
    except ValueError as error:
        print(f"{family:12} {error}")

# %% [markdown]
# ## When something is wrong
#
# Errors name the value, what is allowed, and the way out.

# %%
for mistake in ({"alpha": 5}, {"min_k": 9}, {"max_k": 100}, {"mode": "watch"}):
    try:
        BHRoutingIntegration(model, **mistake)
    except ValueError as error:
        print(f"{mistake}: {error}\n")

# %% [markdown]
# Previous: [From p-values to experts, and why the statistic decides](03_bh_routing.ipynb) ([in Colab](https://colab.research.google.com/github/OWNER/bh-routing/blob/main/notebooks/03_bh_routing.ipynb)) · Next: [What alpha and temperature do](05_alpha_sweeps.ipynb) ([in Colab](https://colab.research.google.com/github/OWNER/bh-routing/blob/main/notebooks/05_alpha_sweeps.ipynb))
