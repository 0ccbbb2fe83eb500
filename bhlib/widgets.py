"""An explorer of routing: sliders for the rule, and what it makes of a passage.

    from bhlib import load_demo
    from bhlib.widgets import Explorer

    Explorer(*load_demo())

Core ipywidgets only, the same code under versions 7 and 8. The views are functions of `bhlib.figures.passage`; here are
only the controls, and when what is computed:

- while a slider moves, the rule decides anew on logits that were read once, and the views are redrawn;
- when it has rested for a moment, the model runs under the patch, for the loss and the exact number of experts, and
  what each expert adds for the token that is explained is measured, once;
- nulls and compensations are fitted when they are first chosen (`bhlib.small_fits`).
"""

import asyncio
import math
import warnings
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from html import escape

import ipywidgets as widgets
import pandas as pd
import torch
from matplotlib.figure import Figure

from bhlib.compensation import Compensation
from bhlib.contributions import Contributions, measure_token
from bhlib.discovery import find_moe_layers, name_of
from bhlib.evaluation import evaluate
from bhlib.explain import explain
from bhlib.explain_token import add_contributions
from bhlib.figures.passage import Passage, RoutedPassage
from bhlib.figures.passage_charts import PassageCharts, draw_passage
from bhlib.figures.passage_decision import decision_html
from bhlib.figures.passage_text import passage_html
from bhlib.patching import RoutingPatch
from bhlib.procedures import PROCEDURES
from bhlib.pvalues import NULLS, STATISTICS, PValueMaker
from bhlib.rules import BH
from bhlib.small_fits import CONTRIBUTION, LARGEST, SmallFits, heldout_texts

#: Choices of a procedure: what the menu says, and its key in `bhlib.procedures.PROCEDURES`.
PROCEDURE_CHOICES = tuple((function.__name__.replace("_", " "), name) for name, function in PROCEDURES.items())

#: What the menu says about dropped experts, and the rank of the compensation's map; None for no compensation.
COMPENSATIONS = {"nothing": None, "their mean outputs": 0, "means and a map of rank 16": 16}

