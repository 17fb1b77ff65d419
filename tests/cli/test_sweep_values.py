"""What the words of a sweep mean, what a search suggests, and what is refused before anything is trained."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_train.cli.main import main
from vlm_train.cli.sweep_folder import Row
from vlm_train.cli.sweep_search import Search
from vlm_train.cli.sweep_table import best, lines, ranked
from vlm_train.cli.sweep_values import Choices, Range, grid, read_sweeps
from vlm_train.cli.sweep_words import Goal, split_sweep
from vlm_train.cli.sweeps import name_of

LOSS = Goal("loss", is_maximum=False)
LR = Range("optim.lr", "log", 1e-5, 1e-1)
WIDTH = Range("model.embed_dim", "int", 1, 64)
DECAY = Choices("optim.weight_decay", ("0", "0.1", "0.2"))


def test_what_is_swept_over_is_read_once() -> None:
    texts = ("seed=range(0,3)", "optim.lr=log(1e-5, 1e-3)", "+a.b='x,y',z", "d=int(1,8)", "c=interval(-1,1)")
    seed, rate, text, whole, plain = read_sweeps(texts, ["trainer.max_steps=3"])
    assert seed == Choices("seed", ("0", "1", "2")) and text == Choices("+a.b", ("'x,y'", "z"))
    assert rate == Range("optim.lr", "log", 1e-5, 1e-3) and whole == Range("d", "int", 1, 8)
    assert plain == Range("c", "interval", -1.0, 1.0)
    assert grid([Choices("a", ("1", "2")), Choices("b", ("3", "4"))])[1:3] == [
        {"a": "1", "b": "4"},
        {"a": "2", "b": "3"},
    ]
    assert name_of(3, {"optim.lr": "0.001", "model": "clip_tiny"}) == "03-lr-0.001-model-clip_tiny"


def test_words_of_a_sweep_are_taken_out_of_those_of_a_run() -> None:
    rest, asked = split_sweep(["a=1", "--sweep", "seed=0,1", "--trials=5", "--minimize", "loss", "--sweep=b=1,2"])
    assert rest == ["a=1"] and asked is not None
    assert (asked.sweeps, asked.num_trials, asked.goal) == (("seed=0,1", "b=1,2"), 5, LOSS)
    assert split_sweep(["a=1", "--config-dir", "x"]) == (["a=1", "--config-dir", "x"], None)


REFUSED = [
    ("-m seed=0,1", "--sweep"), ("--multirun", "--sweep"), ("--swep seed=0,1", "--sweep"),
    ("--trials 5", "nothing is swept over"), ("--maximize loss", "nothing is swept over"),
    ("--sweep seed=0,1 --trials 5", "no goal"), ("--sweep seed=0,1 --trials 0 --minimize loss", "no count"),
    ("--sweep seed=0,1 --trials 2 --trials 3 --minimize loss", "one number of trials"),
    ("--sweep seed=0,1 --minimize loss --maximize loss", "one goal"), ("--sweep seed=0,1 --minimize", "one goal"),
    ("--sweep", "several values"), ("--sweep seed=1", "several values"), ("--sweep seed=1,1", "several values"),
    ("--sweep ~seed=1,2", "several values"), ("--sweep seed=choice(1)", "several values"),
    ("--sweep sede=1,2", "seed"), ("--sweep run.id=a,b", "names its runs itself"),
    ("--sweep seed=1,2 --sweep seed=3,4", "said twice"), ("seed=5 --sweep seed=1,2", "said twice"),
    ("--sweep optim.lr=log(1e-5,1e-3)", "--trials"), ("--sweep seed=glob(*)", "no glob(...)"),
    ("--sweep optim.lr=lgo(1e-5,1e-3) --trials 2 --minimize loss", "no lgo(...)"),
    ("--sweep optim.lr=log(0,1e-3) --trials 2 --minimize loss", "above 0"),
    ("--sweep optim.lr=log(1e-3,1e-5) --trials 2 --minimize loss", "smaller first"),
    ("--sweep optim.lr=interval(1,nan) --trials 2 --minimize loss", "smaller first"),
    ("--sweep optim.lr=interval(1,2,3) --trials 2 --minimize loss", "two numbers"),
    ("--sweep seed=int(1,2.5) --trials 2 --minimize loss", "two whole numbers"),
    ("--sweep trainer.max_steps=interval(5,8) --trials 2 --minimize loss", "trainer.max_steps"),
    ("--sweep optim.lr=log(1e-5,1e-3) --sweep schedule.warmup_steps=int(1,99999) --trials 2 --minimize loss", "warmup"),
    ("--sweep seed=0,1 --trials 3 --minimize loss", "at most 2"),
    ("--sweep seed=int(1,5) --trials 6 --minimize loss", "at most 5"),
    ("--sweep seed=0,1 --maximize retrievals.text_to_image.R@1", "retrieval"),
    ("--sweep seed=0,1 run.resume=runs/x", "run.dir"), ("trainer.num_nodes=2 strategy=ddp --sweep seed=0,1", "submit"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "said"), REFUSED, ids=[words for words, _ in REFUSED])
def test_what_cannot_be_meant_is_refused_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *words.split()]) == 2
    told = capsys.readouterr().err
    assert said in told and all(f"\n  {part}:" in told for part in ("got", "allowed", "remedy")), told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [("--sweep optim.lr=log(1e-5,1e-3)", "vlm-train train"), ("--sweep seed=0,1 --trials 3", "vlm-train train"),
     ("--sweep seed=0,1 --minimize=loss", "vlm-train train")],
)  # fmt: skip
def test_a_search_is_not_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["submit", "launch.dry_run=true", *words.split()]) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_search_without_optuna_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(["train", "--sweep", "seed=0,1", "--trials", "2", "--minimize", "loss"]) == 2
    assert "vlm-train[sweep]" in capsys.readouterr().err and not list(tmp_path.iterdir())


ENDS = st.floats(1e-9, 1e9).map(lambda number: float(f"{number:.12g}"))


@given(ends=st.tuples(ENDS, ENDS).map(sorted), share=st.floats(0, 1), kind=st.sampled_from(["interval", "log"]))
def test_a_drawn_number_is_short_and_within_its_range(ends: list[float], share: float, kind: str) -> None:
    drawn = min(ends[0] + share * (ends[1] - ends[0]), ends[1])
    text = Range("k", kind, *ends).text(drawn)
    assert ends[0] <= float(text) <= ends[1]
    assert float(text) == pytest.approx(drawn, rel=1e-5) and (float(text) in ends or len(text) <= 13)
    assert Range("k", kind, *ends).text(Range("k", kind, *ends).value(text)) == text


def rows(search: Search, number: int, seed: int = 7, given: list[Row] | None = None) -> list[Row]:
    """A search up to `number` runs, of which each scores its distance from optim.lr=1e-3; every fifth run fails."""
    found = list(given or [])
    for each in range(len(found), number):
        swept = search.choose(each, found, seed)
        loss = abs(float(swept["optim.lr"]) - 1e-3) * 1e3
        failed = each % 5 == 4
        found.append(Row(f"{each:02}", swept, "failed" if failed else "finished", 8, {} if failed else {"loss": loss}))
    return found


def test_a_search_goes_on_as_if_it_had_not_been_stopped() -> None:
    """What it suggests is a function of the seed and of what sweep.json tells. Beyond ten runs TPE looks at scores."""
    values = [LR, WIDTH, DECAY]
    whole = rows(Search(values, 24, LOSS), 24)
    for stop in (0, 1, 11, 23):
        told = json.loads(json.dumps([asdict(row) for row in whole[:stop]]))
        assert rows(Search(values, 24, LOSS), 24, given=[Row(**row) for row in told]) == whole
    assert rows(Search(values, 24, LOSS), 24, seed=8) != whole  # the twins: another seed, and another score
    changed = [Row(**asdict(row)) for row in whole[:15]]
    changed[0].metrics["loss"] = -1.0
    assert rows(Search(values, 24, LOSS), 24, given=changed)[15:] != whole[15:]


def test_a_sampler_that_is_made_anew_from_one_seed_repeats_itself() -> None:
    """Why each run has a seed of its own: Optuna's sampler, seeded alike after every stop, suggests the same again."""
    import optuna

    drawn = []
    for _ in range(2):
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=7))
        drawn.append(study.ask({"x": optuna.distributions.FloatDistribution(0, 1)}).params)
    assert drawn[0] == drawn[1]
    assert len({row.swept["optim.lr"] for row in rows(Search([LR], 10, LOSS), 10)}) == 10


