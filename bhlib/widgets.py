"""An explorer of routing: sliders for the rule, and what it makes of a passage.

    from bhlib import load_demo
    from bhlib.widgets import Explorer

    Explorer(*load_demo())

Core ipywidgets only, the same code under versions 7 and 8. The views are functions of `bhlib.figures.passage`; here are
only the controls, and when what is computed:

- while a slider moves, the rule decides anew on logits that were read once, and the views are redrawn;
- when it has rested for a moment, the model runs under the patch, for the loss and the exact number of experts.
"""

import asyncio
import math
import warnings
from base64 import b64encode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from html import escape

import ipywidgets as widgets
import pandas as pd
import torch
from matplotlib.figure import Figure
from transformers import AutoTokenizer

from bhlib.calibration import collect_router_logits, fit_null, name_of
from bhlib.discovery import find_moe_layers
from bhlib.evaluation import evaluate
from bhlib.explain import explain
from bhlib.figures.passage import Passage, RoutedPassage
from bhlib.figures.passage_charts import PassageCharts, draw_passage
from bhlib.figures.passage_text import passage_html
from bhlib.loading import DEMO, load_heldout
from bhlib.patching import RoutingPatch
from bhlib.procedures import PROCEDURES
from bhlib.pvalues import NULLS, STATISTICS, PValueMaker
from bhlib.rules import BH

#: Choices of a procedure: what the menu says, and its key in `bhlib.procedures.PROCEDURES`.
PROCEDURE_CHOICES = tuple((function.__name__.replace("_", " "), name) for name, function in PROCEDURES.items())

_TYPED = "typed below"
_BUSY = '<b style="color:#D55E00">●</b>'
_SECONDS_TO_SETTLE = 0.4


def heldout_texts(split: str = "validation", length: int = 256) -> dict[str, str]:
    """The beginning of each domain's held-out text, as text: for any model and tokenizer.

    Parameters
    ----------
    split : {"calibration", "validation", "test"}
    length : int
        Tokens of the demo's tokenizer.
    """
    tokenizer = AutoTokenizer.from_pretrained(DEMO, local_files_only=True)
    parts = load_heldout(split, length, max_sequences=1)
    return {domain: tokenizer.decode(ids[0], skip_special_tokens=True) for domain, ids in parts.items()}


