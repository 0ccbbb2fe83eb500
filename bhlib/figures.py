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

from bhlib import evaluation, evidence
from bhlib.calibration import VALUES_PER_LAYER, collect_router_logits, fit_null, name_of
from bhlib.loading import load_demo, load_heldout
from bhlib.patching import BHRoutingIntegration
from bhlib.procedures import critical_values, reject
from bhlib.pvalues import STATISTICS, DirichletNull
from bhlib.rules import BH, TopK
from bhlib.simulations import simulate_fdr, simulate_power_1995

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

    #: Tokens per sequence of `validation` and of the logits below.
    window = 256

    @cached_property
    def validation(self) -> dict[str, torch.Tensor]:
        """Text to choose settings on."""
        return load_heldout("validation", self.window, max(1, self.sequences_per_domain // 2))

    @cached_property
    def calibration_logits(self) -> torch.Tensor:
        """Router logits [layers, tokens, experts] on the calibration split: what nulls are fitted on."""
        text = load_heldout("calibration", self.window, max(1, 3 * self.sequences_per_domain // 4))
        return collect_router_logits(self.model, text)

    @cached_property
    def validation_logits(self) -> torch.Tensor:
        """Router logits [layers, tokens, experts] on `validation`: what nulls are tested on."""
        return collect_router_logits(self.model, self.validation)

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


# -- evidence for the p-values --------------------------------------------------------------------------------


def compute_softmax_theorem(demo: Demo) -> pd.DataFrame:
    """The k-th largest of a token's probabilities, its bound 1/k, and what BH on 1 - softmax would need it to be."""
    probabilities = torch.softmax(demo.validation_logits, dim=-1).sort(dim=-1, descending=True).values.flatten(0, 1)
    num_tests = probabilities.shape[-1]
    rank = np.arange(1, num_tests + 1)
    seen = {"largest": probabilities.amax(dim=0), "median": probabilities.median(dim=0).values}
    needed = {f"needed_{alpha}": 1 - alpha * rank / num_tests for alpha in SOFTMAX_ALPHAS}
    layers, tokens, _ = demo.validation_logits.shape
    return pd.DataFrame({"k": rank, "bound": 1 / rank} | seen | needed).assign(tokens=tokens, layers=layers)


SOFTMAX_ALPHAS = (0.05, 0.5, 0.95)


@figure("softmax_theorem", compute_softmax_theorem)
def draw_softmax_theorem(table: pd.DataFrame) -> Figure:
    """Why 1 - softmax can never reject two: the k-th probability is at most 1/k, and BH needs nearly 1."""
    fig = Picture(figsize=(6.6, 3.8), layout="constrained")
    axes = fig.subplots()
    k, num_tests = table["k"], len(table)
    axes.fill_between(k, table["bound"], 2, color=BLACK, alpha=0.07, linewidth=0)
    axes.plot(k, table["bound"], color=BLACK, label="bound: k probabilities sum to at most 1")
    for alpha, color in zip(SOFTMAX_ALPHAS, (BLUE, GREEN, ORANGE), strict=True):
        axes.plot(k, table[f"needed_{alpha}"], color=color, label=f"needed to reject k at α = {alpha}: 1 − αk/N")
    axes.plot(k, table["largest"], color=RED, linestyle="--", label="demo model: the largest k-th probability seen")
    axes.plot(k, table["median"], color=RED, linestyle=":", label="demo model: median k-th probability")
    axes.annotate("impossible", (9, 0.2), color="#555555", fontsize=9, style="italic")
    ticks = [1, 2, 4, 8, 16, 32, 64]
    axes.set(xscale="log", yscale="log", xlim=(1, num_tests), ylim=(5e-4, 1.3), xlabel="rank k among the N experts")
    axes.set_xticks(ticks, ticks, minor=False)
    axes.set_xticks([], minor=True)
    axes.set(ylabel="k-th largest probability")
    axes.set_title(
        f"N = {num_tests}; demo on the validation split: {table['tokens'].iloc[0]:,} tokens × "
        f"{table['layers'].iloc[0]} layers",
        fontsize=8,
    )
    axes.legend(fontsize=7.5, loc="lower left")
    return fig


def compute_null_calibration(demo: Demo) -> pd.DataFrame:
    """Held-out p-values of null experts, for every null: a row per layer (``ks``) and per level (``curve``)."""
    logits = demo.calibration_logits
    parts = []
    for name, maker in evidence.candidate_nulls(logits, name_of(demo.model)).items():
        settings = {"sequence_length": demo.window}
        layers = evidence.uniformity(maker, demo.validation_logits, **settings)
        parts.append(layers.assign(kind="ks", null=name, calibration_tokens=logits.shape[1]))
        if name in NULL_LOOKS:
            curve = evidence.level_curve(maker, demo.validation_logits, **settings)
            parts.append(curve.assign(kind="curve", null=name))
    whole = dict.fromkeys(["layer", "tokens", "sequences", "values", "calibration_tokens"], "Int64")
    return pd.concat(parts, ignore_index=True).astype(whole)  # whole numbers, also where some are missing


#: The nulls whose distributions are drawn, and how.
NULL_LOOKS = {
    "Dirichlet": (PINK, ":"),
    "Gaussian, trimmed": (ORANGE, "--"),
    "Gaussian, truncated": (RED, "--"),
    "KDE, standardized": (BLUE, "-"),
    "KDE, log_prob": (SKY, "-"),
    "conformal, standardized": (GREEN, "-"),
}


@figure("null_calibration", compute_null_calibration)
def draw_null_calibration(table: pd.DataFrame) -> Figure:
    """Distance from uniform per null and layer; QQ plot and histogram of some."""
    fig = Picture(figsize=(10.4, 5.6), layout="constrained")
    grid = fig.add_gridspec(2, 2, width_ratios=(1.3, 1))
    _draw_ks(fig, fig.add_subplot(grid[:, 0]), table[table["kind"] == "ks"])
    curves = table[table["kind"] == "curve"]
    _draw_qq(fig.add_subplot(grid[0, 1]), curves)
    _draw_histogram(fig.add_subplot(grid[1, 1]), curves)
    fig.legend(*fig.axes[-2].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=len(NULL_LOOKS))
    return fig


def _draw_ks(fig: Figure, axes, layers: pd.DataFrame) -> None:
    """Heat map of the Kolmogorov-Smirnov distance, with its numbers."""
    wide = layers.pivot(index="null", columns="layer", values="ks").loc[layers["null"].unique()]
    worst = wide.max(axis=1)
    image = axes.imshow(wide, aspect="auto", cmap="cividis_r", norm=matplotlib.colors.LogNorm(0.002, 0.5))
    for (row, column), value in np.ndenumerate(wide.to_numpy()):
        bold = value == worst.iloc[row]
        axes.text(
            column, row, f"{1000 * value:.0f}", ha="center", va="center", fontsize=7.5,
            color="white" if value > 0.03 else BLACK, weight="bold" if bold else "normal",
        )  # fmt: skip
    axes.set_yticks(range(len(wide)), wide.index)
    axes.set_xticks(range(wide.shape[1]), wide.columns.astype(int))
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    first = layers.iloc[0]
    half = ((layers["ks_high"] - layers["ks_low"]) / 2).median()
    axes.set_xlabel("layer")
    axes.set_title(
        "Kolmogorov-Smirnov distance of held-out null p-values × 1000 (bold: worst layer)\n"
        f"fitted on {first['calibration_tokens']:,.0f} tokens, tested on {first['tokens']:,.0f} others, "
        f"{first['values'] / 1e6:.2f} million values per layer\n"
        f"95 % intervals over {first['sequences']:.0f} sequences: ± {1000 * half:.1f} in the median",
        fontsize=8, loc="right",
    )  # fmt: skip
    fig.colorbar(image, ax=axes, fraction=0.03, ticks=[0.002, 0.01, 0.05, 0.2], format="%g", label="KS distance")


def _draw_qq(axes, curves: pd.DataFrame) -> None:
    """Fraction of null p-values up to a level, over the level: 1 if uniform."""
    for name, (color, style) in NULL_LOOKS.items():
        part = curves[curves["null"] == name]
        level = part["level"]
        axes.plot(level, part["fraction"], color=color, linestyle=style, label=name)
        axes.fill_between(level, part["low"], part["high"], color=color, alpha=0.25, linewidth=0)
    axes.plot([1e-4, 1], [1e-4, 1], color=BLACK, linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlim=(1e-4, 1), ylim=(1e-5, 1))
    axes.set(xlabel="level", ylabel="null p-values up to it")
    axes.annotate("too many small p-values", (1.3e-4, 2.5e-2), fontsize=7, color="#555555")
    axes.annotate("too few: cautious", (2e-2, 2e-5), fontsize=7, color="#555555")
    axes.set_title("QQ plot, all layers, 95 % bands", fontsize=8)


def _draw_histogram(axes, curves: pd.DataFrame) -> None:
    for name, (color, style) in NULL_LOOKS.items():
        part = curves[(curves["null"] == name) & (curves["level"] * 32 % 1 == 0)]
        density = np.diff(part["fraction"], prepend=0) * 32
        edges = np.append(0, part["level"])
        axes.stairs(density, edges, baseline=None, color=color, linestyle=style, linewidth=1.4)
    axes.axhline(1, color=BLACK, linewidth=0.8)
    axes.set(xlim=(0, 1), ylim=(0, 2.2), xlabel="null p-value", ylabel="density")
    axes.set_title("histogram, all layers, bins of 1/32", fontsize=8)


def compute_fdr_simulation(demo: Demo, repetitions: int = 10_000) -> pd.DataFrame:
    """Realised false discovery rates under four dependences, two of them fitted to the demo's router logits."""
    parts = [
        simulate_fdr(dependence="independent", repetitions=repetitions),
        simulate_fdr(dependence="equicorrelated", rho=0.5, repetitions=repetitions),
    ]
    for statistic, label in {"standardized": "router, standardized", "logit": "router, raw logits"}.items():
        layer, correlation = evidence.strongest_dependence(demo.calibration_logits, statistic)
        part = simulate_fdr(dependence=label, correlation=correlation, repetitions=repetitions)
        parts.append(part.assign(layer=layer))
    return pd.concat(parts, ignore_index=True).astype({"layer": "Int64"})


PROCEDURE_LOOKS = {
    "fixed": ("no correction", BLACK, "x"),
    "storey": ("Storey", ORANGE, "^"),
    "tsbky": ("two-stage BH", PINK, "v"),
    "bh": ("Benjamini-Hochberg", BLUE, "o"),
    "by": ("Benjamini-Yekutieli", GREEN, "D"),
    "hochberg": ("Hochberg", SKY, "s"),
    "bonferroni": ("Bonferroni", RED, "+"),
}


@figure("fdr_simulation", compute_fdr_simulation)
def draw_fdr_simulation(table: pd.DataFrame) -> Figure:
    """Realised false discovery rate over alpha, a panel per dependence."""
    dependences = table["dependence"].unique()
    fig = Picture(figsize=(2 + 2 * len(dependences), 3.6), layout="constrained")
    panels = fig.subplots(1, len(dependences), sharey=True, squeeze=False)[0]
    for axes, dependence in zip(panels, dependences, strict=True):
        panel = table[table["dependence"] == dependence]
        axes.axhspan(1, 10, color=BLACK, alpha=0.07, linewidth=0)
        for i, (method, (label, color, marker)) in enumerate(PROCEDURE_LOOKS.items()):
            part = panel[panel["method"] == method]
            axes.errorbar(
                part["alpha"] * 1.03 ** (i - 3), part["fdr"] / part["alpha"], 2 * part["fdr_se"] / part["alpha"],
                color=color, marker=marker, markersize=4.5, linewidth=1, capsize=2, label=label,
            )  # fmt: skip
        alphas = sorted(panel["alpha"].unique())
        axes.set(xscale="log", yscale="log", ylim=(0.03, 7), xlabel="α")
        axes.set_xticks(alphas, [f"{alpha:g}" for alpha in alphas])
        axes.set_xticks([], minor=True)
        axes.set_yticks([0.05, 0.1, 0.25, 0.5, 1, 2, 4], ["0.05", "0.1", "0.25", "0.5", "1", "2", "4"])
        axes.set_yticks([], minor=True)
        fitted = "layer" in panel and panel["layer"].notna().all()
        layer = f"\n(layer {int(panel['layer'].iloc[0])} of the demo)" if fitted else "\n"
        title = "equicorrelated, ρ = 0.5" if dependence == "equicorrelated" else dependence
        axes.set_title(title + layer, fontsize=8.5)
    fig.axes[0].set_ylabel("false discovery rate / α")
    fig.axes[0].annotate("above α", (0.0105, 5.2), fontsize=7, color="#555555")
    first = table.iloc[0]
    fig.suptitle(
        f"{first['num_tests']} tests, {first['num_null']} true nulls, the others with effects of {first['effect']:g} "
        f"standard deviations; {first['repetitions']:,} repetitions, bars: ± 2 standard errors",
        fontsize=8,
    )
    handles, labels = fig.axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, fontsize=8, loc="outside right center")
    return fig


def compute_power_1995(demo: Demo | None = None, repetitions: int = 20_000) -> pd.DataFrame:
    """Power in the setting of figure 1 of Benjamini & Hochberg (1995)."""
    return simulate_power_1995(repetitions=repetitions)


@figure("power_1995", compute_power_1995)
def draw_power_1995(table: pd.DataFrame) -> Figure:
    """Power against the number of tests: rows by the fraction of true nulls, columns by the effects."""
    fractions = sorted(table["null_fraction"].unique(), reverse=True)
    titles = {"D": "mostly small effects", "E": "all effects alike often", "I": "mostly large effects"}
    fig = Picture(figsize=(7.0, 1.55 * len(fractions) + 0.9), layout="constrained")
    panels = fig.subplots(len(fractions), len(titles), sharex=True, sharey=True)
    for row, fraction in zip(panels, fractions, strict=True):
        for axes, configuration in zip(row, titles, strict=True):
            panel = table[(table["null_fraction"] == fraction) & (table["configuration"] == configuration)]
            for method in ("storey", "bh", "by", "hochberg", "bonferroni"):
                label, color, marker = PROCEDURE_LOOKS[method]
                part = panel[panel["method"] == method]
                axes.errorbar(
                    part["num_tests"], part["power"], 2 * part["power_se"],
                    color=color, marker=marker, markersize=4, linewidth=1.2, capsize=2, label=label,
                )  # fmt: skip
            axes.set(xscale="log", ylim=(0, 1))
            tests = sorted(panel["num_tests"].unique())
            axes.set_xticks(tests, [str(m) for m in tests])
            axes.set_xticks([], minor=True)
        row[0].set_ylabel(f"power\n{100 * fraction:.0f} % true nulls")
    for axes, title in zip(panels[0], titles.values(), strict=True):
        axes.set_title(title, fontsize=8.5)
    for axes in panels[-1]:
        axes.set_xlabel("number of tests m")
    first = table.iloc[0]
    fig.suptitle(
        f"independent tests at α = {first['alpha']:g}, effects up to {first['largest_effect']:g} standard deviations; "
        f"{first['repetitions']:,} repetitions,\nbars (± 2 standard errors) are smaller than the marks",
        fontsize=8,
    )
    handles, labels = panels[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=len(labels))
    return fig


def compute_statistic_matters(demo: Demo, mean_experts: tuple[float, ...] = (4.0, 5.0, 6.0)) -> pd.DataFrame:
    """Loss of BH with one kind of null and different statistics, against static top-k with as many experts."""
    logits = demo.calibration_logits
    num_values = min(VALUES_PER_LAYER, logits.shape[1])
    fit = {"model_name": name_of(demo.model), "max_values": num_values}
    makers = {"KDE of all, logit": fit_null(logits, statistic="logit", exclude_top=0, **fit)}
    makers |= {f"KDE, {name}": fit_null(logits, statistic=name, **fit) for name in STATISTICS}
    makers |= {"Dirichlet": DirichletNull()}
    return evidence.compare_at_equal_cost(demo.model, makers, logits, demo.validation, mean_experts=mean_experts)


@figure("statistic_matters", compute_statistic_matters)
def draw_statistic_matters(table: pd.DataFrame) -> Figure:
    """Loss above that of static top-k with the same mean number of experts, a line per statistic."""
    fig = Picture(figsize=(7.0, 3.6), layout="constrained")
    axes = fig.subplots()
    looks = dict(zip(table["pvalues"].unique(), (RED, ORANGE, BLUE, GREEN, SKY, PINK), strict=False))
    for (name, color), marker in zip(looks.items(), "osD^vP", strict=False):
        part = table[table["pvalues"] == name].sort_values("mean_k")
        error = part["difference"] - part["low"], part["high"] - part["difference"]
        axes.errorbar(
            part["mean_k"], part["difference"], error, color=color, marker=marker, markersize=5, capsize=2, label=name
        )
    axes.axhline(0, color=BLACK, linewidth=1)
    axes.annotate("static top-k", (table["mean_k"].min(), 0.0007), fontsize=8)
    axes.set_yscale("symlog", linthresh=0.02, linscale=1.2)
    ticks = [-0.02, -0.01, 0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4]
    axes.set_yticks(ticks, [f"{tick:+g}".replace("-", "−") if tick else "0" for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.set(xlabel="experts per token and layer (mean)", ylabel="loss above static top-k (nats per token)")
    axes.set_title(
        f"demo model, validation split: {table['sequences'].iloc[0]} sequences, {table['tokens'].iloc[0]:,} tokens; "
        "95 % paired bootstrap\nKDE nulls leave out the top 8 of each token, except “of all”", fontsize=8,
    )  # fmt: skip
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), title="null and statistic", title_fontsize=8)
    return fig
