"""`vlm-train export`: a trained dual encoder as a folder that transformers loads."""

from __future__ import annotations

from vlm_train.cli.arguments import parse
from vlm_train.cli.options import new_place
from vlm_train.cli.trained import CHECKPOINT, RUN, choose_checkpoint, open_run
from vlm_train.errors import ConfigError

USAGE = """usage: vlm-train export run=RUN out=DIR [checkpoint=PATH]

  vlm-train export run=runs/quickstart/latest out=exported

Writes config, weights (safetensors), tokenizer, image processor and a model card, then loads the folder with
transformers and measures how far its features and logits are from the trained model's. A difference is an error.

  run=RUN            {run}
  out=DIR            a new or empty folder
  checkpoint=PATH    {checkpoint}"""

KEYS = {"run": "RUN", "out": "DIR", "checkpoint": "PATH"}


def main(words: list[str]) -> int:
    """Runs the verb."""
    if not words or any(word in ("-h", "--help") for word in words):
        print(USAGE.format(run=RUN, checkpoint=CHECKPOINT))
        return 0
    arguments = parse(words, KEYS, verb="export")
    run = open_run(arguments.required("run", example="run=runs/quickstart/latest"))
    out = arguments.required("out", new_place, example="out=DIR")

    from transformers.utils import logging

    from vlm_train import build
    from vlm_train.export.hf import export_transformers
    from vlm_train.models.dual_encoder import DualEncoder

    checkpoint = choose_checkpoint(run, arguments.optional("checkpoint"))
    parts = build.load(run.path, checkpoint=checkpoint)
    state = parts.objective.state_dict()
    if not isinstance(parts.model, DualEncoder) or "logit_scale" not in state:
        raise ConfigError("only a dual encoder trained by a contrastive objective can be exported",
                          got=f"{type(parts.model).__name__} and {type(parts.objective).__name__}",
                          allowed="DualEncoder with infonce or sigmoid")  # fmt: skip
    logging.disable_progress_bar()
    report = export_transformers(
        parts.model,
        tokenizer=parts.tokenizer,
        logit_scale=state["logit_scale"],
        logit_bias=state.get("logit_bias"),
        out=out,
    )
    print(f"{checkpoint} as {report.family}, {report.num_parameters:,} parameters:")
    for path in sorted(out.iterdir()):
        print(f"  {path.name:26} {path.stat().st_size:>12,} bytes")
    print("certificate, transformers on this folder against the trained model:")
    print(f"  largest difference of unit features  {report.feature_difference:.1e}")
    print(f"  largest difference of logits         {report.logit_difference:.1e}")
    if report.left_out_bias is not None:
        print(f"CLIPModel has no place for the logit bias {report.left_out_bias:.4f}; rankings are the same without it")
    print(f'next: transformers.AutoModel.from_pretrained("{out}")')
    return 0
