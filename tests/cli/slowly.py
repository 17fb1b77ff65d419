"""The command line with a pause before each part of a manifest is written, so that a test can kill it in between."""

from __future__ import annotations

import sys
import time


def main() -> None:
    from vlm_train.cli.main import main as command
    from vlm_train.curation import columns

    plain = columns.write_whole

    def slow(path: object, content: object) -> None:
        time.sleep(0.3)
        plain(path, content)  # type: ignore[arg-type]

    columns.write_whole = slow  # type: ignore[assignment]
    sys.exit(command(sys.argv[1:]))
