"""`vlm-train import`: a model of open_clip or transformers as a run that the other verbs read."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_train.cli.arguments import parse
from vlm_train.cli.export import preparation, print_certificate, trained_of
from vlm_train.cli.options import choice, new_place
from vlm_train.errors import ConfigError, VlmError

if TYPE_CHECKING:
    from vlm_train.engine.rundir import RunDirectory
    from vlm_train.export.answers import Answering
    from vlm_train.export.certificate import Certificate, Trained
    from vlm_train.export.foreign import Foreign
    from vlm_train.types import Tokenizer

USAGE = """usage: vlm-train import from=PATH out=DIR [architecture=NAME] [tokenizer=PATH] [verify=false]

  vlm-train import from=clip-vit-base-patch32 out=runs/imported/clip
  vlm-train import from=epoch_32.pt architecture=ViT-B-32 out=runs/imported/laion
  vlm-train import from=llava-1.5-7b-hf out=runs/imported/llava

Reads weights (never code), config and tokenizer, writes them as a finished run, then runs the other library beside it
and measures how far features and logits are from its own. A difference is an error.

  from=PATH          a folder of transformers (CLIPModel, SiglipModel, LLaVA, Idefics2) or open_clip, or a file of
                     open_clip's weights
  out=DIR            a new or empty folder; evaluate, predict and export take it as run=DIR
  architecture=NAME  of a file: its name in open_clip, such as ViT-B-32-quickgelu
  tokenizer=PATH     a folder with the tokenizer, where the model comes without
  verify=false       import without running the other library"""

CONF = "conf"
"""Folder of the run with its model as a choice for other trainings: `--config-dir RUN/conf model=imported`."""

HEADER = """# The model that `vlm-train import` wrote to {run}.
#   vlm-train train --config-dir {run}/conf model=imported
"""
NO_TEMPLATE = (
    "no template of ours writes its questions as its chat template does; data.template=vicuna is set, and no tokens of "
    "questions were compared"
)
KEYS = {"from": "PATH", "out": "DIR", "architecture": "NAME", "tokenizer": "PATH", "verify": "true|false"}


def main(words: list[str]) -> int:
    """Runs the verb."""
    if not words or any(word in ("-h", "--help") for word in words):
        print(USAGE)
        return 0
    arguments = parse(words, KEYS, verb="import")
    source = arguments.required("from", example="from=FOLDER")
    out = arguments.required("out", new_place, example="out=DIR")
    verify = arguments.optional("verify", choice("true", "false"), "true") == "true"

    from transformers.utils import logging

    from vlm_train.engine.rundir import RunDirectory
    from vlm_train.export.folders import KINDS, read_model

    logging.disable_progress_bar()
    foreign = read_model(source, arguments.optional("architecture"))
    tokenizer, missing = _tokenizer(foreign, arguments.optional("tokenizer"))
    trained, run = foreign.trained(tokenizer), RunDirectory(out)
    template = _template(foreign, trained)
    certificate = _write(run, foreign, trained, template, source, verify=verify)
    num_parameters = sum(parameter.numel() for parameter in trained.model.parameters())
    print(f"{source} ({foreign.family}) as {run.path}, {num_parameters:,} parameters")
    for note in [*foreign.notes, *([NO_TEMPLATE] if template is None else [])]:
        print(f"note: {note}")
    if certificate is not None:
        print(f"certificate, {certificate.library} on {source} against the run:")
        print_certificate(certificate)
    if tokenizer is None:
        print(f"imported without a tokenizer: {missing}; evaluate and predict need one: import with tokenizer=PATH")
        return 0
    asking = 'image=FILE prompt="..."' if foreign.family in KINDS else 'text="..." images=FOLDER out=grid.png'
    print(f"next: vlm-train predict run={shlex.quote(str(run.path))} {asking}")
    return 0


def _tokenizer(foreign: Foreign, given: str | None) -> tuple[Tokenizer | None, str]:
    """The model's tokenizer, or None and why there is none. Raises VlmError for a given one that does not fit."""
    from vlm_train.data.tokenizer import SPEC_FILE, HuggingFaceTokenizer, load_tokenizer

    spec, location = foreign.spec, given or foreign.vocabulary
    if location is None:
        return None, "it comes without one"
    try:
        if (Path(location) / SPEC_FILE).is_file():
            return load_tokenizer(location), ""
        tokenizer = HuggingFaceTokenizer(
            path=location,
            context_length=spec.context_length,
            pad_to_max=spec.pad_to_max,
            vocab_size=spec.vocab_size,
            clean=foreign.clean,
        )
    except VlmError as error:
        if given is not None:
            raise
        return None, f"{error.what} ({error.got})"
    return tokenizer, ""


