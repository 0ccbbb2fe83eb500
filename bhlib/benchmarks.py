"""How long routing takes: nanoseconds per token, on the processor and on the GPU if there is one.

    python -m bhlib bench routing
"""

import warnings

import numpy as np
import pandas as pd
import torch
from statsmodels.stats.multitest import multipletests
from torch.utils.benchmark import Timer
from tqdm.auto import tqdm

from bhlib.calibration import fit_null
from bhlib.procedures import PROCEDURES, reject
from bhlib.pvalues import DirichletNull, PValueMaker, TokenGaussian
from bhlib.rules import BH

BASELINE = "softmax + topk"


def bench_routing(
    num_tokens: int = 16_384,
    num_experts: int = 64,
    *,
    alpha: float = 0.05,
    max_k: int = 8,
    loop_tokens: int = 256,
    min_run_time: float = 0.5,
    devices: list[str] | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Time the routing of one layer.

    Parameters
    ----------
    num_tokens, num_experts : int
        Shape of the logits: float32, standard normal times two.
    alpha : float
        Level of every procedure.
    max_k : int
        Experts per token of the baseline, and the bound of the rules.
    loop_tokens : int
        Tokens for the loop over statsmodels, which is timed on so many only; its time per token does not depend on it.
    min_run_time : float
        Seconds to spend on each row.
    devices : list of str, optional
        By default the CPU, and CUDA if there is any.
    seed : int
        Of the logits.

    Returns
    -------
    pandas.DataFrame
        One row per device and operation: ``device``, ``threads`` (of the CPU), ``group``, ``operation``, ``tokens``,
        ``experts``, ``ns_per_token`` (median), ``iqr_ns`` (interquartile range of the repetitions), ``repetitions``,
        and ``relative``, the median over that of `BASELINE` on the same device. Groups:

        "router" : what a model does itself, from logits to weights and indices.
        "rule" : the whole of `bhlib.rules.BH`, from logits to weights, indices and counts.
        "p-values" : from logits to p-values alone.
        "procedure" : from p-values to decisions alone.
        "statsmodels" : from p-values to decisions, a loop over the tokens, on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(num_tokens, num_experts, generator=generator)
    makers = _makers(num_experts, max_k, generator)
    if devices is None:
        devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    rows = []
    with tqdm(desc="bench routing", unit="op") as bar:
        for device in devices:
            for group, operation, timer, tokens in _timers(logits.to(device), makers, alpha, max_k, loop_tokens):
                bar.set_postfix_str(f"{device}: {operation}")
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of the timer, about few repetitions: their number is reported
                    measured = timer.blocked_autorange(min_run_time=min_run_time)
                rows.append(
                    {
                        "device": device,
                        "threads": torch.get_num_threads(),
                        "group": group,
                        "operation": operation,
                        "tokens": tokens,
                        "experts": num_experts,
                        "ns_per_token": 1e9 * measured.median / tokens,
                        "iqr_ns": 1e9 * measured.iqr / tokens,
                        "repetitions": len(measured.times) * measured.number_per_run,
                    }
                )
                bar.update()
    frame = pd.DataFrame(rows)
    baseline = frame[frame["operation"] == BASELINE].set_index("device")["ns_per_token"]
    return frame.assign(relative=frame["ns_per_token"] / frame["device"].map(baseline))


def format_routing(frame: pd.DataFrame) -> str:
    """The table of `bench_routing` as text, a paragraph per device."""
    columns = ["group", "operation", "ns_per_token", "iqr_ns", "relative"]
    formats = {"ns_per_token": "{:,.0f}".format, "iqr_ns": "{:,.0f}".format, "relative": "{:.2f}".format}
    paragraphs = []
    for (device, threads), part in frame.groupby(["device", "threads"], sort=False):
        place = f"{device}, {threads} threads" if device == "cpu" else f"{device}, {torch.cuda.get_device_name()}"
        shape = f"{part['tokens'].max():,} tokens x {part['experts'].iloc[0]} experts"
        table = part[columns].to_string(index=False, formatters=formats)
        paragraphs.append(f"{place}: {shape}, relative to {BASELINE}\n\n{table}\n")
    return "\n".join(paragraphs)


def _makers(num_experts: int, exclude_top: int, generator: torch.Generator) -> dict[str, PValueMaker]:
    """One of each kind; those that need calibration are fitted on noise, which costs the same as real logits."""
    noise = 2 * torch.randn(1, 4096, num_experts, generator=generator)
    exclude_top = min(exclude_top, num_experts - 2)
    fit = {"model_name": "noise", "exclude_top": exclude_top}
    return {
        "dirichlet": DirichletNull(),
        "gaussian": TokenGaussian(exclude_top),
        "kde": fit_null(noise, null="kde", **fit),
        "conformal": fit_null(noise, null="conformal", **fit),
        "kde per expert": fit_null(noise, null="kde", per_expert=True, max_values=1000, **fit),
    }


def _timers(logits: torch.Tensor, makers: dict[str, PValueMaker], alpha: float, max_k: int, loop_tokens: int):
    """(group, operation, timer, tokens) of every row for one device."""
    tokens = len(logits)
    pvals = makers["gaussian"](logits)
    scope = {"torch": torch, "logits": logits, "pvals": pvals, "reject": reject, "alpha": alpha, "max_k": max_k}

    def timer(statement: str, **names) -> Timer:
        return Timer(statement, globals=scope | names, num_threads=torch.get_num_threads())

    yield "router", BASELINE, timer("torch.topk(torch.softmax(logits, -1, dtype=torch.float32), max_k)"), tokens
    for name, maker in makers.items():
        rule = BH(alpha, maker, max_k=max_k)
        yield "rule", f"BH, {name}", timer("rule(logits)", rule=rule), tokens
    for name, maker in makers.items():
        yield "p-values", name, timer("maker(logits)", maker=maker), tokens
    for method in PROCEDURES:
        yield "procedure", method, timer("reject(pvals, alpha, method, check=False)", method=method), tokens
    if logits.device.type == "cpu":
        few = pvals[:loop_tokens].double().numpy()
        for method in ("fdr_bh", "fdr_tsbky"):
            loop = timer("loop(few, alpha, method)", loop=statsmodels_loop, few=few, method=method)
            yield "statsmodels", f"loop, {method}", loop, len(few)


def statsmodels_loop(pvals: np.ndarray, alpha: float, method: str) -> np.ndarray:
    """Decisions [tokens, experts] of ``statsmodels.stats.multitest.multipletests``, token by token."""
    return np.stack([multipletests(row, alpha, method)[0] for row in pvals])
