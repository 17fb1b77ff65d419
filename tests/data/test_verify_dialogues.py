"""`data verify --run` finds the dialogues that a run could not learn, before anything is trained on them."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import several_images as toys
from data_fixtures import encoded, pixels, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from vlm_train.cli.compose import compose_config
from vlm_train.cli.main import main
from vlm_train.data.decode import SampleError, decode_metadata
from vlm_train.data.dialogue import Encoded
from vlm_train.data.sources.shards import ShardSource
from vlm_train.data.verify import Dialogues, verify
from vlm_train.engine.rundir import RunDirectory
from vlm_train.types import NO_LABEL

READER = toys.dialogues(max_images=2, context_length=60)
LONG = "A red star is in the picture, and it is large. " * 20


def asked(num_images, *texts):
    """The dialogue in which these are said by turns, behind the images."""
    first = {"role": "user", "content": "<image>" * num_images + texts[0]}
    rest = [{"role": ("assistant", "user")[place % 2], "content": text} for place, text in enumerate(texts[1:])]
    return [first, *rest]


SAMPLES = {
    "good": toys.parts_of(0, 1),
    "two": toys.parts_of(1, 2),
    "texts": toys.parts_of(2, 0),
    "long": toys.parts_of(3, 1, asked(1, "What?", LONG)),
    "mute": toys.parts_of(4, 1, asked(1, "What?", " ")),
    "late": toys.parts_of(5, 1, asked(1, LONG, "Yes.")),
    "behind": toys.parts_of(6, 1, asked(0, LONG, "Yes.", "<image>", "No.")),
    "more": toys.parts_of(7, 2, asked(1, "What?", "Yes.")),
    "many": toys.parts_of(8, 3),
    "turns": toys.parts_of(9, 1, [{"role": "assistant", "content": "Yes."}]),
    "number": toys.parts_of(10, 1, [{"role": "user", "content": 5}]),
    "broken": {**toys.parts_of(11, 1), "jpg": encoded(pixels(1))[:-30]},
}  # fmt: skip
WRONG = {
    "mute": "dialogue_no_label",
    "late": "dialogue_no_label",
    "behind": "dialogue_image_cut",
    "more": "dialogue_image_count",
    "many": "dialogue_many_images",
    "turns": "dialogue_roles",
    "number": "dialogue_text",
    "broken": "image_truncated",
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    members = [member for key, parts in SAMPLES.items() for member in toys.members_of(key, parts)]
    return str(write_tar(folder / "a.tar", members))


def encoded_by_hand(reader, keys):
    return [reader.read(SAMPLES[key], decode_metadata(SAMPLES[key]), "unused") for key in keys]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_each_dialogue_that_cannot_be_learned_is_named(shards, num_workers):
    verdict = verify(shards, mode="full", num_workers=num_workers, dialogue=READER.read)
    assert {problem.key: problem.reason for problem in verdict.problems} == WRONG
    assert len(verdict.problems) == len(WRONG) and verdict.num_checked == len(SAMPLES)
    assert verdict.by_reason()["dialogue_no_label"] == 2
    found = encoded_by_hand(READER, ["good", "two", "texts", "long"])
    whole = [len(each.ids) + each.num_cut for each in found]
    num_told = sum(int((each.labels != NO_LABEL).sum()) for each in found)
    assert verdict.dialogues == Dialogues(
        num=4,
        tokens=(min(whole), float(np.median(whole)), max(whole)),
        label_share=num_told / sum(len(each.ids) for each in found),
        cut_share=0.25,
    )
    assert max(whole) > READER.spec.context_length >= max(len(each.ids) for each in found)
    assert json.loads(json.dumps(verdict.as_dict()))["dialogues"]["num"] == 4


def test_without_a_run_only_what_no_model_could_use_is_a_problem(shards):
    for verdict in (verify(shards), verify(shards, mode="full", num_workers=1)):
        assert verdict.dialogues is None
        assert {problem.key for problem in verdict.problems} == ({"broken"} if verdict.mode == "full" else set())


def test_what_verify_names_is_what_training_replaces(shards):
    """The same words by the same samples, from the two places that read them."""
    made = toys.encoder(READER)
    source = ShardSource(shards=shards)
    refused = {}
    for sample in source.read(np.arange(len(source))):
        try:
            made.draft(1).put(0, sample, visit=0)
        except SampleError as error:
            refused[sample.key] = error.reason
    assert refused == WRONG


def test_a_share_bounds_the_rate_of_dialogues_that_cannot_be_learned(shards):
    verdict = verify(shards, mode="sample", share=1.0, num_workers=1, dialogue=READER.read)
    assert verdict.highest_rate > len(WRONG) / len(SAMPLES)
    alone = verify(shards, mode="sample", share=1.0, num_workers=1)
    assert alone.highest_rate < verdict.highest_rate


def test_another_model_reads_them_otherwise(shards):
    roomy = toys.dialogues(max_images=3, context_length=4096)
    verdict = verify(shards, mode="full", num_workers=1, dialogue=roomy.read)
    mended = {"late", "behind", "many"}
    assert {problem.key for problem in verdict.problems} == WRONG.keys() - mended
    assert verdict.dialogues.cut_share == 0 and verdict.dialogues.num == 7
    captions = verify(shards, mode="full", num_workers=1, dialogue=toys.dialogues(template="plain").read)
    reasons = {problem.key: problem.reason for problem in captions.problems}
    assert reasons == {"two": "dialogue_image_count", "more": "dialogue_image_count", "many": "dialogue_image_count",
                       "texts": "no_image", "broken": "image_truncated"}  # fmt: skip


sizes = st.lists(st.tuples(st.integers(1, 500), st.integers(1, 500), st.integers(0, 500)), max_size=20)


@settings(deadline=None)
@given(chunks=st.lists(sizes, max_size=4))
def test_figures_are_of_all_dialogues_however_they_were_read(chunks):
    found = Dialogues.of([np.array(chunk, np.int64).reshape(-1, 3) for chunk in chunks])
    rows = [row for chunk in chunks for row in chunk]
    if not rows:
        assert found is None
        return
    whole = sorted(read + cut for read, _, cut in rows)
    assert found.tokens == (whole[0], np.median(whole), whole[-1]) and found.num == len(rows)
    assert found.label_share == sum(told for _, told, _ in rows) / sum(read for read, _, _ in rows)
    assert found.cut_share == sum(cut > 0 for *_, cut in rows) / len(rows)


def test_what_was_cut_is_counted():
    whole, cut = (
        toys.dialogues(2, length).read(SAMPLES["long"], decode_metadata(SAMPLES["long"]), "") for length in (4096, 60)
    )
    assert whole.num_cut == 0 and len(cut.ids) <= 60
    assert len(cut.ids) + cut.num_cut == len(whole.ids)
    assert Encoded(whole.ids, whole.labels, whole.grids).num_cut == 0


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What a run of a generative model leaves before its first step."""
    found = RunDirectory(tmp_path_factory.mktemp("run"))
    found.create()
    words = ["model=llava_tiny", "objective=next_token", "evaluation=vqa", "data=scenes", "data.template=chatml",
             "data.system=''", "model.context_length=200", "model.max_images=2", "trainer.global_batch=8",
             "model.tokenizer.vocab_size=400"]  # fmt: skip
    OmegaConf.save(compose_config(words), found.config)
    toys.tokenizer().save(str(found.tokenizer))
    return found