def _write(
    run: RunDirectory,
    foreign: Foreign,
    trained: Trained | Answering,
    template: list[str] | None,
    source: str,
    *,
    verify: bool,
) -> Certificate | None:
    """Writes the run and, where asked, certifies it."""
    import torch
    from omegaconf import OmegaConf

    from vlm_train.engine import checkpoints
    from vlm_train.engine.rundir import write_atomic

    config = _config(run, foreign, trained, template)
    run.create()
    if trained.tokenizer is not None:
        trained.tokenizer.save(str(run.tokenizer))
    state = {f"model.{name}": tensor for name, tensor in trained.model.state_dict().items()}
    state |= {f"objective.{name}": tensor for name, tensor in trained.objective.items()}
    temporary = checkpoints.begin(run.checkpoints, 0)
    torch.save({"state_dict": state}, temporary / checkpoints.STATE)
    checkpoints.commit(temporary, 0, keep=1)
    write_atomic(run.config, OmegaConf.to_yaml(config))
    choice_file = run.path / CONF / "model" / "imported.yaml"
    choice_file.parent.mkdir(parents=True)
    write_atomic(choice_file, HEADER.format(run=run.path) + OmegaConf.to_yaml(config.model))
    run.event("imported", {"source": source, "family": foreign.family, "notes": list(foreign.notes)})
    run.event("finished", {"step": 0})
    return _certify(run, foreign, trained, has_template=template is not None) if verify else None


def _certify(run: RunDirectory, foreign: Foreign, trained: Trained | Answering, *, has_template: bool) -> Certificate:
    """The run as every other verb reads it, against the other library; a run that is not the same model is removed."""
    from vlm_train import build
    from vlm_train.export.folders import compare

    try:
        if trained.tokenizer is None or not has_template:
            return compare(trained, foreign.load())
        parts = build.load(run.path)
        prepare = None if foreign.notes else preparation(parts)  # a note is about preprocessing that differs
        return compare(trained_of(parts), foreign.load(), prepare=prepare)
    except VlmError:
        shutil.rmtree(run.path)
        raise


def _config(run: RunDirectory, foreign: Foreign, trained: Trained | Answering, template: list[str] | None) -> Any:
    """The defaults of a training with the imported model: what `evaluate` measures, and what a training would do."""
    from vlm_train.cli.compose import compose_config
    from vlm_train.schema import check

    config = compose_config(_choices(foreign, trained, template), checked=False)
    config.run.experiment, config.run.id, config.run.dir = "imported", run.path.name, str(run.path)
    tokenizer = {
        "_target_": "vlm_train.data.tokenizer.HuggingFaceTokenizer",
        "path": str(run.tokenizer.resolve()),
        "context_length": foreign.spec.context_length,
        "pad_to_max": foreign.spec.pad_to_max,
        "vocab_size": foreign.spec.vocab_size,
    }
    config.model = {**foreign.node, "tokenizer": tokenizer}
    try:
        check(config)
    except ConfigError as error:
        raise ConfigError(f"the imported model makes no config: {error.what}", got=error.got, allowed=error.allowed,
                          remedy=error.remedy) from error  # fmt: skip
    return config


def _choices(foreign: Foreign, trained: Trained | Answering, template: list[str] | None) -> list[str]:
    """What a training of such a model would do, as words of a command."""
    from vlm_train.export.answers import Answering

    if not isinstance(trained, Answering):
        return ["objective=sigmoid" if "logit_bias" in trained.objective else "objective=infonce"]
    return ["objective=next_token", "evaluation=vqa", *(["data.template=vicuna"] if template is None else template)]


def _template(foreign: Foreign, trained: Trained | Answering) -> list[str] | None:
    """Words of a command for the template that writes every question as the other library does; of a dual encoder
    none, and None where no template of ours does."""
    from itertools import product

    from PIL import Image

    from vlm_train.data.chat import TEMPLATES, Turn
    from vlm_train.data.dialogue import OWN, DialogueEncoder
    from vlm_train.export.answers import QUESTIONS, Answering

    if not isinstance(trained, Answering):
        return []
    if trained.tokenizer is None:
        return None
    library, blank = foreign.load(), Image.new("RGB", (8, 8))
    theirs = {text: library.prompt(text, blank) for text in QUESTIONS}
    for name, system in product([*TEMPLATES, OWN], [None, ""]) if None not in theirs.values() else ():
        try:
            encoder = DialogueEncoder(name, trained.tokenizer, trained.model.dialogue, system)
            if all(encoder.prompt([Turn("user", text)]).tolist() == ids for text, ids in theirs.items()):
                return [f"data.template={name}", *(["data.system=''"] if system == "" else [])]
        except VlmError:  # one that this tokenizer or this context does not take
            continue
    return None
