"""Train the demo, a small OLMoE with OLMoE's own routing, on one GPU in less than ten minutes.

    python bhlib/demo/train.py --corpus .corpus --out OUT --checkpoint CKPT --time-budget 540

Run the same command again to resume from the checkpoint. `--steps N` fixes the length of the schedule;
without it the length follows from the speed of the first steps and the budget. What is drawn at a step
depends on the seed and the step alone, so an interrupted run sees the same data as an uninterrupted one.

The loss is cross-entropy + 0.01 load balance (per layer, then averaged) + 0.001 router z-loss, unless options say
otherwise; other options make models of other sizes, pools and depths with the same recipe. Forward and
backward run in bfloat16; the optimizer keeps float32 copies of the weights. Matrices are updated by Muon, the
embeddings, router and norms by AdamW. At the end the model is saved and measured, see measure.py.
"""

import argparse
import csv
import json
import lzma
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from expert_training import IMPLEMENTATION
from measure import evaluate
from optimizers import Trainer
from safetensors.numpy import load_file
from snapshots import Snapshots
from transformers import AutoTokenizer, OlmoeConfig, OlmoeForCausalLM

HERE = Path(__file__).parent
LOG_EVERY = 50  # steps; only then does the host wait for the device
COLUMNS = ["step", "seconds", "loss", "load_balance", "z", "gradient_norm", "lr_factor", "tokens_per_second"]
PLAN_FROM, PLAN_AT = 20, 60  # the speed that sets the schedule is measured between these two steps
DECAY = 0.5  # the last part of the schedule, in which the learning rate falls linearly to 0


def make_config(tokenizer, args) -> OlmoeConfig:
    return OlmoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 32,
        max_position_embeddings=1024,
        num_experts=args.experts,
        num_experts_per_tok=args.top_k,
        norm_topk_prob=args.norm_topk_prob,
        router_aux_loss_coef=args.load_balance,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )


class Corpus:
    """Training tokens of all domains on one device, and the probability of drawing from each domain.

    A domain with n tokens is drawn with probability proportional to n**exponent: below 1, small domains are
    repeated more often than large ones.
    """

    def __init__(self, folder: Path, device: torch.device, exponent: float):
        files = sorted(folder.glob("*.npy.xz"))
        if not files:
            raise FileNotFoundError(f"no *.npy.xz in {folder}: run corpus.py --train {folder} first")
        parts = [np.load(lzma.open(path)) for path in files]
        self.domains = [path.name.removesuffix(".npy.xz") for path in files]
        self.sizes = np.array([len(part) for part in parts])
        self.starts = np.concatenate([[0], self.sizes.cumsum()[:-1]])
        self.probability = self.sizes**exponent / (self.sizes**exponent).sum()
        self.tokens = torch.from_numpy(np.concatenate(parts).astype(np.int16)).to(device)

    def __str__(self) -> str:
        shares = zip(self.domains, self.sizes, self.probability, strict=True)
        return ", ".join(f"{domain} {size / 1e6:.1f} M ({share:.0%})" for domain, size, share in shares)

    def batch(self, seed: int, step: int, rows: int, length: int) -> torch.Tensor:
        """Random windows, int64 [rows, length + 1]; the same seed and step give the same windows."""
        rng = np.random.default_rng([seed, step])
        domain = rng.choice(len(self.sizes), size=rows, p=self.probability)
        first = self.starts[domain] + (rng.random(rows) * (self.sizes[domain] - length - 1)).astype(np.int64)
        first = torch.from_numpy(first).to(self.tokens.device, non_blocking=True)
        return self.tokens[first[:, None] + torch.arange(length + 1, device=self.tokens.device)].long()


