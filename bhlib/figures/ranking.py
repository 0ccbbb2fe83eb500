"""The figure of how well a router ranks its experts by what they add for a token."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import rankdata
from torch import Tensor

from bhlib.comparisons import Resamples, resample
from bhlib.contributions import Contributions, measure_contributions, one_changed
from bhlib.figures.about import about_of
from bhlib.figures.drawing import Picture, error_bars, layer_ticks
from bhlib.figures.registry import figure
from bhlib.figures.study import Study
from bhlib.looks import BLACK, BLUE, ORANGE, Look

__all__ = ["compute_router_ranking", "draw_router_ranking"]

#: What experts are ranked by, in the order of the picture, and what it is called there.
MEASURES = {"r": "r", "along": "r along\nthe output", "kl": "KL", "loss": "loss"}

#: Among which experts of a token. "all" is drawn on the left of the other.
LOOKS = {"all": Look(BLUE, "o"), "top-k": Look(ORANGE, "s", "--")}

#: Per `Study.sequences_per_domain`: tokens of which all experts are computed, and pairs of a token and a layer of which
#: the model's own experts, or all of them, are changed one by one.
TOKENS, CHANGED, ALL_CHANGED = 100, 5, 1


def correlation_within(scores: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Spearman's correlation along the last axis; 0 where one of the two does not vary, and so ranks nothing."""
    a, b = (rankdata(part, axis=-1) for part in (scores, values))
    a, b = (part - part.mean(axis=-1, keepdims=True) for part in (a, b))
    spread = np.sqrt((a * a).sum(axis=-1) * (b * b).sum(axis=-1))
    return np.divide((a * b).sum(axis=-1), spread, out=np.zeros_like(spread), where=spread > 0)


class _Documents:
    """Means over tokens, with intervals over the documents that these are of."""

    def __init__(self, domains: np.ndarray, documents: np.ndarray) -> None:
        pairs = pd.MultiIndex.from_arrays([domains, documents])
        self.unit, places = pairs.factorize()
        self.sizes = np.bincount(self.unit)
        self.drawn: Resamples = resample(places.get_level_values(0), places.get_level_values(1), size=self.sizes)

    def row(self, values: np.ndarray) -> dict[str, float]:
        """Mean of the values of tokens [tokens], its 95 % interval, and what it is made of."""
        means = np.bincount(self.unit, values) / self.sizes
        statistic = self.drawn.means(means)
        low, high = self.drawn.interval(statistic)
        sample = {"tokens": len(self.unit), "documents": self.drawn.units}
        return {"value": float(statistic[0]), "low": low, "high": high} | sample


def _by_output(seen: Contributions) -> list[dict]:
    """Rows of what experts add to the output: correlations layer by layer and of all, and r by rank."""
    documents, rows = _Documents(seen.domains, seen.documents), []
    top_k, scores = int(seen.selected[0, 0].sum()), seen.logits
    own = scores.masked_fill(~seen.selected, -np.inf).topk(top_k).indices
    for measure, values in (("r", seen.r), ("along", seen.along)):
        for among, at in (("all", None), ("top-k", own)):
            a, b = (part if at is None else part.gather(-1, at) for part in (scores, values))
            found = correlation_within(a.numpy(), b.numpy())  # [layers, tokens]
            named = {"kind": "correlation", "measure": measure, "among": among}
            rows += [named | {"layer": str(number)} | documents.row(part) for number, part in enumerate(found)]
            rows.append(named | {"layer": "all"} | documents.row(found.mean(axis=0)))
    by_router = seen.r.gather(-1, scores.argsort(dim=-1, descending=True))
    for measure, ranked in (("r by router", by_router), ("r by itself", seen.r.sort(descending=True).values)):
        means = ranked.mean(dim=0).numpy()  # of the layers, [tokens, experts]
        rows += [
            {"kind": "rank", "measure": measure, "layer": "all", "rank": rank + 1} | documents.row(means[:, rank])
            for rank in range(means.shape[1])
        ]
    return rows


def _by_effect(changed: pd.DataFrame, among: str) -> list[dict]:
    """Rows of what experts do to the prediction: correlations of all layers together, a row per measure."""
    # What is left out matters by how much worse that is, what is added by how much better.
    changed = changed.assign(loss=changed["loss_change"].where(changed["selected"], -changed["loss_change"]))
    places = changed.groupby(["domain", "sequence", "position", "layer"], sort=False)
    first, rows = places[["document"]].first().reset_index(), []
    documents = _Documents(first["domain"].to_numpy(), first["document"].to_numpy())
    for measure in ("kl", "loss"):
        values = np.stack([part.sort_values("rank")[measure].to_numpy() for _, part in places])
        found = correlation_within(-np.arange(values.shape[1])[None].repeat(len(values), axis=0), values)
        rows.append({"kind": "correlation", "measure": measure, "among": among, "layer": "all"} | documents.row(found))
    return rows


