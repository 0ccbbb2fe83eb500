"""From router logits to p-values: a *statistic* of the logits, and a *null* for it, chosen independently.

A p-value maker is an object that is called like a function::

    pvals = TokenGaussian()(router_logits)                    # no calibration
    pvals = load_null("null.safetensors")(router_logits, layer=3)

``pvals`` has the shape of ``router_logits`` ([..., num_experts]), is float32 whatever the dtype of the logits, and is
small where an expert stands out. Three steps are public, so that a rule can skip the one that it does not need:

``statistic_of(router_logits)``
    the statistic, strictly increasing in the logit within one token;
``survival(statistics, layer)``
    the p-value of a statistic, never increasing in it;
``critical_statistics(critical_p, layer)``
    the smallest statistic whose p-value is at most ``critical_p``: where the null is shared by all experts, comparing
    the k-th largest statistic with the k-th critical value makes the decisions of a step-up procedure with no p-value.

What is guaranteed, and what is not. A p-value of a fitted null is valid for a value that is exchangeable with the
calibration sample; the conformal one exactly and at any sample size, the kernel one as far as the density estimate is
right. A router's logits are neither independent between the experts of a token nor identically distributed between
tokens, and "an expert that the model would not select" is defined by the same logits that are tested. The level alpha
is therefore a dial with a meaning under the null that each class states, not a proven false discovery rate. The one
null that is about something measured, what an expert contributes, is `ContributionNull`; it states what is proven.
"""

from bhlib.pvalues.conformal import ConformalNull
from bhlib.pvalues.contribution import ContributionNull
from bhlib.pvalues.fitted import FittedNull, ResolutionWarning
from bhlib.pvalues.kde import KDENull
from bhlib.pvalues.maker import KernelForm, PValueMaker
from bhlib.pvalues.names import NULLS, NullEntry, each_statistic, fitted_nulls, make_pvalues, null_looks
from bhlib.pvalues.statistics import STATISTICS, check_logits, check_temperature, null_values
from bhlib.pvalues.storage import load_null
from bhlib.pvalues.table import TableNull
from bhlib.pvalues.token_nulls import DirichletNull, SoftmaxPseudo, SoftmaxPseudoWarning, TokenGaussian

__all__ = [
    "NULLS",
    "STATISTICS",
    "ConformalNull",
    "ContributionNull",
    "DirichletNull",
    "FittedNull",
    "KDENull",
    "KernelForm",
    "NullEntry",
    "PValueMaker",
    "ResolutionWarning",
    "SoftmaxPseudo",
    "SoftmaxPseudoWarning",
    "TableNull",
    "TokenGaussian",
    "check_logits",
    "check_temperature",
    "each_statistic",
    "fitted_nulls",
    "load_null",
    "make_pvalues",
    "null_looks",
    "null_values",
]
