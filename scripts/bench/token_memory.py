"""Peak memory and time of the loss of next tokens at the vocabulary of Llama 3: logits some rows at a time, or at once.

    python scripts/bench/token_memory.py               # CPU, 16 GB, about two minutes
    python scripts/bench/token_memory.py --full        # three rounds

8,192 labels, 128,256 entries, width 1,024, fp32, forward and backward. Each way runs in a process of its own, in turns;
its peak is what the process held at most less what it held before, the gradients included, which both ways form.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "proof"))
from _table import Row, arguments, report

from vlm_train.objectives.token_nll import token_nll

NUM_LABELS, VOCABULARY, WIDTH = 8192, 128_256, 1024
WAYS = ("rows", "at once")


def main() -> int:
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2])))
        return 0
    options = arguments(__doc__.splitlines()[0])
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(3 if options.full else 1):
        for way in WAYS:
            told = subprocess.run(
                [sys.executable, __file__, "--measure", way], capture_output=True, text=True, check=True
            )
            found[way].append(json.loads(told.stdout))
            print(f"{way:8}" + "".join(f"  {key} {value:.6g}" for key, value in found[way][-1].items()), flush=True)
    ours, plain = found["rows"], found["at once"]
    ratio = {
        key: statistics.median(a[key] / b[key] for a, b in zip(ours, plain, strict=True))
        for key in ("peak_MB", "seconds")
    }
    difference = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(ours, plain, strict=True))
    gradients = max(abs(a["gradient"] / b["gradient"] - 1) for a, b in zip(ours, plain, strict=True))
    rows = [
        Row(
            claim="peak memory, some rows at a time / at once",
            value=ratio["peak_MB"],
            bar=0.15,
            sense="<=",
        ),
        Row(claim="relative difference of the losses", value=difference, bar=1e-5, sense="<="),
        Row(claim="relative difference of the norms of the gradients", value=gradients, bar=1e-5, sense="<="),
    ]
    print(f"time, some rows at a time / at once: {ratio['seconds']:.2f}")
    return report(rows, options.json)


def measure(way: str) -> dict[str, float]:
    """Of one forward and backward: MB at most beyond the inputs, seconds, the loss, the norm of the gradients."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(NUM_LABELS, WIDTH, generator=generator).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).mul_(0.02).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (NUM_LABELS,), generator=generator)
    (torch.ones(64, 64) @ torch.ones(64, 64)).sum()
    before, start = resident_megabytes(), time.perf_counter()
    if way == "rows":
        loss, _ = token_nll(hidden, weight, labels)
    else:
        loss = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    loss.backward()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    assert hidden.grad is not None and weight.grad is not None
    gradient = (hidden.grad.double().norm() ** 2 + weight.grad.double().norm() ** 2).sqrt().item()
    return {"peak_MB": peak, "seconds": seconds, "loss": loss.item(), "gradient": gradient}


def resident_megabytes() -> float:
    """What this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


if __name__ == "__main__":
    sys.exit(main())
