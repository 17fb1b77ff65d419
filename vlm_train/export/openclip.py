"""open_clip: our models as folders that `local-dir:` loads, and its folders and files as models of ours.

open_clip itself is needed only to certify, and for architectures that are named instead of described.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from vlm_train.errors import CheckpointError, ConfigError, nearest
from vlm_train.export import openclip_config, openclip_timm
from vlm_train.export.certificate import Encoded, Trained
from vlm_train.export.foreign import CLIP_VOCABULARY, Foreign, read_tensors
from vlm_train.export.openclip_config import NAME
from vlm_train.export.rules import Family
from vlm_train.export.weights import export_state
from vlm_train.models.dual_encoder import DualEncoder
from vlm_train.models.vision.image import as_image_spec
from vlm_train.types import ImageSpec

CONFIG_FILE, WEIGHTS_FILE = "open_clip_config.json", "open_clip_model.safetensors"
TEXT = "text."
"""What the names of a text tower begin with in models that open_clip calls custom."""

_PREFERRED = (WEIGHTS_FILE, "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")


class OpenClipModel:
    """A model in the hands of open_clip.

    Args:
        model: as open_clip makes it.
        preprocess: its evaluation transform, and `tokenizer`: ids of texts; None where they were not asked for.
    """

    name = NAME

    def __init__(self, model: Any, *, preprocess: Any = None, tokenizer: Any = None) -> None:
        self.model, self._preprocess, self._tokenizer = model.eval(), preprocess, tokenizer

    @classmethod
    def from_folder(cls, directory: Path) -> OpenClipModel:
        """As users of open_clip load a folder: weights, preprocessing and tokenizer."""
        library, name = open_clip(), f"local-dir:{directory}"
        model, _, preprocess = library.create_model_and_transforms(name)
        return cls(model, preprocess=preprocess, tokenizer=library.get_tokenizer(name))

    @classmethod
    def from_weights(
        cls, config: Mapping[str, Any], weights: Path, *, images: ImageSpec, tokenizer_at: str | None
    ) -> OpenClipModel:
        """The model of a `model_cfg` with the weights of a file; the tokenizer of a folder or open_clip's own."""
        library = open_clip()
        preprocess = library.image_transform(
            images.size, is_train=False, mean=images.mean, std=images.std, resize_mode=images.resize
        )
        keywords = {key: value for key, value in config.items() if key != "custom_text"}
        model = (library.CustomTextCLIP if config.get("custom_text") else library.CLIP)(**keywords)
        try:
            library.load_checkpoint(model, str(weights), weights_only=True)
        except RuntimeError as error:
            raise CheckpointError(f"open_clip cannot load {weights} by its config", got=error) from error
        text = config["text_cfg"]
        length = text.get("context_length", openclip_config.CONTEXT)
        options = text.get("tokenizer_kwargs") or {}
        tokenizer = None
        if tokenizer_at == CLIP_VOCABULARY:
            tokenizer = library.SimpleTokenizer(context_length=length, **options)
        elif tokenizer_at is not None:
            tokenizer = library.tokenizer.HFTokenizer(tokenizer_at, context_length=length, **options)
        return cls(model, preprocess=preprocess, tokenizer=tokenizer)

    def encode(self, pixels_B3SS: Tensor, ids_BT: Tensor) -> Encoded:
        """See `Library.encode`."""
        return Encoded(
            images=self.model.encode_image(pixels_B3SS, normalize=True),
            texts=self.model.encode_text(ids_BT, normalize=True),
            logits=self.model.get_logits(pixels_B3SS, ids_BT)[0],
        )

    def tokenize(self, texts: list[str]) -> Tensor | None:
        """See `Library.tokenize`."""
        return None if self._tokenizer is None else self._tokenizer(texts)

    def prepare(self, picture: Image.Image) -> Tensor | None:
        """See `Library.prepare`."""
        return None if self._preprocess is None else self._preprocess(picture)


def open_clip() -> Any:
    """The library. Raises ConfigError where it is not installed."""
    try:
        return importlib.import_module("open_clip")
    except ModuleNotFoundError as error:
        raise ConfigError(
            "this needs open_clip, which is not installed",
            got=f"no module {error.name}",
            remedy="pip install open-clip-torch==3.3.0; a folder with its config can do without: verify=false",
        ) from error


