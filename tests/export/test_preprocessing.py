"""What a picture goes through before the model is part of the certificate, for either format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vlm_train.data.tokenizer import BytePairTokenizer
from vlm_train.errors import CheckpointError
from vlm_train.export.certificate import Prepare, Trained, certify
from vlm_train.export.folders import export_model
from vlm_train.export.hf import TransformersModel
from vlm_train.export.openclip import OpenClipModel
from vlm_train.models.dual_encoder import DualEncoder
from vlm_train.types import ImageSpec

SCALE = torch.tensor([3.0])
MEAN, STD = [0.5, 0.4578275, 0.40821073], [0.3, 0.3, 0.3]
SQUASHED = {"do_center_crop": False, "size": {"height": 32, "width": 32}}


@pytest.mark.parametrize(
    ("target", "change"),
    [
        ("transformers", {"image_mean": MEAN}),
        ("transformers", {"image_std": STD}),
        ("transformers", SQUASHED),
        ("open_clip", {"mean": MEAN}),
        ("open_clip", {"std": STD}),
        ("open_clip", {"resize_mode": "squash"}),
    ],
)
def test_other_preprocessing_is_noticed(
    clip: DualEncoder,
    clip_tokenizer: BytePairTokenizer,
    out: Path,
    prepare: Callable[[ImageSpec], Prepare],
    target: str,
    change: dict[str, Any],
) -> None:
    trained = Trained(model=clip, tokenizer=clip_tokenizer, logit_scale=SCALE)
    own = prepare(clip.image_spec)
    report = export_model(trained, target=target, out=out, prepare=own)
    assert report.certificate is not None and report.certificate.pixels is not None
    assert report.certificate.pixels < 1.5  # of 255; measured 1.0
    is_open_clip = target == "open_clip"
    path = out / ("open_clip_config.json" if is_open_clip else "preprocessor_config.json")
    document = json.loads(path.read_text())
    (document["preprocess_cfg"] if is_open_clip else document).update(change)
    path.write_text(json.dumps(document))
    theirs = OpenClipModel.from_folder(out) if is_open_clip else TransformersModel(out)
    with pytest.raises(CheckpointError, match="not the same model") as caught:
        certify(trained.reference(), theirs, prepare=own)
    assert float(str(caught.value.got).split()[-1]) > 4  # measured 4.7, 15 and 116
