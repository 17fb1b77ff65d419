"""`vlm-train data`: datasets from what people have (`import`, `make`), what is done with shards (`cli/shards`), and by
trained models: the walk through them (`cli/walk`) and new captions of them (`cli/recaption`)."""

from __future__ import annotations

import re
from collections.abc import Mapping

from vlm_train.cli import balance, calibrate, curation_report, decontaminate, dedup, prune, recaption, shards, walk
from vlm_train.cli.options import (
    Action,
    Option,
    arguments,
    choice,
    count,
    local,
    needed,
    out_folder,
    plain,
    several,
    share,
    span,
    whole,
)
from vlm_train.cli.progress import Ticker
from vlm_train.data.writer import Summary
from vlm_train.errors import ConfigError, nearest

USAGE = """usage: vlm-train data import openmoji OUT [--size 72]
           4,000 drawings with names; a tenth of the names is held out
       vlm-train data import folder FOLDER OUT [--val-fraction 0.1]
           images with KEY.txt beside them, or one captions.csv|json|jsonl|parquet with image, caption[, label]
       vlm-train data import coco ANNOTATIONS IMAGES OUT [--split NAME]
           COCO captions JSON, or Karpathy's dataset_coco.json and dataset_flickr30k.json
       vlm-train data import aro QUESTIONS IMAGES OUT
           ARO's visual_genome_relation.json or visual_genome_attribution.json, for evaluation=composition
       vlm-train data import llava JSON OUT --images FOLDER [--val-fraction 0.01]
           dialogues about images, or about none, as LLaVA has them: [{id, image, conversations}]
       vlm-train data make scenes OUT [--num-samples 10000] [--seed 0] [--size 64] [--val-fraction 0.1]
                                        [--num-objects 1-5] [--num-shapes 9] [--num-colors 10] [--hold-out TYPE]
                                        [--modalities depth,audio,motion]
           rendered scenes with complete ground truth; a type of false caption may be held out of training: attribute,
           replacement, relation, order, count or negation
       vlm-train data index SHARDS ...
           the manifest of shards (made on first use anyway)
       vlm-train data verify SHARDS ... [--mode fast|full|sample] [--share 0.01] [--selection DIR] [--json FILE]
                                          [--run RUN]
           what is wrong with them, and where; exit code 1 if anything is; with a run also its dialogues, as it reads
           them
       vlm-train data stats SHARDS ... [--out stats.html]
           sizes, captions, formats, repeats, error rate; a page with pictures
       vlm-train data select SHARDS ... --where "width >= 256 AND height >= 256" --out DIR [--weight EXPRESSION]
           which samples count (and how often), by a condition on the manifest's columns
       vlm-train data convert SHARDS ... --out FILE.beton|FOLDER [--selection DIR] [--max-samples 10000]
           tars to one FFCV file, or anything to tars
       vlm-train data dedup SHARDS ... --out DIR [--radius 4] [--tolerance 1] [--covered no] [--selection DIR]
                                        [--num-workers 2] [--engine local|ray|slurm] [--ray-address HOST:PORT]
                                        [--slurm partition=cpu,time=60]
                                        [--run RUN --eps 0.01 [--rule leader|paper] [--device NAME]]
           a selection without samples whose image is a copy of another's, byte for byte or by its looks (smaller,
           compressed again, cropped, covered in one place); with a run also without those whose cosine with
           another is above 1 - eps (SemDeDup). Engines, here and below: processes, a Ray cluster, SLURM's job arrays
       vlm-train data prune SHARDS ... --out DIR [--preset datacomp-basic] [--min-side 200] [--max-side 4096]
                                        [--max-aspect 3] [--min-pixels N] [--max-pixels N] [--min-chars 6]
                                        [--max-chars N] [--min-words 3] [--max-words N] [--min-letters 0.5]
                                        [--max-repeats 0.5] [--max-run 8] [--forms url,file_name,date,number]
                                        [--patterns FILE] [--languages en,de]
                                        [--max-per-caption 10 [--similarity 0.8] [--seed 0]]
                                        [--run RUN [--min-score 0.28 | --keep 0.3] [--density 0.5] [--device NAME]]
                                        [--selection DIR] [--num-workers 2]
           a selection without samples whose picture or first caption breaks a rule (FILE: a regular expression a line),
           with so many samples of each caption or nearly equal one; with a run also without pairs that fit badly (by
           cosine, or all but a share), and thinned out to a share where pictures are dense; in this order
       vlm-train data balance SHARDS ... --out DIR --entries FILE | --min-count 20  --t 20000 | --keep 0.5
                                        [--unmatched drop|keep] [--seed 0] [--selection DIR] [--num-workers 2]
           a selection in which of each entry (a line of FILE, or a word or pair of words that so many captions hold)
           about t samples stay, rare ones all, as MetaCLIP does; or so that a share stays
       vlm-train data decontaminate SHARDS ... --out DIR --against NAME=SHARDS [--against NAME=SHARDS]
                                        [--drop exact,near,model,text] [--radius 4] [--num-words 13]
                                        [--run RUN --min-cosine 0.9 [--device NAME]] [--selection DIR]
                                        [--num-workers 2]
           which samples are those of a benchmark too, by picture (with a run by cosine too) or by a run of words: told,
           flagged in the manifest (contaminated_by), and dropped by the rules that are named
       vlm-train data curate curation=RECIPE shards=SHARDS out=DIR [key=value] [--config-dir DIR]
           a chain of such steps, of conf/curation/RECIPE.yaml or of your own folder, each on what the ones before it
           keep; curation.steps.NAME.KEY=VALUE changes one, ~curation.steps.NAME leaves it out
       vlm-train data calibrate SHARDS ... --out DIR [--num-samples 500] [--precision 0.99] [--seed 0]
                                        [--num-workers 2] [--run RUN [--device NAME]]
           how many copies dedup finds in your data at which tolerance, with a run also at which eps, measured on copies
           that are planted; a table, a suggestion and a page
       vlm-train data report DIR SHARDS ... [--out report.html] [--calibration DIR]
           what dedup, prune, balance or curate did, as one page: what each rule dropped, with pictures; DIR is their
           folder
       vlm-train data walk SHARDS ... --run RUN --out DIR [--by image|text|both] [--checkpoint PATH] [--device NAME]
                                        [--num-workers 1]
           the samples in an order in which neighbours are alike to a trained model, for data.groups (hard negatives)
       vlm-train data recaption SHARDS ... --out DIR --run RUN|--model FOLDER [--scorer RUN] [--min-score 0.2]
                                        [--num-captions 1] [--temperature 1] [--top-p 0.9] [--prompt TEXT]
                                        [--max-tokens 64] [--originals keep|drop] [--selection DIR] [--seed 0]
                                        [--checkpoint PATH] [--batch-size 32] [--part-size 1024] [--device NAME]
           captions that a model writes, beside the samples' own, for data.captions; a trained contrastive model may
           score them and drop those that do not fit (CapFilt); the same command goes on after a kill
SHARDS are tars, .beton files, folders of these or of images, globs, 'path/{00000..00012}.tar', or URLs of tars
(https:// s3:// gs://)"""


