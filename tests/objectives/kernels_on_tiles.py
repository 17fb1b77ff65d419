"""The fused kernels beside torch and the gathered losses, on a GPU or, with TRITON_INTERPRET=1, on CPU tensors.

Run by test_tile_kernels.py in a process of its own: Triton reads the variable when it is imported.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tile_cases import make_pairing, outcome
from torch import Tensor

from vlm_train.objectives import tile_kernels, tile_maths, tiled
from vlm_train.objectives.pairing import NOBODY, Pairing, sigmoid_gathered, softmax_gathered
from vlm_train.objectives.tiled import sigmoid_tiled, softmax_tiled

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")


@pytest.fixture(autouse=True, scope="module")
def small_blocks() -> Iterator[None]:
    """Tiles of several blocks that are quickly interpreted, and kernels wherever a loss looks for its maths."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tile_kernels, "BLOCK", (8, 16))
        patch.setattr(tiled, "maths_for", lambda x: tile_kernels)
        yield


def arguments(
    num_rows: int, num_columns: int, num_ids: int, num_contents: int, scale: float, seed: int
) -> dict[str, tuple[Tensor, ...]]:
    """Function -> what it is given, in fp64. Cosines lie on a grid of which fp32 has every point, so ties are real."""
    generator = torch.Generator().manual_seed(seed)
    cosines = torch.randint(-8, 9, (num_rows, num_columns), generator=generator).double() / 8
    who = [torch.randint(NOBODY, num_contents, (num, num_ids), generator=generator) for num in cosines.shape]
    numbers = torch.tensor([[scale], [-scale], [0.37]], dtype=torch.float64)
    sums = tile_maths.softmax_sums(cosines, numbers[0], *who)
    weights = (torch.rand(len(part), 1, generator=generator, dtype=torch.float64) for part in sums)
    about = [torch.cat([tile_maths.summary(part), weight], dim=1) for part, weight in zip(sums, weights, strict=True)]
    return {
        "softmax_sums": (cosines, numbers[0], *who),
        "softmax_grad": (cosines, numbers[0], *who, *about),
        "sigmoid_sums": (cosines, numbers[0], numbers[1], *who),
        "sigmoid_grad": (cosines, numbers[0], numbers[1], *who, numbers[2, 0]),
    }


def in_fp32(values: Iterable[Tensor]) -> list[Tensor]:
    """Ids stay as they are."""
    return [value.float() if value.is_floating_point() else value for value in values]


def difference(kernels: ModuleType, given: dict[str, tuple[Tensor, ...]]) -> dict[str, float]:
    """Function -> how far fp32 kernels are from torch in fp64, relative to 1 + the number."""
    found = {}
    for name, values in given.items():
        got = getattr(kernels, name)(*(value.to(DEVICE).clone() for value in in_fp32(values)))
        expected = getattr(tile_maths, name)(*(value.clone() for value in values))
        pairs = zip(*((x if isinstance(x, tuple) else (x,)) for x in (got, expected)), strict=True)
        found[name] = max(((a.cpu() - b).abs() / (1 + b.abs())).nan_to_num(1e9).max().item() for a, b in pairs)
    return found


@settings(max_examples=12, deadline=None, database=None)
@given(
    num_rows=st.integers(1, 20),
    num_columns=st.integers(1, 40),
    num_ids=st.integers(0, 3),
    num_contents=st.integers(1, 20),
    scale=st.sampled_from([0.5, 14.0, 100.0]),
    seed=st.integers(0, 99),
)
def test_kernels_agree_with_torch(
    num_rows: int, num_columns: int, num_ids: int, num_contents: int, scale: float, seed: int
) -> None:
    found = difference(tile_kernels, arguments(num_rows, num_columns, num_ids, num_contents, scale, seed))
    assert max(found.values()) < 5e-6, found  # fp32; measured 1.4e-7 at most over 240 interpreted cases


TWINS = {
    "counts columns beyond the tile": (
        'tl.where(column[None, :] < num_columns, logits, float("-inf"))', "logits", "softmax_sums",
    ),
    "counts rows beyond the tile": (
        'tl.where(row[:, None] < num_rows, logits, float("-inf"))', "logits", "softmax_sums",
    ),
    "adds up what is beyond the tile": ("tl.where(within, x, 0.0)", "x", "sigmoid_grad"),
    "counts k equal largest as one": (
        "tl.sum(at_top.to(tl.float32), axis)", "tl.max(at_top.to(tl.float32), axis)", "softmax_sums",
    ),
    "takes a wrong one at the top for a partner": ("(at_top & mask)", "at_top", "sigmoid_sums"),
    "pairs nobody with nobody": ("& (image[:, None] != _NOBODY)", "", "softmax_grad"),
    "reads one id": ("tl.static_range(SIZES[0])", "tl.static_range(1)", "sigmoid_grad"),
    "forgets one direction": ("grad += (tl.exp", "grad = (tl.exp", "softmax_grad"),
}  # fmt: skip