class Explorer:
    """Sliders for a rule of the `BH` kind, and what it makes of a passage. The last expression of a notebook cell.

    Parameters
    ----------
    model : PreTrainedModel
        An MoE model that can be patched, not patched now.
    tokenizer : PreTrainedTokenizerBase
    passages : mapping of str to str, optional
        Texts to pick from, by name; by default the demo's held-out texts (`heldout_texts`).
    max_tokens : int
        A longer passage is cut.

    Attributes
    ----------
    alpha, temperature, null, statistic, method, layer, min_k, max_k, token, passage, text, button : widgets
        The controls. To move one from code, set its ``value``.
    widget : widgets.VBox
        All of it. Its parts carry CSS classes that begin with ``bh-``.
    routed : RoutedPassage
        What is shown, for the functions of `bhlib.figures.passage`.

    Notes
    -----
    Without a kernel, as on GitHub, a notebook shows the picture that the explorer had when the cell was run.
    """

    def __init__(self, model, tokenizer, passages: Mapping[str, str] | None = None, max_tokens: int = 512) -> None:
        self.model, self.tokenizer, self.max_tokens = model, tokenizer, max_tokens
        self._moe_layers = find_moe_layers(model)
        self.passages = dict(heldout_texts() if passages is None else passages)
        self.routed: RoutedPassage | None = None
        self._read: Passage | None = None
        self._charts = PassageCharts()
        self._fitted: dict[tuple[str, str], PValueMaker] = {}
        self._calibration_logits: torch.Tensor | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._make_controls()
        self._make_views()
        self._arrange()
        self._read_passage()
        self._watch()

    # -- what it is made of --------------------------------------------------------------------------------------

    def _make_controls(self) -> None:
        first = next(iter(self.passages), _TYPED)
        wide = {"style": {"description_width": "6.5em"}, "layout": widgets.Layout(width="27em")}
        self.passage = widgets.Dropdown(options=[*self.passages, _TYPED], value=first, description="passage", **wide)
        self.text = widgets.Textarea(
            value=self.passages.get(first, ""), continuous_update=False, rows=4, layout=widgets.Layout(width="99%")
        )
        # The scale starts so that 0.05 lies on a step: whoever moves away and back is where they were.
        low = math.log10(0.05) - 2
        self.alpha = widgets.FloatLogSlider(
            value=0.05, base=10, min=low, max=low + 3.3, step=0.05, readout_format=".3g", description="α", **wide
        )
        self.temperature = widgets.FloatLogSlider(
            value=1.0, base=2, min=-2, max=2, step=0.25, readout_format=".2f", description="temperature", **wide
        )
        nulls = [(entry.label, name) for name, entry in NULLS.items()]
        self.null = widgets.Dropdown(options=nulls, value="dirichlet", description="null", **wide)
        self.statistic = widgets.Dropdown(options=list(STATISTICS), value="log_prob", description="statistic", **wide)
        self.method = widgets.Dropdown(options=PROCEDURE_CHOICES, value="bh", description="procedure", **wide)
        self.layer = widgets.Dropdown(options=["all", *range(len(self._moe_layers))], description="layer", **wide)
        top_k, num_experts = self._moe_layers[0].top_k, self._moe_layers[0].num_experts
        most = min(2 * top_k, num_experts)
        self.min_k = widgets.Dropdown(options=range(top_k + 1), value=1, description="min_k", **wide)
        self.max_k = widgets.Dropdown(options=range(1, most + 1), value=top_k, description="max_k", **wide)
        self.token = widgets.IntSlider(value=0, min=0, max=0, description="why? token", **wide)
        self.button = widgets.Button(description="Generate with both", button_style="primary")

    def _make_views(self) -> None:
        self.mean, self.loss, self.message = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.busy = widgets.HTML(layout=widgets.Layout(min_height="2em"))  # so that nothing moves when it speaks
        self.charts = widgets.Image(format="png", layout=widgets.Layout(max_width="100%", object_fit="contain"))
        scroll = widgets.Layout(max_height="24em", overflow="auto", border="1px solid #cccccc", padding="0.3em")
        self.colored = widgets.HTML(layout=scroll)
        self.why = widgets.HTML()
        half = widgets.Layout(width="49%")
        self.bh_text, self.own_text = widgets.HTML(layout=half), widgets.HTML(layout=half)

    def _arrange(self) -> None:
        names = {
            "passage": self.passage, "input": self.text, "alpha": self.alpha, "temperature": self.temperature,
            "null": self.null, "statistic": self.statistic, "method": self.method, "layer": self.layer,
            "min-k": self.min_k, "max-k": self.max_k, "mean": self.mean, "loss": self.loss, "busy": self.busy,
            "message": self.message, "charts": self.charts, "colored": self.colored, "token": self.token,
            "why": self.why, "generate": self.button, "text": self.bh_text, "own-text": self.own_text,
        }  # fmt: skip
        for name, part in names.items():
            part.add_class(f"bh-{name}")
        rows = [
            (self.alpha, self.temperature), (self.null, self.statistic), (self.method, self.layer),
            (self.min_k, self.max_k),
        ]  # fmt: skip
        wrap = widgets.Layout(flex_flow="row wrap")
        self.widget = widgets.VBox(
            [self.passage, self.text]
            + [widgets.HBox(row, layout=wrap) for row in rows]
            + [self.mean, self.loss, self.busy, self.message, self.charts, self.colored, self.token, self.why]
            + [self.button]
            + [widgets.HBox([self.bh_text, self.own_text], layout=wrap)]
        )
        self.widget.add_class("bh-explorer")

    def _watch(self) -> None:
        self.passage.observe(self._pick_passage, "value")
        self.text.observe(self._read_passage, "value")
        for control in (
            self.alpha, self.temperature, self.null, self.statistic, self.method, self.min_k, self.max_k
        ):  # fmt: skip
            control.observe(self._move, "value")
        self.layer.observe(lambda change: self.redraw(), "value")
        self.token.observe(lambda change: self._answer(), "value")
        self.button.on_click(lambda button: self.generate())

    def _repr_mimebundle_(self, **kwargs) -> dict:
        """The live view, and a picture for places where no kernel answers."""
        view = {"version_major": 2, "version_minor": 0, "model_id": self.widget.model_id}
        bundle = {"text/plain": repr(self), "application/vnd.jupyter.widget-view+json": view}
        if self.routed is not None:
            bundle["image/png"] = b64encode(self.draw()._repr_png_()).decode("ascii")
        return bundle

    def draw(self) -> Figure:
        """What is shown now, as a picture for places where no kernel answers; says how to get the sliders."""
        picture = draw_passage(self.routed, self._shown_layer)
        note = "A picture, without sliders: run the cells above and this one, in Colab or JupyterLab, to get them."
        picture.suptitle(f"{self._rule_in_words()}\n{note}", y=1.05, fontsize=9)
        return picture

    def __repr__(self) -> str:
        return f"Explorer of {name_of(self.model)}: run the cells above and this one for its sliders"

    # -- what happens when a control moves -----------------------------------------------------------------------

    @property
    def rule(self) -> BH:
        """The rule that the controls describe; fits a null that is asked for the first time."""
        bounds = {"min_k": self.min_k.value, "max_k": self.max_k.value}
        return BH(self.alpha.value, self._pvalues(), self.method.value, **bounds)

    @property
    def _shown_layer(self) -> int | None:
        return None if self.layer.value == "all" else self.layer.value

    def _pvalues(self) -> PValueMaker:
        null, top_k = self.null.value, self._read.top_k
        if not NULLS[null].needs_calibration:
            return NULLS[null].make(exclude_top=top_k, temperature=self.temperature.value)
        key = null, self.statistic.value
        if key not in self._fitted:
            with self._busy(f"fitting the {null} null of {self.statistic.value} on calibration text"):
                self._fitted[key] = fit_null(
                    self._logits_to_fit_on(), model_name=name_of(self.model), null=null, statistic=key[1],
                    exclude_top=top_k, max_values=NULLS[null].max_values,
                )  # fmt: skip
        return self._fitted[key]

    def _logits_to_fit_on(self) -> torch.Tensor:
        if self._calibration_logits is None:
            texts = heldout_texts("calibration").items()
            token_ids = {name: self.tokenizer(text, return_tensors="pt")["input_ids"] for name, text in texts}
            self._calibration_logits = collect_router_logits(self.model, token_ids, progress=False)
        return self._calibration_logits

    def _pick_passage(self, change: dict) -> None:
        if change["new"] in self.passages:
            self.text.value = self.passages[change["new"]]

    def _read_passage(self, change: dict | None = None) -> None:
        """Read the routers' logits on the text, and the model's own loss, once per passage."""
        if self.passages.get(self.passage.value) != self.text.value:
            self.passage.value = _TYPED
        self._read = self.routed = None
        self.bh_text.value = self.own_text.value = ""
        with self._reporting(), self._busy("reading the passage"):
            read = Passage.read(self.model, self.tokenizer, self.text.value, self.max_tokens)
            self._own_loss = evaluate(self.model, {"passage": read.token_ids})["loss"].item()
            self._read = read
        if self._read is None:
            self.colored.value = self.why.value = ""
        else:
            self.token.max = len(self._read.tokens) - 1
        self.charts.layout.display = "none" if self._read is None else ""
        self.redraw()
        self.settle()

    def _move(self, change: dict) -> None:
        """A control has moved: redraw at once, and run the model when it has rested."""
        self.redraw()
        self._stop_waiting()
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # a plain script: nothing else will happen
            self.settle()
            return
        if self._read is not None:
            self._timer = loop.call_later(_SECONDS_TO_SETTLE, self.settle)
            self.busy.value = f"{_BUSY} the loss follows when the slider rests"

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None

    def redraw(self) -> None:
        """Decide anew on the logits that were read, and show it. Takes no pass over the model."""
        self.statistic.disabled = not NULLS[self.null.value].needs_calibration
        if self._read is None:
            return
        with self._reporting():
            rule = self.rule
            self.routed = self._read.route(rule, self.temperature.value)
            layer, top_k = self._shown_layer, self._read.top_k
            chosen = self.routed.counts[self.routed.layers(layer)]
            self.mean.value = (
                f"<b>{chosen.mean():.2f}</b> experts per token would be selected ({self.routed.sample(layer)}); "
                f"the model's own: {top_k}"
            )
            self.charts.value = self._charts.png(self.routed, layer)
            self.colored.value = passage_html(self.routed, layer)
            self.why.value = self._explanation(rule)

    def _answer(self) -> None:
        """Another token was asked about."""
        if self.routed is not None:
            with self._reporting():
                self.why.value = self._explanation(self.rule)

    def _explanation(self, rule: BH) -> str:
        """Why the token of the slider gets its experts: the table of the layer shown, or what it gets in each layer."""
        read, layer, token = self._read, self._shown_layer, self.token.value
        name = f"token {token}, <code>{escape(repr(read.tokens[token]))}</code>"
        if layer is None:
            counts = " ".join(map(str, self.routed.counts[:, token].tolist()))
            return f"{name}: experts by layer: {counts}. Choose a layer above to see why."
        options = {"weighting": read.weighting, "temperature": self.temperature.value}
        table = explain(rule, read.router_logits[layer, token], layer, **options)
        return f"{name}, layer {layer}: {_decision_html(table)}"

    def settle(self) -> None:
        """Run the model under the patch, for the loss and the number of experts that it really uses."""
        self._stop_waiting()
        self.busy.value = ""
        if self._read is None:
            return
        with self._reporting(), self._busy("running the model for the loss"):
            data = {"passage": self._read.token_ids}
            row = evaluate(self.model, data, self.rule, temperature=self.temperature.value).iloc[0]
            self.loss.value = (
                f"loss <b>{row['loss']:.3f}</b> nats per token with {row['mean_k']:.2f} experts; the model's own top-"
                f"{self._read.top_k}: {self._own_loss:.3f} (difference {row['loss'] - self._own_loss:+.3f}, "
                f"{row['tokens']:.0f} predicted tokens)"
            )

    def generate(self) -> None:
        """Continue the passage with BH and with the model's own routing."""
        if self._read is None:
            return
        with self._reporting(), self._busy("generating"):
            with RoutingPatch(self.model, self.rule, temperature=self.temperature.value) as patch:
                text = self._continue()
            mean = patch.get_routing_stats()["mean_experts_per_token"]
            self.bh_text.value = _quote(f"{self._rule_in_words()}: {mean:.2f} on average", text)
            self.own_text.value = _quote(f"the model's own top-{self._read.top_k}", self._continue())

    def _rule_in_words(self) -> str:
        dials = f"α = {self.alpha.value:.3g}, temperature {self.temperature.value:.2g}"
        bounds = f"{self.min_k.value} to {self.max_k.value} experts"
        return f"{self.method.label}; {self.null.label}; {dials}; {bounds}"

    def _continue(self, new_tokens: int = 40) -> str:
        """The model's most likely continuation of the passage."""
        token_ids = self._read.token_ids.to(self.model.device)
        output = self.model.generate(
            token_ids, attention_mask=torch.ones_like(token_ids), max_new_tokens=new_tokens, do_sample=False,
            repetition_penalty=1.2, pad_token_id=self.tokenizer.eos_token_id,
        )  # fmt: skip
        return self.tokenizer.decode(output[0, token_ids.shape[1] :], skip_special_tokens=True)

    # -- what it says --------------------------------------------------------------------------------------------

    @contextmanager
    def _busy(self, what: str) -> Iterator[None]:
        """A busy sign while something takes longer than a blink."""
        before, self.busy.value = self.busy.value, f"{_BUSY} {escape(what)} …"
        self.button.disabled = True
        try:
            yield
        finally:
            self.busy.value = before
            self.button.disabled = bool(before)

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """Errors and warnings go where whoever moved the slider is looking."""
        said: list[str] = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            try:
                yield
            except (ValueError, RuntimeError) as error:
                self.mean.value = self.loss.value = self.why.value = ""  # those of another setting
                said.append(f'<b style="color:#A04000">{escape(str(error))}</b>')
        said += [f"Note: {escape(text)}" for text in dict.fromkeys(str(warning.message) for warning in caught)]
        self.message.value = "<br>".join(said)


