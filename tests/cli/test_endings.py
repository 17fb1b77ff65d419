"""How a process of the command line ends: what it printed is out, or said not to be, and nobody is cut short."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

LEAVES = """
import atexit, sys, threading, time
from vlm_train.cli.outcome import leave

class Slow:
    def __del__(self):
        print("taken apart")

slow = Slow()
atexit.register(print, "registered")
threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
print("main", end="")
{end}
"""


# what is printed waits in the process for more, as it does for users who send it to a file
BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


def printed(end: str) -> tuple[str, int]:
    """(what a process prints that ends like this, its exit code)."""
    process = subprocess.run([sys.executable, "-c", LEAVES.format(end=end)], capture_output=True, text=True,
                             env=BUFFERED, timeout=60)  # fmt: skip
    assert process.stderr == ""
    return process.stdout, process.returncode


def test_threads_and_what_is_registered_are_waited_for_and_nothing_is_taken_apart() -> None:
    assert printed("leave(3)") == ("mainthread\nregistered\n", 3)
    assert printed("sys.exit(3)") == ("mainthread\nregistered\ntaken apart\n", 3)
    assert printed("import os; os._exit(3)") == ("", 3)  # the twin: cut short


@pytest.mark.parametrize("words", ["--version", "train --help", "configs list"])
def test_output_that_cannot_be_written_is_a_failure(words: str) -> None:
    with open("/dev/full", "w") as full:
        process = subprocess.run([sys.executable, "-m", "vlm_train.cli.main", *words.split()], stdout=full,
                                 stderr=subprocess.PIPE, text=True, env=BUFFERED, timeout=60)  # fmt: skip
    assert process.returncode == 1
    assert "No space left on device" in process.stderr and process.stderr.count("error:") == 1


def test_a_reader_that_has_left_is_no_mishap() -> None:
    command = [sys.executable, "-m", "vlm_train.cli.main", "train", "--help"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=BUFFERED)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(60) == 1
