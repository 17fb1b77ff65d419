"""Quantised weights beside adapters on two ranks: what is shared out, what is sent, and the gradients of one rank."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "models"))
from generative_toys import SPEC, TEXT, make_batch, make_model, rows_of

from vlm_train.distributed import collectives
from vlm_train.distributed.testing import run_ranks
from vlm_train.engine import sharding
from vlm_train.models.generative import GenerativeModel
from vlm_train.models.language import CausalLanguageModel
from vlm_train.models.lora import fitted
from vlm_train.models.nf4 import NF4Linear
from vlm_train.types import NO_LABEL, Batch

LORA = {"rank": 4, "alpha": 8}
SHARES = [0, 1, 2], [3, 4]


class Traffic(TorchDispatchMode):
    """Bytes that this rank sends, by the kind of collective."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith("c10d"):
            kind, tensors = name.split(".")[1], torch.utils._pytree.tree_leaves(args)
            sizes = [x.numel() * x.element_size() for x in tensors if isinstance(x, Tensor)]
            self.sent[kind] = self.sent.get(kind, 0) + sum(sizes)
        return func(*args, **(kwargs or {}))


def make(quantize: str | None = "nf4") -> GenerativeModel:
    """In fp64, with quantised weights that are large and adapters that do something."""
    keys = {"model_type": "llama", **TEXT, "tie_word_embeddings": True}
    model = make_model(text=CausalLanguageModel(spec=SPEC, architecture=keys, lora=LORA), feature_layer=-2)
    model.get_submodule("vision").requires_grad_(False)
    if quantize is not None:
        lora = {**LORA, "quantize": quantize}
        text = CausalLanguageModel(spec=SPEC, architecture=keys, lora=lora)
        drawn = model.text.state_dict()
        adapters = {name: tensor for name, tensor in drawn.items() if "lora_" in name}
        text.load_state_dict({**fitted(drawn, text.state_dict()), **adapters})
        model.text = text
    return model.double().train()


def total(model: nn.Module, batch: Batch) -> Tensor:
    """Sum over the labels, which adds up over ranks whatever share each has."""
    outputs = model(batch)
    logits = outputs["token_hidden"] @ outputs["token_vocabulary"].T
    labels = batch["dialogue_labels"].flatten()
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels, ignore_index=NO_LABEL, reduction="sum")


def on_a_rank() -> dict[str, Any]:
    batch = rows_of(make_batch(), *SHARES[collectives.rank()])
    return {"fsdp2": sharded(batch), "ddp": replicated(batch)}


def sharded(batch: Batch) -> dict[str, Any]:
    """Rank 1 knows the shapes alone, as in a run."""
    model = make() if collectives.rank() == 0 else make().to("meta")
    sharding.shard(model, init_device_mesh("cpu", (2,)))
    held = {name: [isinstance(p, DTensor), *sharding.local([p])[0].shape] for name, p in model.named_parameters()}
    return {**observed(model, model, batch), "held": held}


def replicated(batch: Batch) -> dict[str, Any]:
    model = make()
    with Traffic() as start:
        wrapper = DistributedDataParallel(model)
    return {**observed(wrapper, model, batch), "start": start.sent}


def observed(wrapper: nn.Module, model: nn.Module, batch: Batch) -> dict[str, Any]:
    with Traffic() as forward:
        loss = total(wrapper, batch)
    with Traffic() as backward:
        (2 * loss).backward()  # both average over ranks
    state = {name: whole(tensor) for name, tensor in model.state_dict().items()}
    gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "gradients": gradients, "state": state,
            "forward": forward.sent, "backward": backward.sent}  # fmt: skip


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    """What two ranks found, by strategy."""
    return run_ranks(on_a_rank, 2)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
def test_two_ranks_have_the_loss_and_the_gradients_of_one(strategy: str, ranks: list[dict[str, Any]]) -> None:
    """fp64; measured 7e-15 of gradients up to 69, and 0 of the loss. The twins: the share of one rank, and the weights
    as they were before they were quantised."""
    alone = observed_alone(make())
    for found in (rank[strategy] for rank in ranks):
        assert found["state"].keys() == alone["state"].keys()
        assert all(torch.equal(tensor, alone["state"][name]) for name, tensor in found["state"].items())
        assert distance(found["gradients"], alone["gradients"]) < 1e-12
    assert abs(sum(rank[strategy]["loss"] for rank in ranks) - alone["loss"]) < 1e-12
    for twin in (observed_alone(make(), *SHARES[0]), observed_alone(make(quantize=None))):
        assert abs(twin["loss"] - alone["loss"]) > 1e-2 and distance(twin["gradients"], alone["gradients"]) > 1e-2


def observed_alone(model: GenerativeModel, *rows: int) -> dict[str, Any]:
    loss = total(model, rows_of(make_batch(), *rows) if rows else make_batch())
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "gradients": gradients, "state": model.state_dict()}


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


@pytest.mark.slow
def test_packed_weights_are_shared_out_by_fsdp2_and_sent_once_by_ddp(ranks: list[dict[str, Any]]) -> None:
    """Of the bytes of a forward pass under DistributedDataParallel none are packed weights: it sends the buffers of the
    model and nothing else. The twin: its start, which sends everything."""
    model = make()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, NF4Linear)}
    assert len(layers) == 2 * 7
    for held in (rank["fsdp2"]["held"] for rank in ranks):
        for name, layer in layers.items():
            for part in ("weight", "absmax"):
                is_sharded, num_rows, num_columns = held[f"{name}.{part}"]
                assert is_sharded and num_rows == layer.out_features // 2
                assert num_columns == getattr(layer, part).shape[1]
    packed = sum(layer.weight.numel() + 8 * layer.absmax.numel() for layer in layers.values())
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    for found in (rank["ddp"] for rank in ranks):
        assert set(found["forward"]) == {"broadcast_"} and found["forward"]["broadcast_"] <= buffers < packed
        assert set(found["backward"]) == {"allreduce_"}
        learning = sum(8 * p.numel() for p in model.parameters() if p.requires_grad)
        assert found["backward"]["allreduce_"] == learning
        assert found["start"]["broadcast_"] > packed
