"""Fingerprints: what changes a number changes them, and nothing else does."""

import functools
import math
import os
import subprocess
import sys
import threading
import types
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from models import tiny_olmoe, tokens

from bhlib.evaluation import sweep
from bhlib.fingerprints import Fingerprint, add_model
from bhlib.patching import RoutingPatch
from bhlib.pvalues import ConformalNull, PValueMaker
from bhlib.rules import BH, PrefixRule, TopK

DATA = {"a": tokens(2, 12, seed=1)}


def hash_of(*values):
    digest = Fingerprint()
    for value in values:
        digest.add(value)
    return digest.hexdigest()


def hash_of_model(model):
    digest = Fingerprint()
    add_model(digest, model)
    return digest.hexdigest()


def rule_from(source, **names):
    """The one rule that a source text defines, as a notebook's cell would."""
    cell = types.ModuleType("__main__")
    vars(cell).update({"dataclass": dataclass, "PrefixRule": PrefixRule, "torch": torch, "math": math} | names)
    exec(compile(source, "<cell>", "exec", dont_inherit=True), vars(cell))
    return vars(cell)["Own"]


OWN = """
def helper(top):
    return top * 1

@dataclass(frozen=True)
class Own(PrefixRule):
    # how many
    level: float = 0.5
    def count(self, top, scores, layer):
        "Counts."
        return (helper(top) > FACTOR * self.level).sum(-1) + OFFSETS[0]
"""


def own(source=OWN, factor=0.1, offsets=(0,)):
    return rule_from(source, FACTOR=factor, OFFSETS=list(offsets))()


@pytest.mark.parametrize(
    "changed",
    [
        lambda: own(OWN.replace("> FACTOR", "< FACTOR")),
        lambda: own(OWN.replace("top * 1", "top * 2")),
        lambda: own(OWN.replace("level: float = 0.5", "level: float = 0.25")),
        lambda: own(OWN.replace("self.level", "math.exp(self.level)")),
        lambda: own(OWN.replace(".sum(-1)", ".cumsum(-1)")),
        lambda: own(factor=0.2),
        lambda: own(offsets=(1,)),
    ],
    ids=["code", "helper", "field", "installed function", "method", "global", "list"],
)
def test_own_rules_are_told_by_their_code(changed):
    assert hash_of(own()) == hash_of(own()) != hash_of(changed()) == hash_of(changed())


def test_comments_and_docstrings_do_not_count():
    assert hash_of(own()) == hash_of(own(OWN.replace("# how many", "# so many\n\n").replace("Counts.", "How many.")))


def closure_rule(k, default=0):
    @dataclass(frozen=True)
    class Closure(PrefixRule):
        def count(self, top, scores, layer, more=default):
            return torch.full(top.shape[:1], k + more)

    return Closure()


def test_closures_and_defaults():
    assert hash_of(closure_rule(1)) == hash_of(closure_rule(1))
    assert len({hash_of(closure_rule(k, default)) for k in (1, 2) for default in (0, 3)}) == 4
    assert hash_of(functools.partial(math.pow, 1)) != hash_of(functools.partial(math.pow, 2))
    assert hash_of(lambda x: x + 1) == hash_of(lambda x: x + 1) != hash_of(lambda x: x + 2)


@dataclass(frozen=True)
class Holding(PrefixRule):
    held: object = field(default=None, repr=False)
    derived: dict = field(default_factory=dict, init=False, compare=False)

    @functools.cached_property
    def doubled(self):
        return 2 * self.held

    def count(self, top, scores, layer):
        return torch.full(top.shape[:1], 1)


def test_fields_that_the_repr_leaves_out():
    for one, other in [(torch.ones(2), torch.zeros(2)), ([1], [2]), ({"a"}, {"b"}), (math.sin, math.cos)]:
        assert repr(Holding(one)) == repr(Holding(other))
        assert hash_of(Holding(one)) == hash_of(Holding(one)) != hash_of(Holding(other))


def test_what_a_rule_remembers_does_not_count():
    rule = Holding(1.0)
    before = hash_of(rule)
    rule.derived[0] = rule.doubled
    assert hash_of(rule) == before
    null = ConformalNull.fit([torch.arange(1000.0)] * 3, model_name="m", num_experts=64)
    rule = BH(0.2, null)
    before = hash_of(rule)
    with RoutingPatch(tiny_olmoe(), rule) as patch, torch.no_grad():
        patch.model(DATA["a"])
    assert null._on_device and hash_of(rule) == before


class Flat(PValueMaker):
    def __init__(self, factor):
        self.factor = factor

    def statistic_of(self, router_logits, top=None):
        return router_logits if top is None else top

    def survival(self, statistics, layer=None):
        return torch.sigmoid(-self.factor * statistics)

    def __repr__(self):
        return "Flat()"


