"""Real runs that read their tars from front to back: what docs/data.md promises of streaming, and what it does not."""

from __future__ import annotations

import functools
import gzip
import http.server
import json
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import _runs
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))
from data_fixtures import zstd

DDP = ("trainer.devices=2", "strategy=ddp")
MICRO = ("trainer.micro_batch=9",)
NUM_STEPS = 24


def words(data: Path, run: Path, shards: object, *extra: str, max_steps: int = NUM_STEPS) -> list[str]:
    stream = ("data.streaming=true", "data.epoch_end=wrap", "data.shuffle_buffer=50", f"data.train.shards={shards}")
    return _runs.train_words(
        data, *stream, f"trainer.max_steps={max_steps}", "checkpoint.every_steps=5", f"run.dir={run}", *extra
    )


def listed(*locations: object) -> str:
    return "[" + ",".join(f'"{location}"' for location in locations) + "]"


def split(tar: Path, folder: Path, num_shards: int) -> list[Path]:
    """The members of a tar in several, no sample cut apart."""
    with tarfile.open(tar) as whole:
        members = [(member, whole.extractfile(member)) for member in whole.getmembers()]
        keys = sorted({member.name.partition(".")[0] for member, _ in members})
        shards = [folder / f"{number:05d}.tar" for number in range(num_shards)]
        for number, shard in enumerate(shards):
            mine = set(keys[number * len(keys) // num_shards : (number + 1) * len(keys) // num_shards])
            with tarfile.open(shard, "w") as part:
                for member, content in members:
                    if member.name.partition(".")[0] in mine:
                        part.addfile(member, content)
    return shards


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> list[Path]:
    """The training split in three tars, the second also packed by gzip and the third by zstd, under names of their
    own."""
    folder = tmp_path_factory.mktemp("tars")
    shards = split(scenes / "train" / "00000.tar", folder, 3)
    (folder / "1.tar.gz").write_bytes(gzip.compress(shards[1].read_bytes()))
    (folder / "2.tar.zst").write_bytes(zstd(shards[2].read_bytes()))
    return shards


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory, tars: list[Path]) -> str:
    """Three tars: one with a picture that has a hole and a header that is damaged, one that breaks off, one joined from
    two."""
    folder = tmp_path_factory.mktemp("damaged")
    content = bytearray(tars[0].read_bytes())
    picture = content.index(b"\x89PNG", len(content) // 2)
    content[picture + 60 : picture + 200] = bytes(140)
    header = content.rindex(b".png\0") // 512 * 512
    content[header : header + 512] = b"Z" * 512
    (folder / "0.tar").write_bytes(content)
    (folder / "1.tar.gz").write_bytes(gzip.compress(tars[1].read_bytes())[:-9000])
    (folder / "2.tar").write_bytes(tars[2].read_bytes() + tars[0].read_bytes()[: 512 * 40] + bytes(1024))
    return listed(*sorted(folder.iterdir()))


class _NoRanges(http.server.SimpleHTTPRequestHandler):
    """Python's own server of files: it gives whole files only. `broken.tar` breaks off in the middle."""

    def do_GET(self) -> None:
        if not self.path.startswith("/broken.tar"):
            super().do_GET()
            return
        content = (Path(self.directory) / "00000.tar").read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])

    def log_message(self, *args: object) -> None:
        pass


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:  # who asks hangs up when it has enough
        pass


