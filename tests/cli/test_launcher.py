"""What the launcher of ranks says of how they ended, and what becomes of a signal that no rank can hear any more."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from vlm_train.cli import launcher
from vlm_train.errors import VlmError

ENDS = """
import os, sys, time
word = sys.argv[1 + int(os.environ["RANK"])]
if word == "wait":
    time.sleep(600)
code = int(word)
if code < 0:
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module whose ranks end with the codes that they are given, or by the signals."""
    (tmp_path / "ends.py").write_text(ENDS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "ends"


@pytest.mark.parametrize(
    ("codes", "said"),
    [
        ([0], 0),
        ([3], 3),
        ([-signal.SIGTERM], 128 + signal.SIGTERM),  # before the rank could save
        ([0, -signal.SIGUSR1], 128 + signal.SIGUSR1),
        ([-signal.SIGTERM, 4], 4),  # who knows more is believed
    ],
)
def test_the_exit_code_says_how_ranks_ended(module: str, codes: list[int], said: int) -> None:
    assert launcher.launch([str(int(code)) for code in codes], len(codes), module=module) == said


def test_a_signal_that_no_rank_hears_is_the_launchers(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a sweep would start its next run. The twin comes while the rank is alive, and is the rank's alone."""
    heard: list[int] = []
    previous = signal.signal(signal.SIGUSR2, lambda signum, frame: heard.append(signum))
    plain = launcher._wait
    try:
        for is_late in (True, False):
            heard.clear()

            def wait(ranks: list, is_late: bool = is_late) -> int:
                code = plain(ranks) if is_late else 0
                os.kill(os.getpid(), signal.SIGUSR2)
                return code or plain(ranks)

            monkeypatch.setattr(launcher, "_wait", wait)
            code = launcher.launch(["0"], 1, module=module)
            assert (code, heard) == ((0, [signal.SIGUSR2]) if is_late else (128 + signal.SIGUSR2, []))
    finally:
        signal.signal(signal.SIGUSR2, previous)


@pytest.mark.parametrize(
    ("codes", "told"),
    [([-signal.SIGKILL], "rank 0"), ([1, -signal.SIGKILL], "rank 1"), ([75, -signal.SIGKILL], None)],
)
def test_a_rank_that_was_killed_is_named_unless_another_knows_why(
    module: str, codes: list[int], told: str | None
) -> None:
    words = [str(int(code)) for code in codes]
    if told is None:
        assert launcher.launch(words, len(codes), module=module) == 75
        return
    with pytest.raises(VlmError, match=f"{told} was ended by SIGKILL"):
        launcher.launch(words, len(codes), module=module)


@pytest.mark.parametrize("codes", [["wait", "3"], ["3", "wait"]])
def test_whichever_rank_ends_the_others_do_not_wait_for_it(
    module: str, codes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that is killed before ranks have met: the others would wait in the meeting for half an hour."""
    monkeypatch.setattr(launcher, "FAIL_SECONDS", 0.2)
    assert launcher.launch(codes, 2, module=module) == 3
