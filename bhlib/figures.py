"""Figures: one function draws each, from a table; one registry computes, saves, redraws and checks them all.

A figure is a pair of functions. ``compute(demo)`` makes the table, ``draw(table)`` makes a matplotlib Figure of it
and of nothing else, so that a figure can be redrawn from the CSV that lies beside it. Notebooks and sliders call the
same ``draw`` functions.

    from bhlib import figures
    figures.draw_stepup(figures.compute_stepup())
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, wraps
from io import BytesIO
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tqdm.auto import tqdm

from bhlib import evaluation
from bhlib.loading import load_demo, load_heldout
from bhlib.patching import BHRoutingIntegration
from bhlib.procedures import critical_values, reject
from bhlib.rules import BH, TopK

#: Colours that colour-blind readers can tell apart (Okabe & Ito 2008).
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PINK = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "figure.dpi": 110,
    "savefig.dpi": 200,
    "pdf.fonttype": 42,
    "axes.prop_cycle": matplotlib.cycler(color=[BLUE, RED, GREEN, ORANGE, PINK, SKY, BLACK, YELLOW]),
}

#: The 15 p-values of Benjamini & Hochberg (1995), section 4.1.
PVALUES_1995 = (
    0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344,
    0.0459, 0.3240, 0.4262, 0.5719, 0.6528, 0.7590, 1.0000,
)  # fmt: skip

#: Levels at which the default rule is measured.
ALPHAS = (0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.85, 0.95)


class Picture(Figure):
    """A Figure that a notebook shows, whatever backend is chosen, and that nobody has to close."""

    def _repr_png_(self) -> bytes:
        buffer = BytesIO()
        with matplotlib.rc_context(STYLE):
            self.savefig(buffer, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
        return buffer.getvalue()


class Demo:
    """The embedded model and its held-out text, loaded when first needed."""

    #: Sequences of each domain on which figures are computed: a compromise between time and intervals.
    sequences_per_domain = 16

    @cached_property
    def model_and_tokenizer(self) -> tuple:
        return load_demo()

    @property
    def model(self):
        return self.model_and_tokenizer[0]

    @property
    def tokenizer(self):
        return self.model_and_tokenizer[1]

    @cached_property
    def test(self) -> dict[str, torch.Tensor]:
        return load_heldout("test", length=512, max_sequences=self.sequences_per_domain)

    @cached_property
    def alpha_sweep(self) -> pd.DataFrame:
        """The default BH rule over `ALPHAS` and static top-k, on the test split: shared by several figures."""
        rules = {f"top-{k}": TopK(k) for k in (1, 2, 3, 4, 5, 6, 7, 8)}
        rules |= {f"BH {alpha:g}": BH(alpha) for alpha in ALPHAS}
        frame = evaluation.sweep(self.model, rules, self.test)
        kind, value = zip(*(name.replace("-", " ").split() for name in frame["rule"]), strict=True)
        return frame.assign(kind=kind, value=[float(v) for v in value])


@dataclass(frozen=True)
class FigureSpec:
    """A registered figure: how to make its table, how to draw it."""

    name: str
    compute: Callable[[Demo], pd.DataFrame]
    draw: Callable[[pd.DataFrame], Figure]


FIGURES: dict[str, FigureSpec] = {}


def figure(name: str, compute: Callable[[Demo], pd.DataFrame]) -> Callable:
    """Register a drawing function under a name; it is run in this module's style, whatever the user's is."""

    def decorate(draw: Callable) -> Callable:
        @wraps(draw)
        def styled(*args, **kwargs) -> Figure:
            with matplotlib.rc_context(STYLE):
                return draw(*args, **kwargs)

        FIGURES[name] = FigureSpec(name, compute, styled)
        return styled

    return decorate


def save(fig: Figure, path: Path) -> None:
    """Write ``path.png`` and ``path.pdf``, without the dates and versions that would change their bytes."""
    with matplotlib.rc_context(STYLE):
        fig.savefig(path.with_suffix(".png"), metadata={"Software": None}, bbox_inches="tight")
        fig.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None}, bbox_inches="tight")


def make_figures(folder: str | Path = "figures", only: Iterable[str] | None = None) -> list[Path]:
    """Compute, save and draw the registered figures; returns the paths of their CSV tables.

    Parameters
    ----------
    folder : path
        Where ``NAME.csv``, ``NAME.png`` and ``NAME.pdf`` go.
    only : iterable of str, optional
        Names of figures; all by default.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = list(FIGURES if only is None else only)
    unknown = [name for name in names if name not in FIGURES]
    if unknown:
        raise ValueError(f"no figure is called {', '.join(map(repr, unknown))}; there are: {', '.join(FIGURES)}.")
    demo = Demo()
    written = []
    for name in tqdm(names, desc="figures", unit="figure"):
        path = folder / f"{name}.csv"
        FIGURES[name].compute(demo).to_csv(path, index=False, float_format="%.6g", lineterminator="\n")
        # Drawn from the file, so that the picture shows what the file says.
        save(FIGURES[name].draw(pd.read_csv(path)), path)
        written.append(path)
    return written