def test_the_command_reads_them_as_the_run_does(shards, run, tmp_path, capsys, caplog):
    caplog.set_level(logging.ERROR)
    words = ["data", "verify", shards, "--run", str(run.path)]
    assert main([*words, "--json", str(tmp_path / "found.json")]) == 1
    told = capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert "12 samples read and decoded" in told  # without --mode, all of them
    assert "by the template chatml, in 200 tokens, 36 to an image, at most 2 of these" in told
    assert f"{found['dialogues']['num']} can be learned" in told
    reasons = {problem["key"]: problem["reason"] for problem in found["problems"]}
    assert reasons["many"] == "dialogue_many_images" and "two" not in reasons
    assert main([*words, "--mode", "sample", "--share", "0.99"]) == 1


@pytest.mark.parametrize("wrong", ["fast", "no run", "no dialogues"])
def test_what_cannot_be_asked_is_refused(shards, run, tmp_path, capsys, wrong):
    words = ["data", "verify", shards, "--run", str(run.path)]
    if wrong == "fast":
        words += ["--mode", "fast"]
    elif wrong == "no run":
        words[-1] = str(tmp_path)
    else:
        other = RunDirectory(tmp_path / "other")
        other.create()
        OmegaConf.save(compose_config(["experiment=quickstart"]), other.config)
        toys.tokenizer().save(str(other.tokenizer))
        words[-1] = str(other.path)
    assert main(words) == 2
    said = capsys.readouterr().err
    assert {"fast": "--mode full", "no run": "is no run", "no dialogues": "reads no dialogues"}[wrong] in said