def changed(folder: Path, old: str, new: str) -> ModuleType:
    """The kernels with one place of their source written otherwise."""
    source = Path(tile_kernels.__file__).read_text()
    assert source.count(old) == 1
    path = folder / "changed_kernels.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("changed_kernels", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.BLOCK = tile_kernels.BLOCK
    return module


@pytest.mark.parametrize("twin", TWINS)
def test_a_kernel_with_an_error_is_seen(twin: str, tmp_path: Path) -> None:
    old, new, where = TWINS[twin]
    given = {where: arguments(11, 21, 2, 6, 1.0, 0)[where]}
    assert difference(tile_kernels, given)[where] < 5e-6
    assert difference(changed(tmp_path, old, new), given)[where] > 1e-3


def test_what_a_clear_negative_costs_is_not_rounded_away(tmp_path: Path) -> None:
    """1,024 pairs at logits of -17 to -16, as a run of SigLIP at a batch of millions has them."""
    cosines, nobody = torch.linspace(-1, 0, 1024, dtype=torch.float64).view(32, 32), torch.full((32, 1), NOBODY)
    scale, bias = torch.ones(1, dtype=torch.float64), torch.full((1,), -16.0, dtype=torch.float64)
    exact = tile_maths.sigmoid_sums(cosines, scale, bias, nobody, nobody)[1]
    given = [x.to(DEVICE) for x in in_fp32([cosines, scale, bias, nobody, nobody])]
    twin = changed(tmp_path, "2.0 * s * series", "tl.log(1.0 + e)")
    ours, rounded = (kernels.sigmoid_sums(*given)[1].cpu() for kernels in (tile_kernels, twin))
    assert abs(ours / exact - 1) < 1e-5
    assert abs(rounded / exact - 1) > 1e-3


def test_the_check_before_the_first_use_passes_and_can_fail(tmp_path: Path) -> None:
    twin = changed(tmp_path, "(at_top & mask)", "at_top")
    with pytest.MonkeyPatch.context() as patch:
        for kernels in (tile_kernels, twin):
            patch.setattr(kernels, "BLOCK", (64, 128))
        tile_kernels.check(DEVICE)
        with pytest.raises(AssertionError):
            twin.check(DEVICE)


def small(pairing: Pairing) -> Pairing:
    """The same pairs in fp32, where the kernels run."""
    image_BD, text_CD, *ids = (
        x.detach().to(DEVICE) for x in in_fp32((pairing.image_BD, pairing.text_CD, pairing.image_ids, pairing.text_ids))
    )
    leaves = {"image_BD": image_BD.requires_grad_(), "text_CD": text_CD.requires_grad_()}
    return replace(pairing, **leaves, image_ids=ids[0], text_ids=ids[1])


@settings(max_examples=6, deadline=None, database=None)
@given(
    num_pairs=st.integers(0, 9),
    num_hard=st.integers(0, 5),
    num_contents=st.integers(1, 20),
    tile=st.integers(4, 90),
    scale=st.sampled_from([0.5, 14.0, 100.0]),
    seed=st.integers(0, 99),
)
def test_whole_losses_are_the_gathered_ones(
    num_pairs: int, num_hard: int, num_contents: int, tile: int, scale: float, seed: int
) -> None:
    pairing = make_pairing(num_pairs, num_hard, num_contents, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled, "LARGE_TILE", tile)
        patch.setitem(tiled.TILE, "cpu", tile)
        for ours, reference, parameters in (
            (softmax_tiled, softmax_gathered, (scale,)),
            (sigmoid_tiled, sigmoid_gathered, (scale, -scale)),
        ):
            got, expected = outcome(ours, small(pairing), *parameters), outcome(reference, pairing, *parameters)
            for value, wanted in zip(got, expected, strict=True):
                error = (
                    ((value.cpu().double() - wanted).abs() / (1 + wanted.abs())).max().item() if value.numel() else 0.0
                )
                assert error < 1e-4, error  # fp32 against fp64; measured 1.4e-5 at scale 100, 6e-7 at 14
