"""Dialogues one behind the other against dialogues with a padded row each.

    python scripts/bench/packing.py               3 rounds of 128 dialogues
    python scripts/bench/packing.py --full        9 rounds of 512

A small Llama is trained (forward, loss, backward; no optimizer) on dialogues whose lengths are spread like those of
instruction data: lognormal, median 180 tokens, one in twenty above 800, cut at 2,048; 8 in a micro-batch. Four ways
take turns in one process on the same dialogues and weights: padded to the longest of a micro-batch, in the order in
which they come; padded, grouped by length as LLaVA's trainer does it for 8 ranks (`--group_by_modality_length`: the
longest of each 8 micro-batches are dealt out so that the ranks have about equally many tokens); padded, all sorted by
length first, which no trainer does, for then an epoch goes from long to short; and as we train, without padding. The
padded ones are transformers' own forward with a mask of the padding.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "proof"))
from _table import Row, arguments, report

from vlm_train.models.language import CausalLanguageModel
from vlm_train.models.packing import Texts
from vlm_train.objectives.token_nll import token_nll
from vlm_train.types import TextSpec

CONTEXT, MICRO_BATCH, NUM_RANKS, VOCABULARY = 2048, 8, 8, 2048


def main() -> int:
    options = arguments(__doc__)
    num_rounds, num_dialogues = (9, 512) if options.full else (3, 128)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.empty(num_dialogues).log_normal_(5.2, 0.9, generator=generator).long().clamp(16, CONTEXT)
    text, by_length = make_text(), lengths.sort().values
    ways = {
        "padded, as they come": (padded, lengths),
        "padded, grouped as by LLaVA": (padded, grouped(lengths)),
        "padded, sorted by length": (padded, by_length),
        "one behind the other": (together, lengths),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    losses: dict[str, float] = {}
    for number in range(num_rounds + 1):
        for name, (hidden_of, order) in ways.items():
            took, losses[name] = train(text, hidden_of, order)
            if number:  # the first round warms up
                seconds[name].append(took)
    ours, plain = seconds["one behind the other"], losses["padded, as they come"]
    for name, each in seconds.items():
        print(f"{name:<29}{num_dialogues / statistics.median(each):7.1f} dialogues/s")
    rows = [
        Row(
            claim=f"dialogues/s, one behind the other / {name} [{padding(order):.0%} padding]",
            value=statistics.median(slow / fast for slow, fast in zip(seconds[name], ours, strict=True)),
            bar=2.0,
            sense=">=",
        )
        for name, (hidden_of, order) in ways.items()
        if hidden_of is padded
    ]
    difference = max(abs(loss - plain) / plain for loss in losses.values())
    rows.append(Row(claim="largest relative difference of their losses", value=difference, bar=1e-5, sense="<="))
    return report(rows, options.json)


def make_text() -> CausalLanguageModel:
    """Four layers of width 128."""
    torch.manual_seed(0)
    spec = TextSpec(vocab_size=VOCABULARY, context_length=CONTEXT, pad_id=0, bos_id=None, eos_id=1)
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    return CausalLanguageModel(
        spec=spec, architecture={"model_type": "llama", "max_position_embeddings": CONTEXT, **sizes}
    )


def grouped(lengths: Tensor) -> Tensor:
    """The order of LLaVA's trainer: of each `NUM_RANKS` micro-batches the longest first, each to the rank that has the
    fewest tokens and a place left; the dialogues come shuffled already."""
    order: list[int] = []
    for part in lengths.split(NUM_RANKS * MICRO_BATCH):
        ranks: list[list[int]] = [[] for _ in range(len(part) // MICRO_BATCH)]
        for length in part.sort(descending=True).values.tolist():
            min((rank for rank in ranks if len(rank) < MICRO_BATCH), key=sum).append(length)
        order += [length for rank in ranks for length in rank]
    return torch.tensor(order)


def padding(lengths: Tensor) -> float:
    """Share of the places of padded micro-batches that hold no token."""
    places = sum(len(part) * int(part.max()) for part in lengths.split(MICRO_BATCH))
    return 1 - int(lengths.sum()) / places


def padded(text: Any, ids_BT: Tensor, lengths: Tensor) -> Tensor:
    """Hidden states [N, D] of the tokens that are there, through rows [B, T]."""
    is_token_BT = torch.arange(ids_BT.shape[1]) < lengths[:, None]
    embedded = {"inputs_embeds": text.embed(ids_BT), "attention_mask": is_token_BT.long()}
    output = text.network.base_model(**embedded, use_cache=False)
    return output.last_hidden_state[is_token_BT]


def together(text: Any, ids_BT: Tensor, lengths: Tensor) -> Tensor:
    """The same without a place for padding."""
    texts = Texts.of(lengths.tolist(), ids_BT.device)
    return text(text.embed(ids_BT.flatten()[texts.places(ids_BT.shape[1])]), texts)


def train(text: CausalLanguageModel, hidden_of: Any, lengths: Tensor) -> tuple[float, float]:
    """Seconds of all dialogues, and the mean of their tokens' losses: each token tells one that follows from it."""
    total, start = 0.0, time.perf_counter()
    for part in lengths.split(MICRO_BATCH):
        text.zero_grad()
        ids_BT = (torch.arange(int(part.max())) * 7 + part[:, None] * 13) % VOCABULARY
        is_token_BT = torch.arange(ids_BT.shape[1]) < part[:, None]
        labels_N = (ids_BT[is_token_BT] * 5 + 1) % VOCABULARY
        loss, _ = token_nll(hidden_of(text, ids_BT, part), text.vocabulary, labels_N)
        loss.backward()
        total += loss.item()
    return time.perf_counter() - start, total / int(lengths.sum())


if __name__ == "__main__":
    sys.exit(main())
