"""Local processes, Ray and a real SLURM: results in order, errors as they are, deaths, and nothing left behind."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import _clusters
import engine_functions as functions
import psutil
import pytest

from vlm_train.curation import engines, on_ray, on_slurm, slurm_task
from vlm_train.curation.engines import Engine, Local
from vlm_train.curation.on_ray import Ray
from vlm_train.curation.on_slurm import Slurm
from vlm_train.errors import ConfigError, DataError, VlmError

HERE = str(Path(__file__).resolve().parent)
ENGINES = ("local", "ray", "slurm")


@pytest.fixture(scope="module", autouse=True)
def importable() -> Iterator[None]:
    """Processes of any engine can import what is beside this file; Ray leaves no secret in the home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", HERE, prepend=os.pathsep)
        patch.setenv("RAY_AUTH_MODE", "disabled")
        yield


@pytest.fixture(scope="module")
def ray() -> Iterator[Ray]:
    pytest.importorskip("ray")
    engine = Ray(num_workers=2)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if lack := _clusters.lacks_slurm():
        pytest.skip(lack)
    folder = tmp_path_factory.mktemp("slurm")
    with _clusters.slurm_cluster(folder / "daemons", max_array=8):
        yield Slurm(folder=folder / "calls")


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    return Local(num_workers=2) if request.param == "local" else request.getfixturevalue(request.param)


class Careless:
    """The twin: results as they come."""

    def map(self, function, items, *, runs_model=False):
        with ThreadPoolExecutor(2) as pool:
            yield from (future.result() for future in as_completed([pool.submit(function, item) for item in items]))


def test_results_come_in_order(engine: Engine) -> None:
    expected = [item * item for item in range(20)]
    assert list(engine.map(functions.slow_first, range(20))) == expected
    assert list(Careless().map(functions.slow_first, range(20))) != expected
    assert list(engine.map(functions.slow_first, [])) == []


def test_an_error_arrives_as_itself_behind_the_results_before_it(engine: Engine) -> None:
    for items, error in (([1, 3, 4], DataError), ([1, 4, 3], ConfigError)):
        found = engine.map(functions.refused, items)
        assert next(found) == 1
        with pytest.raises(error) as caught:
            next(found)
        assert type(caught.value) is error and caught.value.got == items[1]
        assert caught.value.remedy.startswith("leave out")


def test_an_error_that_nobody_foresaw_tells_where(engine: Engine) -> None:
    with pytest.raises(VlmError if isinstance(engine, Slurm) else KeyError) as caught:
        list(engine.map(functions.unforeseen, [0, 7]))
    if isinstance(engine, Slurm):  # which tells it by the log of the task
        assert "task 1 of SLURM job" in str(caught.value) and "KeyError: 7" in str(caught.value)
        assert "FAILED" in str(caught.value) and "exit code 1:0" in str(caught.value)
        assert not engine.folder.exists()


def test_a_function_that_always_dies_comes_to_an_end(engine: Engine) -> None:
    with pytest.raises(VlmError, match=r"killed|died 4 times|did not come to its end"):
        list(engine.map(functions.dies, [0, 9, 0]))


def test_ray_begins_again_whose_worker_died(ray: Ray, tmp_path: Path) -> None:
    markers = [tmp_path / str(number) for number in range(3)]
    assert list(ray.map(functions.dies_once, markers)) == ["0", "1", "2"]


def test_ray_keeps_a_model_and_looks_ahead_so_far(ray: Ray, tmp_path: Path) -> None:
    found = list(ray.map(functions.with_model, range(12), runs_model=True))
    assert len({process for process, _ in found}) <= 2 and max(number for _, number in found) >= 6
    markers = [tmp_path / str(number) for number in range(30)]
    results = ray.map(functions.marked, markers)
    next(results)
    list(ray.map(functions.slow_first, range(4)))  # behind all that were begun
    assert 2 <= sum(marker.exists() for marker in markers) <= 3
    list(results)
    assert all(marker.exists() for marker in markers)


