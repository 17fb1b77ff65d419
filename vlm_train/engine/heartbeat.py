"""Where each rank of this machine is, told to other processes: one page of shared memory a rank.

A rank writes into it at every border between two kinds of work, a fraction of a microsecond each time; the watchdog and
`vlm-train watch` read it, and what a killed process had done by its end stays there for the next one. It lies in
/dev/shm, which no full or slow disk can hold up; where there is none, in the run directory.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vlm_train.errors import VlmError

ACCOUNTS = (
    "startup", "compile", "data_wait", "host_to_device", "compute", "optimizer", "communication", "validation",
    "checkpoint", "replay", "overhead",
)  # fmt: skip
"""What a second of a process is booked to; `ledger.py` says what each means."""

EXIT_HANG = os.EX_TEMPFAIL
"""75: the run stood still and was ended from outside; the same command goes on with it, so it may be queued again."""

_SHARED_MEMORY = Path("/dev/shm")
_SIZE = mmap.PAGESIZE
_MAGIC = b"vlmbeat1"
_HEAD = struct.Struct("<8sqqqqd")  # magic, process, its ticks, rank, life, when it began
_ORDER_AT = _HEAD.size
_ORDER = struct.Struct("<q")
_POSITION_AT = _ORDER_AT + _ORDER.size
_POSITION = struct.Struct("<qqd16s")  # step, account, time on the machine's monotonic clock, collective
_SECONDS_AT = _POSITION_AT + _POSITION.size
_SECOND = struct.Struct("<d")
_SECONDS = struct.Struct(f"<{len(ACCOUNTS)}d")


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """What a rank last told.

    `process`, `ticks`: its id and when that was given; `life`, `began`: as in `ledger.py`; `step`: that it works on,
    from 1, 0 where it is at none; `account`: what with; `moved`: when it got there, on `time.monotonic`; `collective`:
    the exchange with other ranks that it waits in, empty where it does not; `seconds`: booked so far.
    """

    process: int
    ticks: int
    rank: int
    life: int
    began: float
    step: int
    account: str
    moved: float
    collective: str
    seconds: dict[str, float]

    @property
    def is_running(self) -> bool:
        """Whether its process is there, and not another one that got its id."""
        return ticks_of(self.process) == self.ticks


class Heartbeat:
    """The page of this rank. `order` may be read by the rank and set by the watchdog.

    Args:
        path: the page; an old one is overwritten.
        rank: this process among the ranks.
        life, began: as in `ledger.py`.
    """

    def __init__(self, path: Path, *, rank: int, life: int, began: float) -> None:
        self.path = path
        self._ended = threading.Event()
        self._page = _map(path, fresh=True)
        self._page[: _HEAD.size] = _HEAD.pack(_MAGIC, os.getpid(), ticks_of(os.getpid()) or 0, rank, life, began)

    def move(self, step: int, account: int, collective: bytes = b"") -> None:
        """The rank has come to another kind of work; `account`: its place in ACCOUNTS."""
        _POSITION.pack_into(self._page, _POSITION_AT, step, account, time.monotonic(), collective)

    def book(self, account: int, seconds: float) -> None:
        """An account's total."""
        _SECOND.pack_into(self._page, _SECONDS_AT + account * _SECOND.size, seconds)

    def obey(self) -> None:
        """From now on this process ends with EXIT_HANG soon after the watchdog has told it to, whatever it waits for
        outside the interpreter."""
        threading.Thread(target=self._obey, name="heartbeat", daemon=True).start()

    def _obey(self) -> None:
        while not self._ended.wait(0.5):
            self.end_if_told()

    def end_if_told(self) -> None:
        """Ends this process with EXIT_HANG if the watchdog has told it to."""
        if _ORDER.unpack_from(self._page, _ORDER_AT) != (0,):
            os._exit(EXIT_HANG)

    def remove(self) -> None:
        """The run has ended as it should: nobody needs the page."""
        self._ended.set()
        self.path.unlink(missing_ok=True)
        with suppress(OSError):  # another rank's page is there yet
            self.path.parent.rmdir()


def folder_of(run: Path) -> Path:
    """Where the pages of a run's ranks lie on this machine; the same for every process of this user."""
    if not _SHARED_MEMORY.is_dir():
        return run / ".heartbeats"
    name = hashlib.sha256(os.fsencode(run.resolve())).hexdigest()[:16]
    return _SHARED_MEMORY / f"vlm-train-{os.getuid()}-{name}"


def page_of(run: Path, rank: int) -> Path:
    """The page of one rank. Makes its folder. Raises VlmError where another user has taken the name."""
    folder = folder_of(run)
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise VlmError(f"{folder} belongs to somebody else", remedy="remove it, or choose another run.dir")
    return folder / f"rank-{rank}"


def read_beat(path: Path) -> Beat | None:
    """What a page tells; None where there is none, or none yet."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    if len(content) != _SIZE or not content.startswith(_MAGIC):
        return None
    _, process, ticks, rank, life, began = _HEAD.unpack_from(content)
    step, account, moved, collective = _POSITION.unpack_from(content, _POSITION_AT)
    seconds = dict(zip(ACCOUNTS, _SECONDS.unpack_from(content, _SECONDS_AT), strict=True))
    return Beat(process=process, ticks=ticks, rank=rank, life=life, began=began, step=step,
                account=ACCOUNTS[account], moved=moved, collective=collective.rstrip(b"\0").decode(),
                seconds=seconds)  # fmt: skip


def read_beats(run: Path) -> list[Beat]:
    """Of every rank of this machine whose process is there, by rank."""
    paths = folder_of(run).glob("rank-*[0-9]")
    beats = (beat for path in paths if (beat := read_beat(path)) is not None)
    return sorted((beat for beat in beats if beat.is_running), key=lambda beat: beat.rank)


def ticks_of(process: int) -> int | None:
    """When a process began, in the system's ticks since it was started; None where there is none, or not Linux."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return None


def order_end(path: Path) -> None:
    """Tells the rank of a page to end."""
    page = _map(path, fresh=False)
    _ORDER.pack_into(page, _ORDER_AT, 1)
    page.close()


def _map(path: Path, *, fresh: bool) -> mmap.mmap:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | (os.O_TRUNC if fresh else 0), 0o600)
    try:
        os.posix_fallocate(descriptor, 0, _SIZE)  # a page without memory behind it would end the process when written
        return mmap.mmap(descriptor, _SIZE)
    finally:
        os.close(descriptor)
