"""What the package can do from a shell: ``python -m bhlib --help``."""

import argparse

import torch

from bhlib import figures_command, sweep_command, tune_command
from bhlib.loading import load_demo, load_heldout


def main(argv: list[str] | None = None) -> None:
    """Parse a command line and run it."""
    parser = argparse.ArgumentParser(prog="python -m bhlib", description="Benjamini–Hochberg routing of OLMoE.")
    commands = parser.add_subparsers(dest="command", required=True)
    figures = commands.add_parser("figures", help="route held-out text through a model and draw every figure")
    figures_command.add_arguments(figures)
    bench = commands.add_parser("bench", help="measure speed on this machine")
    benches = bench.add_subparsers(dest="bench", required=True)
    routing = benches.add_parser("routing", help="nanoseconds per token of top-k, of each null and of each procedure")
    routing.add_argument("--tokens", type=int, default=16_384, help="tokens per call (default: 16384)")
    routing.add_argument("--experts", type=int, default=64, help="experts per layer (default: 64)")
    routing.add_argument("--seconds", type=float, default=0.5, help="time to spend on each row (default: 0.5)")
    routing.add_argument("--csv", metavar="FILE", help="write the table to a file as well")
    experts = benches.add_parser("experts", help="time of the embedded model's experts when it uses fewer of them")
    experts.add_argument("--csv", metavar="FILE", help="write the table to a file as well")
    call = benches.add_parser("call", help="processor time of the README's call, with the embedded model in one thread")
    call.add_argument("--csv", metavar="FILE", help="write the table to a file as well")
    speed = benches.add_parser("speed", help="a full-size OLMoE on a CUDA device: the call, router, experts, decoding")
    speed.add_argument("--folder", default="figures", help="where speed.csv is, or goes (default: figures)")
    speed.add_argument("--only", action="append", metavar="STAGE", help="measure this stage only; may be repeated")
    speed.add_argument("--quick", action="store_true", help="fewer rounds, fewer things compiled")
    speed.add_argument("--model", metavar="NAME", help="a checkpoint instead of random weights")
    colab = commands.add_parser("colab", help="put the repository's address into badges, set-up cells and links")
    colab.add_argument("address", nargs="?", metavar="OWNER/REPO", help="default: the one in pyproject.toml")
    sweep = commands.add_parser("sweep", help="loss and cost of rules on held-out text, in one process or several")
    sweep_command.add_arguments(sweep)
    tuning = commands.add_parser("tune", help="train a model, or its routers alone, for a mean number of experts")
    tune_command.add_arguments(tuning)
    arguments = parser.parse_args(argv)
    if arguments.command == "figures":
        figures_command.run(arguments)
    elif arguments.command == "colab":
        from bhlib.colab import stamp

        for path in stamp(arguments.address):
            print(path)
    elif arguments.command == "bench" and arguments.bench == "speed":
        from bhlib.speed import bench_speed

        bench_speed(arguments.folder, arguments.only, arguments.quick, arguments.model)
    elif arguments.command == "sweep":
        sweep_command.run(arguments)
    elif arguments.command == "tune":
        tune_command.run(arguments)
    elif arguments.command == "bench":
        from bhlib import benchmarks

        if arguments.bench == "routing":
            table = benchmarks.bench_routing(arguments.tokens, arguments.experts, min_run_time=arguments.seconds)
            print(benchmarks.format_routing(table))
        else:
            model, _ = load_demo()
            documents = torch.cat(list(load_heldout("validation", length=512, max_sequences=1).values()))
            if arguments.bench == "experts":
                table = benchmarks.bench_experts(model, documents[:8])
                print(benchmarks.format_experts(table))
            else:
                table = benchmarks.bench_call(model, documents[:1, :16], documents[:4])
                print(benchmarks.format_call(table))
        if arguments.csv:
            table.to_csv(arguments.csv, index=False)


if __name__ == "__main__":
    main()
