"""`ganscale plan CONFIG... key=value...`: what a run needs on a cluster, without the cluster."""

import argparse
from pathlib import Path

from ganscale.cli.arguments import positive_float, positive_int
from ganscale.errors import UserError


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "plan",
        help="print what a run needs on a cluster of any size, without the cluster",
        description="Prints a run's batches, epochs, bytes read, cache, memory, operations, "
        "traffic and checkpoints on a cluster, from its settings and its data's manifest. If the "
        "run is not possible there, suggests the nearest one that is and exits with code 2.",
    )
    add = parser.add_argument
    add("settings", nargs="+", metavar="CONFIG|key=value")
    add("--nodes", type=positive_int, default=1, metavar="N", help="(default: 1)")
    add("--gpus-per-node", type=positive_int, default=1, metavar="N", help="ranks (default: 1)")
    add(
        "--gpu-memory",
        type=positive_int,
        metavar="GB",
        help="memory of a GPU; a run that does not fit is refused (default: some usual ones)",
    )
    add(
        "--gpu-tflops",
        type=positive_float,
        metavar="N",
        help="trillions of operations per second that a GPU reaches (default: 62, a fifth of an "
        "A100's bfloat16 peak)",
    )
    add("--json", type=Path, metavar="FILE", help="also write the numbers to FILE")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    import json
    from dataclasses import asdict

    from ganscale.config import resolve
    from ganscale.plan.planning import make_plan

    config = resolve(arguments.settings).config
    gpu = arguments.gpu_memory, arguments.gpu_tflops
    plan = make_plan(config, arguments.nodes, arguments.gpus_per_node, *gpu)
    if arguments.json:
        try:
            arguments.json.write_text(json.dumps(asdict(plan), indent=1) + "\n")
        except OSError as error:
            raise UserError(f"the plan cannot be written: {error}") from error
    print(plan.table(), end="")
