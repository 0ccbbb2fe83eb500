"""What the package can do from a shell: ``python -m bhlib --help``."""

import argparse

import torch

from bhlib.loading import load_demo, load_heldout


def main(argv: list[str] | None = None) -> None:
    """Parse a command line and run it."""
    parser = argparse.ArgumentParser(prog="python -m bhlib", description="Benjamini–Hochberg routing of OLMoE.")
    commands = parser.add_subparsers(dest="command", required=True)
    figures = commands.add_parser("figures", help="route the embedded model's held-out text and draw every figure")
    figures.add_argument("--folder", default="figures", help="where pictures and tables go (default: figures)")
    figures.add_argument("--only", action="append", metavar="NAME", help="draw this figure only; may be repeated")
    bench = commands.add_parser("bench", help="measure speed on this machine")
    benches = bench.add_subparsers(dest="bench", required=True)
    routing = benches.add_parser("routing", help="nanoseconds per token of top-k, of each null and of each procedure")
    routing.add_argument("--tokens", type=int, default=16_384, help="tokens per call (default: 16384)")
    routing.add_argument("--experts", type=int, default=64, help="experts per layer (default: 64)")
    routing.add_argument("--seconds", type=float, default=0.5, help="time to spend on each row (default: 0.5)")
    routing.add_argument("--csv", metavar="FILE", help="write the table to a file as well")
    experts = benches.add_parser("experts", help="time of the embedded model's experts when it uses fewer of them")
    experts.add_argument("--csv", metavar="FILE", help="write the table to a file as well")
    arguments = parser.parse_args(argv)
    if arguments.command == "figures":
        from bhlib.figures import make_figures  # imports matplotlib, which other commands do not need

        for path in make_figures(arguments.folder, arguments.only):
            print(f"{path.with_suffix('.png')}  {path}")
    elif arguments.command == "bench":
        from bhlib import benchmarks

        if arguments.bench == "routing":
            table = benchmarks.bench_routing(
                arguments.tokens, arguments.experts, min_run_time=arguments.seconds
            )
            print(benchmarks.format_routing(table))
        else:
            model, _ = load_demo()
            sequences = load_heldout("validation", length=512, max_sequences=1)
            table = benchmarks.bench_experts(model, torch.cat(list(sequences.values()))[:8])
            print(benchmarks.format_experts(table))
        if arguments.csv:
            table.to_csv(arguments.csv, index=False)


if __name__ == "__main__":
    main()
