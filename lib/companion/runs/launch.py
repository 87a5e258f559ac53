"""Make notebook 03's training runs for any model, on one device or on several under accelerate:

    accelerate launch --num_processes 4 -m companion.runs.launch --model meta-llama/Llama-3.1-8B

It says first what they take. Finished runs go to build/runs, where the notebook finds them when it
is run with the same model and dtype. All processes must see that folder.
"""

import argparse
import sys

from backattn import runtime
from companion.runs.estimate import estimate
from companion.runs.plans import complete, main_runs
from companion.runs.store import Store


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="companion.runs.launch", description=__doc__.splitlines()[0])
    p.add_argument("--model", required=True, help="a Hugging Face id, a folder or a packaged name")
    p.add_argument("--dtype", choices=runtime.DTYPES, default="float32", help="of the test")
    p.add_argument("--device", help="where one process trains; default: a GPU if there is one")
    p.add_argument("--source-layer", type=int, default=6)
    p.add_argument("--dim", type=int, default=64, help="d′; other arms get as many weights")
    p.add_argument("--steps", type=int, default=100)
    p.add_argument("--estimate", action="store_true", help="only say what it takes")
    sizes = vars(p.parse_args(argv))
    model, dtype, only_estimate = sizes.pop("model"), sizes.pop("dtype"), sizes.pop("estimate")
    runtime.use_threads()
    world, store = runtime.process_state(), Store()
    device = sizes.pop("device") or str(world.device)
    plan = main_runs(model, tested_in=dtype, **sizes)
    if world.is_main_process:
        try:
            what = estimate(plan, store, device)
        except OSError as error:
            what = f"no estimate could be made ({error})"
        print(f"{model}, tested in {dtype}, on {device}: {what}", flush=True)
    if not only_estimate:
        world.wait_for_everyone()
        complete(plan, store, 1, device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
