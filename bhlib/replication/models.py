"""The models that results are repeated on: how each was trained, and what it is called in tables."""

from dataclasses import dataclass

#: Steps of the demo's training, and of most others.
STEPS, PART = 5558, 1000

#: Shares of the training after which the routers' logits are kept, where router saturation is looked at.
SNAPSHOTS = "0.01 0.02 0.05 0.1 0.2 0.4 0.6 0.8 1"


@dataclass(frozen=True)
class Replicate:
    """A model that is trained by `bhlib/demo/train.py`.

    Attributes
    ----------
    label : str
        What figures call it: how it differs from the demo.
    arguments : str
        Of the script, beside those for folders.
    """

    label: str
    arguments: str

    def command(self, name: str) -> str:
        """The command that trains it."""
        folders = f"--corpus .corpus --out OUT/{name} --checkpoint /tmp/checkpoint-{name}"
        return f"python bhlib/demo/train.py {folders} {self.arguments}"


REPLICATES = {
    "demo": Replicate("demo", f"--steps {STEPS}"),
    "seed2": Replicate("seed 2", f"--seed 2 --steps {STEPS} --snapshots {SNAPSHOTS}"),
    "seed3": Replicate("seed 3", f"--seed 3 --steps {STEPS} --snapshots {SNAPSHOTS}"),
    "small": Replicate("6 M", f"--seed 4 --steps {PART} --hidden 96 --width 32"),
    "large": Replicate("113 M", "--seed 5 --steps 600 --hidden 512 --width 128"),
    "deep": Replicate("16 layers", "--seed 6 --steps 700 --layers 16"),
    "balance": Replicate("load balance 0.1", f"--seed 7 --steps {PART} --load-balance 0.1"),
    "norm_topk": Replicate("norm_topk_prob", f"--seed 8 --steps {PART} --norm-topk-prob"),
    "norm_topk128": Replicate(
        "norm_topk_prob, 128 experts", f"--seed 11 --steps {PART} --norm-topk-prob --experts 128"
    ),
    "experts128": Replicate("128 experts", f"--seed 9 --steps {PART} --experts 128"),
    "experts16": Replicate("16 experts, top 2", f"--seed 10 --steps {PART} --experts 16 --top-k 2 --width 256"),
}
