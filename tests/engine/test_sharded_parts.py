"""Frozen parts and adapters on two ranks that share the weights: gradients, what is sent, and what stays tied."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "models"))
from generative_toys import SPEC, TEXT, make_batch, make_model, rows_of

from vlm_train.distributed import collectives
from vlm_train.distributed.testing import run_ranks
from vlm_train.engine import sharding
from vlm_train.models.generative import GenerativeModel
from vlm_train.models.language import CausalLanguageModel
from vlm_train.types import NO_LABEL, Batch

LORA = {"rank": 4, "alpha": 8}
STAGES: dict[str, tuple[tuple[str, ...], Any]] = {
    "align": (("vision", "text"), None),
    "instruct": (("vision",), None),
    "adapters": (("vision",), LORA),
}
SHARES = [0, 1, 2], [3, 4]


class Traffic(TorchDispatchMode):
    """Numbers that this rank sends to be gathered, and of gradients to be added up."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered, self.reduced = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if "allgather" in name:
            self.gathered += args[1].numel()
        if "reduce_scatter" in name:
            self.reduced += args[1].numel()
        return func(*args, **(kwargs or {}))


def staged(stage: str) -> GenerativeModel:
    frozen, lora = STAGES[stage]
    keys = {"model_type": "llama", **TEXT, "tie_word_embeddings": True}
    model = make_model(text=CausalLanguageModel(spec=SPEC, architecture=keys, lora=lora), feature_layer=-2)
    for part in frozen:
        getattr(model, part).requires_grad_(False)
    return model.train()


def total(model: GenerativeModel, batch: Batch) -> Tensor:
    """Sum over the labels, which adds up over ranks whatever share each has."""
    outputs = model(batch)
    labels = batch["dialogue_labels"]
    logits = outputs["token_hidden"] @ outputs["token_vocabulary"].T
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=NO_LABEL, reduction="sum"
    )


def whole(gradient: Tensor) -> Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def share(parameter: Tensor) -> int:
    """Numbers of it that a rank of two holds, the fill of the last rows included."""
    return -(-parameter.shape[0] // 2) * parameter[0].numel()


def on_a_rank() -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2,))
    return {stage: shared(stage, mesh) for stage in STAGES}


def shared(stage: str, mesh: DeviceMesh) -> dict[str, Any]:
    model = staged(stage).double()
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    sharding.shard(model, mesh)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == learning
    batch = rows_of(make_batch(), *SHARES[collectives.rank()])
    with Traffic() as forward:
        loss = total(model, batch)
    with Traffic() as backward:
        (2 * loss).backward()  # sharding averages over ranks
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    embedding = model.text.network.get_input_embeddings().weight  # type: ignore[operator]
    return {
        "gradients": {name: whole(gradient) for name, gradient in gradients.items()},
        "learning": learning,
        "is_tied": model.text.vocabulary is embedding,
        "sent": {"gathered": backward.gathered, "reduced": backward.reduced, "reduced forward": forward.reduced},
        "learning numbers": 2 * sum(share(p) for name, p in staged(stage).named_parameters() if name in learning),
        "text blocks": sum(share(p) for p in staged(stage).text.blocks.parameters()),
        "tower blocks": sum(share(p) for p in staged(stage).vision.blocks.parameters()),  # type: ignore[operator]
        "a tower block": sum(share(p) for p in staged(stage).vision.blocks[0].parameters()),  # type: ignore[index]
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    """What two ranks found, by stage."""
    return run_ranks(on_a_rank, 2)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_have_the_gradients_of_one_and_send_those_of_what_learns_alone(
    stage: str, ranks: list[dict[str, Any]]
) -> None:
    """fp64; measured 2e-14 of gradients up to 8. A rank sends the gradients of what learns, each once, and gathers for
    the backward pass the blocks of the language model: of the frozen tower no more than the one that torch fetches
    ahead."""
    model = staged(stage).double()
    total(model, make_batch()).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for found in (rank[stage] for rank in ranks):
        assert set(found["gradients"]) == set(found["learning"]) == set(expected)
        assert found["is_tied"]
        for name, gradient in expected.items():
            assert (found["gradients"][name] - gradient).abs().max() < 1e-12, name
        sent = found["sent"]
        assert sent["reduced"] == found["learning numbers"] and sent["reduced forward"] == 0
        assert sent["gathered"] - found["text blocks"] <= found["a tower block"] < found["tower blocks"]
    assert max(gradient.abs().max() for gradient in expected.values()) > 1
    alone = staged(stage).double()  # the twin: the share of one rank
    total(alone, rows_of(make_batch(), *SHARES[0])).backward()
    assert any((p.grad - expected[name]).abs().max() > 1e-3 for name, p in alone.named_parameters() if name in expected)