def compute_router_ranking(study: Study) -> pd.DataFrame:
    """How well the router's scores rank the experts of a token by what they add, on a part of the test split.

    Nothing is fitted or chosen here.

    Returns
    -------
    pandas.DataFrame
        Of ``kind`` "correlation": the mean over tokens of Spearman's correlation between the router's scores and a
        ``measure`` (`MEASURES`) of the experts of one token, ``among`` the model's own ("top-k") or all; by ``layer``,
        and of all layers. Of ``kind`` "rank": mean r of the experts of a ``rank``, ranked by the router or by r
        itself. ``value`` with its 95 % interval ``low``, ``high`` over documents (`bhlib.comparisons.resample`), each
        by itself, and how many ``tokens`` (for "kl" and "loss" pairs of a token and a layer) and ``documents`` it is
        of.
    """
    some = study.sequences_per_domain

    def of_test(length: int) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
        length = max(2, length)
        return study.text.sequences("test", length, some), study.text.documents("test", length, some)

    (text, documents), (short, of_short) = of_test(study.window // 2), of_test(study.window // 8)
    seen = measure_contributions(study.model, text, documents=documents, max_tokens=TOKENS * some)
    rows = _by_output(seen)
    there = study.num_layers * sum(len(ids) * (ids.shape[1] - 1) for ids in short.values())
    for among, number, ranks in (("all", ALL_CHANGED, study.num_experts), ("top-k", CHANGED, study.top_k)):
        number = min(number * some, there)
        changed = one_changed(study.model, short, num_tokens=number, ranks=ranks, documents=of_short)
        rows += _by_effect(changed, among)
    columns = ["kind", "measure", "among", "layer", "rank", "value", "low", "high", "tokens", "documents"]
    return pd.DataFrame(rows)[columns]


#: What is not told apart from rounding in a prediction moves ranks of experts that hardly matter.
_TOLERANCE = {"value": 5e-3, "low": 1e-2, "high": 1e-2}


@figure("router_ranking", compute_router_ranking, tolerance=_TOLERANCE)
def draw_router_ranking(table: pd.DataFrame) -> Figure:
    """r against rank; correlations with r layer by layer; correlations with four measures of all layers together."""
    top_k = about_of(table).top_k
    fig = Picture(figsize=(9.6, 3.9), layout="constrained")
    ranks, layers, measures = fig.subplots(1, 3, width_ratios=(1.1, 1, 1.1))
    _draw_ranks(ranks, table[table["kind"] == "rank"], top_k)
    found = table[table["kind"] == "correlation"]
    names = {"all": "all experts", "top-k": f"the top {top_k} alone"}
    for (among, look), shift in zip(LOOKS.items(), (-0.1, 0.1), strict=True):
        part = found[(found["among"] == among) & (found["measure"] == "r") & (found["layer"] != "all")]
        numbers = part["layer"].astype(int)
        style = look._asdict() | {"markersize": 4.5, "capsize": 2, "label": names[among]}
        layers.errorbar(numbers + shift, *error_bars(part), **style)
        whole = found[(found["among"] == among) & (found["layer"] == "all")].set_index("measure").reindex(MEASURES)
        measures.errorbar(np.arange(len(whole)) + shift, *error_bars(whole), **style | {"linestyle": ""})
    layers.set_xticks(layer_ticks(found.loc[found["layer"] != "all", "layer"].astype(int)))
    layers.set(xlabel="MoE layer", ylabel="Spearman's correlation within a token (mean)")
    measures.set_xticks(range(len(MEASURES)), [*MEASURES.values()])
    measures.set_xlabel("the router's scores with ... (mean of the layers)")
    for axes in (layers, measures):
        axes.set_ylim(min(-0.1, 1.1 * found["low"].min()), 1.02)
        axes.axhline(0, color=BLACK, linewidth=0.8)
    layers.set_title("the router's scores with r, layer by layer", fontsize=8)
    measures.set_title(_samples(found[found["layer"] == "all"], names), fontsize=8)
    layers.legend(fontsize=8, loc="lower left")
    first = table.iloc[0]
    fig.suptitle(
        f"{about_of(table).name}, test split: r of {first['tokens']:,} tokens of {first['documents']} documents; "
        "bars and bands: 95 % bootstrap over documents, each point by itself\n"
        "r: norm of weight × output, over the norm of the layer's output; KL, loss: one expert left out (or added, if "
        "the model does not select it)",
        fontsize=8,
    )
    return fig


def _samples(whole: pd.DataFrame, names: dict[str, str]) -> str:
    """How much the two measures of the prediction were taken of."""
    texts = ["KL and loss of pairs of a token and a layer:"]
    for among, name in names.items():
        row = whole[(whole["measure"] == "kl") & (whole["among"] == among)].iloc[0]
        texts.append(f"{name}: {row['tokens']} pairs, {row['documents']} documents")
    return "\n".join(texts)


def _draw_ranks(axes: Axes, table: pd.DataFrame, top_k: int) -> None:
    looks = {"r by router": (BLUE, "-", "ranked by the router"), "r by itself": (BLACK, ":", "ranked by r itself")}
    for measure, (color, line, label) in looks.items():
        part = table[table["measure"] == measure]
        axes.plot(part["rank"], part["value"], color=color, linestyle=line, label=label)
        low = part["low"].clip(lower=0.5 * part["value"].min())  # the axis is one of logarithms
        axes.fill_between(part["rank"], low, part["high"], color=color, alpha=0.2, linewidth=0)
    axes.axvline(top_k + 0.5, color=BLACK, linewidth=0.8, linestyle="--")
    axes.annotate(f"the model's own top {top_k}", (top_k + 0.4, 0.02), xycoords=("data", "axes fraction"), fontsize=7,
                  rotation=90, ha="right")  # fmt: skip
    axes.set_yscale("log")
    axes.set(xlabel="rank of the expert for the token", ylabel="r (mean of tokens and layers)")
    axes.set_title("what the expert of a rank adds", fontsize=8)
    axes.legend(fontsize=8, loc="upper right")
