"""Commands that cannot be meant: what is answered, that nothing was done before, and that no password is shown."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from vlm_train.cli.compose import compose_config
from vlm_train.cli.evaluate import override
from vlm_train.cli.main import main
from vlm_train.cli.outcome import concealed, tell
from vlm_train.cli.runs import locked
from vlm_train.data.writer import ShardWriter
from vlm_train.engine.rundir import RunDirectory
from vlm_train.errors import ConfigError, DataError
from vlm_train.log import get_logger

URL = "https://me:hushhush@h:9/dir/x.tar?X-Amz-Signature=hushhush2&sig=hushhush3"
MISUSE = """
trian|--foo|data nothing|data import|data import foldr a b|data make|data make scene a
data index|data verify|data stats|data select|data convert|data import folder a|data import coco a b|data make scenes
data make scenes a b|data import openmoji a b|data index a --foo|data index a --foo=1|data index -v|data verify a --mode
data verify a --mode --json x|data verify a --mode fast --mode full|data verify a --mode quick|data verify a --json
data verify a --mode sample --share nan|data verify a --mode sample --share 0|data verify a --mode sample --share -1
data verify a --mode sample --share 7|data verify a --share 0.5|data verify a --mode full --share 0.5
data verify a --run x|data verify a --run full --mode fast|data verify a --run|data import llava file a
data import llava file a --images file|data import llava file full --images full|data import llava full a --images full
data walk a|data walk a --out b|data walk a --run full --out b|data walk a --run x --out full|data walk a --by x
data walk a --out b --run x --num-workers -1|data walk a --out b --run x --foo 1
data verify a --json nowhere/x|data verify a --json .|data stats a --out nowhere/x|data stats a --out .
data select a --out b|data select a --where true|data select a --where true --out file|data select a --out file/b
data convert a|data convert a --out file|data convert a --out file/x.beton|data convert a --out b --max-samples 0
data convert a --out b --max-samples -5|data convert a --out b.beton --max-samples 5|data convert a --out full
data make scenes file|data make scenes a --size 0|data make scenes a --size 99999|data make scenes a --num-samples 0
data make scenes a --num-samples 1.5|data make scenes a --val-fraction 1|data make scenes a --val-fraction nan
data make scenes a --seed 99999999999999999999|data import openmoji a --size 0|data import openmoji file
data import folder full file|data import folder full a --val-fraction nan|data import folder full a --val-fraction -2
data import folder full a --val-fraction 2|data import coco file full file
data index s3://|data index https://[bad/x.tar|data index {0..999999999}.tar|data index a{3..1}::file.tar
configs lst|configs list x|configs show x/y|configs show ../train|configs show a b|configs search|configs keys foo=1
predict run=x|predict run=x run=y|predict run=|predict x|predict foo=1|predict text=a
evaluate x=1|evaluate run=nowhere|evaluate run=full|evaluate run=x run=y|evaluate checkpoint=x
export run=nowhere out=b|export out=b|export run=x out=b foo=1
train foo|train --foo|train foo=1|train --config-dir|train --config-dir nowhere
train --config-dir=full --config-dir=full|train hydra.verbose=1|train experiment=|train data=5|train seed=1,2
train seed=choice(1,2)|train +trainer.foo=1
train data=shards data.train.shards=7|train run.id=a/b|train run.dir=|train data.retry_seconds=.inf
train =5|train seed=[|train experiment=quickstart trainer.micro_images=8
"""
PLACES = """
URL|data URL|data import URL|data make URL|data import folder URL OUT|data import folder full URL
data import coco URL URL OUT|data import coco file full URL|data import coco file full OUT --split=URL --x
data import llava URL OUT --images full|data import llava file OUT --images URL|data verify file --run URL
data import openmoji URL|data import openmoji OUT --size URL|data make scenes URL|data make scenes OUT --size URL
data make scenes OUT --val-fraction=URL|data verify file --mode URL|data verify file --share URL
data verify file --json URL|data verify file --selection URL|data verify file --URL|data stats file --out URL
data select file --out URL|data walk file --out URL|data walk file --out OUT --run URL|data walk file --by URL
data select file --where URL --out full --weight|data convert file --out URL|data index URL --x|data index ftp:URL
data index a::URL::nowhere|configs URL|configs list URL|configs show URL|configs show objective/URL
configs show data=URL|configs show URL=5|configs keys nothing=URL|predict URL|predict run=URL|predict run=full out=URL
predict run=full text=a images=URL|evaluate run=URL|evaluate run=full checkpoint=URL|evaluate run=full out=URL
evaluate run=full data.val.shards=URL|export run=URL out=OUT|export run=full out=URL|train URL|train URL=1
train data=URL|train seed=URL|train data.selection=URL|train data.classes=URL|train run.dir=URL|train run.id=URL
train run.resume=URL
train --config-dir URL|train --config-dir=URL|train data.train.shards=[URL,5]|train data.train.shards={a:{shards:URL}}
train data.train.shards=["URL",5]|train nothing=URL|train model.text.path=URL|train optim.lr=URL
"""


def commands(text: str) -> list[str]:
    return [command for line in text.strip().splitlines() for command in line.split("|")]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in: a file, and a folder that is not empty."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    return tmp_path


@pytest.mark.parametrize("command", commands(MISUSE))
def test_misuse_is_answered_in_full_and_nothing_is_done(
    place: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert main(command.split()) == 2
    told = capsys.readouterr()
    assert not told.out and told.err.startswith("error: ")
    assert all(f"\n  {part}:" in told.err for part in ("got", "allowed", "remedy")), told.err
    assert sorted(str(path.relative_to(place)) for path in place.rglob("*")) == ["file", "full", "full/file"]


@pytest.mark.parametrize("command", commands(PLACES))
def test_no_answer_shows_a_password_or_a_signature(
    place: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert main([word.replace("URL", URL) for word in command.split()]) == 2
    told = capsys.readouterr()
    assert "hush" not in told.out + told.err, told.err
    assert "Traceback" not in told.err and "error: " in told.err


@pytest.mark.parametrize("word", ["data.train.shards=URL", 'data.train.shards=["URL"]', "data.val.shards=URL"])
@pytest.mark.parametrize("action", [["show"], ["keys"], ["search", "shards"]])
def test_what_configs_prints_shows_none_either(
    capsys: pytest.CaptureFixture[str], action: list[str], word: str
) -> None:
    assert main(["configs", *action, word.replace("URL", URL)]) == 0
    told = capsys.readouterr()
    assert "hush" not in told.out and "https://h:9/dir/x.tar" in told.out


SIGNS = st.text("abcXYZ019-._~!$*+%", min_size=6, max_size=12)


@settings(max_examples=200, deadline=None)
@given(user=SIGNS, password=SIGNS, signature=SIGNS, scheme=st.sampled_from(["https", "HTTP", "s3"]))
def test_a_url_has_no_secret_left_in_whatever_pieces_it_comes(
    user: str, password: str, signature: str, scheme: str
) -> None:
    password, signature = f"hush{password}", f"hush{signature}"
    url = f"{scheme}://{user}:{password}@host/0.tar?X-Sig={signature}&part=1"
    texts = [url, repr(url), str(Path(url)), url.rpartition("/")[2], url.partition("//")[2], url.partition("?")[2]]
    texts += [f"shards=[{url},{url}]", url.rpartition("=part")[0], f"no such choice {user}:{password}", signature]
    for text in texts:
        for word in (url, f"data.train.shards={url}", f'a=["{url}","{url}"]', f"{{x: {{shards: {url}}}}}"):
            assert "hush" not in concealed(f"before {text} after", [word])
    assert concealed("a path /x/y and 0.5", [url]) == "a path /x/y and 0.5"


def test_what_nobody_foresaw_keeps_its_traceback_without_the_password(capsys: pytest.CaptureFixture[str]) -> None:
    assert tell(KeyError(URL), [URL]) == 1
    told = capsys.readouterr().err
    assert "KeyError" in told and "hush" not in told
    assert tell(PermissionError(13, "Permission denied", "folder"), who="[rank 3] ") == 1
    told = capsys.readouterr().err
    assert told.startswith("error: [rank 3] the system refused: Permission denied\n  got:     folder\n")
    assert tell(DataError("gone", got=URL)) == 2
    assert capsys.readouterr().err == "error: gone\n  got:     https://h:9/dir/x.tar\n"


def test_no_line_of_the_log_shows_a_password() -> None:
    get_logger("test")
    handler = logging.getLogger("vlm_train").handlers[0]
    record = logging.LogRecord("test", logging.WARNING, "file", 1, "%s is gone", (URL,), None)
    assert handler.format(record) == "warning: https://h:9/dir/x.tar is gone"


@pytest.fixture
def shard(place: Path) -> Path:
    writer = ShardWriter(place / "shards", max_samples=9)
    writer.write("a", {"png": b"\x89PNG\r\n\x1a\n", "txt": b"a"})
    writer.close()
    (found,) = (place / "shards").glob("*.tar")
    return found


@pytest.mark.parametrize("words", [["stats", "--out"], ["verify", "--json"]])
def test_no_shard_is_overwritten(shard: Path, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    before = shard.read_bytes()
    (shard.parent / "link").symlink_to(shard)
    for out in (shard, shard.parent / "link"):
        for shards in (shard, shard.parent):
            assert main(["data", words[0], str(shards), words[1], str(out)]) == 2
            assert "would overwrite a shard" in capsys.readouterr().err and shard.read_bytes() == before


def test_a_share_that_draws_nothing_is_no_clean_bill(scenes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "verify", str(scenes / "train"), "--mode", "sample", "--share", "1e-9"]) == 2
    assert "not one sample was drawn" in capsys.readouterr().err
    assert main(["data", "verify", str(scenes / "train"), "--mode", "sample", "--share", "0.2"]) == 0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run that was started and no more."""
    found = RunDirectory(tmp_path_factory.mktemp("run"))
    OmegaConf.save(compose_config(["experiment=quickstart"]), found.config)
    return found


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("evaluation=[a]", "no such choice"),
        ("evaluation=../model/clip_tiny", "evaluation cannot take this value"),
        ("data.val=5", "data.val cannot take this value"),
        ("data.val.shards=7", "data.val.shards names no shards"),
        ("data.val.shards={a: {shards: x}}", "data.val.shards is a mixture"),
        ("+data.val.x=1", "no such key: data.val.x"),
        ("evaluation.batch_size=0", "evaluation.batch_size is out of range"),
        ("evaluation.batch_size.x=5", "no such key: evaluation.batch_size.x"),
        ("+evaluation.evaluators.x=5", "evaluation.evaluators.x is no evaluator"),
        ("data.classes=${nope}", "data.classes cannot be resolved"),
        ("~data.classes", "takes nothing out"),
        ("optim.lr=1", "how the run was trained"),
    ],
)
def test_what_evaluate_cannot_override_is_named(run: RunDirectory, word: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        override(run, [word])
    assert None not in (caught.value.got, caught.value.allowed, caught.value.remedy)


def test_a_brace_pattern_needs_no_second_quoting_in_evaluate(run: RunDirectory) -> None:
    assert override(run, ["data.val.shards={0..3}.tar"]).data.val.shards == "{0..3}.tar"


@pytest.mark.parametrize("text", ["", "a: [", "- 1", "seed: ${x}", "foo: 1", "seed: abc"])
def test_a_damaged_config_of_a_run_is_told(tmp_path: Path, text: str) -> None:
    found = RunDirectory(tmp_path)
    found.config.write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml is (damaged|not the config of this release)"):
        override(found, [])


def test_a_run_that_cannot_be_made_is_refused(place: Path) -> None:
    for name in ("file", "file/run"):
        with pytest.raises(ConfigError, match="the run cannot be written"), locked(RunDirectory(name)):
            pass


def test_a_name_that_is_no_text_can_be_printed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vlm_train.cli.main", "data", "make", "scenes", b"\xff", "--num-samples", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, env={"PATH": "/bin"}, check=False)
    assert done.returncode == 0 and b"\\udcff written" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("words", "forms"),
    [
        (["verify"], {"verify"}),
        (["import", "llava"], {"import llava"}),
        (["import"], {"import openmoji", "import folder", "import coco", "import aro", "import llava"}),
        (["recaption", "shards", "--out"], {"recaption"}),
    ],
)
def test_help_behind_a_verb_of_data_is_about_it(
    capsys: pytest.CaptureFixture[str], words: list[str], forms: set[str]
) -> None:
    told = {}
    for name, asked in (("one", words), ("all", []), ("unknown", ["nothing"])):
        assert main(["data", *asked, "--help"]) == 0
        told[name] = capsys.readouterr().out
    named = re.findall(r"^(?:usage:|      ) vlm-train data ((?:(?:import|make) )?\w+)", told["one"], re.MULTILINE)
    assert set(named) == forms and len(named) == len(forms)
    assert ("SHARDS are tars" in told["one"]) == ("SHARDS" in told["one"].split("SHARDS are")[0])
    assert told["all"] == told["unknown"] and set(told["one"].splitlines()) < set(told["all"].splitlines()) | {
        line.replace("      ", "usage:", 1) for line in told["all"].splitlines()
    }
