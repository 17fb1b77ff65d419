"""`vlm-train watch RUN`: a run while it trains, drawn again every two seconds; from its files, without torch."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from vlm_train.cli.terminal import can_redraw, terminal_of
from vlm_train.errors import ConfigError

if TYPE_CHECKING:
    from vlm_train.cli.watched import Reader, View

USAGE = """usage: vlm-train watch RUN [--once]

  vlm-train watch runs/quickstart/latest          until the run ends, or Ctrl-C, which ends the watching alone
  vlm-train watch runs/quickstart/latest --once   one picture

Loss, speed, time left, where time goes, scores, the newest checkpoint, what happened last, and whether the run is
alive. A run whose job has not begun is waited for. Into a file or a pipe: a line every 30 seconds.

Exit code: 0 the run is finished, 1 it ended otherwise: stopped, failed or killed; 130 Ctrl-C. With --once always 0."""
DRAW_SECONDS, LINE_SECONDS = 2.0, 30.0


def main(words: list[str]) -> int:
    """Runs the verb."""
    if not words or any(word in ("-h", "--help") for word in words):
        print(USAGE)
        return 0
    path, once = parsed(words)
    from vlm_train.cli.watched import Reader, submission
    from vlm_train.engine.rundir import RunDirectory

    run = RunDirectory(path)
    if not run.config.is_file() and submission(run) is None:
        raise ConfigError(f"{path} is no run", got=f"RUN={path}",
                          allowed="a folder with config.yaml, or one that vlm-train submit made",
                          remedy="vlm-train watch runs/quickstart/latest")  # fmt: skip
    reader = Reader(run)
    if once:
        _draw_once(reader)
        return 0
    return _draw(reader) if can_redraw(sys.stdout) else _tell(reader)


def parsed(words: list[str]) -> tuple[str, bool]:
    """(the run, whether one picture is enough). Raises ConfigError."""
    rest = [word for word in words if word != "--once"]
    if len(rest) != 1 or rest[0].startswith("-"):
        raise ConfigError("vlm-train watch takes one run", got=" ".join(words), allowed="RUN [--once]",
                          remedy="vlm-train watch runs/quickstart/latest")  # fmt: skip
    return rest[0], "--once" in words


def _draw_once(reader: Reader) -> None:
    from vlm_train.cli.frame import frame

    print("\n".join(frame(reader.look(), terminal_of(sys.stdout))))


def _draw(reader: Reader) -> int:
    """On the terminal's second screen, so that what stood there comes back. Returns the exit code."""
    from vlm_train.cli.frame import frame

    code, lines = 130, []
    print("\x1b[?1049h\x1b[?25l", end="")
    try:
        while True:
            view = reader.look()
            lines = frame(view, terminal_of(sys.stdout))
            print("\x1b[H" + "\n".join(f"{line}\x1b[K" for line in lines) + "\x1b[J", end="", flush=True)
            if view.is_over:
                code = _exit_code(view)
                break
            time.sleep(DRAW_SECONDS)
    except KeyboardInterrupt:
        pass
    finally:
        print("\x1b[?25h\x1b[?1049l", end="")
    print("\n".join(lines))
    return code


def _tell(reader: Reader) -> int:
    from vlm_train.cli.frame import summary

    while True:
        view = reader.look()
        print(summary(view), flush=True)
        if view.is_over:
            return _exit_code(view)
        time.sleep(LINE_SECONDS)


def _exit_code(view: View) -> int:
    return 0 if view.status == "finished" else 1