def test_a_larger_array_than_slurm_allows_is_shared_out(slurm: Slurm, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(slurm.map(functions.refused, [1] * 21)) == [1] * 21  # 8 tasks at most
    two = Slurm(folder=slurm.folder, num_workers=1, cpus=2, gres=None, options={"partition": "main", "time": "5"})
    assert list(two.map(functions.slow_first, range(5))) == [0, 1, 4, 9, 16]
    with pytest.raises(ConfigError, match="nowhere"):
        list(Slurm(folder=slurm.folder, options={"partition": "nowhere"}).map(functions.refused, [1]))
    assert not slurm.folder.exists()


def test_what_a_killed_driver_left_to_slurm_is_ended(slurm: Slurm, tmp_path: Path) -> None:
    folder, markers = tmp_path / "slurm", [tmp_path / str(number) for number in range(3)]
    code = f"""
import signal
from pathlib import Path
import engine_functions
from vlm_train.curation.on_slurm import Slurm
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
list(Slurm(folder=Path({str(folder)!r})).map(engine_functions.long, [Path(name) for name in {[*map(str, markers)]}]))
"""
    driver = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    _clusters.until(lambda: all(marker.exists() for marker in markers), "the tasks")
    driver.kill()
    driver.wait()
    assert len(_clusters.told("squeue", "--noheader", "--array").splitlines()) == 3  # they go on
    on_slurm.end_left(folder)
    assert not folder.exists() and not _clusters.told("squeue", "--noheader").strip()
    # a driver that ends, by Ctrl-C too, ends its array itself
    driver = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    _clusters.until(lambda: len(_clusters.told("squeue", "--noheader", "--array").splitlines()) == 3, "the tasks")
    driver.send_signal(signal.SIGINT)
    assert driver.wait(60) != 0
    _clusters.until(lambda: not _clusters.told("squeue", "--noheader").strip(), "the end of the tasks")
    assert not folder.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_of_ray_outlives_its_driver(tmp_path: Path, number: int) -> None:
    pytest.importorskip("ray")
    marker = tmp_path / "begun"
    code = f"""
import signal
from pathlib import Path
import engine_functions
from vlm_train.curation.on_ray import Ray
signal.signal(signal.SIGINT, signal.default_int_handler)
list(Ray(num_workers=1).map(engine_functions.long, [Path({str(marker)!r})]))
"""
    driver = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, start_new_session=True)
    _clusters.until(marker.exists, "the task")
    begun = psutil.Process(driver.pid).children(recursive=True)
    assert any("raylet" in process.name() for process in begun)
    os.killpg(driver.pid, number)  # as a terminal does
    assert driver.wait(60) != 0
    _, alive = psutil.wait_procs(begun, timeout=60)
    assert alive == []


def test_what_is_not_there_is_told_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Ray().close()  # else the cluster of the tests before this one is taken
    with pytest.raises(ConfigError, match="no Ray cluster"):
        list(Ray(address=f"127.0.0.1:{_clusters.free_port()}").map(functions.refused, [1]))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'vlm-train\[ray\]'"):
        list(Ray().map(functions.refused, [1]))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="no SLURM"):
        list(Slurm(folder=tmp_path / "x").map(functions.refused, [1]))
    assert not (tmp_path / "x").exists()


def test_another_machine_is_named_with_what_it_must_see(monkeypatch: pytest.MonkeyPatch) -> None:
    error = DataError("a shard cannot be read", got="/a.tar", remedy="check the path")
    assert engines.seen_from(socket.gethostname(), error) is error
    monkeypatch.setattr(socket, "gethostname", lambda: "node7")
    for found in (engines.seen_from("login", error), engines.seen_from("login", FileNotFoundError(2, "no", "/a.tar"))):
        assert type(found) is DataError and "/a.tar" in str(found)
        assert "node7 must see the files of login" in str(found)


def test_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="another vlm-train"):
        on_ray._call(functions.refused, 1, socket.gethostname(), "0.0.0")
    tmp_path.chmod(0o700)
    call = slurm_task.Call(functions.refused, [1], runs_model=False, num_processes=1, version="0.0.0")
    slurm_task.call_file(tmp_path, 0).write_bytes(pickle.dumps(call))
    assert slurm_task.main(tmp_path, 0) == 1
    found, error = pickle.loads(slurm_task.result_file(tmp_path, 0).read_bytes())
    assert found == [] and "another vlm-train" in str(error)


def test_a_task_takes_no_calls_from_where_others_can_write(tmp_path: Path) -> None:
    call = slurm_task.Call(functions.refused, [1], runs_model=False, num_processes=1)
    slurm_task.call_file(tmp_path, 0).write_bytes(pickle.dumps(call))
    tmp_path.chmod(0o755)
    with pytest.raises(ConfigError, match="its own user"):
        slurm_task.main(tmp_path, 0)
    assert not slurm_task.result_file(tmp_path, 0).exists()
    tmp_path.chmod(0o700)
    assert slurm_task.main(tmp_path, 0) == 0
    shutil.rmtree(tmp_path)
