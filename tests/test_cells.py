"""Finished cells: named after all that they depend on; read back to the bit, or computed again."""

import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import tiny_olmoe, tokens

import bhlib
from bhlib.cells import cell_path, hash_source, read_cell, sweep_key, write_cell
from bhlib.evaluation import evaluate, sweep
from bhlib.patching import RoutingPatch
from bhlib.pvalues import ConformalNull, DirichletNull, load_null
from bhlib.rules import BH, EntropyK, PrefixRule, StaticPerLayer, Threshold, TopK, TopP

DATA = {"a": tokens(4, 12, seed=1), 'b, "c"': tokens(5, 12, seed=2)}


# -- names of rules ----------------------------------------------------------------------------------------------


def null(last=999.0):
    values = torch.cat([torch.arange(999.0), torch.tensor([last])])
    return ConformalNull.fit([values] * 3, model_name="m", num_experts=64)


def name_of(rule):
    return cell_path("", "x", rule, "key").name


DIFFERENT = {
    "own": lambda: None,
    "top-2": lambda: TopK(2),
    "top-3": lambda: TopK(3),
    "per layer": lambda: StaticPerLayer((2, 3)),
    "per layer, other order": lambda: StaticPerLayer((3, 2)),
    "entropy": lambda: EntropyK((2.0, 2.5), (1, 2, 3)),
    "entropy, other threshold": lambda: EntropyK((2.0, 2.6), (1, 2, 3)),
    "threshold": lambda: Threshold(0.4),
    "top-p": lambda: TopP(0.4),
    "BH": lambda: BH(0.1),
    "BH, level": lambda: BH(0.1 + 1e-16),
    "BH, bound": lambda: BH(0.1, min_k=2),
    "BH, method": lambda: BH(0.1, method="by"),
    "BH, layers": lambda: BH(0.1, layer_weights=(1, 2, 3)),
    "BH, concentration": lambda: BH(0.1, DirichletNull(2)),
    "BH, fitted": lambda: BH(0.1, null()),
    "BH, one value of the sample": lambda: BH(0.1, null(1000.0)),
}


def test_rules_are_told_by_their_parameters():
    names = {what: name_of(make()) for what, make in DIFFERENT.items()}
    assert len(set(names.values())) == len(names)
    assert names == {what: name_of(make()) for what, make in DIFFERENT.items()}


def test_what_a_rule_remembers_does_not_count(tmp_path):
    """Nor that its null went through a file: a sweep goes on after a restart."""
    rule = BH(0.2, null())
    before = name_of(rule)
    with RoutingPatch(tiny_olmoe(), rule) as patch, torch.no_grad():
        patch.model(DATA["a"])
    assert rule.pvalues._on_device and name_of(rule) == before
    rule.pvalues.save(tmp_path / "null.safetensors")
    assert name_of(BH(0.2, load_null(tmp_path / "null.safetensors", "m", num_layers=3, num_experts=64))) == before


@dataclass(frozen=True)
class Constant(PrefixRule):
    """A rule of somebody's own, in a file."""

    k: int = 1

    def count(self, top, scores, layer):
        return torch.full(top.shape[:1], self.k)


def closure_rule(k):
    @dataclass(frozen=True)
    class Closure(PrefixRule):
        def count(self, top, scores, layer):
            return torch.full(top.shape[:1], k)

    return Closure()


class Steep(DirichletNull):
    """P-values of somebody's own."""

    def survival(self, statistics, layer=None):
        return super().survival(2 * statistics, layer)


@pytest.mark.parametrize("make", [Constant, lambda: closure_rule(7), lambda: BH(0.2, Steep())])
def test_code_of_ones_own_is_not_stored(make, tmp_path):
    """Whatever may have changed in it: 7 experts, stored, must never be read as 1."""
    refusal = r"the rule 'mine' cannot be stored, since .*\.\w+, which bhlib does not define.*cache=None"
    with pytest.raises(ValueError, match=refusal):
        sweep(tiny_olmoe(), {"top-2": TopK(2), "mine": make()}, DATA, cache=tmp_path)
    assert not list(tmp_path.iterdir())
    assert (sweep(tiny_olmoe(), {"mine": make()}, DATA)["error"] == "").all()


# -- source text -------------------------------------------------------------------------------------------------


