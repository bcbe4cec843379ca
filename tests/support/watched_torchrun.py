"""torchrun that also says how its processes have ended, which it does not where a signal has stopped it.

    python -m tests.support.watched_torchrun FILE [what torchrun takes]

FILE becomes JSON: exit status by local rank, negative for a signal.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.run import main

_close = SubprocessContext._close


def _watched(context: SubprocessContext, *words: object, **named: object) -> None:
    handlers = dict(context.subprocess_handlers)
    try:
        _close(context, *words, **named)
    finally:
        ended = {rank: handler.proc.returncode for rank, handler in handlers.items()}
        Path(file).write_text(json.dumps(ended))


if __name__ == "__main__":
    file, *arguments = sys.argv[1:]
    SubprocessContext._close = _watched
    main(arguments)