def test_a_search_of_few_combinations_tries_each_once() -> None:
    found = rows(Search([Choices("optim.lr", ("1e-4", "1e-3", "1e-2")), Range("seed", "int", 0, 7)], 24, LOSS), 24)
    assert len({tuple(row.swept.values()) for row in found}) == 24


def test_a_search_comes_near_the_best() -> None:
    """How many decades the last ten of 40 runs lie from the best rate, against the first ten, which are drawn at
    random: over 200 seeds the medians are 0.52 and 1.12; the means of these eight were measured as 0.47 and 0.86."""
    last, first = 0.0, 0.0
    for seed in range(8):
        found = rows(Search([LR], 40, LOSS), 40, seed)
        away = [abs(math.log10(float(row.swept["optim.lr"])) + 3) for row in found]
        first, last = first + sorted(away[:10])[5] / 8, last + sorted(away[30:])[5] / 8
    assert last < 0.6 < first, (last, first)


def test_the_table_has_the_best_first_and_the_failed_last() -> None:
    told = [
        Row(f"0{n}-x", {"seed": str(n)}, "finished", 8, {"loss": loss, "a.b": n / 10})
        for n, loss in enumerate((2.0, 1.0, 3.0))
    ]
    told.append(Row("03-x", {"seed": "3"}, "failed", 2, {"loss": 0.5}))
    assert [row.run for row in ranked(told, LOSS)] == ["01-x", "00-x", "02-x"]
    assert best(told, Goal("a.b", is_maximum=True)) == told[2] and best(told, None) is None
    assert [line.split()[0] for line in lines(told, LOSS, 100)] == ["run", "01", "00", "02", "03"]
    assert [line.split()[0] for line in lines(told, None, 100)] == ["run", "00", "01", "02", "03"]
    assert "a.b" in lines(told, LOSS, 100)[0] and "a.b" not in lines(told, LOSS, 30)[0]


def test_no_password_is_in_a_name_or_the_table() -> None:
    swept = {"data.train.shards": "https://me:hushhush@h/x.tar?sig=hushhush2"}
    assert "hush" not in name_of(0, swept) + "".join(lines([Row("00-x", swept)], None, 100))
