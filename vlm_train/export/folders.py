"""The two ways between us and other libraries: our model as a folder that one loads, and such a folder as ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from vlm_train.assets import resolve_asset
from vlm_train.errors import ConfigError
from vlm_train.export import hf, openclip
from vlm_train.export.card import model_card
from vlm_train.export.certificate import Certificate, Library, Prepare, Trained, certify
from vlm_train.export.foreign import Foreign

Format = Literal["transformers", "open_clip"]

WRITERS: dict[str, Callable[[Trained, Path], str]] = {hf.NAME: hf.write, openclip.NAME: openclip.write}
READERS: dict[str, Callable[[Path], Library]] = {
    hf.NAME: hf.TransformersModel,
    openclip.NAME: openclip.OpenClipModel.from_folder,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """What an export made.

    Attributes:
        family: the kind of model in the other library, see `rules.Family`.
        certificate: how far the other library is from our model; None where it was not asked for.
        left_out_bias: the logit bias that a CLIPModel of transformers has no place for; without it every logit is
            shifted by one constant, which changes no ranking and no softmax.
    """

    family: str
    num_parameters: int
    certificate: Certificate | None
    left_out_bias: float | None = None


def export_model(
    trained: Trained, *, target: Format, out: Path, verify: bool = True, prepare: Prepare | None = None
) -> ExportReport:
    """Writes config, weights (fp32 safetensors), tokenizer, preprocessing and card to `out`, and certifies them.

    Args:
        trained: two of our transformers with a tokenizer; not changed.
        target: the library that loads the folder.
        out: folder to write, made if missing.
        verify: load the folder with that library and compare.
        prepare: evaluation's way to pixels, for comparing the preprocessing too.

    Raises:
        ConfigError: the library has no model for these towers, or is not installed.
        CheckpointError: the written folder does not reproduce the model.
    """
    reference = trained.reference()
    if verify and target == openclip.NAME:
        openclip.open_clip()
    family = WRITERS[target](reference, out)
    left_out = None
    if family == "clip" and reference.logit_bias is not None:
        left_out, reference = float(reference.logit_bias), replace(reference, logit_bias=None)
    certificate = certify(reference, READERS[target](out), prepare=prepare) if verify else None
    card = model_card(reference.model, target, family, certificate, left_out_bias=left_out)
    (out / "README.md").write_text(card, encoding="utf-8")
    return ExportReport(
        family=family,
        num_parameters=sum(parameter.numel() for parameter in reference.model.parameters()),
        certificate=certificate,
        left_out_bias=left_out,
    )


def read_model(path: str, architecture: str | None = None) -> Foreign:
    """The model at a folder or in a file of another library, read but not yet ours.

    Args:
        path: a folder of open_clip (it has open_clip_config.json) or of transformers, a hub name of transformers, or a
            file of open_clip's weights.
        architecture: of such a file, its name in open_clip.

    Raises:
        ConfigError: nothing there, nothing that can be read safely, or parts that our towers have not.
    """
    location = resolve_asset(path)
    local = Path(location)
    is_open_clip = local.is_file() or openclip.is_folder(local)
    if architecture is not None and not local.is_file():
        raise ConfigError(
            "a folder says its architecture itself",
            got=f"architecture={architecture}",
            allowed="architecture= with a file of weights",
            remedy="leave it out",
        )
    return openclip.read(local, architecture) if is_open_clip else hf.read(location)
