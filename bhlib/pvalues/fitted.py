"""Nulls that are estimated from a sample: what they share, and what a new one has to say."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from scipy.special import expit
from scipy.special import logit as logit_of
from torch import Tensor

from bhlib.pvalues.maker import KernelForm, PValueMaker
from bhlib.pvalues.statistics import STATISTICS, check_exclude_top, check_statistic

FORMAT = 1  # version of the calibration file


class ResolutionWarning(UserWarning):
    """The calibration sample is too small for the level that is asked of it."""


class FittedNull(PValueMaker):
    """A null estimated from calibration values, per layer and if wanted per expert. Make one with ``fit``.

    A subclass gives

    ``name``
        what the files call it;
    ``parts``
        the names of the tensors that it keeps of each layer;
    ``fit_layers``
        calibration values -> these tensors;
    ``layer_survival``
        statistics -> p-values, by the tensors of one layer;
    ``damage``
        what may be wrong with tensors that come out of a file;

    and, where it needs them: ``make_tables``, to derive from the tensors what ``layer_survival`` works with;
    ``header_types``, for what it adds to the header; ``check_resolution``, if its p-values have a floor. All else is
    done here: checks of the samples, layers, devices, files, and the choice of the statistic. An entry in
    `bhlib.pvalues.NULLS` makes it known by its name.

    Attributes
    ----------
    header : dict
        What the file's header holds: null, statistic, exclude_top, model_name, num_layers, num_experts, per_expert,
        sample_sizes ([layers] or [layers][experts]), seed, what the subclass adds, and the levels of ``alpha_for``.
    tensors : dict of Tensor
        What the file holds, on the CPU, named ``"what.layer"``.
    """

    #: Names of the tensors of a layer, which ``tensors`` holds as ``"part.layer"``.
    parts: tuple[str, ...]
    #: What the subclass adds to the header, by key, and whether a value read from a file may be one.
    header_types: dict[str, Callable[[object], bool]] = {}

    def __init__(self, tensors: dict[str, Tensor], header: dict):
        with torch.inference_mode(False):  # a copy that a backward pass may save, whatever it was made in
            self.tensors = {name: table.clone() if table.is_inference() else table for name, table in tensors.items()}
        self.header = header
        self.statistic = check_statistic(header["statistic"])
        self.exclude_top: int = header["exclude_top"]
        self.model_name: str = header["model_name"]
        self.num_layers: int = header["num_layers"]
        self.num_experts: int = header["num_experts"]
        self.shared = not header["per_expert"]
        self._on_device: dict = {}

    def __getstate__(self) -> dict:
        """Without the tables on devices, which are made anew."""
        return vars(self) | {"_on_device": {}}

    @classmethod
    def fit(
        cls,
        samples,
        *,
        model_name: str,
        num_experts: int,
        statistic: str = "log_prob",
        exclude_top: int = 8,
        per_expert: bool = False,
        seed: int | None = None,
        **options,
    ) -> "FittedNull":
        """Fit one null per layer, or per layer and expert.

        Parameters
        ----------
        samples : sequence over layers of 1-D arrays
            Statistic values of null experts, as ``null_values`` gives them. With ``per_expert``, a sequence over layers
            of sequences over experts of 1-D arrays.
        model_name : str
            Whose logits these are. Checked on loading.
        num_experts : int
        statistic, exclude_top
            How the values were computed; logits get the same statistic later.
        per_expert : bool
            Whether each expert has a null of its own.
        seed : int, optional
            Of the sampling, kept for the record.
        **options
            Of the subclass: ``KDENull`` takes ``bw_method`` and ``weights``.

        Raises
        ------
        ValueError
            If a sample is empty, not 1-D, not finite, or not there for every expert; the message says which.
        """
        columns = _columns(samples, num_experts, per_expert)
        sizes = [[len(values) for values in layer] for layer in columns]
        header = cls.make_header(sizes, model_name, num_experts, statistic, exclude_top, per_expert, seed)
        tensors, extra = cls.fit_layers(columns, **options)
        return cls(tensors, header | extra)

    @classmethod
    def make_header(
        cls,
        sizes: list[list[int]],
        model_name: str,
        num_experts: int,
        statistic: str,
        exclude_top: int,
        per_expert: bool = False,
        seed: int | None = None,
    ) -> dict:
        """What every file says, checked; `sizes` are the sample sizes [layers][1 or experts]. For a subclass that is
        not made by ``fit``."""
        check_statistic(statistic)
        if not isinstance(model_name, str) or not model_name:
            raise ValueError(f"model_name is {model_name!r}; name the model whose logits these are")
        check_exclude_top(exclude_top, num_experts)
        return dict(
            format=FORMAT,
            null=cls.name,
            statistic=statistic,
            exclude_top=int(exclude_top),
            model_name=model_name,
            num_layers=len(sizes),
            num_experts=int(num_experts),
            per_expert=bool(per_expert),
            sample_sizes=sizes if per_expert else [layer[0] for layer in sizes],
            seed=None if seed is None else int(seed),
        )

    @classmethod
    def fit_layers(cls, columns: list[list[np.ndarray]], **options) -> tuple[dict[str, Tensor], dict]:
        """Estimate the null of every layer.

        Parameters
        ----------
        columns : list over layers of lists of 1-D float64 arrays
            The samples, finite and none empty: one per layer, or one per expert.
        **options
            What ``fit`` was given beyond its own parameters.

        Returns
        -------
        tensors : dict of Tensor
            On the CPU, each with a row per sample: ``{f"{part}.{layer}": ...}`` for every part and layer.
        extra : dict
            What the header says besides, as JSON; its keys are those of ``header_types``.
        """
        raise NotImplementedError

    def alpha_for(self, mean_experts: float) -> float:
        """The level at which BH with these p-values gives tokens this many experts on average, from 1 to 8 each.

        One alpha means different numbers of experts with different nulls: ``alpha=null.alpha_for(4.0)`` asks for the
        number. `bhlib.calibrate` and `bhlib.calibration.fit_null` measure it on a sample of the calibration tokens and
        keep it in the header, at steps of half an expert; between these the log-odds are interpolated. On the demo, a
        kernel null of the log-probability reaches 6.2 experts at alpha = 0.05 already, 4 at 8e-4, and 3 at 2e-5 (the
        Dirichlet null: 4 at 0.01, 5 at 0.08). Levels below num_experts/n are read from the tail of the kernels, beyond
        what n values can show: as good as any to set a number of experts, but no error rate.

        Parameters
        ----------
        mean_experts : float
            Over tokens and layers, with the rule's own bounds ``min_k=1`` and ``max_k=8`` (or all experts, if fewer).

        Raises
        ------
        ValueError
            If the null brings no levels, since it was made of samples or a table alone, or none for this many experts.
            `bhlib.levels.alpha_for_mean_experts` finds the level for any p-values, bounds and procedure.
        """
        levels = self.header.get("levels")
        if levels is None:
            raise ValueError(
                f"{self!r} brings no levels; find one with "
                f"bhlib.levels.alpha_for_mean_experts(null, router_logits, {mean_experts:g})"
            )
        means, alphas = np.array(levels["mean_experts"]), np.array(levels["alpha"])
        if not means[0] <= mean_experts <= means[-1]:
            raise ValueError(
                f"mean_experts is {mean_experts:g}, but the levels of this null are for {means[0]:g} to {means[-1]:g} "
                "experts; bhlib.levels.alpha_for_mean_experts takes other bounds"
            )
        return float(expit(np.interp(mean_experts, means, logit_of(alphas))))

    @property
    def smallest_sample(self) -> int:
        """Calibration values of the layer (and expert) that has the fewest."""
        return int(np.min(np.concatenate([np.atleast_1d(sizes) for sizes in self.header["sample_sizes"]])))

    def check_model(self, num_layers: int, num_experts: int) -> None:
        """Raise a ValueError if it was fitted on a model of another number of MoE layers or experts."""
        if (num_layers, num_experts) != (self.num_layers, self.num_experts):
            raise ValueError(
                f"the calibration of {self.model_name!r} is for {self.num_layers} layers of {self.num_experts} "
                f"experts, but the model has {num_layers} MoE layers of {num_experts} experts: calibrate on the model "
                "that you route, null = bhlib.calibrate(model, token_ids)"
            )

    def statistic_of(self, router_logits: Tensor, top: Tensor | None = None) -> Tensor:
        if router_logits.shape[-1] != self.num_experts:
            raise ValueError(
                f"router_logits has shape {tuple(router_logits.shape)}, but {self!r} was fitted on "
                f"{self.num_experts} experts; calibrate on the model that you route"
            )
        return STATISTICS[self.statistic](router_logits, self.exclude_top, top)

    def kernel_form(self, num_experts: int, thresholds: Tensor) -> KernelForm:
        return KernelForm(self.statistic, self.exclude_top, thresholds)

    def survival(self, statistics: Tensor, layer: int | None = None) -> Tensor:
        if not self.shared and statistics.shape[-1] != self.num_experts:
            raise ValueError(
                f"statistics has shape {tuple(statistics.shape)}, but {self!r} has a null per expert; "
                f"the last axis must hold all {self.num_experts} experts"
            )
        tables = self._tables(self._check_layer(layer), statistics.device)
        return self.layer_survival(statistics.float(), *tables)

    def _check_layer(self, layer: int | None) -> int:
        if layer is None and self.num_layers == 1:
            return 0
        if layer is None or not 0 <= layer < self.num_layers:
            raise ValueError(
                f"layer is {layer}, but this null holds {self.num_layers} layers; pass layer=0..{self.num_layers - 1}"
            )
        return layer

    def _tables(self, layer: int, device: torch.device) -> tuple[Tensor, ...]:
        """What ``layer_survival`` needs, moved to the device once."""
        if (layer, device) not in self._on_device:
            parts = [self.tensors[f"{part}.{layer}"] for part in self.parts]
            # They outlive the pass that asks first; made in inference mode they would be of no use in training.
            with torch.inference_mode(False):
                self._on_device[layer, device] = tuple(table.to(device) for table in self.make_tables(*parts))
        return self._on_device[layer, device]

    def make_tables(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """What ``layer_survival`` works with, from a layer's tensors in the order of ``parts``: by default these.

        Called once per layer and device, on the CPU.
        """
        return parts

    def layer_survival(self, statistics: Tensor, *tables: Tensor) -> Tensor:
        """The p-values of one layer.

        Parameters
        ----------
        statistics : float32 Tensor, [...], or [..., num_experts] if each expert has a null of its own
        *tables : Tensor [1 or num_experts, ...]
            What ``make_tables`` gave, on the device of the statistics.

        Returns
        -------
        float32 Tensor, the shape of `statistics`
            In [0, 1], never increasing in the statistic; NaN where that is NaN.
        """
        raise NotImplementedError

    @classmethod
    def damage(cls, sizes: list[int], **parts: Tensor) -> str | None:
        """What keeps the tables of a layer from being a survival function, None if nothing does.

        Asked of every layer of a file, before ``make_tables`` or ``layer_survival`` sees it.

        Parameters
        ----------
        sizes : list of int
            Sample sizes that the header announces, one per row of the tables.
        **parts : Tensor [rows, ...]
            The layer's tensors, by the names in `cls.parts`.

        Returns
        -------
        str or None
            Begins with the name of a part.
        """
        raise NotImplementedError

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: the tables, and in its header what they were fitted on."""
        save_file(self.tensors, path, metadata={"bhlib": json.dumps(self.header, sort_keys=True)})

    def __repr__(self) -> str:
        sizes = self.smallest_sample
        return (
            f"{type(self).__name__}({self.statistic} without top {self.exclude_top}, {self.num_layers} layers, "
            f"{'shared by' if self.shared else 'one for each of'} {self.num_experts} experts, "
            f"{sizes:,} values or more each, fitted on {self.model_name!r}, seed {self.header['seed']})"
        )


