"""Figures of multiple testing itself: the step-up rule, false discoveries and power by simulation."""

import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bhlib import evidence
from bhlib.figures.drawing import Picture
from bhlib.figures.registry import figure
from bhlib.figures.study import Study
from bhlib.looks import BLACK, BLUE, GREEN, ORANGE, PINK, RED, SKY
from bhlib.procedures import critical_values, reject
from bhlib.simulations import simulate_fdr, simulate_power_1995

__all__ = [
    "PVALUES_1995",
    "compute_fdr_simulation",
    "compute_power_1995",
    "compute_stepup",
    "draw_fdr_simulation",
    "draw_power_1995",
    "draw_stepup",
]

#: The 15 p-values of Benjamini & Hochberg (1995), section 4.1.
PVALUES_1995 = (
    0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344,
    0.0459, 0.3240, 0.4262, 0.5719, 0.6528, 0.7590, 1.0000,
)  # fmt: skip


def compute_stepup(study: Study | None = None, alpha: float = 0.05) -> pd.DataFrame:
    """The p-values of Benjamini & Hochberg (1995) with the lines that they are compared with."""
    pvals = torch.tensor(PVALUES_1995, dtype=torch.float64, device="cpu")
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


@figure("stepup_1995", compute_stepup, of_model=False)
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
    axes.annotate(f"BH rejects {counts[0]}, Bonferroni {counts[1]}", (0.05, 0.92), xycoords="axes fraction", fontsize=8)
    return fig


def compute_fdr_simulation(study: Study, repetitions: int = 10_000) -> pd.DataFrame:
    """Realised false discovery rates under four dependences, two of them fitted to the model's router logits.

    There are as many tests as experts, three quarters of them true nulls.
    """
    size = {"num_tests": study.num_experts, "num_null": 3 * study.num_experts // 4, "repetitions": repetitions}
    parts = [simulate_fdr(dependence="independent", **size), simulate_fdr(dependence="equicorrelated", rho=0.5, **size)]
    for statistic, label in {"standardized": "router, standardized", "logit": "router, raw logits"}.items():
        layer, correlation = evidence.strongest_dependence(study.calibration_logits, statistic, study.top_k)
        part = simulate_fdr(dependence=label, correlation=correlation, **size)
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
        layer = f"\n(layer {int(panel['layer'].iloc[0])})" if fitted else "\n"
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


def compute_power_1995(study: Study | None = None, repetitions: int = 20_000) -> pd.DataFrame:
    """Power in the setting of figure 1 of Benjamini & Hochberg (1995)."""
    return simulate_power_1995(repetitions=repetitions)


@figure("power_1995", compute_power_1995, of_model=False)
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