_LARGEST_SIDE = 8192  # what is larger is not read
_MOST_SCENES = 99_999_999  # their keys have eight digits
_LOWEST_SEED, _HIGHEST_SEED = -(2**63), 2**63 - 1


def main(words: list[str]) -> int:
    """Runs the verb."""
    if not words or any(word in ("-h", "--help") for word in words):
        print(usage_of(words))
        return 0
    by_models: dict[str, Action] = {"walk": walk.make_walk, "recaption": recaption.make_table}
    actions: dict[str, Action] = {
        "import": _import,
        "make": _make,
        **shards.ACTIONS,
        "dedup": dedup.deduplicate,
        "prune": prune.prune,
        "balance": balance.balance,
        "decontaminate": decontaminate.decontaminate,
        "curate": _curate,
        "calibrate": calibrate.calibrate,
        "report": curation_report.make_report,
        **by_models,
    }
    return _choose(actions, words, "vlm-train data")(words[1:]) or 0


def usage_of(words: list[str]) -> str:
    """The help of what the words begin with (`import llava`, `verify`), of everything where they name nothing."""
    *forms, last = re.split(r"\n?(?:usage:|      ) (?=vlm-train data)", USAGE)[1:]
    last, places = last.split("\nSHARDS", 1)
    for length in (2, 1):
        start = " ".join(["vlm-train data", *words[:length]])
        if found := [form for form in [*forms, last] if f"{form} ".startswith(f"{start} ")]:
            said = "\n       ".join([f"usage: {found[0]}", *found[1:]])
            return f"{said}\nSHARDS{places}" if "SHARDS" in said else said
    return USAGE


def _choose(actions: Mapping[str, Action], words: list[str], verb: str) -> Action:
    name = words[0] if words else ""
    if name not in actions:
        close = nearest(name, actions)
        raise ConfigError(f"{verb} does not know this", got=name or "nothing", allowed=", ".join(actions),
                          remedy=f"{verb} {close[0]}" if close else "vlm-train data --help")  # fmt: skip
    return actions[name]