_TYPED = "typed below"
_BUSY = '<b style="color:#D55E00">●</b>'
_SECONDS_TO_SETTLE = 0.4


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
    alpha, temperature, null, statistic, method, layer, min_k, max_k, compensation : widgets
    token, passage, text, button : widgets
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
        self._fits = SmallFits(model, tokenizer, self._busy)
        self._contributions: dict[int, Contributions] = {}  # by token of the passage
        self._waiting: dict[str, asyncio.TimerHandle] = {}  # by what follows when the sliders rest
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
        nulls.insert(1, (f"contribution of at most {LARGEST:g}, fitted", CONTRIBUTION))
        self.null = widgets.Dropdown(options=nulls, value="dirichlet", description="null", **wide)
        self.statistic = widgets.Dropdown(options=list(STATISTICS), value="log_prob", description="statistic", **wide)
        self.method = widgets.Dropdown(options=PROCEDURE_CHOICES, value="bh", description="procedure", **wide)
        self.layer = widgets.Dropdown(options=["all", *range(len(self._moe_layers))], description="layer", **wide)
        top_k, num_experts = self._moe_layers[0].top_k, self._moe_layers[0].num_experts
        most = min(2 * top_k, num_experts)
        self.min_k = widgets.Dropdown(options=range(top_k + 1), value=1, description="min_k", **wide)
        self.max_k = widgets.Dropdown(options=range(1, most + 1), value=top_k, description="max_k", **wide)
        self.compensation = widgets.Dropdown(options=[*COMPENSATIONS], description="for dropped", **wide)
        self.token = widgets.IntSlider(value=0, min=0, max=0, description="why? token", **wide)
        self.button = widgets.Button(description="Generate with both", button_style="primary")

    def _make_views(self) -> None:
        self.mean, self.loss, self.message = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.busy = widgets.HTML(layout=widgets.Layout(min_height="2em"))  # so that nothing moves when it speaks
        self.charts = widgets.Image(format="png", layout=widgets.Layout(max_width="100%", object_fit="contain"))
        scroll = widgets.Layout(max_height="24em", overflow="auto", border="1px solid #cccccc", padding="0.3em")
        self.colored = widgets.HTML(layout=scroll)
        self.why = widgets.HTML(layout=widgets.Layout(overflow="auto"))  # its table may be wider than the page
        half = widgets.Layout(width="49%")
        self.bh_text, self.own_text = widgets.HTML(layout=half), widgets.HTML(layout=half)

    def _arrange(self) -> None:
        names = {
            "passage": self.passage, "input": self.text, "alpha": self.alpha, "temperature": self.temperature,
            "null": self.null, "statistic": self.statistic, "method": self.method, "layer": self.layer,
            "min-k": self.min_k, "max-k": self.max_k, "compensation": self.compensation, "mean": self.mean,
            "loss": self.loss, "busy": self.busy, "message": self.message, "charts": self.charts,
            "colored": self.colored, "token": self.token, "why": self.why, "generate": self.button,
            "text": self.bh_text, "own-text": self.own_text,
        }  # fmt: skip
        for name, part in names.items():
            part.add_class(f"bh-{name}")
        rows = [
            (self.alpha, self.temperature), (self.null, self.statistic), (self.method, self.layer),
            (self.min_k, self.max_k), (self.compensation,),
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
        self.layer.observe(lambda change: (self.redraw(), self._measure_soon()), "value")
        self.token.observe(lambda change: (self._answer(), self._measure_soon()), "value")
        self.compensation.observe(lambda change: self._settle_soon(), "value")
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
        null = self.null.value
        if self._is_fitted:
            return self._fits.null(null, self.statistic.value, self.max_k.value)
        return NULLS[null].make(exclude_top=self._read.top_k, temperature=self.temperature.value)

    @property
    def _is_fitted(self) -> bool:
        return self.null.value == CONTRIBUTION or NULLS[self.null.value].needs_calibration

    def _standing_in(self) -> Compensation | None:
        """What stands in for dropped experts; fits one that is asked for the first time."""
        rank = COMPENSATIONS[self.compensation.value]
        return None if rank is None else self._fits.compensation(rank)

    def _pick_passage(self, change: dict) -> None:
        if change["new"] in self.passages:
            self.text.value = self.passages[change["new"]]

    def _read_passage(self, change: dict | None = None) -> None:
        """Read the routers' logits on the text, and the model's own loss, once per passage."""
        if self.passages.get(self.passage.value) != self.text.value:
            self.passage.value = _TYPED
        self._read = self.routed = None
        self._contributions.clear()
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
        self.measure()

    def _move(self, change: dict) -> None:
        """A control has moved: redraw at once, and run the model when it has rested."""
        self.redraw()
        self._settle_soon()
        self._measure_soon()

    def _settle_soon(self) -> None:
        self._when_at_rest("the loss follows when the slider rests", self.settle)

    def _measure_soon(self) -> None:
        if self._is_unmeasured:
            self._when_at_rest("what the experts add follows when the slider rests", self.measure)

    @property
    def _is_unmeasured(self) -> bool:
        """Whether a decision is shown, and not yet what the experts add."""
        is_shown = self._shown_layer is not None and self.routed is not None
        return is_shown and self.token.value not in self._contributions

    def _when_at_rest(self, promise: str, act: Callable[[], None]) -> None:
        self._stop_waiting(act)
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # a plain script: nothing else will happen
            act()
            return
        if self._read is not None:
            self._waiting[act.__name__] = loop.call_later(_SECONDS_TO_SETTLE, act)
            self.busy.value = f"{_BUSY} {promise}"

    def _stop_waiting(self, act: Callable[[], None]) -> None:
        timer = self._waiting.pop(act.__name__, None)
        if timer is not None:
            timer.cancel()

    def redraw(self) -> None:
        """Decide anew on the logits that were read, and show it. Takes no pass over the model."""
        self.statistic.disabled = not self._is_fitted or self.null.value == CONTRIBUTION
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
        if token in self._contributions:
            table = add_contributions(table, self._contributions[token], layer)
        return f"{name}, layer {layer}: {decision_html(table)}"

    def measure(self) -> None:
        """Measure what each expert adds for the token of the slider, and show it beside the decision."""
        self._stop_waiting(self.measure)
        self._clear_busy()
        if not self._is_unmeasured:
            return
        with self._reporting():
            rule, token = self.rule, self.token.value
            with self._busy("computing all experts of the token"):
                self._contributions[token] = measure_token(self.model, self._read.token_ids, token)
            self.why.value = self._explanation(rule)

    def settle(self) -> None:
        """Run the model under the patch, for the loss and the number of experts that it really uses."""
        self._stop_waiting(self.settle)
        self._clear_busy()
        if self._read is None:
            return
        with self._reporting():
            rule, compensation = self.rule, self._standing_in()
            with self._busy("running the model for the loss"):
                row = self._run(rule, compensation)
                plain = row if compensation is None else self._run(rule)
            self.loss.value = (
                f"loss <b>{row['loss']:.3f}</b> nats per token with {row['mean_k']:.2f} experts"
                f"{self._compensation_in_words()}; the model's own top-{self._read.top_k}: {self._own_loss:.3f} "
                f"(difference {row['loss'] - self._own_loss:+.3f}, "
                + ("" if compensation is None else f"with nothing for them {plain['loss'] - self._own_loss:+.3f}, ")
                + f"{row['tokens']:.0f} predicted tokens)"
            )

    def _run(self, rule: BH, compensation: Compensation | None = None) -> pd.Series:
        """Loss and number of experts of the passage."""
        data, options = {"passage": self._read.token_ids}, {"temperature": self.temperature.value}
        return evaluate(self.model, data, rule, compensation=compensation, **options).iloc[0]

    def generate(self) -> None:
        """Continue the passage with BH and with the model's own routing."""
        if self._read is None:
            return
        with self._reporting(), self._busy("generating"):
            options = {"temperature": self.temperature.value, "compensation": self._standing_in()}
            with RoutingPatch(self.model, self.rule, **options) as patch:
                text = self._continue()
            mean = patch.get_routing_stats()["mean_experts_per_token"]
            self.bh_text.value = _quote(f"{self._rule_in_words()}: {mean:.2f} on average", text)
            self.own_text.value = _quote(f"the model's own top-{self._read.top_k}", self._continue())

    def _rule_in_words(self) -> str:
        dials = f"α = {self.alpha.value:.3g}, temperature {self.temperature.value:.2g}"
        bounds = f"{self.min_k.value} to {self.max_k.value} experts"
        return f"{self.method.label}; {self.null.label}; {dials}; {bounds}{self._compensation_in_words()}"

    def _compensation_in_words(self) -> str:
        words = self.compensation.value
        return "" if COMPENSATIONS[words] is None else f", {words} for dropped ones"

    def _continue(self, new_tokens: int = 40) -> str:
        """The model's most likely continuation of the passage."""
        token_ids = self._read.token_ids.to(self.model.device)
        output = self.model.generate(
            token_ids, attention_mask=torch.ones_like(token_ids), max_new_tokens=new_tokens, do_sample=False,
            repetition_penalty=1.2, pad_token_id=self.tokenizer.eos_token_id,
        )  # fmt: skip
        return self.tokenizer.decode(output[0, token_ids.shape[1] :], skip_special_tokens=True)

    # -- what it says --------------------------------------------------------------------------------------------

    def _clear_busy(self) -> None:
        """No busy sign, unless something else is still waiting for the sliders to rest."""
        if not self._waiting:
            self.busy.value = ""

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


def _quote(title: str, text: str) -> str:
    return (
        f'<div style="font-weight:bold;line-height:1.4">{escape(title)}</div>'
        f'<div style="white-space:pre-wrap;font-family:monospace;line-height:1.4">{escape(text)}</div>'
    )