def _decision_html(table: pd.DataFrame) -> str:
    """The table of `explain` for one token, down to two experts after the last one that matters, and a sentence."""
    found, kept, bound = int(table["found"].sum()), int(table["kept"].sum()), table["bound"][0]
    because = "" if bound == "none" else f", and {bound} makes it {kept}"
    shown = ["expert", "logit", "probability", "probability_threshold", "pvalue", "pvalue_threshold", "weight"]
    cell = '<td style="padding:0 0.6em;text-align:right">'
    lines = ["".join(f"{cell}<b>{escape(name.replace('_', ' '))}</b></td>" for name in ["", *shown, "found"])]
    for row in table.head(max(found, kept) + 2).itertuples():
        values = [f"{getattr(row, name):.3g}" for name in shown]
        values = [str(row.rank), *("–" if value == "nan" else value for value in values), "yes" if row.found else "no"]
        lines.append("".join(f"{cell}{value}</td>" for value in values))
    color = ["", *("background:#deebf7" if is_kept else "" for is_kept in table["kept"])]
    body = "".join(f'<tr style="{style}">{line}</tr>' for style, line in zip(color, lines, strict=False))
    return f"the procedure finds <b>{found}</b>{because}<table>{body}</table>"


def _quote(title: str, text: str) -> str:
    return (
        f'<div style="font-weight:bold;line-height:1.4">{escape(title)}</div>'
        f'<div style="white-space:pre-wrap;font-family:monospace;line-height:1.4">{escape(text)}</div>'
    )
