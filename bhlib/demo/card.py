"""Write the demo's model card, README.md, from metrics.json (train.py) and heldout.json (corpus.py).

    python bhlib/demo/card.py

No number of the card is typed by hand.
"""

import json
import math
from pathlib import Path

HERE = Path(__file__).parent

CARD = """\
# A small OLMoE for experiments with routing

`OlmoeForCausalLM`, {parameters:.1f} M parameters: {layers} layers, {experts} experts of width
{width}, top {top_k}, `norm_topk_prob={norm}`, hidden size {hidden}, context {context}, byte-level
BPE of {vocabulary} tokens. The weights are stored in bfloat16 in the layout of the OLMoE
checkpoints. Load it with `bhlib.load_demo()`.

**What it is for.** Studying the router of a trained mixture of experts on a laptop: real text, real
specialization, losses that move when routing changes. **What it is not for.** Its text is locally
fluent at best. It knows no facts, follows no instructions, writes no code that can be trusted, and
repeats the views of its sources, most of them Victorian or older. Findings on it are leads for
large models, not results about them.

## Loss

Nats per token on the held-out `test` split, windows of {context} tokens, the model's own top
{top_k}; bits per byte count the bytes of the UTF-8 text.

| domain | loss | bits per byte | tokens |
|---|---|---|---|
{losses}

Loss when every token gets the same number of experts (the weights are not renormalized):

| top-k | validation | test |
|---|---|---|
{static}

Share of the (token, slot) pairs that an expert receives, relative to an equal share, on the test
split:

| layer | least used | most used | entropy relative to uniform |
|---|---|---|---|
{balance}

## Training

{steps} steps of {rows} sequences of {length} tokens, {tokens:.0f} M tokens drawn from {corpus:.1f}
M, {seconds:.0f} s on one {device}, torch {torch}. Cross-entropy + {aux} load balance (per layer) +
{z} router z-loss; optimizer {optimizer} (peak learning rate {muon_lr} for matrices, AdamW {lr} for
the rest), weight decay {decay}, gradient norm clipped at 1, constant learning rate, then linear
decay to 0 over the second half. A domain with n tokens is drawn with probability proportional to
n^{exponent}. `train_log.csv` has the losses along the way.

    python bhlib/demo/corpus.py --work /tmp/demo-corpus --train .corpus    # Debian, pip; minutes
    python bhlib/demo/train.py --corpus .corpus --out bhlib/demo --checkpoint /tmp/checkpoint --steps {steps}
    python bhlib/demo/card.py

## Data

Documents (acts, chapters, countries, files) went to training or to a held-out split as a whole,
before the tokenizer was trained; any stretch of {shared} tokens that also occurs in a held-out
document was cut out of the training text. `heldout.safetensors` holds int16 token ids under
`split/domain`; documents end with token {end}.

| domain | training tokens | drawn | calibration | validation | test |
|---|---|---|---|---|---|
{sizes}

| domain | package | version | by | licence of the text |
|---|---|---|---|---|
{sources}

Texts that are not in the public domain keep their licences; `NOTICE.md` has their notices. The dictionary domain
contains WordNet 3.0, "WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved.", under the WordNet
licence, provided "as is" and without warranty.
"""


def row(*cells) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def render(metrics: dict, heldout: dict, config: dict) -> str:
    """The card as Markdown."""
    domains, training, arguments = heldout["domains"], metrics["training"], metrics["arguments"]
    own = metrics["test"]["loss"][str(config["num_experts_per_tok"])]
    losses, sizes, sources = [], [], []
    for name, domain in domains.items():
        test = domain["splits"]["test"]
        bits = own[name] * test["tokens"] / test["bytes"] / math.log(2)
        losses.append(row(name, f"{own[name]:.3f}", f"{bits:.3f}", f"{test['tokens']:,}"))
        sizes.append(
            row(
                name,
                f"{domain['train']['tokens']:,}",
                f"{training['sampling'][name]:.1%}",
                *(f"{domain['splits'][split]['tokens']:,}" for split in ("calibration", "validation", "test")),
            )
        )
        sources += [row(name, s["package"], s["version"], s["installer"], s["licence"]) for s in domain["sources"]]
    losses.append(row("mean of the domains", f"{own['mean']:.3f}", "", ""))
    static = [
        row(k, f"{metrics['validation']['loss'][k]['mean']:.3f}", f"{loss['mean']:.3f}")
        for k, loss in metrics["test"]["loss"].items()
    ]
    share = metrics["test"]["expert_share"]
    layers = zip(share["min_over_uniform"], share["max_over_uniform"], share["normalized_entropy"], strict=True)
    balance = [row(i, f"{low:.2f}", f"{high:.2f}", f"{entropy:.3f}") for i, (low, high, entropy) in enumerate(layers)]
    return CARD.format(
        parameters=metrics["parameters"] / 1e6,
        layers=config["num_hidden_layers"],
        experts=config["num_experts"],
        width=config["intermediate_size"],
        top_k=config["num_experts_per_tok"],
        norm=config["norm_topk_prob"],
        hidden=config["hidden_size"],
        context=config["max_position_embeddings"],
        vocabulary=config["vocab_size"],
        losses="\n".join(losses),
        static="\n".join(static),
        balance="\n".join(balance),
        sizes="\n".join(sizes),
        sources="\n".join(sources),
        steps=training["steps"],
        tokens=training["tokens"] / 1e6,
        corpus=training["corpus_tokens"] / 1e6,
        seconds=training["seconds"],
        device=metrics["device"],
        torch=metrics["torch"],
        aux=config["router_aux_loss_coef"],
        z=arguments["z_loss"],
        rows=arguments["rows"],
        length=arguments["length"],
        optimizer=arguments["optimizer"],
        muon_lr=arguments["muon_lr"],
        lr=arguments["lr"],
        decay=arguments["weight_decay"],
        exponent=arguments["exponent"],
        shared=heldout["shared_tokens"],
        end=heldout["end_token"],
    )


def main() -> None:
    metrics, heldout, config = (
        json.loads((HERE / name).read_text()) for name in ("metrics.json", "heldout.json", "config.json")
    )
    (HERE / "README.md").write_text(render(metrics, heldout, config))


if __name__ == "__main__":
    main()
