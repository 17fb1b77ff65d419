"""The tiled losses beside the gathered ones: values, gradients, memory, precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tile_cases import make_pairing, outcome, unit
from torch import Tensor

from vlm_train.distributed import collectives
from vlm_train.distributed.testing import run_ranks
from vlm_train.objectives import tiled
from vlm_train.objectives.contrastive import Contrastive, device_memory
from vlm_train.objectives.infonce import InfoNCE
from vlm_train.objectives.pairing import Pairing, gathered_bytes, sigmoid_gathered, softmax_gathered
from vlm_train.objectives.sigmoid import Sigmoid
from vlm_train.objectives.tiled import sigmoid_tiled, softmax_tiled

KINDS = pytest.mark.parametrize("kind", [InfoNCE, Sigmoid])


@settings(max_examples=60, deadline=None)
@given(
    num_pairs=st.integers(1, 13),
    num_hard=st.integers(0, 5),
    num_contents=st.integers(1, 20),
    tile=st.integers(1, 40),
    scale=st.sampled_from([0.5, 14.0, 100.0]),
    seed=st.integers(0, 99),
)
def test_any_cut_into_tiles_gives_the_gathered_loss(
    num_pairs: int, num_hard: int, num_contents: int, tile: int, scale: float, seed: int
) -> None:
    pairing = make_pairing(num_pairs, num_hard, num_contents, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiled.TILE, "cpu", tile)
        for ours, reference, parameters in (
            (softmax_tiled, softmax_gathered, (scale,)),
            (sigmoid_tiled, sigmoid_gathered, (scale, -scale)),
        ):
            got, expected = outcome(ours, pairing, *parameters), outcome(reference, pairing, *parameters)
            assert len(got) == len(expected)
            for value, wanted in zip(got, expected, strict=True):
                # fp64; measured 6.4e-14 at most over 3,000 cases
                assert torch.allclose(value, wanted, rtol=1e-10, atol=1e-10)


def test_twin_without_the_running_maximum_the_sum_is_infinite() -> None:
    pairing = make_pairing(6, 0, 10**6, 0)
    logits = 1000 * (pairing.image_BD @ pairing.text_CD.T).float()
    assert torch.isinf(logits.exp().sum())
    assert torch.isfinite(outcome(softmax_tiled, pairing, 1000.0)[0])


def test_hard_captions_are_wrong_answers_and_ask_nothing() -> None:
    pairing = make_pairing(5, 3, 10**6, 1)
    without = make_pairing(5, 3, 10**6, 1)
    kept = Pairing(
        image_BD=without.image_BD,
        text_CD=without.text_CD[:5],
        image_ids=without.image_ids,
        text_ids=without.text_ids[:5],
        image_counts=[5],
        text_counts=[5],
    )
    scale = torch.tensor([10.0], dtype=torch.float64)
    images, texts = pairing.image_BD, pairing.text_CD
    by_hand = F.cross_entropy(10 * images @ texts.T, torch.arange(5), reduction="sum")
    by_hand = by_hand + F.cross_entropy(10 * texts[:5] @ images.T, torch.arange(5), reduction="sum")
    assert softmax_tiled(pairing, scale)[0].item() == pytest.approx(by_hand.item() / 2, rel=1e-12)
    assert softmax_tiled(pairing, scale)[0] > softmax_tiled(kept, scale)[0] + 0.01


def test_partners_by_content_are_no_negatives() -> None:
    """Two copies of every pair: by content the loss is that of perfect answers split in two; by pair it cannot be."""
    features = F.normalize(torch.eye(4, dtype=torch.float64), dim=1).repeat(2, 1)
    contents = torch.arange(4).repeat(2)[:, None].expand(-1, 2)
    rows = {"image_features": features, "text_features": features, "weights": torch.ones(8), "contents": contents}
    by_content = InfoNCE(init_temperature=0.01, partners="content", implementation="tiled").double().loss(rows)
    by_pair = InfoNCE(init_temperature=0.01, implementation="tiled").double().loss(rows)
    assert by_content.metrics["accuracy_image_to_text"][0].item() == 8
    assert by_pair.metrics["accuracy_image_to_text"][0].item() == 4  # two equal answers, one right
    assert by_content.sum.item() / 8 == pytest.approx(0.6931, abs=1e-3)  # ln 2: the target is spread over two
    sigmoid = {name: Sigmoid(partners=name).double().loss(rows).sum.item() for name in ("content", "pair")}
    assert sigmoid["content"] < sigmoid["pair"]


@KINDS
def test_autocast_of_the_caller_reaches_neither_pass(kind: type[Contrastive]) -> None:
    generator = torch.Generator().manual_seed(3)
    image, text = (unit(64, 16, generator, torch.float32) for _ in range(2))
    found = []
    for enabled in (False, True):
        leaves = {"image_features": image.clone().requires_grad_(), "text_features": text.clone().requires_grad_()}
        objective = kind(implementation="tiled")
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            objective.loss({**leaves, "weights": torch.ones(64)}).sum.backward()
        found.append([leaf.grad for leaf in leaves.values()])
    assert all(torch.equal(plain, under) for plain, under in zip(*found, strict=True))


def saved_bytes(kind: type[Contrastive], implementation: str, num_pairs: int, width: int = 16) -> int:
    """Bytes that autograd keeps for the backward pass of the loss, on this rank."""
    generator = torch.Generator().manual_seed(collectives.rank())
    rows: dict[str, Tensor] = {
        "image_features": unit(num_pairs, width, generator, torch.float32).requires_grad_(),
        "text_features": unit(num_pairs, width, generator, torch.float32).requires_grad_(),
        "weights": torch.ones(num_pairs),
    }
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = kind(implementation=implementation).loss(rows).sum
    loss.backward()
    return sum(kept.values())


def saved_on_a_rank() -> dict[str, int]:
    cases = [(kind, implementation) for kind in (InfoNCE, Sigmoid) for implementation in ("gathered", "tiled")]
    return {f"{kind.__name__}/{name}": saved_bytes(kind, name, 64) for kind, name in cases}


@pytest.mark.slow
def test_what_is_kept_grows_with_the_rows_of_a_rank_and_not_with_the_ranks() -> None:
    by_world = {world_size: run_ranks(saved_on_a_rank, world_size)[0] for world_size in (2, 4, 8)}
    for kind in ("InfoNCE", "Sigmoid"):
        ours = [found[f"{kind}/tiled"] for found in by_world.values()]
        theirs = [found[f"{kind}/gathered"] for found in by_world.values()]
        assert ours[0] == ours[1] == ours[2]
        assert ours[0] <= 64 * (2 * 16 * 4 + 100)  # two features of width 16, ids, and a few numbers a row
        assert theirs[2] > 3 * theirs[0]  # the twin


@KINDS
def test_what_is_kept_is_linear_in_the_batch(kind: type[Contrastive]) -> None:
    small, large = (saved_bytes(kind, "tiled", num_pairs) for num_pairs in (256, 2048))
    assert large <= 8 * small
    assert saved_bytes(kind, "gathered", 2048) > 40 * saved_bytes(kind, "gathered", 256)  # the twin


def test_auto_turns_to_tiles_where_gathered_would_take_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    pairing = make_pairing(10, 0, 100, 0)
    objective = InfoNCE()
    assert not objective.tiles(pairing)
    monkeypatch.setattr(
        "vlm_train.objectives.contrastive.device_memory", lambda device: 16 * gathered_bytes(pairing) - 1
    )
    assert objective.tiles(pairing)
    assert device_memory(torch.device("cpu")) > 2**28


def test_an_unknown_way_is_refused() -> None:
    from vlm_train.errors import ConfigError

    wrong: Any = "ring"
    with pytest.raises(ConfigError, match="auto, gathered, tiled"):
        InfoNCE(implementation=wrong)
