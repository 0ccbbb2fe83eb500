"""The decision about one token of a passage as HTML: the table of `bhlib.explain`, and what was measured beside it."""

from html import escape

import pandas as pd

from bhlib.looks import BLUE, ORANGE

__all__ = ["decision_html"]

_SHOWN = ("expert", "logit", "probability", "probability_threshold", "pvalue", "pvalue_threshold", "weight")
_CELL = '<td style="padding:0 0.45em;text-align:right">'
_KEPT = "background:#deebf7"
_BAR = 5  # em, of a contribution as large as the layer's output


def decision_html(table: pd.DataFrame) -> str:
    """Why a token gets its experts: a sentence and a table, the kept experts on blue.

    Parameters
    ----------
    table : pandas.DataFrame
        Of one token, from `bhlib.explain.explain`; with the contributions of `bhlib.explain_token` they are shown too,
        the size of each expert's as a bar, orange for an expert that is not kept.

    Returns
    -------
    str
        HTML. The rows end two experts after the last one that matters: that is found, kept or, where contributions are
        shown, one of the model's own.
    """
    found, kept, bound = int(table["found"].sum()), int(table["kept"].sum()), table["bound"].iloc[0]
    because = "" if bound == "none" else f", and {bound} makes it {kept}"
    is_measured = "r" in table
    last = max(found, kept, int(table.loc[table["own"], "rank"].max()) if is_measured else 0)
    names = ["", *_SHOWN, "found", *(("r", "along") if is_measured else ())]
    lines = ["".join(f"{_CELL}<b>{escape(name.replace('_', ' '))}</b></td>" for name in names)]
    for row in table.head(last + 2).itertuples():
        values = [f"{getattr(row, name):.3g}" for name in _SHOWN]
        values = [str(row.rank), *("–" if value == "nan" else value for value in values), "yes" if row.found else "no"]
        line = "".join(f"{_CELL}{value}</td>" for value in values)
        lines.append(line + (_contribution(row) if is_measured else ""))
    styles = ["", *(_KEPT if is_kept else "" for is_kept in table["kept"])]
    body = "".join(f'<tr style="{style}">{line}</tr>' for style, line in zip(styles, lines, strict=False))
    return f"the procedure finds <b>{found}</b>{because}<table>{body}</table>{_sum(table) if is_measured else ''}"


def _contribution(row) -> str:
    """Two cells: the size of an expert's contribution, as a bar with its number, and its part along the output."""
    color, length = BLUE if row.kept else ORANGE, _BAR * min(row.r, 1)
    look = f"display:inline-block;height:0.7em;width:{length:.2f}em;background:{color};margin-right:0.4em"
    return (
        f'<td style="padding:0 0.45em;text-align:left;white-space:nowrap"><span style="{look}"></span>{row.r:.3f}</td>'
        f"{_CELL}{row.along:+.3f}</td>"
    )


def _sum(table: pd.DataFrame) -> str:
    own, kept = table[table["own"]], table[table["kept"]]
    return (
        "Measured, all experts computed: <b>r</b> is the norm of an expert's weighted output over that of the layer's "
        f"output, <b>along</b> its part along it. Of that, the model's own {len(own)} make 1.00 together, the kept "
        f"ones make <b>{kept['along'].sum():.2f}</b>."
    )
