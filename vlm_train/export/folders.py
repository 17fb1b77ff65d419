"""The two ways between us and other libraries: our model as a folder that one loads, and such a folder as ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from vlm_train.assets import resolve_asset
from vlm_train.errors import ConfigError
from vlm_train.export import hf, idefics2, llava, openclip, speaking
from vlm_train.export.answers import Answering, certify_answers
from vlm_train.export.card import answering_card, model_card
from vlm_train.export.certificate import Certificate, Library, Prepare, Trained, certify
from vlm_train.export.foreign import Foreign, read_config
from vlm_train.export.speaking import Kind
from vlm_train.models.connectors.perceiver import PerceiverConnector
from vlm_train.models.generative import GenerativeModel
from vlm_train.models.nf4 import num_weights

Format = Literal["transformers", "open_clip"]

WRITERS: dict[str, Callable[[Trained, Path], str]] = {hf.NAME: hf.write, openclip.NAME: openclip.write}
READERS: dict[str, Callable[[Path], Library]] = {
    hf.NAME: hf.TransformersModel,
    openclip.NAME: openclip.OpenClipModel.from_folder,
}
"""Of dual encoders; only transformers has generative models."""
KINDS: dict[str, Kind] = {kind.family: kind for kind in (llava.KIND, idefics2.KIND)}
"""Of generative models, by the `model_type` of transformers."""


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
    trained: Trained | Answering, *, target: Format, out: Path, verify: bool = True, prepare: Prepare | None = None
) -> ExportReport:
    """Writes config, weights (fp32 safetensors), tokenizer, preprocessing and card to `out`, and certifies them.

    Args:
        trained: two of our transformers, or a generative model, with a tokenizer; not changed.
        target: the library that loads the folder.
        out: folder to write, made if missing.
        verify: load the folder with that library and compare.
        prepare: evaluation's way to pixels, for comparing the preprocessing too.

    Raises:
        ConfigError: the library has no model for these towers, or is not installed.
        CheckpointError: the written folder does not reproduce the model.
    """
    reference = trained.reference()
    if isinstance(reference, Answering):
        return _export_answers(reference, target=target, out=out, verify=verify, prepare=prepare)
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


def _export_answers(
    reference: Answering, *, target: Format, out: Path, verify: bool, prepare: Prepare | None
) -> ExportReport:
    if target != hf.NAME:
        raise ConfigError(
            f"{target} has no model that answers", got=f"format={target}", allowed=hf.NAME, remedy=f"format={hf.NAME}"
        )
    kind = kind_of(reference.model)
    speaking.write(kind, reference, out)
    certificate = certify_answers(reference, kind.library(out), prepare=prepare) if verify else None
    (out / "README.md").write_text(answering_card(reference, kind.family, certificate), encoding="utf-8")
    num_parameters = num_weights(reference.model)
    return ExportReport(family=kind.family, num_parameters=num_parameters, certificate=certificate)


def kind_of(model: GenerativeModel) -> Kind:
    """The class of transformers that may hold `model`: its connector decides."""
    return idefics2.KIND if isinstance(model.connector, PerceiverConnector) else llava.KIND


def compare(trained: Trained | Answering, library: Any, *, prepare: Prepare | None = None) -> Certificate:
    """How far `library`, which holds the same model, is from `trained`. Raises CheckpointError where it is too far."""
    if isinstance(trained, Answering):
        return certify_answers(trained.reference(), library, prepare=prepare)
    return certify(trained.reference(), library, prepare=prepare)


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
    if is_open_clip:
        return openclip.read(local, architecture)
    config, processor = read_config(location)
    kind = KINDS.get(config.model_type)
    if kind is None:
        return hf.read(location, config, processor)
    return speaking.read(kind, location, config, processor)
