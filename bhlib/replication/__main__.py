"""Measure a replicate, or gather the tables of all: see the package."""

import argparse
from pathlib import Path

from bhlib.replication.evaluate import TABLES, evaluate_model
from bhlib.replication.gather import gather


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bhlib.replication", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    evaluate = commands.add_parser("evaluate", help="measure a trained model")
    evaluate.add_argument("name", help="in bhlib/replication/models.py")
    evaluate.add_argument("folder", type=Path, help="of the model")
    evaluate.add_argument("out", type=Path, help="OUT/NAME gets the tables")
    evaluate.add_argument("--tables", nargs="+", metavar="TABLE", choices=TABLES, default=TABLES, help="those to make")
    evaluate.add_argument("--sequences", type=int, help="of each domain and split, for a first look")
    together = commands.add_parser("gather", help="tables of all models, for the figures")
    together.add_argument("out", type=Path)
    together.add_argument("figures", type=Path)
    given = parser.parse_args(arguments)
    if given.command == "evaluate":
        made = evaluate_model(given.name, given.folder, given.out, given.sequences, tables=given.tables)
    else:
        made = gather(given.out, given.figures)
    print(", ".join(made) or "nothing was left to do")


if __name__ == "__main__":
    main()