# -- the step-up rule ----------------------------------------------------------------------------------------


def compute_stepup(demo: Demo | None = None, alpha: float = 0.05) -> pd.DataFrame:
    """The p-values of Benjamini & Hochberg (1995) with the lines that they are compared with."""
    pvals = torch.tensor(PVALUES_1995, dtype=torch.float64)
    return pd.DataFrame(
        {
            "rank": range(1, len(pvals) + 1),
            "pvalue": pvals.numpy(),
            "bh": critical_values(len(pvals), alpha, "bh", dtype=torch.float64).numpy(),
            "bonferroni": critical_values(len(pvals), alpha, "bonferroni", dtype=torch.float64).numpy(),
            "rejected_bh": reject(pvals, alpha, "bh").numpy(),
            "rejected_bonferroni": reject(pvals, alpha, "bonferroni").numpy(),
        }
    )


@figure("stepup_1995", compute_stepup)
def draw_stepup(table: pd.DataFrame) -> Figure:
    """The step-up rule: sorted p-values against the line alpha k/m."""
    fig = Picture(figsize=(6.4, 3.2), layout="constrained")
    for axes, limit in zip(fig.subplots(1, 2), (len(table), 9.5), strict=True):
        axes.plot(table["rank"], table["bh"], color=BLUE, label="BH: α k / m")
        axes.plot(table["rank"], table["bonferroni"], color=RED, linestyle="--", label="Bonferroni: α / m")
        rejected = table["rejected_bh"].astype(bool)
        axes.scatter(table["rank"][rejected], table["pvalue"][rejected], color=BLUE, zorder=3, label="rejected by BH")
        axes.scatter(
            table["rank"][~rejected], table["pvalue"][~rejected],
            facecolor="white", edgecolor=BLACK, zorder=3, label="not rejected",
        )  # fmt: skip
        axes.set(xlabel="rank k", ylabel="p-value", xlim=(0.5, limit + 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(ylim=(-0.001, 0.05), title="the smallest, enlarged")
    fig.axes[0].set_title(f"the 15 p-values of 1995 (m = {len(table)})")
    fig.axes[0].legend(fontsize=7.5)
    counts = table["rejected_bh"].sum(), table["rejected_bonferroni"].sum()
    axes.annotate(
        f"BH rejects {counts[0]}, Bonferroni {counts[1]}", (0.05, 0.92), xycoords="axes fraction", fontsize=8
    )
    return fig


# -- alpha and the number of experts -------------------------------------------------------------------------


def compute_experts_vs_alpha(demo: Demo) -> pd.DataFrame:
    """Mean experts per token by alpha and domain, with 95 % bootstrap intervals over sequences."""
    sweep = demo.alpha_sweep.query("kind == 'BH'")
    rows = []
    for (domain, alpha), part in sweep.groupby(["domain", "value"]):
        low, high = evaluation.bootstrap_mean(part["mean_k"].to_numpy())
        rows.append(
            {"domain": domain, "alpha": alpha, "mean_k": part["mean_k"].mean(), "low": low, "high": high,
             "sequences": len(part), "tokens_per_sequence": int(part["tokens"].iloc[0]) + 1}
        )  # fmt: skip
    return pd.DataFrame(rows)


@figure("experts_vs_alpha", compute_experts_vs_alpha)
def draw_experts_vs_alpha(table: pd.DataFrame) -> Figure:
    """Experts per token against alpha, a line per domain."""
    fig = Picture(figsize=(6.6, 3.6), layout="constrained")
    axes = fig.subplots()
    # More domains than colours: the line style tells the second round from the first.
    order = table.groupby("domain")["mean_k"].mean().sort_values(ascending=False).index
    for i, domain in enumerate(order):
        part = table[table["domain"] == domain]
        (line,) = axes.plot(
            part["alpha"], part["mean_k"], "-" if i < 6 else "--", color=f"C{i % 6}", marker="o", markersize=3,
            label=domain,
        )  # fmt: skip
        axes.fill_between(part["alpha"], part["low"], part["high"], alpha=0.2, linewidth=0, color=line.get_color())
    axes.axhline(8, color=BLACK, linestyle=":", label="the model's own top-8")
    axes.set(xscale="log", xlabel="α", ylabel="experts per token and layer", ylim=(0, 8.4))
    axes.set_title(
        f"default p-values, max_k = 8; per domain {table['sequences'].iloc[0]} sequences of "
        f"{table['tokens_per_sequence'].iloc[0]} tokens, 95 % bands", fontsize=8
    )  # fmt: skip
    axes.legend(fontsize=7.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return fig


def compute_loss_vs_experts(demo: Demo) -> pd.DataFrame:
    """Loss against experts per token, of BH over alpha and of static top-k, and its difference from top-8."""
    sweep = demo.alpha_sweep
    summary = evaluation.summarize(sweep, ["kind", "value", "rule"])
    against = pd.DataFrame([evaluation.paired_difference(sweep, rule, "top-8") for rule in summary["rule"]])
    return pd.concat([summary, against[["difference", "low", "high"]]], axis=1)


@figure("loss_vs_experts", compute_loss_vs_experts)
def draw_loss_vs_experts(table: pd.DataFrame) -> Figure:
    """Loss minus the loss of the model's own top-8, against experts per token."""
    fig = Picture(figsize=(5.6, 3.6), layout="constrained")
    axes = fig.subplots()
    looks = {"top": (BLACK, "s", "static top-k"), "BH": (BLUE, "o", "BH, default p-values, α from 0.01 to 0.95")}
    for kind, (color, marker, label) in looks.items():
        part = table[(table["kind"] == kind) & (table["mean_k"] > 1.2)].sort_values("mean_k")
        error = part["difference"] - part["low"], part["high"] - part["difference"]
        axes.errorbar(
            part["mean_k"], part["difference"], error, color=color, marker=marker, markersize=4, capsize=2, label=label
        )
    axes.axhline(0, color=BLACK, linewidth=0.8)
    axes.set(xlabel="experts per token and layer (mean)", ylabel="loss above top-8 (nats per token)", ylim=(-0.01, 0.4))
    axes.set_title(
        f"demo model, test split: {table['sequences'].iloc[0]} sequences, {table['tokens'].iloc[0]:,} tokens; "
        f"95 % paired bootstrap", fontsize=8
    )  # fmt: skip
    axes.legend(fontsize=8)
    return fig


def compute_count_distribution(demo: Demo) -> pd.DataFrame:
    """How many (token, layer) pairs get k experts, per alpha; a fifth of the test sequences."""
    rows = []
    for alpha in (0.01, 0.05, 0.2, 0.5):
        with BHRoutingIntegration(demo.model, alpha=alpha, mode="analyze", max_recorded_tokens=0) as bh:
            for sequences in demo.test.values():
                with torch.no_grad():
                    demo.model(input_ids=sequences[::5], use_cache=False)
        stats = bh.get_routing_stats()
        total = sum(stats["histogram"])
        rows += [
            {"alpha": alpha, "experts": k, "fraction": n / total, "tokens": stats["total_tokens"],
             "layers": len(stats["mean_experts_per_layer"])}
            for k, n in enumerate(stats["histogram"][:9])
        ]  # fmt: skip
    return pd.DataFrame(rows)


@figure("count_distribution", compute_count_distribution)
def draw_count_distribution(table: pd.DataFrame) -> Figure:
    """Distribution of the number of experts per token and layer, one panel per alpha."""
    alphas = sorted(table["alpha"].unique())
    fig = Picture(figsize=(7.2, 2.4), layout="constrained")
    for axes, alpha in zip(fig.subplots(1, len(alphas), sharey=True), alphas, strict=True):
        part = table[table["alpha"] == alpha]
        axes.bar(part["experts"], 100 * part["fraction"], color=BLUE)
        mean = (part["experts"] * part["fraction"]).sum()
        axes.axvline(mean, color=RED, linestyle="--")
        axes.set(title=f"α = {alpha:g}, mean {mean:.2f}", xlabel="experts", xticks=range(0, 9, 2))
    fig.axes[0].set_ylabel("% of (token, layer) pairs")
    fig.suptitle(f"{table['tokens'].iloc[0]:,} tokens × {table['layers'].iloc[0]} layers; bounds 1 and 8", fontsize=8)
    return fig


# -- one passage ---------------------------------------------------------------------------------------------


def compute_token_layer_map(demo: Demo, alpha: float = 0.2, length: int = 40) -> pd.DataFrame:
    """Experts per token and layer of a passage from each of two test domains."""
    parts = []
    domains = sorted(demo.test)
    for domain in (domains[0], domains[-1]):
        ids = demo.test[domain][:1, : 3 * length]
        parts.append(passage_counts(demo.model, demo.tokenizer, ids, alpha=alpha).tail(
            length * len(demo.model.model.layers)).assign(domain=domain, alpha=alpha))  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def passage_counts(model, tokenizer, input_ids: torch.Tensor, **bh_options) -> pd.DataFrame:
    """Experts that BH gives to each token of one passage in each layer.

    Parameters
    ----------
    model, tokenizer
        As `load_demo` returns them.
    input_ids : Tensor [1, tokens], int64
    **bh_options
        For `BHRoutingIntegration`.

    Returns
    -------
    pandas.DataFrame
        Columns ``position``, ``token`` (its text), ``layer``, ``count``.
    """
    with BHRoutingIntegration(model, **bh_options) as bh, torch.no_grad():
        model(input_ids=input_ids, use_cache=False)
    counts = bh.records.counts()
    texts = [tokenizer.decode([token]) for token in input_ids[0].tolist()]
    tokens, layers = counts.shape
    return pd.DataFrame(
        {
            "position": np.repeat(np.arange(tokens), layers),
            "token": np.repeat(texts, layers),
            "layer": np.tile(np.arange(layers), tokens),
            "count": counts.flatten(),
        }
    )


@figure("token_layer_map", compute_token_layer_map)
def draw_token_layer_map(table: pd.DataFrame) -> Figure:
    """Experts per token and layer, a row of panels per passage (column ``domain``, if there is one)."""
    passages = list(table.groupby("domain")) if "domain" in table else [("passage", table)]
    fig = Picture(figsize=(9.0, 2.5 * len(passages)), layout="constrained")
    for axes, (name, part) in zip(np.atleast_1d(fig.subplots(len(passages), 1)), passages, strict=True):
        grid = part.pivot(index="layer", columns="position", values="count")
        texts = part.drop_duplicates("position")["token"]
        image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=1, vmax=8, origin="lower")
        axes.set_xticks(range(len(texts)), [repr(str(text))[1:-1] for text in texts], rotation=90, fontsize=6.5)
        axes.set(ylabel="layer", title=f"{name}: mean {part['count'].mean():.2f} experts")
        axes.grid(False)
        fig.colorbar(image, ax=axes, label="experts", ticks=[1, 4, 8])
    return fig
