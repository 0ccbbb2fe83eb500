"""The registry of figures: one way to compute, save, redraw and check them all."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import wraps
from io import StringIO
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from bhlib.figures.drawing import STYLE, put_above
from bhlib.figures.folder import StudyFolder
from bhlib.figures.study import Study
from bhlib.figures.tables import compare_tables, read_table, to_csv, write_whole

__all__ = ["FIGURES", "FigureSpec", "check_figures", "figure", "make_figures", "redraw_figures", "save"]


@dataclass(frozen=True)
class FigureSpec:
    """A registered figure: how to make its table, how to draw it, how far its numbers may move.

    Attributes
    ----------
    name : str
    compute : function of a `Study`, or None
        None if the table was measured elsewhere (on a GPU): it is drawn from its CSV and never recomputed.
    draw : function of the table
    tolerance : mapping of str to float
        Absolute tolerance by column, `FREE` to leave a column out of the check; `bhlib.figures.tables` has that of all
        others.
    slow : bool
        Whether computing takes so long that it is done, or checked, only if the figure is asked for by name; otherwise
        it is drawn from its CSV.
    of_model : bool
        Whether it is of a model. What is not is the same for all of them, and is made with the embedded one's figures.
    """

    name: str
    compute: Callable[[Study], pd.DataFrame] | None
    draw: Callable[[pd.DataFrame], Figure]
    tolerance: Mapping[str, float] = field(default_factory=dict)
    slow: bool = False
    of_model: bool = True

    def is_computed(self, named: bool) -> bool:
        """Whether it is computed here, if it was asked for by name or not."""
        return self.compute is not None and (named or not self.slow)


FIGURES: dict[str, FigureSpec] = {}


def figure(
    name: str,
    compute: Callable[[Study], pd.DataFrame] | None,
    tolerance: Mapping[str, float] | None = None,
    slow: bool = False,
    of_model: bool = True,
) -> Callable:
    """Register a drawing function under a name; it is run in this package's style, whatever the user's is.

    Parameters are those of `FigureSpec`.

    Raises
    ------
    ValueError
        If another module has registered a figure of this name.
    """

    def decorate(draw: Callable) -> Callable:
        other = FIGURES[name].draw.__module__ if name in FIGURES else draw.__module__
        if other != draw.__module__:
            raise ValueError(f"a figure is called {name!r} already, in {other}; give this one another name.")

        @wraps(draw)
        def styled(*args, **kwargs) -> Figure:
            with matplotlib.rc_context(STYLE):
                return draw(*args, **kwargs)

        FIGURES[name] = FigureSpec(name, compute, styled, tolerance or {}, slow, of_model)
        return styled

    return decorate


def save(fig: Figure, path: Path) -> None:
    """Write ``path.png`` and ``path.pdf``, without the dates and versions that would change their bytes."""
    with matplotlib.rc_context(STYLE):
        fig.savefig(path.with_suffix(".png"), metadata={"Software": None}, bbox_inches="tight")
        fig.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None}, bbox_inches="tight")


def make_figures(
    folder: str | Path = "figures", only: Iterable[str] | None = None, study: Study | None = None
) -> list[Path]:
    """Compute, save and draw the registered figures; returns the paths of their CSV tables.

    Says how long each took. What several figures share counts for the first of them.

    Parameters
    ----------
    folder : path
        Where ``NAME.csv``, ``NAME.png`` and ``NAME.pdf`` go.
    only : iterable of str, optional
        Names of figures; all by default.
    study : Study, optional
        The model and the text; by default the embedded ones.

    Raises
    ------
    ValueError
        If a name is not registered.
    FileNotFoundError
        If the CSV of a figure that is not computed here is missing.
    """
    folder, study = Path(folder), study or Study()
    specs, named = _without_absent(folder, only), only is not None
    _check_present(folder, [spec for spec in specs if not spec.is_computed(named)])
    folder.mkdir(parents=True, exist_ok=True)
    for spec in each_figure(specs, "figures"):
        if spec.is_computed(named):
            write_whole(folder / f"{spec.name}.csv", to_csv(spec.compute(study)))
        redraw(folder, spec)
    return [folder / f"{spec.name}.csv" for spec in specs]


def redraw_figures(folder: str | Path = "figures", only: Iterable[str] | None = None) -> list[Path]:
    """Draw the registered figures from the CSV tables in a folder, without a model; returns the tables' paths.

    Parameters and errors as for `make_figures`.
    """
    folder, specs = Path(folder), _present(folder, only)
    for spec in each_figure(specs, "redraw"):
        redraw(folder, spec)
    return [folder / f"{spec.name}.csv" for spec in specs]


def check_figures(
    folder: str | Path = "figures", only: Iterable[str] | None = None, study: Study | None = None
) -> pd.DataFrame:
    """Compute the registered figures anew and compare with the CSV tables in a folder, which stays as it is.

    Parameters and errors as for `make_figures`.

    Returns
    -------
    pandas.DataFrame
        One row per cell that moved beyond its tolerance, none if all is as it was: ``figure``, ``row`` (of the CSV, 1
        below the header), ``column``, ``was``, ``now``, ``tolerance``.
    """
    folder, study = Path(folder), study or Study()
    specs, named = _present(folder, only), only is not None
    parts = [compare_tables(pd.DataFrame(), pd.DataFrame(), {}).assign(figure="")]
    for spec in each_figure([spec for spec in specs if spec.is_computed(named)], "check"):
        now = read_table(StringIO(to_csv(spec.compute(study))))
        moved = compare_tables(read_table(folder / f"{spec.name}.csv"), now, spec.tolerance)
        parts.append(moved.assign(figure=spec.name))
    for spec in specs:
        if not spec.is_computed(named):
            why = "measured elsewhere" if spec.compute is None else "checked only if it is named, since it takes long"
            tqdm.write(f"{spec.name}: not checked ({why})")
    moved = pd.concat([part for part in parts if len(part)] or parts, ignore_index=True)
    return moved[["figure", *moved.columns.drop("figure")]]


def redraw(folder: Path, spec: FigureSpec) -> None:
    """Draw a figure from its file, so that the picture shows what the file says, and of which model it is."""
    path = folder / f"{spec.name}.csv"
    table, study = read_table(path), StudyFolder(folder)
    if study.is_there:
        fig = spec.draw(study.about.put_on(table))
        with matplotlib.rc_context(STYLE):
            put_above(fig, study.about.line())
    else:
        fig = spec.draw(table)
    save(fig, path)


def chosen(only: Iterable[str] | None) -> list[FigureSpec]:
    """The figures of these names, or all; ValueError for a name that is not registered."""
    names = list(FIGURES if only is None else only)
    unknown = [name for name in names if name not in FIGURES]
    if unknown:
        raise ValueError(f"no figure is called {', '.join(map(repr, unknown))}; there are: {', '.join(FIGURES)}.")
    return [FIGURES[name] for name in names]


def _present(folder: str | Path, only: Iterable[str] | None) -> list[FigureSpec]:
    """The figures of these names, or all, whose tables have to be there: in a study's folder, all that are."""
    specs = chosen(only)
    if only is None and StudyFolder(folder).is_there:
        return [spec for spec in specs if (Path(folder) / f"{spec.name}.csv").exists()]
    specs = _without_absent(Path(folder), only)
    _check_present(Path(folder), specs)
    return specs