@pytest.fixture
def served(tars: list[Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server without ranges that gives the tars."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with _Server(("127.0.0.1", 0), functools.partial(_NoRanges, directory=str(tars[0].parent))) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def bad_samples(run: Path) -> list[dict[str, object]]:
    path = run / "data_errors.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.slow
def test_plain_packed_and_served_tars_teach_the_same(
    tmp_path: Path, scenes: Path, tars: list[Path], served: str
) -> None:
    """Workers change nothing either. The control mixes fewer samples."""
    packed = ("00000.tar", "1.tar.gz", "2.tar.zst")
    runs = {
        "plain": (listed(*tars),),
        "packed": (listed(*(tars[0].parent / name for name in packed)), "data.num_workers=2"),
        "served": (listed(*(f"http://{served}/{name}" for name in packed)), "data.num_workers=1"),
        "other": (listed(*tars), "data.shuffle_buffer=10"),
    }
    for name, (shards, *extra) in runs.items():
        _runs.call(tmp_path, words(scenes, tmp_path / name, shards, *extra))
    learned = {name: _runs.learned(tmp_path / name) for name in runs}
    assert learned["plain"] == learned["packed"] == learned["served"] != learned["other"]
    assert [row["step"] for row in _runs.rows(tmp_path / "plain")] == list(range(1, NUM_STEPS + 1))
    assert not any(bad_samples(tmp_path / name) for name in runs)


@pytest.mark.slow
@pytest.mark.parametrize(("machine", "kills"), [(MICRO, (3, 17)), ((*DDP, *MICRO), (17,))], ids=["one", "two"])
def test_a_killed_stream_tells_the_story_of_an_untouched_one(
    tmp_path: Path, scenes: Path, damaged: str, machine: tuple[str, ...], kills: tuple[int, ...]
) -> None:
    """Over damaged tars, in micro-batches and with workers: losses and bad samples, in the first epoch and the
    second."""
    untouched, killed = tmp_path / "untouched", tmp_path / "killed"
    machine = (*machine, "data.num_workers=2")
    _runs.call(tmp_path, words(scenes, untouched, damaged, *machine))
    for step in kills:
        _runs.kill_after(tmp_path, words(scenes, killed, damaged, *machine), killed, step)
    assert "resuming" in _runs.call(tmp_path, words(scenes, killed, damaged, *machine))
    assert _runs.learned(killed) == _runs.learned(untouched)
    assert [row["step"] for row in _runs.rows(killed)] == list(range(1, NUM_STEPS + 1))
    errors = bad_samples(untouched)
    assert {error["reason"] for error in errors} >= {"image_corrupt", "bad_header", "truncated"}
    assert len([error for error in errors if error["reason"] == "truncated"]) >= 2  # once an epoch
    assert bad_samples(killed) == errors
    if machine == MICRO:
        _runs.call(tmp_path, words(scenes, tmp_path / "other", damaged, *machine, "seed=1"))  # the twin
        assert _runs.learned(tmp_path / "other") != _runs.learned(untouched)


@pytest.mark.slow
def test_one_process_two_processes_and_micro_batches_learn_the_same(tmp_path: Path, scenes: Path, damaged: str) -> None:
    """fp64, up to rounding; the bad samples are the same too."""
    losses, errors = {}, {}
    for name, machine in {"one": (), "two": DDP, "micro": MICRO}.items():
        _runs.call(tmp_path, words(scenes, tmp_path / name, damaged, "precision=fp64", *machine, max_steps=12))
        losses[name], errors[name] = _runs.losses(tmp_path / name), bad_samples(tmp_path / name)
    assert losses["two"] == pytest.approx(losses["one"], abs=1e-12)
    assert losses["micro"] == pytest.approx(losses["one"], abs=1e-12)
    assert len(set(losses["one"])) == 12
    assert errors["two"] == errors["micro"] == errors["one"] != []


def test_a_shard_that_cannot_be_read_or_breaks_off_is_recorded_and_passed_over(
    tmp_path: Path, scenes: Path, served: str
) -> None:
    run = tmp_path / "run"
    address = f"http://user:5ecret@{served}"
    shards = listed(*(f"{address}/{name}?X-Amz-Signature=5ecret" for name in ("00001.tar", "none.tar", "broken.tar")))
    printed = _runs.call(tmp_path, words(scenes, run, shards))
    assert len(_runs.rows(run)) == NUM_STEPS
    told = {(error["shard"], error["reason"]) for error in bad_samples(run)}
    assert told == {("none.tar", "shard_unreadable"), ("broken.tar", "truncated")}
    assert "none.tar cannot be read" in printed and "broken.tar breaks off" in printed
    texts = {path.name: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "config.yaml"}
    assert {"report.html", "data_errors.jsonl"} < texts.keys()
    assert "5ecret" not in printed and [name for name, text in texts.items() if b"5ecret" in text] == []


def test_tars_without_one_usable_sample_end_the_run(tmp_path: Path, scenes: Path, served: str) -> None:
    (tmp_path / "garbage.tar").write_bytes(b"Z" * 5000)
    shards = listed(tmp_path / "garbage.tar", f"http://{served}/none.tar")
    printed = _runs.call(tmp_path, words(scenes, tmp_path / "run", shards), expect=2)
    assert "no usable sample" in printed and "garbage.tar (start): bad_header" in printed and "Traceback" not in printed
