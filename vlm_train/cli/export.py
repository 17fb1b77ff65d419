"""`vlm-train export`: a trained model as a folder that another library loads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlm_train.cli.arguments import parse
from vlm_train.cli.options import choice, new_place
from vlm_train.cli.trained import CHECKPOINT, RUN, choose_checkpoint, open_run
from vlm_train.errors import ConfigError

if TYPE_CHECKING:
    from vlm_train.build import Parts
    from vlm_train.export.answers import Answering
    from vlm_train.export.certificate import Certificate, Prepare, Trained
    from vlm_train.models.generative import GenerativeModel

USAGE = """usage: vlm-train export run=RUN out=DIR [format=NAME] [verify=false] [checkpoint=PATH]

  vlm-train export run=runs/quickstart/latest out=exported
  vlm-train export run=runs/quickstart/latest out=exported format=open_clip

Writes config, weights (safetensors), tokenizer, preprocessing and a model card, then loads the folder with the other
library and measures how far its features, logits and pixels are from the trained model's. A difference is an error.
A generative model becomes LLaVA or, with a perceiver, Idefics2; its dialogues become a chat template.

  run=RUN            {run}
  out=DIR            a new or empty folder
  format=NAME        transformers (CLIPModel, SiglipModel, LLaVA, Idefics2) or open_clip; transformers if
                     left out
  verify=false       write without loading and comparing
  checkpoint=PATH    {checkpoint}"""

KEYS = {"run": "RUN", "out": "DIR", "format": "NAME", "verify": "true|false", "checkpoint": "PATH"}
NEXT = {
    "transformers": 'transformers.AutoModel.from_pretrained("{out}")',
    "open_clip": 'open_clip.create_model_and_transforms("local-dir:{out}")',
    "llava": 'transformers.AutoModelForImageTextToText.from_pretrained("{out}")',
    "idefics2": 'transformers.AutoModelForImageTextToText.from_pretrained("{out}")',
}
FORMATS = ("transformers", "open_clip")


def main(words: list[str]) -> int:
    """Runs the verb."""
    if not words or any(word in ("-h", "--help") for word in words):
        print(USAGE.format(run=RUN, checkpoint=CHECKPOINT))
        return 0
    arguments = parse(words, KEYS, verb="export")
    run = open_run(arguments.required("run", example="run=runs/quickstart/latest"))
    out = arguments.required("out", new_place, example="out=DIR")
    target = arguments.optional("format", choice(*FORMATS), "transformers")
    verify = arguments.optional("verify", choice("true", "false"), "true") == "true"

    from transformers.utils import logging

    from vlm_train import build
    from vlm_train.export.folders import export_model

    checkpoint = choose_checkpoint(run, arguments.optional("checkpoint"))
    parts = build.load(run.path, checkpoint=checkpoint)
    logging.disable_progress_bar()
    report = export_model(trained_of(parts), target=target, out=out, verify=verify, prepare=preparation(parts))
    print(f"{checkpoint} as {report.family} for {target}, {report.num_parameters:,} parameters:")
    for path in sorted(out.iterdir()):
        print(f"  {path.name:26} {path.stat().st_size:>12,} bytes")
    if report.certificate is not None:
        print(f"certificate, {target} on this folder against the trained model:")
        print_certificate(report.certificate)
    if report.left_out_bias is not None:
        print(f"CLIPModel has no place for the logit bias {report.left_out_bias:.4f}; rankings are the same without it")
    print(f"next: {NEXT.get(report.family, NEXT[target]).format(out=out)}")
    return 0


def print_certificate(found: Certificate) -> None:
    """The differences, a line each."""
    if found.features is not None:
        print(f"  largest difference of unit features  {found.features:.1e}")
    print(f"  largest difference of logits         {found.logits:.1e}")
    if found.pixels is not None:
        print(f"  largest difference of grey levels    {found.pixels:.1e} of 255")
    print(f"  tokens                               {'the same' if found.has_tokens else 'not compared'}")


def trained_of(parts: Parts) -> Trained | Answering:
    """The model of a run with what belongs to it. Raises ConfigError where it is of no kind that is exported."""
    from vlm_train.export.certificate import Trained
    from vlm_train.models.dual_encoder import DualEncoder
    from vlm_train.models.generative import GenerativeModel

    if isinstance(parts.model, GenerativeModel):
        return _answering(parts, parts.model)
    state = parts.objective.state_dict()
    if not isinstance(parts.model, DualEncoder) or "logit_scale" not in state:
        raise ConfigError("only a dual encoder trained by a contrastive objective or a generative model is exported",
                          got=f"{type(parts.model).__name__} and {type(parts.objective).__name__}",
                          allowed="DualEncoder with infonce or sigmoid; GenerativeModel")  # fmt: skip
    return Trained(
        model=parts.model,
        tokenizer=parts.tokenizer,
        logit_scale=state["logit_scale"],
        logit_bias=state.get("logit_bias"),
    )


def _answering(parts: Parts, model: GenerativeModel) -> Answering:
    from vlm_train import build
    from vlm_train.data.chat import Turn
    from vlm_train.data.chat_jinja import jinja_of
    from vlm_train.data.decode import SampleError
    from vlm_train.export.answers import Answering

    encoder = build.dialogues(parts)

    def prompt(text: str) -> list[int] | None:
        try:
            return [int(number) for number in encoder.prompt([Turn("user", text)])]
        except SampleError:  # too long, or more images than the model takes
            return None

    return Answering(
        model=model,
        tokenizer=parts.tokenizer,
        prompt=prompt,
        stop_id=encoder.stop_id,
        chat_template=jinja_of(encoder, parts.tokenizer),
    )


def preparation(parts: Parts) -> Prepare:
    """What evaluation makes of a picture: uint8 pixels [3, S, S]."""
    import numpy as np

    from vlm_train.data.rendering import render
    from vlm_train.data.transforms import EvalTransform

    transform, unused = EvalTransform(spec=parts.image_spec), np.random.default_rng(0)
    return lambda picture: render(
        np.array(picture.convert("RGB")), transform.plan(picture.width, picture.height, unused)
    ).transpose(2, 0, 1)
