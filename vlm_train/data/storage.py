"""Where the bytes of shards come from: a local disk, or a server through the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from vlm_train.data.files import File, Range, Stat, StorageOptions
from vlm_train.data.local import LocalFile
from vlm_train.locations import is_remote

__all__ = ["File", "LocalFile", "Stat", "StorageOptions", "open_file", "stat_files"]

_PARALLEL = 16


def open_file(
    location: str,
    options: StorageOptions | None = None,
    *,
    stat: Stat | None = None,
    kept: Callable[[], Sequence[Range]] | None = None,
    window_bytes: int = 0,
) -> File:
    """A shard. Nothing is opened or asked for before the first read.

    Args:
        location: absolute path, or URL (`https://`, `http://`, `s3://`, `gs://`).
        options: for servers.
        stat: size and version where they are known already (from a manifest); it saves a request per shard.
        kept: gives the ranges that will be read from this shard; it is called when the shard is first read. Where they
            are less than half of it only they are fetched into the cache; None is the whole shard.
        window_bytes: how many bytes the shards that are read in turn have together; where the cache cannot hold that
            much, ranges are read from the server as they are needed.
    """
    if not is_remote(location):
        return LocalFile(location)
    from vlm_train.data.cache import CachedFile, ShardCache
    from vlm_train.data.remote import RemoteFile

    options = options or StorageOptions()
    remote = RemoteFile(location, options, stat)
    if not options.cache_gb:
        return remote
    return CachedFile(remote, ShardCache(int(options.cache_gb * 1e9)), kept=kept, window_bytes=window_bytes)


def stat_files(files: Sequence[File]) -> list[Stat]:
    """`stat` of each, in order; servers are asked for several at once. Raises the first error in that order."""
    if not any(is_remote(file.location) for file in files):
        return [file.stat() for file in files]
    with ThreadPoolExecutor(_PARALLEL) as pool:
        return list(pool.map(lambda file: file.stat(), files))
