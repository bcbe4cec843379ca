"""Pretrains a multimodal model: one process, or many under torchrun.

    python pretrain_multimodal.py --config megatron_mm/recipes/synapse-tiny.yaml --train-iters 20
    torchrun --nproc-per-node 4 pretrain_multimodal.py --config … --tensor-model-parallel-size 2 \
        --pipeline-model-parallel-size 2
    torchrun … pretrain_multimodal.py --config … --check
    python pretrain_multimodal.py --config megatron_mm/recipes/synapse-70b.yaml --dry-run --world-size 256

Every field of the recipe can be overridden (--help lists them), by its path or by Megatron's name.
"""

from __future__ import annotations

import sys

from megatron_mm.platform import stopping

#: Words that ask for something other than training, which a signal ends as any program.
_NO_TRAINING = {"--check", "--dry-run", "--dry_run", "--help", "-h"}


def main() -> None:
    """Parses, trains, and reports an error once."""
    if not _NO_TRAINING & set(sys.argv):
        stopping.install()  # before the imports, which take seconds
    from megatron_mm.config.load import fail, parse_command_line
    from megatron_mm.config.outputs import check_file, figures
    from megatron_mm.config.validate import check, check_device, parallel_sizes
    from megatron_mm.platform import setup
    from megatron_mm.training import run_folder

    config, verbs = parse_command_line()
    try:
        sizes = parallel_sizes(config, (verbs.dry_run and config.parallel.world_size) or setup.world_size())
        check(config, sizes)
        if verbs.dry_run:  # which plans for other machines
            check_file(verbs.dry_run_json, "dry_run_json", figures("stages"))
        else:
            check_device(config, setup.computing_device())
            if setup.rank() == 0:  # which writes there, perhaps before another process looks
                run_folder.check(config, measures=verbs.check)
    except ValueError as error:
        fail(str(error), status=2)
    with setup.reporting_errors():
        if verbs.dry_run:
            from megatron_mm.planner.dry_run import run_from_command_line

            run_from_command_line(config, verbs.dry_run_json)
            return
        setup.apply_platform()  # before anything of megatron-core is imported
        if verbs.check:
            from megatron_mm.checks import preflight

            preflight.run_from_command_line(config, sizes)
        else:
            from megatron_mm.training.loop import Trainer

            Trainer(config, sizes).run()
        setup.shutdown()


if __name__ == "__main__":
    main()