def test_changed_source_is_another_name(tmp_path):
    (tmp_path / "pvalues").mkdir()
    (tmp_path / "figures").mkdir()
    for name in ("rules.py", "pvalues/fitted.py", "figures/drawing.py", "widgets.py"):
        (tmp_path / name).write_text("a = 1\n", encoding="utf-8")
    seen = [hash_source(tmp_path)]
    for name in ("rules.py", "pvalues/fitted.py"):
        (tmp_path / name).write_text("a = 2\n", encoding="utf-8")
        seen.append(hash_source(tmp_path))
    (tmp_path / "weighting.py").touch()
    seen.append(hash_source(tmp_path))
    assert len(set(seen)) == 4
    (tmp_path / "widgets.py").write_text("a = 2\n", encoding="utf-8")
    (tmp_path / "figures" / "drawing.py").unlink()
    assert hash_source(tmp_path) == seen[-1]


def some_cell():
    key = sweep_key(tiny_olmoe(), DATA, {"temperature": 2.0, "agreement": True})
    return cell_path("", "BH", BH(0.1, null(), layer_weights=(1, 2, 3)), key).name


IN_A_COPY = """
import os
from test_cells import bhlib, some_cell
assert os.path.samefile(bhlib.__path__[0], "bhlib")
print(some_cell())
with open("bhlib/rules.py", "a") as file:
    file.write("# changed")
some_cell()
"""


def test_names_in_other_processes(tmp_path):
    """The same until the source changes; a process that runs what is no longer in the files names nothing."""
    source = Path(bhlib.__file__).parent
    shutil.copytree(source, tmp_path / "bhlib", ignore=shutil.ignore_patterns("*.safetensors"))
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    names = [some_cell()]
    for seed in ("1", "2"):
        ended = subprocess.run(
            [sys.executable, "-c", IN_A_COPY],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            timeout=120,
        )
        refusal = "cells cannot be named, since bhlib's files have changed after they were imported: restart Python"
        assert refusal in ended.stderr
        names.append(ended.stdout.strip())
    assert names[0] == names[1] != names[2]


# -- models ------------------------------------------------------------------------------------------------------


def key_of(model):
    return sweep_key(model, DATA, {})


def set_on_routers(model, name, value):
    for layer in model.model.layers:
        setattr(layer.mlp.gate, name, value)