def router_losses(router_logits: tuple[torch.Tensor, ...], top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Load-balance loss (`top_k` when every expert gets the same share) and z-loss, means over the layers."""
    balance, z = 0.0, 0.0
    for logits in router_logits:
        logits = logits.float()
        probabilities = logits.softmax(-1)
        chosen = torch.zeros_like(logits).scatter_(1, logits.topk(top_k, -1).indices, 1.0)
        balance = balance + logits.shape[1] * (chosen.mean(0) * probabilities.mean(0)).sum()
        z = z + logits.logsumexp(-1).square().mean()
    return balance / len(router_logits), z / len(router_logits)


def losses(model: OlmoeForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """Cross-entropy (nats per token), load-balance loss and z-loss of a batch, float32 [3]."""
    output = model.model(tokens[:, :-1], use_cache=False, output_router_logits=True)
    logits = model.lm_head(output.last_hidden_state)
    loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
    return torch.stack([loss, *router_losses(output.router_logits, model.config.num_experts_per_tok)])


def learning_rate_factor(step: int, total: int, warmup: int) -> float:
    """Linear warm-up, constant, then linear decay to 0 at step `total`."""
    return min((step + 1) / warmup, 1.0, max(total - step, 0) / (DECAY * total))


def train(model: OlmoeForCausalLM, corpus: Corpus, args, began: float) -> dict:
    """The training loop; returns what the model card needs to know of it."""
    trainer = Trainer(model, args)
    checkpoint = args.checkpoint / "state.pt"
    args.checkpoint.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    progress = {"step": 0, "total": args.steps, "seconds": 0.0}
    if checkpoint.exists():
        progress = trainer.load(checkpoint)
    step, total, before = progress["step"], progress["total"], progress["seconds"]
    print(f"from step {step}; {model.num_parameters() / 1e6:.1f} M parameters; {corpus}", flush=True)
    compute = torch.compile(losses) if args.compile else losses
    snapshots = Snapshots(args.out / "snapshots", args.snapshots, model.device)
    weights = torch.tensor([1.0, model.config.router_aux_loss_coef, args.z_loss], device=model.device)
    first_log = not (args.out / "train_log.csv").exists() or step == 0
    log = (args.out / "train_log.csv").open("w" if first_log else "a", newline="")
    writer = csv.writer(log)
    if first_log:
        writer.writerow(COLUMNS)
    sums, counted = torch.zeros(4, device=model.device), 0
    mark = saved = started = time.time()
    end = began + args.time_budget - args.reserve if args.time_budget else float("inf")
    speed_from = first = step
    model.train()
    while step < (total or 10**9) and time.time() < end and step < args.stop_at:
        tokens = corpus.batch(args.seed, step, args.rows, args.length)
        try:
            parts = compute(model, tokens)
            (parts * weights).sum().backward()
        except Exception as error:
            if compute is losses:
                raise
            print(f"torch.compile failed ({type(error).__name__}: {str(error)[:300]}); going on without it")
            compute = losses
            model.zero_grad()
            continue
        factor = learning_rate_factor(step, total or 10**9, args.warmup)
        norm = trainer.step(factor)
        sums += torch.cat([parts.detach(), norm[None]])
        counted += 1
        step += 1
        if step - first == PLAN_FROM:
            sums.tolist()  # waits for the device
            speed_from, speed_mark = step, time.time()
        replan = (
            not args.steps
            and args.time_budget
            and (step - first == PLAN_AT if not total else step == int((1 - DECAY) * total))
        )
        if step % LOG_EVERY == 0 or replan or step == total:
            ce, balance, z, norm = (sums / counted).tolist()
            now = time.time()
            speed = counted * args.rows * args.length / (now - mark)
            writer.writerow(
                [
                    step,
                    f"{before + now - started:.1f}",
                    f"{ce:.4f}",
                    f"{balance:.4f}",
                    f"{z:.4f}",
                    f"{norm:.3f}",
                    f"{factor:.4f}",
                    f"{speed:.0f}",
                ]
            )
            log.flush()
            if step % (4 * LOG_EVERY) == 0 or replan:
                print(
                    f"step {step}/{total} {now - started:.0f} s loss {ce:.4f} balance {balance:.3f} "
                    f"z {z:.2f} norm {norm:.2f} lr {factor:.3f} {speed / 1e6:.3f} M tokens/s",
                    flush=True,
                )
            sums.zero_()
            counted, mark = 0, now
            if replan:  # as many steps as fit; asked again when the decay begins, so that it ends in time
                total = step + int((end - now) / (now - speed_mark) * (step - speed_from) * 0.985)
                print(f"planned: {total} steps", flush=True)
            if now - saved > args.save_every:
                trainer.save(checkpoint, step=step, total=total, seconds=before + now - started)
                saved = now
        if snapshots.due(step, total):
            snapshots.take(model, step)
    trainer.save(checkpoint, step=step, total=total, seconds=before + time.time() - started)
    log.close()
    return {
        "steps": step,
        "planned_steps": total,
        "seconds": round(before + time.time() - started, 1),
        "tokens": step * args.rows * args.length,
        "corpus_tokens": int(corpus.sizes.sum()),
        "sampling": dict(zip(corpus.domains, corpus.probability.round(4).tolist(), strict=True)),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=Path(".corpus"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--time-budget", type=float, help="seconds from start to finish, evaluation included")
    parser.add_argument("--reserve", type=float, default=25, help="seconds of it for evaluating and saving")
    parser.add_argument("--steps", type=int, help="length of the schedule; default: what fits the budget")
    parser.add_argument("--stop-at", type=int, default=10**9, help="stop after this step, to go on later")
    parser.add_argument("--save-every", type=float, default=120, help="seconds between checkpoints")
    parser.add_argument("--seed", type=int, default=1995)
    parser.add_argument("--rows", type=int, default=64, help="sequences per step")
    parser.add_argument("--length", type=int, default=1024, help="tokens per sequence")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--width", type=int, default=64, help="intermediate size of one expert")
    parser.add_argument("--experts", type=int, default=64, help="of a layer")
    parser.add_argument("--top-k", type=int, default=8, help="experts of a token")
    parser.add_argument("--norm-topk-prob", action="store_true", help="let a token's weights add up to 1")
    parser.add_argument("--load-balance", type=float, default=0.01, help="strength of the load-balance loss")
    parser.add_argument("--optimizer", choices=["muon", "adamw"], default="muon")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak of AdamW")
    parser.add_argument("--muon-lr", type=float, default=5e-3, help="peak of Muon, at AdamW's scale")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--warmup", type=int, default=150, help="steps")
    parser.add_argument("--z-loss", type=float, default=1e-3)
    parser.add_argument(
        "--snapshots", type=float, nargs="*", default=[], metavar="SHARE",
        help="shares of the schedule after which the router logits on held-out text are saved, see snapshots.py",
    )  # fmt: skip
    parser.add_argument("--exponent", type=float, default=0.7, help="of a domain's size in its weight")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--splits", nargs="*", default=["validation", "test"], help="to measure on")
    parser.add_argument("--compile", action="store_true", help="try torch.compile; falls back when it raises")
    args = parser.parse_args()
    if not args.steps and not args.time_budget:
        parser.error("give --steps, --time-budget or both: without them the training has no end")
    return args


def main() -> None:
    began, args = time.time(), parse_arguments()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(HERE)
    model = OlmoeForCausalLM(make_config(tokenizer, args)).to(args.device, dtype)
    model.set_experts_implementation(IMPLEMENTATION)
    history = train(model, Corpus(args.corpus, torch.device(args.device), args.exponent), args, began)
    if history["steps"] != history["planned_steps"]:
        print(f"stopped at step {history['steps']} of {history['planned_steps']}; the same command resumes")
    model.to(torch.bfloat16)
    arrays = load_file(HERE / "heldout.safetensors")
    metrics = {
        "training": history,
        "arguments": {k: v for k, v in vars(args).items() if not isinstance(v, Path)},
        "parameters": model.num_parameters(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    model.save_pretrained(args.out, max_shard_size="16MB")
    write = (args.out / "metrics.json").write_text
    write(json.dumps(metrics, indent=1) + "\n")
    for split in args.splits:
        metrics[split] = evaluate(model, arrays, split)
        print(split, {k: round(loss["mean"], 4) for k, loss in metrics[split]["loss"].items()}, flush=True)
        write(json.dumps(metrics, indent=1) + "\n")
        print(metrics[split]["loss"][str(args.top_k)], metrics[split]["expert_share"])
    print(f"done after {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