def _without_absent(folder: Path, only: Iterable[str] | None) -> list[FigureSpec]:
    """The figures of these names; or all but those that are computed by name alone and have not been yet."""
    specs = chosen(only)
    if only is not None:
        return specs
    absent = [s.name for s in specs if s.slow and s.compute is not None and not (folder / f"{s.name}.csv").exists()]
    for name in absent:
        tqdm.write(f"{name}: left out (it takes long, and is computed only if it is named: --only {name})")
    return [spec for spec in specs if spec.name not in absent]


def _check_present(folder: Path, specs: list[FigureSpec]) -> None:
    """Raise unless the tables are there: before the first is computed, since that takes minutes."""
    missing = [spec.name for spec in specs if not (folder / f"{spec.name}.csv").exists()]
    if missing:
        raise FileNotFoundError(
            f"{folder} has no CSV of {', '.join(missing)}: `python -m bhlib figures` computes what can be computed "
            f"here, and `--only NAME` chooses among the figures."
        )


def each_figure(specs: list[FigureSpec], what: str, shown: bool = True) -> Iterator[FigureSpec]:
    """The figures in turn; if `shown` with a progress bar, and a line that says how long each took."""
    with tqdm(specs, desc=what, unit="figure", disable=not shown) as bar:
        for spec in bar:
            bar.set_postfix_str(spec.name)
            start = time.perf_counter()
            yield spec
            if shown:
                tqdm.write(f"{time.perf_counter() - start:7.1f} s  {spec.name}")
