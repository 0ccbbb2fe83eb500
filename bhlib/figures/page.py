"""One page with everything that a study has made: pictures, tables, versions, and what has no meaning for the model."""

from collections.abc import Mapping
from html import escape
from typing import Any

import pandas as pd

from bhlib.figures.folder import StudyFolder
from bhlib.figures.registry import FigureSpec
from bhlib.figures.tables import read_table, write_whole

STYLE = """
body { font-family: sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em; color: #222; }
img { max-width: 100%; } table { border-collapse: collapse; font-size: 85%; }
th, td { padding: 0.15em 0.7em; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; } details { margin: 0.5em 0 2em; overflow-x: auto; }
"""

#: Rows of a table that the page itself shows; the CSV has all.
ROWS = 200


def write_page(folder: StudyFolder, figures: Mapping[str, FigureSpec]) -> None:
    """Write ``index.html`` into the folder of a study."""
    facts, about, size = folder.facts, folder.about, folder.facts["identity"]
    entries = facts.get("figures", {})
    finished = [name for name in figures if "table" in entries.get(name, {})]
    parts = [
        f"<h1>Routing of {escape(about.name)}</h1>",
        f"<p>{escape(about.line())}. {size['sequences']} sequences of {size['length']} tokens per domain; every figure "
        f"says what it is computed on.</p>",
        "<h2>Figures</h2>",
        *(_figure(folder, figures[name], entries[name]) for name in finished),
        "<h2>Figures that are not here</h2>",
        _table(pd.DataFrame(_missing(figures, entries), columns=["figure", "why"])),
        *_predecessor(facts.get("predecessor")),
        "<h2>What it took</h2>",
        _table(pd.DataFrame([(n, entries[n]["minutes"], entries[n]["peak_gib"]) for n in finished],
                            columns=["figure", "minutes", "peak memory, GiB"])),
        "<p>A figure's minutes hold those of what it shares with later ones. The memory is that of the GPUs, or "
        "without one the most that the process had taken until then.</p>",
        "<h2>Made with</h2>",
        _table(pd.DataFrame(facts["environment"].items(), columns=["", "version"])),
    ]  # fmt: skip
    head = f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(about.name)}</title>'
    body = "\n".join(parts)
    text = f"{head}<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    write_whole(folder.path / "index.html", text)


def _figure(folder: StudyFolder, spec: FigureSpec, entry: dict[str, Any]) -> str:
    name, table = spec.name, read_table(folder.path / f"{spec.name}.csv")
    what = escape((spec.draw.__doc__ or "").partition("\n")[0])
    return (
        f'<h3 id="{name}">{name}</h3>\n<p>{what}</p>\n<img src="{name}.png" alt="{what}">\n'
        f'<details><summary>{len(table):,} rows; <a href="{name}.csv">CSV</a>, <a href="{name}.pdf">PDF</a>; '
        f"{entry['minutes']:.1f} minutes</summary>{_table(table.head(ROWS))}</details>"
    )


def _missing(figures: Mapping[str, FigureSpec], entries: dict) -> list[tuple[str, str]]:
    """Figures without a table, each with the reason."""
    rows = []
    for name, spec in figures.items():
        entry = entries.get(name, {})
        if "table" in entry:
            continue
        if "refused" in entry:
            rows.append((name, f"no meaning for this model: {entry['refused']}"))
        elif "failed" in entry:
            rows.append((name, f"failed: {entry['failed']}"))
        elif not spec.of_model:
            rows.append((name, "not of a model: it is in the repository's folder figures/"))
        elif spec.slow:
            rows.append((name, f"takes long, and is computed if it is named: --only {name}"))
        else:
            rows.append((name, "not computed yet"))
    return rows


def _predecessor(rows: list[dict] | None) -> list[str]:
    """Perplexities of an earlier study, for a model of OLMoE's shape."""
    if not rows:
        return []
    table = pd.DataFrame(rows)
    table["ours"] = table["ours"].map("{:.2f}".format, na_action="ignore").fillna("not measured on this text")
    return [
        "<h2>An earlier study of the real OLMoE</h2>",
        "<p>Perplexity with k experts for every token. Tokenization and window of the earlier study are not fully "
        "known; ours is of the test split, if the text is the one that is named.</p>",
        _table(table),
    ]


def _table(table: pd.DataFrame) -> str:
    return table.to_html(index=False, border=0, na_rep="", float_format="{:.6g}".format)
