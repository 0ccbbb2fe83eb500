"""What the package can do from a shell: ``python -m bhlib --help``."""

import argparse


def main(argv: list[str] | None = None) -> None:
    """Parse a command line and run it."""
    parser = argparse.ArgumentParser(prog="python -m bhlib", description="Benjamini–Hochberg routing of OLMoE.")
    commands = parser.add_subparsers(dest="command", required=True)
    figures = commands.add_parser("figures", help="route the embedded model's held-out text and draw every figure")
    figures.add_argument("--folder", default="figures", help="where pictures and tables go (default: figures)")
    figures.add_argument("--only", action="append", metavar="NAME", help="draw this figure only; may be repeated")
    arguments = parser.parse_args(argv)
    if arguments.command == "figures":
        from bhlib.figures import make_figures  # imports matplotlib, which other commands do not need

        for path in make_figures(arguments.folder, arguments.only):
            print(f"{path.with_suffix('.png')}  {path}")


if __name__ == "__main__":
    main()
