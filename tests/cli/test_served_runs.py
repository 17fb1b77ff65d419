"""Real runs whose shards lie on a server that dies in the middle: what is learned is what local files teach."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import _runs
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))
from servers import S3, Nginx

NUM_STEPS = 40


def words(data: Path, run: Path, shards: object, *extra: str) -> list[str]:
    common = (f"trainer.max_steps={NUM_STEPS}", "checkpoint.every_steps=1000", f"run.dir={run}")
    return _runs.train_words(data, *common, f"data.train.shards={shards}", *extra)


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Indexes and cached shards of the server go to the test's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> str:
    """What the run over local files learns."""
    folder = tmp_path_factory.mktemp("local")
    _runs.call(folder, words(scenes, folder / "run", scenes / "train"))
    return _runs.learned(folder / "run")


class _Web:
    """A folder behind nginx."""

    def __init__(self, folder: Path, home: Path) -> None:
        self.server = Nginx(folder, home)
        names = sorted(path.name for path in folder.glob("*.tar"))
        self.shards = "[" + ",".join(f"{self.server.url}/{name}" for name in names) + "]"
        self.start, self.stop = self.server.start, self.server.kill


class _Bucket:
    """The same folder in a bucket, behind moto."""

    def __init__(self, folder: Path, server: S3) -> None:
        server.put("shards", {f"train/{path.name}": path.read_bytes() for path in sorted(folder.glob("*.tar"))})
        self.shards = "s3://shards/train/*.tar"
        self.start, self.stop = server.start, server.stop


@contextlib.contextmanager
def served(kind: str, folder: Path, home: Path) -> Iterator[_Web | _Bucket]:
    """The shards of a folder on a server that runs."""
    if kind == "s3":
        with S3() as server:
            yield _Bucket(folder, server)
        return
    web = _Web(folder, home)
    with web.server:
        yield web


def run_through_an_outage(
    folder: Path, command: list[str], server: _Web | _Bucket, seconds: float
) -> tuple[int, str, bool]:
    """Trains; the server is gone for `seconds` from step 3 on. Returns the exit code, what was printed, and whether the
    run stood still during the second half of the outage, when what had been read before was used up."""
    run = Path(next(word for word in command if word.startswith("run.dir=")).partition("=")[2])
    with open(folder / "log.txt", "w") as log:
        process = _runs.start(folder, command, stdout=log, stderr=subprocess.STDOUT)
        try:
            while _runs.last_step(run) < 3 and process.poll() is None:
                time.sleep(0.002)
            assert process.poll() is None, (folder / "log.txt").read_text()
            server.stop()
            time.sleep(seconds / 2)
            half_way = _runs.last_step(run)
            time.sleep(seconds / 2)
            waited = process.poll() is None and _runs.last_step(run) == half_way < NUM_STEPS
            server.start()
            code = process.wait(timeout=120)
        finally:
            process.kill()
            process.wait()
    return code, (folder / "log.txt").read_text(), waited


def training_errors(run: Path) -> list[dict[str, object]]:
    path = run / "data_errors.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in rows if row["split"] == "train" and row["step"] > 0]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "seconds"), [("http", 10.0), ("s3", 6.0)])
def test_an_outage_changes_nothing(tmp_path: Path, scenes: Path, local: str, kind: str, seconds: float) -> None:
    run = tmp_path / "run"
    with served(kind, scenes / "train", tmp_path / "nginx") as server:
        command = words(scenes, run, server.shards, "data.cache_gb=0")
        code, printed, waited = run_through_an_outage(tmp_path, command, server, seconds)
    assert code == 0, printed
    assert waited and "does not answer" in printed and "answers again" in printed  # so the outage was met
    assert _runs.learned(run) == local and len(_runs.rows(run)) == NUM_STEPS
    assert training_errors(run) == []


@pytest.mark.slow
def test_twin_without_patience_the_outage_is_seen(tmp_path: Path, scenes: Path, local: str) -> None:
    run = tmp_path / "run"
    with served("http", scenes / "train", tmp_path / "nginx") as server:
        command = words(scenes, run, server.shards, "data.cache_gb=0", "data.retry_seconds=1")
        code, printed, _ = run_through_an_outage(tmp_path, command, server, 6.0)
    assert code == 2 or training_errors(run), printed
    assert "Traceback" not in printed
    assert _runs.learned(run) != local


@pytest.mark.slow
def test_with_the_cache_the_server_is_needed_no_more(tmp_path: Path, scenes: Path, local: str) -> None:
    """Every shard is on the local disk after its first touch; retry_seconds=1 shows that nobody waits for a server."""
    run = tmp_path / "run"
    with served("http", scenes / "train", tmp_path / "nginx") as server:
        command = words(scenes, run, server.shards, "data.retry_seconds=1")
        code, printed, waited = run_through_an_outage(tmp_path, command, server, 6.0)
    assert code == 0 and not waited, printed
    assert _runs.learned(run) == local and training_errors(run) == []


def test_a_url_signed_anew_goes_on_and_no_signature_is_kept_beside_the_config(tmp_path: Path, scenes: Path) -> None:
    run = tmp_path / "run"
    with served("http", scenes / "train", tmp_path / "nginx") as server:

        def signed(signature: str) -> list[str]:
            query = f"?X-Amz-Expires=60&X-Amz-Signature={signature}"
            names = ",".join(f'"{name}{query}"' for name in server.shards.strip("[]").split(","))
            return words(scenes, run, f"[{names}]", "checkpoint.every_steps=1")

        _runs.kill_after(tmp_path, signed("5ecret1"), run, 3)
        other = signed("5ecret2")
        refused = _runs.call(tmp_path, [*other[:-1], "data.shuffle_window=7"], expect=2)
        printed = _runs.call(tmp_path, signed("5ecret2"))
    assert "data.shuffle_window" in refused and "data.train.shards" not in refused and "5ecret" not in refused
    assert "resuming" in printed and len(_runs.rows(run)) == NUM_STEPS
    config = (run / "config.yaml").read_text()
    assert "5ecret2" in config and "5ecret1" not in config
    texts = {path.name: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "config.yaml"}
    assert {"report.html", "events.jsonl"} < texts.keys()
    assert [name for name, text in texts.items() if b"5ecret" in text] == []
