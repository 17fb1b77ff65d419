"""Verbs of curation on any engine, with any number of workers and killed at any moment: the same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import _clusters
import pytest
from _curating import STAGES, Chain, children, written

from vlm_train.cli import engines
from vlm_train.cli.main import main
from vlm_train.cli.options import arguments, plain
from vlm_train.curation.engines import Local
from vlm_train.curation.on_ray import Ray
from vlm_train.curation.on_slurm import Slurm
from vlm_train.errors import ConfigError


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return Chain(tmp_path_factory.mktemp("chain"), shard_size=64)


@pytest.fixture(scope="module")
def ray_words() -> Iterator[list[str]]:
    pytest.importorskip("ray")
    with _clusters.ray_cluster(num_cpus=1) as (address, _):
        yield ["--engine", "ray", "--ray-address", address]


@pytest.fixture(scope="module")
def slurm_words(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    if lack := _clusters.lacks_slurm():
        pytest.skip(lack)
    with _clusters.slurm_cluster(tmp_path_factory.mktemp("slurm") / "daemons", num_cpus=2):
        yield ["--engine", "slurm", "--slurm", "partition=main,mem=1G", "--num-workers", "1"]


def deduplicated(chain: Chain, place: tuple[Path, Path], *words: str) -> dict[str, bytes]:
    assert main(["data", "dedup", str(place[0]), "--out", str(place[1]), *words]) == 0
    return written(place)


@pytest.fixture(scope="module")
def expected(chain: Chain) -> dict[str, bytes]:
    """Of one process, which is this one."""
    return deduplicated(chain, chain.fresh("one"), "--num-workers", "1")


def test_any_number_of_processes_leaves_the_same_bytes(chain: Chain, expected: dict[str, bytes]) -> None:
    assert deduplicated(chain, chain.fresh("four"), "--num-workers", "4") == expected
    assert deduplicated(chain, chain.fresh("other"), "--radius", "0", "--num-workers", "1") != expected  # the twin


def test_two_nodes_of_ray_leave_the_same_bytes(chain: Chain, expected: dict[str, bytes], ray_words: list[str]) -> None:
    assert deduplicated(chain, chain.fresh("ray"), *ray_words) == expected


def test_slurm_leaves_the_same_bytes(chain: Chain, expected: dict[str, bytes], slurm_words: list[str]) -> None:
    assert deduplicated(chain, chain.fresh("slurm"), *slurm_words) == expected


def test_a_killed_chain_ends_in_the_same_bytes(chain: Chain) -> None:
    """The short form of scripts/proof/curation_engines.py, with a model's features."""
    whole = chain.run(chain.fresh("whole"), "curation.num_workers=1")
    assert sum(name.startswith("embeddings/") for name in whole) == 2 * chain.num_shards
    place = chain.fresh("killed")
    stages = chain.killed(place, "curation.num_workers=1", num_kills=3, workers=children)
    assert len(stages) >= 2 and len(set(stages)) >= 2 and set(stages) <= set(STAGES)  # with work left
    leftover = place[1] / ".selection.npy.1.tmp"  # as a kill in the middle of a file leaves it
    leftover.write_bytes(b"half")
    others = place[1] / "slurm" / ".a.1.tmp"  # of somebody who works there too
    others.parent.mkdir()
    others.write_text("mine")
    found = chain.run(place, "curation.num_workers=1")
    assert found.pop("slurm/.a.1.tmp") == b"mine" and found == whole


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--engine", "spark"], "no such choice"),
        (["--ray-address", "auto"], "--ray-address is about engine ray"),
        (["--engine", "ray", "--slurm", "time=5"], "--slurm is about engine slurm"),
        (["--engine", "slurm", "--slurm", "partitions=x"], "--slurm partition"),
        (["--engine", "slurm", "--slurm", "partition"], "no list of values"),
        (["--engine", "slurm", "--slurm", "time=5,time=6"], "each key once"),
        (["--engine", "slurm", "--slurm", "cpus=none"], "value of cpus"),
        (["--engine", "slurm", "--slurm", "mem="], "value of mem"),
        (["--num-workers", "0"], "--num-workers"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    shards = str(chain.folder / "all" / "train")
    assert main(["data", "dedup", shards, "--out", str(tmp_path / "x"), *words]) == 2
    told = capsys.readouterr().err
    assert said in told and "remedy" in told
    assert not (tmp_path / "x").exists()


def test_a_config_says_the_same_as_options(tmp_path: Path) -> None:
    slurm = ["--engine", "slurm", "--num-workers", "3", "--slurm", "gres=gpu:1,shard:2,time=1:00:00,cpus=4"]
    for words, values, engine in (
        ([], {}, Local()),
        (["--num-workers", "2"], {"engine": "local", "num_workers": 2, "ray": {}, "slurm": None}, Local(num_workers=2)),
        (["--engine", "ray"], {"engine": "ray", "ray": {"address": None}}, Ray()),
        (["--engine=ray", "--ray-address=a:1"], {"engine": "ray", "ray": {"address": "a:1"}}, Ray(address="a:1")),
        (slurm, {"engine": "slurm", "num_workers": 3,
                 "slurm": {"gres": "gpu:1,shard:2", "time": "1:00:00", "cpus": 4, "mem": None}},
         Slurm(folder=tmp_path / ".vlm-train-slurm", num_workers=3, cpus=4, gres="gpu:1,shard:2",
               options={"time": "1:00:00"})),
    ):  # fmt: skip
        _, given = arguments(["x", *words], {"SHARDS": plain}, engines.OPTIONS)
        assert given == engines.options_of(values)
        with engines.opened(given, tmp_path) as made:
            assert made == engine
    for values in ({"engine": "spark"}, {"num_workers": 0}, {"ray": {"host": "x"}}, {"slurm": {"cpu": 1}},
                   {"slurm": {"time": 3600}}):  # fmt: skip
        with pytest.raises(ConfigError):
            engines.options_of(values)


def test_a_chain_takes_its_engine_of_the_config(
    chain: Chain, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = chain.words(chain.fresh("config"), "curation.engine=local", "curation.slurm.time='0:05:00'")
    assert main(words) == 2 and "--slurm is about engine slurm" in capsys.readouterr().err
    assert main([*words[:-1], "curation.ray.host=x"]) == 2 and "curation.ray.host" in capsys.readouterr().err
