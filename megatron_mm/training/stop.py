"""How a run stops when it is told to: all processes at the same step, within the patience of whoever told them."""

from __future__ import annotations

import math

from megatron_mm.platform import stopping
from megatron_mm.platform.collectives import all_agree

#: torchrun, Slurm and Kubernetes kill 30 s after they have told a run to stop; the step in hand takes some of them.
SLOW_SAVE_SECONDS = 25.0


class Stop:
    """The agreement of all processes to stop. In a process that does not take signals (stopping.py) there is none."""

    def __init__(self) -> None:
        self._agreed = False

    def agreed(self) -> bool:
        """Whether any process was told to stop; every process calls this at the same points.

        The first call comes after the first step and before anything is said of it: who reads of a step can rely on a
        signal ending in a checkpoint.
        """
        if stopping.is_installed() and not self._agreed:
            stopping.remember()
            self._agreed = not all_agree(stopping.asked() is None)
            stopping.remembered_by_all()
        return self._agreed


class Patience:
    """Says, once, that saving takes longer than a run is given to stop."""

    def __init__(self) -> None:
        self._said = False

    def lines(self, seconds: float | None) -> list[str]:
        """What to raise, in one line; none for a save that was fast enough, and after the first time.

        Args:
            seconds: that a save took; None: nobody knows.
        """
        if seconds is None or seconds <= SLOW_SAVE_SECONDS or self._said:
            return []
        self._said = True
        wanted = math.ceil(2 * seconds)
        return [
            f"warning: a save took {seconds:.0f} s, and a run that is stopped is killed after 30 s by default; give it "
            f"{wanted} s: torchrun --shutdown-timeout {wanted} (or TORCH_ELASTIC_SHUTDOWN_TIMEOUT={wanted}); "
            f"sbatch --signal=B:USR1@{wanted} (or KillWait of slurm.conf); "
            f"terminationGracePeriodSeconds: {wanted} of Kubernetes"
        ]