class Steep(Flat):
    def survival(self, statistics, layer=None):
        return torch.sigmoid(-9 * self.factor * statistics)


def test_own_makers_of_pvalues():
    assert hash_of(BH(0.1, Flat(1))) == hash_of(BH(0.1, Flat(1)))
    assert len({hash_of(BH(0.1, maker)) for maker in (Flat(1), Flat(2), Steep(1))}) == 3


def imports_when_called():
    import models

    return models


@pytest.mark.parametrize(
    "held",
    [
        threading.Lock(),
        (i for i in range(3)),
        imports_when_called,
        sys.modules[__name__],
        torch.eye(2).to_sparse(),
        np.frompyfunc(lambda x: x, 1, 1),
        functools.reduce(lambda inside, _: [inside], range(5000), []),
    ],
    ids=["lock", "generator", "late import", "module", "sparse tensor", "ufunc of ones own", "without end"],
)
def test_what_cannot_be_told_is_refused(held, tmp_path):
    with pytest.raises(TypeError):
        hash_of(held)
    with pytest.raises(ValueError, match="the rule 'odd' cannot be stored, since it depends on .*cache=None"):
        sweep(tiny_olmoe(), {"odd": Holding(held)}, DATA, cache=tmp_path)
    assert (sweep(tiny_olmoe(), {"odd": Holding(held)}, DATA)["error"] == "").all()


def test_the_same_in_every_process():
    """Whatever the order of sets, and after other work."""
    script = (
        "from test_fingerprints import *; assert hash_of_model(tiny_olmoe()); "
        "print(hash_of(own(), Holding({'a', 'b', 'c'}), BH(0.1), BH(0.1, Flat(2), 'by'), TopK(2)), "
        "hash_of_model(tiny_olmoe()))"
    )
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    found = {
        subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
            timeout=120,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


# -- models ------------------------------------------------------------------------------------------------------


def changed_model(change):
    model = tiny_olmoe()
    with torch.no_grad():
        change(model)
    return model


def set_on_routers(model, name, value):
    for layer in model.model.layers:
        setattr(layer.mlp.gate, name, value)


CHANGES = {
    "one number of many": lambda model: model.model.layers[1].mlp.experts.gate_up_proj[3, 5, 7].add_(1),
    "top_k of the routers": lambda model: set_on_routers(model, "top_k", 2),
    "weights of the routers": lambda model: set_on_routers(model, "norm_topk_prob", True),
    "dropout": lambda model: model.train(),
    "scaling of the attention": lambda model: setattr(model.model.layers[0].self_attn, "scaling", 0.5),
    "a buffer": lambda model: model.model.rotary_emb.inv_freq.mul_(2),
    "dtype": lambda model: model.bfloat16(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_set_on_a_model_changes_it(change):
    assert hash_of_model(tiny_olmoe()) == hash_of_model(tiny_olmoe()) != hash_of_model(changed_model(change))


def test_a_forward_pass_does_not_change_a_model():
    model = tiny_olmoe()
    before = hash_of_model(model)
    with torch.no_grad():
        model(DATA["a"], output_router_logits=True, output_hidden_states=True)
    assert hash_of_model(model) == before
    model.forward = torch.compile(model.forward)
    assert hash_of_model(model) == before


def test_code_of_ones_own_in_a_model_is_refused(tmp_path):
    hooked, replaced = tiny_olmoe(), tiny_olmoe()
    hooked.model.norm.register_forward_hook(lambda module, args, output: output + 1)
    replaced.model.norm.forward = lambda states: states
    for model, what in ((hooked, "'model.norm' of the model carries the hook"), (replaced, "a forward of its own")):
        with pytest.raises(ValueError, match=f"this sweep cannot be stored.*{what}.*cache=None"):
            sweep(model, {"top-2": TopK(2)}, DATA, cache=tmp_path)
        assert (sweep(model, {"top-2": TopK(2)}, DATA)["error"] == "").all()


# -- sweeps ------------------------------------------------------------------------------------------------------


def test_sweeps_see_the_change(tmp_path):
    """A router's top-k set on a loaded model, and an own rule whose closure changed: neither gets a stale cell."""
    model = tiny_olmoe()
    for top_k in (8, 2):
        set_on_routers(model, "top_k", top_k)
        assert set(sweep(model, {"own": None}, DATA, cache=tmp_path)["mean_k"]) == {top_k}
    for k in (7, 1):
        assert set(sweep(model, {"mine": closure_rule(k)}, DATA, cache=tmp_path)["mean_k"]) == {k}
