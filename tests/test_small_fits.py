"""What the explorer fits on a little text, for a model that is not the demo: once, with a note, of this model."""

from contextlib import contextmanager

import pytest
from models import tiny_olmoe

from bhlib import load_demo
from bhlib.pvalues import ContributionNull, KDENull
from bhlib.small_fits import PER_DOCUMENT, SmallFits


@pytest.fixture(scope="module")
def tokenizer():
    return load_demo()[1]


def small(tokenizer, notes, **changes):
    @contextmanager
    def note(words):
        notes.append(words)
        yield

    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "vocab_size": len(tokenizer)}
    return SmallFits(tiny_olmoe(**size | changes), tokenizer, note)


def test_everything_is_fitted_once_and_said_once(tokenizer):
    fits = small(tokenizer, notes := [])
    for _ in range(2):
        kde, null, means = fits.null("kde"), fits.null("contribution"), fits.compensation()
    assert isinstance(kde, KDENull) and isinstance(null, ContributionNull) and means.rank == 0
    assert fits.null("kde") is kde and fits.null("contribution") is null and fits.compensation() is means
    subjects = ("the kde null of log_prob", "the contribution null", "what stands in for experts")
    assert notes == [f"fitting {subject} on calibration text" for subject in subjects]
    for fitted in (kde, null, means):
        assert fitted.num_layers == 2 and fitted.num_experts == 64


def test_documents_are_the_units_of_contributions(tokenizer):
    fits = small(tokenizer, [])
    null, seen = fits.null("contribution", max_k=4), fits._contributions
    assert null.header["max_k"] == 4 and null.smallest_sample == len(set(seen.units)) > 50
    assert seen.r.shape[1] == null.smallest_sample * PER_DOCUMENT and seen.positions.max() == PER_DOCUMENT - 1


def test_a_map_has_no_larger_rank_than_the_model_has_dimensions(tokenizer):
    assert small(tokenizer, []).compensation(16).rank == 8
