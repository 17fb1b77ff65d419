"""What contrastive losses keep for the backward pass on one rank, at global batches that fit on no machine at hand.

    python scripts/bench/loss_memory.py [--json FILE]              # CPU, about a minute

One rank of W is simulated: tensors have shapes and no contents, and every exchange answers with tensors of the right
shape. Counted are the bytes of all tensors that autograd saves, each storage once; the features themselves are not
left out. Beside ours: open_clip's softmax loss with local_loss and gather_with_grad, and its SigLIP loss in all four
ways of exchanging texts. Features of 512 numbers in fp32.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import open_clip.loss as theirs
import torch
from torch import Tensor

from vlm_train.distributed import collectives, ring
from vlm_train.distributed.ring import Hop
from vlm_train.objectives.pairing import Pairing, sigmoid_gathered, softmax_gathered
from vlm_train.objectives.tiled import sigmoid_tiled, softmax_tiled

WIDTH = 512
WORLDS = (2, 8, 32)
BATCHES = (8192, 32768, 131072)
OPEN_CLIP_WAYS = ("bidir", "shift", "reduce", "gather")
META = torch.device("meta")

Loss = Callable[[Tensor, Tensor], Tensor]


class _Echo(torch.autograd.Function):
    """An exchange with gradient: as many tensors of the same shape as come back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, copies: int) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for _ in range(copies))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return torch.empty_like(gradients[0]), None


@contextmanager
def one_rank_of(world_size: int) -> Iterator[None]:
    """Every exchange of either project answers as if there were `world_size` ranks with equal batches."""
    echo = _Echo.apply
    everything = lambda x, counts=None: torch.cat(echo(x, world_size))  # noqa: E731
    patches = [
        mock.patch.object(collectives, "rank", lambda: 0),
        mock.patch.object(collectives, "world_size", lambda: world_size),
        mock.patch.object(collectives, "gather_rows", everything),
        mock.patch.object(ring, "pass_on", lambda tensors: Hop([], list(tensors), list(tensors))),
        mock.patch("torch.distributed.nn.all_gather", lambda x: echo(x, world_size)),
        mock.patch("torch.distributed.nn.all_reduce", lambda x, op: echo(x, 1)[0]),
        mock.patch.object(theirs, "neighbour_exchange_with_grad", lambda a, b, x: echo(x, 1)[0]),
        mock.patch.object(
            theirs, "neighbour_exchange_bidir_with_grad", lambda a, b, x, y: (echo(x, 1)[0], echo(y, 1)[0])
        ),
    ]
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def saved_bytes(loss: Loss, num_pairs: int) -> int:
    """Bytes that autograd saves for one rank with `num_pairs` pairs."""
    image, text = (torch.empty(num_pairs, WIDTH, device=META, requires_grad=True) for _ in range(2))
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor  # held, so that no storage takes the place of another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(image, text)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def ours(loss: Callable[..., tuple[Tensor, ...]], world_size: int, *, biased: bool) -> Loss:
    parameters = [torch.empty(1, device=META, requires_grad=True) for _ in range(1 + biased)]

    def of_one_rank(image: Tensor, text: Tensor) -> Tensor:
        ids, counts = torch.empty(len(image), 1, dtype=torch.int64, device=META), [len(image)] * world_size
        pairing = Pairing(
            image_BD=image, text_CD=text, image_ids=ids, text_ids=ids, image_counts=counts, text_counts=counts
        )
        return loss(pairing, *parameters)[0]

    return of_one_rank


def open_clip_softmax(world_size: int) -> Loss:
    loss = theirs.ClipLoss(local_loss=True, gather_with_grad=True, rank=0, world_size=world_size)
    return lambda image, text: loss(image, text, torch.empty((), device=META, requires_grad=True))


def open_clip_sigmoid(world_size: int, way: str) -> Loss:
    loss = theirs.SigLipLoss(rank=0, world_size=world_size, dist_impl=way)
    parameters = [torch.empty((), device=META, requires_grad=True) for _ in range(2)]
    return lambda image, text: loss(image, text, *parameters)


def losses(world_size: int) -> dict[str, Loss]:
    """Name -> loss of one rank."""
    return {
        "softmax, tiled": ours(softmax_tiled, world_size, biased=False),
        "softmax, gathered": ours(softmax_gathered, world_size, biased=False),
        "open_clip softmax, local loss": open_clip_softmax(world_size),
        "sigmoid, tiled": ours(sigmoid_tiled, world_size, biased=True),
        "sigmoid, gathered": ours(sigmoid_gathered, world_size, biased=True),
        **{f"open_clip SigLIP, {way}": open_clip_sigmoid(world_size, way) for way in OPEN_CLIP_WAYS},
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(argv)
    columns = [(world_size, batch) for world_size in WORLDS for batch in BATCHES]
    table: dict[str, dict[str, float]] = {}
    for world_size, batch in columns:
        with one_rank_of(world_size):
            for name, loss in losses(world_size).items():
                head, megabytes = f"{batch // 1024}k on {world_size}", saved_bytes(loss, batch // world_size) / 1e6
                table.setdefault(name, {})[head] = megabytes
    print("MB that the loss keeps for its backward pass on one rank: global batch on ranks\n")
    heads = list(next(iter(table.values())))
    print(f"{'':32}" + "".join(f"{head:>12}" for head in heads))
    for name, row in table.items():
        print(f"{name:32}" + "".join(f"{row[head]:12,.0f}" for head in heads))
    if options.json:
        options.json.write_text(json.dumps(table, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
