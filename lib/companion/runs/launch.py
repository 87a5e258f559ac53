"""Make notebook 03's training runs for any model, on one device or on several under accelerate:

    accelerate launch --num_processes 4 -m companion.runs.launch --model meta-llama/Llama-3.1-8B --dtype bfloat16

It says first what they take. Finished runs are kept in build/runs, where the notebook finds them when it is run with
the same model and dtype. All processes must see that folder.
"""

import argparse
import os
import sys

from backattn import runtime
from companion.runs.estimate import estimate
from companion.runs.plans import complete, main_runs
from companion.runs.store import Store


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="companion.runs.launch", description="Training runs of notebook 03 for any model."
    )
    p.add_argument(
        "--model",
        required=True,
        metavar="NAME",
        help="a Hugging Face id, a folder or a name of load_model",
    )
    p.add_argument(
        "--dtype",
        choices=runtime.DTYPES,
        default="float32",
        help="of the test (training is in bfloat16)",
    )
    p.add_argument(
        "--device", metavar="D", help="where one process trains; default: a GPU where there is one"
    )
    p.add_argument("--source-layer", type=int, default=6)
    p.add_argument(
        "--dim",
        type=int,
        default=64,
        help="d′ of back attention; the other arms get as many weights",
    )
    p.add_argument("--steps", type=int, default=100)
    p.add_argument("--estimate", action="store_true", help="only say what it takes")
    arguments = p.parse_args(argv)
    os.environ[runtime.DTYPE] = arguments.dtype
    runtime.use_threads()
    world = runtime.process_state()
    device = arguments.device or str(world.device)
    sizes = {"source_layer": arguments.source_layer, "dim": arguments.dim, "steps": arguments.steps}
    store = Store()
    if world.is_main_process:
        try:
            what = estimate(arguments.model, store, device, **sizes)
        except OSError as error:
            what = f"no estimate could be made ({error})"
        print(f"{arguments.model}, tested in {arguments.dtype}, on {device}: {what}", flush=True)
    if not arguments.estimate:
        world.wait_for_everyone()
        complete(lambda own: main_runs(own, arguments.model, **sizes), store, 1, device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