def family_of(model: DualEncoder) -> Family:
    """Which of open_clip's image towers holds `model`; `config_of` refuses what none does."""
    return "open_clip_timm" if getattr(model.vision, "pool", None) == "map" else "open_clip"


def write(trained: Trained, directory: Path) -> str:
    """Writes config, weights and tokenizer; returns the family. Raises ConfigError."""
    model, family = trained.model, family_of(trained.model)
    config = openclip_config.config_of(trained, tokenizer_name=directory.resolve().name)
    state = export_state(model, family=family, logit_scale=trained.logit_scale, logit_bias=trained.logit_bias)
    if config["model_cfg"]["custom_text"]:
        state = {name if name.startswith(("visual.", "logit_")) else TEXT + name: state[name] for name in state}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(state, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    assert trained.tokenizer is not None
    trained.tokenizer.save(str(directory))
    return family


def read(path: Path, architecture: str | None) -> Foreign:
    """The model of a folder with open_clip's config, or of a file of weights with a named `architecture`.

    Raises:
        ConfigError: it cannot be read, or has something that our towers have not.
    """
    document = _described(path) if path.is_dir() else {"model_cfg": _named(architecture)}
    weights = _weights_in(path) if path.is_dir() else path
    config, images = document["model_cfg"], document.get("preprocess_cfg")
    node, spec, notes = openclip_config.node_of(config, images or {})
    if images is None:
        notes.append("a file of weights does not say how its images are prepared: mean and std of CLIP were taken")
    state = {name.removeprefix(TEXT): tensor for name, tensor in read_tensors(weights).items()}
    is_timm = "timm_model_name" in config["vision_cfg"]
    vocabulary, options = _vocabulary(path, config["text_cfg"]), config["text_cfg"].get("tokenizer_kwargs") or {}
    return Foreign(
        family="open_clip_timm" if is_timm else "open_clip",
        node=node,
        spec=spec,
        state=state,
        vocabulary=vocabulary,
        notes=notes,
        load=lambda: OpenClipModel.from_weights(
            openclip_timm.without_download(config),
            weights,
            images=as_image_spec(node["vision"]["image"]),
            tokenizer_at=vocabulary,
        ),
        clean=options.get("clean", None if vocabulary == CLIP_VOCABULARY else "whitespace"),
    )


def _vocabulary(path: Path, text: Mapping[str, Any]) -> str | None:
    """A named tokenizer of Hugging Face lies in the folder, or is somewhere on the hub."""
    if not text.get("hf_tokenizer_name"):
        return CLIP_VOCABULARY
    return str(path) if path.is_dir() and (path / "tokenizer_config.json").is_file() else None


def _described(folder: Path) -> dict[str, Any]:
    try:
        document: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        return {"preprocess_cfg": {}, **document, "model_cfg": dict(document["model_cfg"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder / CONFIG_FILE} cannot be read",
            got=f"{type(error).__name__}: {error}",
            allowed="JSON with model_cfg and preprocess_cfg",
        ) from error


def _named(architecture: str | None) -> dict[str, Any]:
    library = open_clip()
    found = None if architecture is None else library.get_model_config(architecture)
    if found is None:
        close = nearest(architecture or "", library.list_models())
        raise ConfigError(
            "a file of weights needs the name of its architecture in open_clip",
            got=f"architecture={architecture}" if architecture else "no architecture=",
            allowed=", ".join(close) or "a name of open_clip.list_models(), or a folder with open_clip_config.json",
            remedy=f"architecture={(close or ['ViT-B-32'])[0]}",
        )
    return dict(found)


def _weights_in(folder: Path) -> Path:
    files = sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES)
    named = [folder / name for name in _PREFERRED if (folder / name).is_file()]
    if not named and len(files) != 1:
        raise ConfigError(
            f"{folder} has no file of weights that open_clip would take",
            got=", ".join(path.name for path in files) or "none",
            allowed=", ".join(_PREFERRED),
            remedy=f"name it {WEIGHTS_FILE}",
        )
    return (named or files)[0]


def is_folder(path: Path) -> bool:
    """Whether a folder is one of open_clip's."""
    return (path / CONFIG_FILE).is_file()
