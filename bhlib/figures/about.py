"""What a figure says of the model and the text that it is of, and why a figure may have nothing to say."""

from dataclasses import asdict, dataclass

import pandas as pd

__all__ = ["About", "NotForThisModel", "about_of"]


class NotForThisModel(ValueError):
    """A figure has no meaning for a model; the message says why."""


@dataclass(frozen=True)
class About:
    """A model and its text, as pictures name them.

    Attributes
    ----------
    name : str
        Of the model.
    family : str
        The ``model_type`` of transformers.
    layers, experts, top_k : int
        MoE layers, experts of each, and how many of them the model itself gives to a token.
    text : str
        Name of the text.
    """

    name: str
    family: str
    layers: int
    experts: int
    top_k: int
    text: str

    @property
    def own(self) -> str:
        """What tables call the model's own routing."""
        return f"top-{self.top_k}"

    def line(self) -> str:
        """All of it, for the head of a picture."""
        return (
            f"{self.name} ({self.family}): {self.layers} MoE layers of {self.experts} experts, {self.own}; {self.text}"
        )

    def put_on(self, table: pd.DataFrame) -> pd.DataFrame:
        """The table, which tells `about_of` from here on; its columns and rows stay as they are."""
        table.attrs["about"] = asdict(self)
        return table


#: The embedded model on its held-out text: what a table is of that does not say anything else.
DEMO = About("demo model", "olmoe", 8, 64, 8, "the repository's held-out text")


def about_of(table: pd.DataFrame) -> About:
    """The model and the text that a table is of: those that were put on it, or else the embedded ones."""
    return About(**table.attrs["about"]) if "about" in table.attrs else DEMO
