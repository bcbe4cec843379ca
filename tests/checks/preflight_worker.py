"""One process of a pre-flight in which the ranks' machines are not alike. Run under torchrun, on four processes.

    preflight_worker.py RECIPE FAULTS       FAULTS: damaged, dies or hangs

Devices are measured by a function given to `preflight.check`, and folders are named to `identity.not_shared`: a fault
changes what a rank's machine would have said. Damaged are: rank 1's products, rank 2's speed and folder, rank 3's sums,
and rank 3's memory is held by someone else. Rank 2 hangs once all have come as far, and the watchdogs lose their
patience only there: how long a machine takes to get so far is no hang.
"""

import os
import sys
import time
from pathlib import Path

from megatron_mm.config.load import load_config
from megatron_mm.config.validate import parallel_sizes
from megatron_mm.platform import setup


def main() -> None:
    """Runs the pre-flight."""
    recipe, faults = sys.argv[1:]
    setup.apply_platform()
    import torch

    from megatron_mm.checks import preflight
    from megatron_mm.checks.preflight import Product
    from megatron_mm.training import identity
    from megatron_mm.training.start import start

    config = load_config(recipe)
    rank = setup.rank()

    def product(device: torch.device) -> Product:
        if faults == "hangs":
            torch.distributed.barrier()
            watchdog.beat("a rank that hangs")
            watchdog.seconds = 10.0
            while rank == 2:
                time.sleep(1.0)
        if faults == "dies" and rank == 2:
            os._exit(9)
        wrong, slow, full = rank == 1, rank == 2, rank == 3
        return Product("a device", 0.014 if slow else 0.010, 200.0, 8 if wrong else 7, 50 if full else 80, 80)

    reduce = torch.distributed.all_reduce

    def damaged(tensor, *args, **kwargs):
        done = reduce(tensor, *args, **kwargs)
        tensor[-1] += 1
        return done

    with setup.reporting_errors():
        sizes = parallel_sizes(config, setup.world_size())
        device, watchdog = start(config, sizes)
        unshared = identity.not_shared(Path(config.logging.output, "elsewhere" if rank == 2 else "there"), seconds=1.0)
        if rank == 0:
            print(*unshared, sep="\n", flush=True)
        if rank == 3:
            torch.distributed.all_reduce = damaged
        preflight.check(config, sizes, device, product, judged=True)
        watchdog.stop()
    setup.shutdown()


if __name__ == "__main__":
    main()
