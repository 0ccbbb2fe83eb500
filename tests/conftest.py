"""What every test shares: seeds, a drawing backend that opens no window, and how hypothesis searches."""

import os
import random

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import settings

matplotlib.use("Agg")

# "suite" tries the same examples on every run; HYPOTHESIS_PROFILE=explore looks for new ones.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))


@pytest.fixture(autouse=True)
def seeded():
    """Start each test from the same random state, so that its result does not depend on which ran before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