CHANGES = {
    "a parameter": lambda model: model.model.norm.weight[7].add_(1),
    "one column of an expert": lambda model: model.model.layers[1].mlp.experts.gate_up_proj[3, :, 7].add_(1),
    "a buffer": lambda model: model.model.rotary_emb.inv_freq.mul_(2),
    "top_k of the routers": lambda model: set_on_routers(model, "top_k", 2),
    "weights of the routers": lambda model: set_on_routers(model, "norm_topk_prob", True),
    "configuration": lambda model: setattr(model.config, "rms_norm_eps", 0.1),
    "dtype": lambda model: model.bfloat16(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_model_is_another_name(change):
    model = tiny_olmoe()
    assert key_of(model) == key_of(tiny_olmoe())
    with torch.no_grad():
        change(model)
    assert key_of(model) != key_of(tiny_olmoe())


def test_where_a_model_lies_and_what_it_computed_do_not_count(tmp_path):
    model = tiny_olmoe()
    before = key_of(model)
    with torch.no_grad():
        model(DATA["a"], output_router_logits=True, output_hidden_states=True)
    assert key_of(model) == before
    model.save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert len({key_of(type(model).from_pretrained(tmp_path / folder)) for folder in ("a", "b")}) == 1


def test_a_top_k_set_on_a_loaded_model_gets_no_stale_cell(tmp_path):
    model = tiny_olmoe()
    for top_k in (8, 2):
        set_on_routers(model, "top_k", top_k)
        assert set(sweep(model, {"own": None}, DATA, cache=tmp_path)["mean_k"]) == {top_k}


# -- files -------------------------------------------------------------------------------------------------------


@cache
def table():
    return evaluate(tiny_olmoe(num_hidden_layers=1), DATA, TopK(2), agreement=True)


def test_read_back_to_the_bit(tmp_path):
    write_cell(table(), tmp_path / "top-2-0123.csv")
    pd.testing.assert_frame_equal(read_cell(tmp_path / "top-2-0123.csv"), table(), check_exact=True)
    assert [path.name for path in tmp_path.iterdir()] == ["top-2-0123.csv"]


def test_people_read_it_with_pandas(tmp_path):
    write_cell(table(), tmp_path / "top-2-0123.csv")
    frame = pd.read_csv(tmp_path / "top-2-0123.csv")
    assert frame.pop("checksum").nunique() == 1
    pd.testing.assert_frame_equal(frame, table())


def test_a_cell_under_the_name_of_another_is_not_read(tmp_path):
    write_cell(table(), tmp_path / "top-2-0123.csv")
    (tmp_path / "top-2-0123.csv").rename(tmp_path / "top-3-4567.csv")
    with pytest.warns(UserWarning, match="top-3-4567.csv is not as it was written, so its rule is computed again"):
        assert read_cell(tmp_path / "top-3-4567.csv") is None


def test_a_cell_cut_at_a_row_is_computed_again(tmp_path):
    model = tiny_olmoe()
    wanted = sweep(model, {"top-2": TopK(2)}, DATA, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]))
    with pytest.warns(UserWarning, match=f"{path.name} is not as it was written"):
        found = sweep(model, {"top-2": TopK(2)}, DATA, cache=tmp_path)
    pd.testing.assert_frame_equal(found.drop(columns="seconds"), wanted.drop(columns="seconds"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pd.testing.assert_frame_equal(sweep(model, {"top-2": TopK(2)}, DATA, cache=tmp_path), found, check_exact=True)


def test_names_that_are_too_long_for_a_file(tmp_path):
    names = ["x" * 300, "y" * 299 + "/", "≥ 3"]
    frame = sweep(tiny_olmoe(), {name: TopK(2) for name in names}, DATA, cache=tmp_path)
    assert (frame["error"] == "").all() and frame["rule"].unique().tolist() == names
    assert len(list(tmp_path.iterdir())) == 3


def test_a_folder_that_cannot_be_used_is_said_before_computing(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="finished rules cannot be kept in .*file.*: name another cache"):
        sweep(tiny_olmoe(), {"top-2": TopK(2)}, DATA, cache=tmp_path / "file")


# -- damage at random --------------------------------------------------------------------------------------------


@st.composite
def damages(draw):
    """A change of the bytes of a file, as a function: what disks, editors, merges and stopped copies do."""
    place, other = draw(st.floats(0, 1)), draw(st.floats(0, 1))
    junk = draw(st.binary(min_size=1, max_size=8) | st.sampled_from([b"\n", b",", b'"', b"\r\n", b"nan", b"0", b"-"]))

    def at(raw, share):
        return int(share * len(raw))

    def lines(raw):
        return raw.splitlines(keepends=True)

    def line(raw, share):
        return min(int(share * len(lines(raw))), len(lines(raw)) - 1)

    def without(raw):
        return b"".join(lines(raw)[: line(raw, place)] + lines(raw)[line(raw, place) + 1 :])

    def swapped(raw):
        rows = lines(raw)
        i, j = line(raw, place), line(raw, other)
        rows[i], rows[j] = rows[j], rows[i]
        return b"".join(rows)

    def digit(raw):
        found = [i for i, byte in enumerate(raw) if chr(byte).isdigit()]
        i = found[int(place * (len(found) - 1))]
        return raw[:i] + b"%d" % ((raw[i] - 48 + 1 + int(other * 8)) % 10) + raw[i + 1 :]

    return draw(
        st.sampled_from(
            [
                lambda raw: raw[: at(raw, place)],
                lambda raw: raw[at(raw, place) :],
                lambda raw: b"".join(lines(raw)[: line(raw, place)]),
                lambda raw: raw[: at(raw, place)] + junk + raw[at(raw, place) :],
                lambda raw: raw[: at(raw, place)] + junk + raw[at(raw, place) + len(junk) :],
                lambda raw: raw[: at(raw, min(place, other))] + raw[at(raw, max(place, other)) :],
                lambda raw: raw + b"".join(lines(raw)[line(raw, place) :]),
                lambda raw: raw.replace(b"\n", b"\r\n"),
                lambda raw: raw + raw,
                without,
                swapped,
                digit,
                digit,
            ]
        )
    )


@settings(max_examples=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(damages(), min_size=1, max_size=3))
def test_a_damaged_cell_is_never_a_wrong_number(changes, tmp_path):
    path = tmp_path / "top-2-0123.csv"
    write_cell(table(), path)
    raw = path.read_bytes()
    damaged = raw
    for change in changes:
        damaged = change(damaged) if damaged.strip() and any(48 <= byte < 58 for byte in damaged) else damaged
    path.write_bytes(damaged)
    if damaged == raw:
        pd.testing.assert_frame_equal(read_cell(path), table(), check_exact=True)
        return
    with pytest.warns(UserWarning, match="is not as it was written"):
        assert read_cell(path) is None


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(damages(), min_size=2, max_size=2))
def test_a_sweep_over_damaged_cells_is_the_whole_sweep(changes, tmp_path):
    model, rules = tiny_olmoe(num_hidden_layers=1), {"top-1": TopK(1), "top-2": TopK(2), "own": None}
    wanted = sweep(model, rules, DATA, cache=tmp_path)
    for path, change in zip(sorted(tmp_path.iterdir()), changes, strict=False):
        path.write_bytes(change(path.read_bytes()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = sweep(model, rules, DATA, cache=tmp_path)
    pd.testing.assert_frame_equal(found.drop(columns="seconds"), wanted.drop(columns="seconds"), check_exact=True)
