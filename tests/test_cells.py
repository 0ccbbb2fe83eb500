"""Finished cells: read back to the bit, or computed again, whatever has become of the file."""

import warnings
from functools import cache

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import tiny_olmoe, tokens

from bhlib.cells import read_cell, write_cell
from bhlib.evaluation import evaluate, sweep
from bhlib.rules import TopK

DATA = {"a": tokens(4, 12, seed=1), 'b, "c"': tokens(5, 12, seed=2)}


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
