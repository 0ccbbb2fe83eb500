"""The one list of nulls that are known by name: whoever offers, compares, times or draws nulls reads it.

To add a null, write its class and enter it here::

    NULLS["laplace"] = NullEntry(
        TokenLaplace, "the token's own Laplace (no calibration)",
        compared={"Laplace": {}}, looks={"Laplace": ("#000000", "--")},
    )
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bhlib.pvalues.conformal import ConformalNull
from bhlib.pvalues.fitted import FittedNull
from bhlib.pvalues.kde import KDENull
from bhlib.pvalues.maker import PValueMaker
from bhlib.pvalues.statistics import STATISTICS
from bhlib.pvalues.token_nulls import DirichletNull, SoftmaxPseudo, TokenGaussian

Options = Mapping[str, Any]  #: of a null: arguments of its class, or of `bhlib.calibration.fit_null` if it is fitted
Look = tuple[str, str]  #: colour and line style, as matplotlib takes them


@dataclass(frozen=True)
class NullEntry:
    """A null by name: how it is made, what menus call it, and what is measured of it.

    Attributes
    ----------
    maker : type of PValueMaker
        A subclass of `FittedNull` needs calibration and is fitted; any other is made by calling it.
    label : str
        What the explorer's menu says.
    takes : tuple of str
        Which of ``"exclude_top"`` (how many experts the model selects) and ``"temperature"`` (of its weights) the class
        is told where they are known.
    max_values : int
        How many values per layer a fitted null needs for a first look, which the explorer takes.
    compared : mapping of str to Options
        The variants that are tested for uniformity, by the label that tables give them. Empty for what is no null: it
        is neither tested nor timed.
    looks : mapping of str to Look
        How the figures draw those variants that they draw.
    tried : mapping of str to Options
        The variants with which rules were tried on the validation split, by the label that tables give them.
    """

    maker: type[PValueMaker]
    label: str
    takes: tuple[str, ...] = ()
    max_values: int = 10_000
    compared: Mapping[str, Options] = field(default_factory=dict)
    looks: Mapping[str, Look] = field(default_factory=dict)
    tried: Mapping[str, Options] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = set(self.takes) - {"exclude_top", "temperature"}
        if unknown:
            raise ValueError(f"takes has {sorted(unknown)}, but may have 'exclude_top' and 'temperature' only")
        undrawn = self.looks.keys() - self.compared.keys()
        if undrawn:
            raise ValueError(f"looks has {sorted(undrawn)}, but only what is in compared is drawn")

    @property
    def needs_calibration(self) -> bool:
        """Whether it is fitted to a sample."""
        return issubclass(self.maker, FittedNull)

    def make(self, **known) -> PValueMaker:
        """The null without calibration.

        Parameters
        ----------
        **known
            ``exclude_top`` and ``temperature``, of which the class gets what it takes, and its own options.
        """
        others = {"exclude_top", "temperature"} - set(self.takes)
        return self.maker(**{name: value for name, value in known.items() if name not in others})


def each_statistic(label: str) -> dict[str, Options]:
    """Variants of a fitted null: with every statistic, and with the standardized one for each expert by itself."""
    variants: dict[str, Options] = {f"{label}, {statistic}": {"statistic": statistic} for statistic in STATISTICS}
    per_expert = {"statistic": "standardized", "per_expert": True}
    return variants | {f"{label}, standardized, per expert": per_expert}


#: Every null that is known by name, in the order of menus and tables. Colours are those of `bhlib.looks`.
NULLS: dict[str, NullEntry] = {
    "dirichlet": NullEntry(
        DirichletNull,
        "Dirichlet (no calibration)",
        compared={"Dirichlet": {}},
        looks={"Dirichlet": ("#CC79A7", ":")},
        tried={f"Dirichlet {a}": {"concentration": a} for a in (1, 2, 4, 8)},
    ),
    "gaussian": NullEntry(
        TokenGaussian,
        "the token's own Gaussian (no calibration)",
        takes=("exclude_top",),
        compared={f"Gaussian, {kind}": {"estimator": kind} for kind in ("trimmed", "truncated")},
        looks={"Gaussian, trimmed": ("#E69F00", "--"), "Gaussian, truncated": ("#D55E00", "--")},
        tried={f"token Gaussian, {kind}": {"estimator": kind} for kind in ("trimmed", "truncated")},
    ),
    "kde": NullEntry(
        KDENull,
        "kernel density, fitted",
        compared=each_statistic("KDE"),
        looks={"KDE, standardized": ("#0072B2", "-"), "KDE, log_prob": ("#56B4E9", "-")},
        tried={f"KDE, {statistic}": {"statistic": statistic} for statistic in STATISTICS},
    ),
    "conformal": NullEntry(
        ConformalNull,
        "conformal, fitted",
        max_values=50_000,  # the smallest p-value is one over their number, and a value takes little time
        compared=each_statistic("conformal"),
        looks={"conformal, standardized": ("#009E73", "-")},
        tried={
            "conformal, log_prob": {"statistic": "log_prob"},
            "conformal per expert, log_prob": {"statistic": "log_prob", "per_expert": True},
        },
    ),
    "softmax": NullEntry(SoftmaxPseudo, "1 − softmax (no p-values)", takes=("temperature",)),
}


def fitted_nulls() -> dict[str, type[FittedNull]]:
    """The nulls that are fitted to a sample, by name."""
    return {name: entry.maker for name, entry in NULLS.items() if issubclass(entry.maker, FittedNull)}


def null_looks() -> dict[str, Look]:
    """The variants of nulls that figures draw, and how."""
    return {label: look for entry in NULLS.values() for label, look in entry.looks.items()}


def make_pvalues(pvalues: PValueMaker | str, temperature: float = 1.0) -> PValueMaker:
    """A maker of p-values: itself, or one that needs no calibration by its name.

    Parameters
    ----------
    pvalues : PValueMaker or str
        ``"dirichlet"`` for `DirichletNull`, ``"gaussian"`` for `TokenGaussian`, ``"softmax"`` for `SoftmaxPseudo`, or
        the name of another null in `NULLS` that needs no calibration.
    temperature : float
        Of the softmax of ``"softmax"``; the others ignore it.
    """
    if isinstance(pvalues, PValueMaker):
        return pvalues
    names = [name for name, entry in NULLS.items() if not entry.needs_calibration]
    if pvalues not in names:
        raise ValueError(
            f"pvalues={pvalues!r} must be {', '.join(map(repr, names))} or a PValueMaker such as KDENull.fit(...) "
            f"or load_null(path)"
        )
    return NULLS[pvalues].make(temperature=temperature)
