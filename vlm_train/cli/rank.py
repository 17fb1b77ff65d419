"""`python -m vlm_train.cli.rank RUN_DIR [CHECKPOINT]`: what each rank runs. The config was composed before."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

from vlm_train.errors import VlmError
from vlm_train.log import global_rank

PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> int:
    """Trains this rank's share; exit codes as in cli.main."""
    die_with_parent()
    from vlm_train import build

    directory = Path(arguments[0])
    checkpoint = Path(arguments[1]) if len(arguments) > 1 else None
    try:
        build.train(directory, checkpoint)
    except VlmError as error:
        if global_rank() == 0 or error.exit_code < 128:
            print(f"error: [rank {global_rank()}] {error}", file=sys.stderr)
        sys.stderr.flush()
        # other ranks may wait for this one in a collective; tearing the process group down would wait with them
        os._exit(error.exit_code)
    return 0


def die_with_parent() -> None:
    """A killed launcher must not leave ranks that go on writing into its run (Linux)."""
    if sys.platform != "linux" or "VLM_TRAIN_PARENT" not in os.environ:
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ["VLM_TRAIN_PARENT"]):
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
