"""The registry of figures: what each is computed from, and one way to compute, save, redraw and check them all."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, wraps
from io import StringIO
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from bhlib.calibration import collect_router_logits
from bhlib.figures.drawing import STYLE
from bhlib.figures.runs import Run, observe
from bhlib.loading import heldout_sequence_documents, load_demo, load_heldout
from bhlib.rules import BH, TopK

#: Levels at which the default rule is measured.
ALPHAS = (0.0003, 0.003, 0.01, 0.05, 0.07, 0.1, 0.3, 0.6, 0.9)


class Demo:
    """The embedded model, on a CUDA device if there is one, and its held-out text; loaded when first needed.

    Parameters
    ----------
    cache : path, optional
        Folder of finished cells for the sweeps that compare rules on the test split (`bhlib.evaluation.sweep`). With
        it a sweep that was stopped goes on where it was, and what is made of a finished one needs no second pass:
        ``make_figures(only=["whole_test_split"], demo=Demo(cache="cells"))``.
    """

    #: Sequences of each domain on which figures are computed: a compromise between time and intervals.
    sequences_per_domain = 16

    def __init__(self, cache: str | Path | None = None) -> None:
        self.cache = cache

    @cached_property
    def model_and_tokenizer(self) -> tuple:
        model, tokenizer = load_demo()
        return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer

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
    def test_documents(self) -> dict[str, np.ndarray]:
        """The document of each sequence of `test`."""
        return heldout_sequence_documents("test", 512, self.sequences_per_domain)

    @cached_property
    def whole_test(self) -> dict[str, torch.Tensor]:
        """All of the test split: 14 times what most figures are computed on."""
        return load_heldout("test", length=512)

    @cached_property
    def whole_test_documents(self) -> dict[str, np.ndarray]:
        """The document of each sequence of `whole_test`."""
        return heldout_sequence_documents("test", 512)

    @cached_property
    def runs(self) -> dict[str, Run]:
        """The model's own top-8 and the default BH rule on every second test sequence, token by token."""
        text = {domain: sequences[::2] for domain, sequences in self.test.items()}
        documents = {domain: self.test_documents[domain][::2] for domain in text}
        rules = {"top-8": TopK(8), "BH 0.05": BH()}
        return {name: observe(self.model, text, documents, rule) for name, rule in rules.items()}

    #: Tokens per sequence of `validation` and of the logits below.
    window = 256

    @cached_property
    def validation(self) -> dict[str, torch.Tensor]:
        """Text to choose settings on."""
        return load_heldout("validation", self.window, max(1, self.sequences_per_domain // 2))

    @cached_property
    def validation_documents(self) -> dict[str, np.ndarray]:
        """The document of each sequence of `validation`."""
        return heldout_sequence_documents("validation", self.window, max(1, self.sequences_per_domain // 2))

    @cached_property
    def calibration_logits(self) -> torch.Tensor:
        """Router logits [layers, tokens, experts] on the calibration split: what nulls are fitted on."""
        text = load_heldout("calibration", self.window, max(1, 3 * self.sequences_per_domain // 4))
        return collect_router_logits(self.model, text)

    @cached_property
    def validation_logits(self) -> torch.Tensor:
        """Router logits [layers, tokens, experts] on `validation`: what nulls are tested on."""
        return collect_router_logits(self.model, self.validation)


#: Tolerance of a column that no machine need reproduce: generated text, times.
FREE = math.inf

#: How far a number may move in `check_figures`, where a figure does not say otherwise: absolute, and relative to what
#: it was. Whole numbers and text may not move at all. Processors, threads and releases of torch add float32 numbers in
#: different orders. Logits then differ in their seventh digit, and where a p-value lies so close to its threshold a
#: count by one: between one thread and two, or with other vector instructions, that was seen for one count in 20,000,
#: which moved the mean loss of its sequence by 3e-5 nats. So means over the whole text keep within these bounds; those
#: over few tokens, and counts themselves, state wider ones.
ABSOLUTE, RELATIVE = 1e-4, 1e-3


@dataclass(frozen=True)
class FigureSpec:
    """A registered figure: how to make its table, how to draw it, how far its numbers may move.

    Attributes
    ----------
    name : str
    compute : function of a `Demo`, or None
        None if the table was measured elsewhere (on a GPU): it is drawn from its CSV and never recomputed.
    draw : function of the table
    tolerance : mapping of str to float
        Absolute tolerance by column, `FREE` to leave a column out of the check; `ABSOLUTE` and `RELATIVE` for others.
    slow : bool
        Whether computing takes so long that it is done, or checked, only if the figure is asked for by name; otherwise
        it is drawn from its CSV.
    """

    name: str
    compute: Callable[[Demo], pd.DataFrame] | None
    draw: Callable[[pd.DataFrame], Figure]
    tolerance: Mapping[str, float] = field(default_factory=dict)
    slow: bool = False

    def is_computed(self, named: bool) -> bool:
        """Whether it is computed here, if it was asked for by name or not."""
        return self.compute is not None and (named or not self.slow)


FIGURES: dict[str, FigureSpec] = {}


def figure(
    name: str,
    compute: Callable[[Demo], pd.DataFrame] | None,
    tolerance: Mapping[str, float] | None = None,
    slow: bool = False,
) -> Callable:
    """Register a drawing function under a name; it is run in this package's style, whatever the user's is.

    Parameters are those of `FigureSpec`.
    """

    def decorate(draw: Callable) -> Callable:
        @wraps(draw)
        def styled(*args, **kwargs) -> Figure:
            with matplotlib.rc_context(STYLE):
                return draw(*args, **kwargs)

        FIGURES[name] = FigureSpec(name, compute, styled, tolerance or {}, slow)
        return styled

    return decorate


def save(fig: Figure, path: Path) -> None:
    """Write ``path.png`` and ``path.pdf``, without the dates and versions that would change their bytes."""
    with matplotlib.rc_context(STYLE):
        fig.savefig(path.with_suffix(".png"), metadata={"Software": None}, bbox_inches="tight")
        fig.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None}, bbox_inches="tight")


def make_figures(
    folder: str | Path = "figures", only: Iterable[str] | None = None, demo: Demo | None = None
) -> list[Path]:
    """Compute, save and draw the registered figures; returns the paths of their CSV tables.

    Says how long each took. What several figures share counts for the first of them.

    Parameters
    ----------
    folder : path
        Where ``NAME.csv``, ``NAME.png`` and ``NAME.pdf`` go.
    only : iterable of str, optional
        Names of figures; all by default.
    demo : Demo, optional
        The model and the text, if not all of the embedded ones.

    Raises
    ------
    ValueError
        If a name is not registered.
    FileNotFoundError
        If the CSV of a figure that is not computed here is missing.
    """
    folder, demo = Path(folder), demo or Demo()
    specs, named = _chosen(only), only is not None
    _check_present(folder, [spec for spec in specs if not spec.is_computed(named)])
    folder.mkdir(parents=True, exist_ok=True)
    for spec in _each(specs, "figures"):
        if spec.is_computed(named):
            (folder / f"{spec.name}.csv").write_text(_to_csv(spec.compute(demo)), encoding="utf-8", newline="\n")
        # Drawn from the file, so that the picture shows what the file says.
        _redraw(folder, spec)
    return [folder / f"{spec.name}.csv" for spec in specs]


def redraw_figures(folder: str | Path = "figures", only: Iterable[str] | None = None) -> list[Path]:
    """Draw the registered figures from the CSV tables in a folder, without a model; returns the tables' paths.

    Parameters and errors as for `make_figures`.
    """
    folder, specs = Path(folder), _chosen(only)
    _check_present(folder, specs)
    for spec in _each(specs, "redraw"):
        _redraw(folder, spec)
    return [folder / f"{spec.name}.csv" for spec in specs]


def check_figures(
    folder: str | Path = "figures", only: Iterable[str] | None = None, demo: Demo | None = None
) -> pd.DataFrame:
    """Compute the registered figures anew and compare with the CSV tables in a folder, which stays as it is.

    Parameters and errors as for `make_figures`.

    Returns
    -------
    pandas.DataFrame
        One row per cell that moved beyond its tolerance, none if all is as it was: ``figure``, ``row`` (of the CSV, 1
        below the header), ``column``, ``was``, ``now``, ``tolerance``.
    """
    folder, demo = Path(folder), demo or Demo()
    specs, named = _chosen(only), only is not None
    _check_present(folder, specs)
    parts = [compare_tables(pd.DataFrame(), pd.DataFrame(), {}).assign(figure="")]
    for spec in _each([spec for spec in specs if spec.is_computed(named)], "check"):
        now = read_table(StringIO(_to_csv(spec.compute(demo))))
        moved = compare_tables(read_table(folder / f"{spec.name}.csv"), now, spec.tolerance)
        parts.append(moved.assign(figure=spec.name))
    for spec in specs:
        if not spec.is_computed(named):
            why = "measured elsewhere" if spec.compute is None else "checked only if it is named, since it takes long"
            tqdm.write(f"{spec.name}: not checked ({why})")
    moved = pd.concat([part for part in parts if len(part)] or parts, ignore_index=True)
    return moved[["figure", *moved.columns.drop("figure")]]


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
            same = before.astype(str) == after.astype(str)
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
    return pd.read_csv(path, keep_default_na=False, na_values=[""])


def _short(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _is_number(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)


def _to_csv(table: pd.DataFrame) -> str:
    return table.to_csv(index=False, float_format="%.6g", lineterminator="\n")


def _redraw(folder: Path, spec: FigureSpec) -> None:
    path = folder / f"{spec.name}.csv"
    save(spec.draw(read_table(path)), path)


def _chosen(only: Iterable[str] | None) -> list[FigureSpec]:
    names = list(FIGURES if only is None else only)
    unknown = [name for name in names if name not in FIGURES]
    if unknown:
        raise ValueError(f"no figure is called {', '.join(map(repr, unknown))}; there are: {', '.join(FIGURES)}.")
    return [FIGURES[name] for name in names]


def _check_present(folder: Path, specs: list[FigureSpec]) -> None:
    """Raise unless the tables are there: before the first is computed, since that takes minutes."""
    missing = [spec.name for spec in specs if not (folder / f"{spec.name}.csv").exists()]
    if missing:
        raise FileNotFoundError(
            f"{folder} has no CSV of {', '.join(missing)}: `python -m bhlib figures` computes what can be computed "
            f"here, and `--only NAME` chooses among the figures."
        )


def _each(specs: list[FigureSpec], what: str) -> Iterator[FigureSpec]:
    """The figures in turn, with a progress bar, and a line that says how long each took."""
    with tqdm(specs, desc=what, unit="figure") as bar:
        for spec in bar:
            bar.set_postfix_str(spec.name)
            start = time.perf_counter()
            yield spec
            tqdm.write(f"{time.perf_counter() - start:7.1f} s  {spec.name}")