def _import(words: list[str]) -> None:
    importers = {
        "openmoji": _import_openmoji,
        "folder": _import_folder,
        "coco": _import_coco,
        "aro": _import_aro,
        "llava": _import_llava,
    }
    _choose(importers, words, "vlm-train data import")(words[1:])


def _import_openmoji(words: list[str]) -> None:
    from vlm_train.data.openmoji import import_openmoji

    (out,), options = arguments(words, {"OUT": out_folder}, {"--size": Option(count(_LARGEST_SIDE), 72)})
    _tell(import_openmoji(out, size=options["--size"], progress=Ticker("drawings")))


def _import_folder(words: list[str]) -> None:
    from vlm_train.data.importers import import_folder

    known = {"--val-fraction": Option(share(zero=True, one=True), 0.0)}
    (folder, out), options = arguments(words, {"FOLDER": local, "OUT": out_folder}, known)
    _tell(import_folder(folder, out, val_fraction=options["--val-fraction"], progress=Ticker("images")))


def _import_coco(words: list[str]) -> None:
    from vlm_train.data.importers import import_coco

    places = {"ANNOTATIONS": local, "IMAGES": local, "OUT": out_folder}
    (annotations, images, out), options = arguments(words, places, {"--split": Option(plain)})
    _tell(import_coco(annotations, images, out, split=options["--split"], progress=Ticker("images")))


def _import_aro(words: list[str]) -> None:
    from vlm_train.data.aro import import_aro

    places = {"QUESTIONS": local, "IMAGES": local, "OUT": out_folder}
    (questions, images, out), _ = arguments(words, places, {})
    _tell(import_aro(questions, images, out, progress=Ticker("questions")))


def _import_llava(words: list[str]) -> None:
    from vlm_train.data.llava import import_llava

    known = {"--images": Option(local), "--val-fraction": Option(share(zero=True, one=True), 0.0)}
    (dialogues, out), options = arguments(words, {"JSON": local, "OUT": out_folder}, known)
    images, part = needed(options, "--images", "FOLDER"), options["--val-fraction"]
    _tell(import_llava(dialogues, images, out, val_fraction=part, progress=Ticker("dialogues")))


def _curate(words: list[str]) -> None:
    from vlm_train.cli import curation_config  # which imports Hydra

    curation_config.main(words)


def _make(words: list[str]) -> None:
    _choose({"scenes": _make_scenes}, words, "vlm-train data make")(words[1:])


def _make_scenes(words: list[str]) -> None:
    from vlm_train.data.scenes.language import CONTRASTS
    from vlm_train.data.scenes.make import SMALLEST_SIDE, Variant, make_scenes
    from vlm_train.data.scenes.senses import SENSES
    from vlm_train.data.scenes.world import WHOLE, World

    known = {
        "--num-samples": Option(count(_MOST_SCENES), 10_000),
        "--seed": Option(whole(_LOWEST_SEED, _HIGHEST_SEED), 0),
        "--size": Option(whole(SMALLEST_SIDE, _LARGEST_SIDE), 64),
        "--val-fraction": Option(share(zero=True, one=False), 0.1),
        "--hold-out": Option(choice(*CONTRASTS)),
        "--num-shapes": Option(count(), WHOLE.num_shapes),
        "--num-colors": Option(count(), WHOLE.num_colors),
        "--num-objects": Option(span, (WHOLE.fewest, WHOLE.most)),
        "--modalities": Option(several(*SENSES), []),
    }
    (out,), options = arguments(words, {"OUT": out_folder}, known)
    fewest, most = options["--num-objects"]
    world = World(num_shapes=options["--num-shapes"], num_colors=options["--num-colors"], fewest=fewest, most=most)
    summary = make_scenes(
        out,
        num_samples=options["--num-samples"],
        seed=options["--seed"],
        size=options["--size"],
        val_fraction=options["--val-fraction"],
        variant=Variant(hold_out=options["--hold-out"], modalities=options["--modalities"], world=world),
        progress=Ticker("scenes"),
    )
    _tell(summary)


def _tell(summary: Summary) -> None:
    counts = ", ".join(f"{split} {count}" for split, count in summary.num_samples.items())
    state = "is there already" if summary.already_there else "written"
    print(f"{summary.directory} {state}: {counts} samples, {summary.num_bytes / 1e6:.1f} MB")
    if summary.num_errors:
        reasons = ", ".join(f"{reason} {num}" for reason, num in summary.facts.get("errors", {}).items())
        print(
            f"{summary.num_errors} samples could not be imported ({reasons}): {summary.directory}/import_errors.jsonl"
        )
