"""The table of a figure as a file: written, read, and compared with what it was."""

import math
import os
from collections.abc import Mapping
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd

__all__ = ["FREE", "compare_tables", "read_table", "report", "to_csv"]

#: Tolerance of a column that no machine need reproduce: generated text, times.
FREE = math.inf

#: How far a number may move in `check_figures`, where a figure does not say otherwise: absolute, and relative to what
#: it was. Whole numbers and text may not move at all. Processors, threads and releases of torch add float32 numbers in
#: different orders. Logits then differ in their seventh digit, and where a p-value lies so close to its threshold a
#: count by one: between one thread and two, or with other vector instructions, that was seen for one count in 20,000,
#: which moved the mean loss of its sequence by 3e-5 nats. So means over the whole text keep within these bounds; those
#: over few tokens, and counts themselves, state wider ones.
ABSOLUTE, RELATIVE = 1e-4, 1e-3


def compare_tables(was: pd.DataFrame, now: pd.DataFrame, tolerance: Mapping[str, float]) -> pd.DataFrame:
    """The cells in which two tables differ by more than a tolerance: as `check_figures` returns it, less ``figure``."""
    columns = ["row", "column", "was", "now", "tolerance"]
    if list(was.columns) != list(now.columns):
        names = [", ".join(table.columns) for table in (was, now)]
        return pd.DataFrame([(0, "names of columns", *names, 0.0)], columns=columns)
    if len(was) != len(now):
        return pd.DataFrame([(0, "number of rows", len(was), len(now), 0.0)], columns=columns)
    rows = []
    for column in was.columns:
        before, after = was[column], now[column]
        if _is_number(before) and _is_number(after):
            whole = all(pd.api.types.is_integer_dtype(part) for part in (before, after))
            default = 0.0 if whole else ABSOLUTE + RELATIVE * before.abs()
            allowed = pd.Series(tolerance.get(column, default), index=was.index)
            same = ((after - before).abs() <= allowed) | (before == after) | (before.isna() & after.isna())
        else:
            allowed = pd.Series(tolerance.get(column, 0.0), index=was.index)
            same = (before.astype(str) == after.astype(str)) | (before.isna() & after.isna())
        for i in np.flatnonzero(~same & (allowed != FREE)):
            rows.append((i + 1, column, before[i], after[i], allowed[i]))
    return pd.DataFrame(rows, columns=columns)


def report(moved: pd.DataFrame, per_figure: int = 10) -> str:
    """What `check_figures` found, for people: the first cells of each figure, and how many more there are."""
    lines = []
    for name, part in moved.groupby("figure", sort=False):
        lines.append(f"{name}.csv: {len(part)} cell{'s' * (len(part) > 1)} moved beyond tolerance")
        lines += [
            f"  row {row.row}, {row.column}: was {_short(row.was)}, is {_short(row.now)}, "
            f"tolerance {_short(row.tolerance)}"
            for row in part.head(per_figure).itertuples()
        ]
        if len(part) > per_figure:
            lines.append(f"  and {len(part) - per_figure} more")
    return "\n".join(lines)


def read_table(path: Path | StringIO) -> pd.DataFrame:
    """Read a figure's CSV: only an empty cell is a missing number, since "null" or "NA" may be a token of a text."""
    # A token may be a carriage return.
    return pd.read_csv(path, keep_default_na=False, na_values=[""], lineterminator="\n")


def to_csv(table: pd.DataFrame) -> str:
    """A figure's table as it stands in its CSV: six digits, so that rounding of sums seldom shows."""
    return table.to_csv(index=False, float_format="%.6g", lineterminator="\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file: all of it or, if the process is stopped, none."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    unfinished.write_text(text, encoding="utf-8", newline="\n")
    unfinished.replace(path)


def _short(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _is_number(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)