def _columns(samples, num_experts: int, per_expert: bool) -> list[list[np.ndarray]]:
    """[layers][1 or experts] float64 arrays, checked."""
    layers = [list(layer) if per_expert else [layer] for layer in samples]
    if not layers:
        raise ValueError("samples is empty; pass one sample of statistic values per layer")
    columns = []
    for index, layer in enumerate(layers):
        if per_expert and len(layer) != num_experts:
            raise ValueError(
                f"samples[{index}] holds {len(layer)} experts, but num_experts is {num_experts}; "
                "with per_expert=True pass one sample per expert"
            )
        places = [f"samples[{index}]" + (f"[{expert}]" if per_expert else "") for expert in range(len(layer))]
        columns.append([_check_sample(values, place) for values, place in zip(layer, places, strict=True)])
    return columns


def _check_sample(values, place: str) -> np.ndarray:
    values = torch.as_tensor(values, device="cpu").detach().to(torch.float64).numpy()
    if values.ndim != 1:
        raise ValueError(f"{place} has shape {values.shape}, but must be 1-D: the statistic values of null experts")
    if len(values) == 0:
        raise ValueError(
            f"{place} is empty: no token left this expert out of its top. "
            "Calibrate on more tokens, or with per_expert=False or exclude_top=0"
        )
    if not np.isfinite(values).all():
        raise ValueError(f"{place} has {int((~np.isfinite(values)).sum())} values that are NaN or infinite")
    return values


def kind_of(tensor: Tensor) -> str:
    """Type and shape of a tensor, in words for a message about a damaged file."""
    return f"{tensor.dtype} {list(tensor.shape)}"
