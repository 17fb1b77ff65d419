"""How long a new selection takes: from the manifest's Parquet parts to a selection that training has loaded.

    python scripts/bench/selection.py                        2 million rows in 200 parts
    python scripts/bench/selection.py --full                 100 million rows in 10,000 parts, 5 GB on disk
    python scripts/bench/selection.py --rows N --parts P     any size; --keep leaves the manifest for the next run

The manifest is made up, with the columns of a real one and a score. The selection is a process of its own, as on the
command line: it starts Python, evaluates a predicate on two numeric columns, saves, loads, and finds the first 256
samples of an epoch. Time and memory are those of the whole process. The bars are those of --full on two cores that do
nothing else.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "proof"))
from _table import Row, report

WHERE = "width >= 300 AND score > 0.28"
WEIGHT = "CASE WHEN height >= 400 THEN score * 4 ELSE 0.5 END"
SECONDS = {"keep or drop": 10, "repeat weights": 10}
GIGABYTES = 2
SELECT = """
import json, sys, time
from pathlib import Path
import numpy as np
from vlm_train.data.select import select_rows
from vlm_train.data.selection import Selection

folder, where, weight, target = sys.argv[1:]
facts = json.loads((Path(folder) / "root.json").read_text())
parts = sorted(Path(folder).glob("*.parquet"))
select_rows(parts, np.array(facts["num_samples"]), manifest="m", where=where, weight=weight or None).save(target)
start = time.perf_counter()
selection = Selection.load(target, "m")
loaded = time.perf_counter()
slots = np.random.default_rng(0).integers(0, len(selection), (100, 256))
for some in slots:
    selection.select(some, 0, 1)
found = time.perf_counter()
print(json.dumps({"load": loaded - start, "lookup": (found - loaded) / 100, "kept": selection.content.num_kept()}))
"""


def main() -> int:
    options = arguments()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder = Path(options.keep or scratch) / f"{options.rows}-{options.parts}"
        if not (folder / "root.json").exists():
            make(folder, options.rows, options.parts)
        rows = []
        for name, weight in (("keep or drop", ""), ("repeat weights", WEIGHT)):
            rows += measure(name, folder, weight, Path(scratch) / "selection")
    return report(rows, options.json)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows as JSON")
    parser.add_argument("--full", action="store_true", help="100 million rows in 10,000 parts")
    parser.add_argument("--rows", type=int, metavar="N")
    parser.add_argument("--parts", type=int, metavar="P")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where to make the temporary folder")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="make the manifest here and leave it")
    options = parser.parse_args()
    rows, parts = (100_000_000, 10_000) if options.full else (2_000_000, 200)
    options.rows, options.parts = options.rows or rows, options.parts or parts
    return options


def measure(name: str, folder: Path, weight: str, target: Path) -> list[Row]:
    """Runs the selection in a process of its own."""
    command = [sys.executable, "-c", SELECT, str(folder), WHERE, weight, str(target)]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    answer = json.loads(process.stdout.read())
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    cpu = usage.ru_utime + usage.ru_stime
    print(f"{name}: {answer['kept']} rows kept, {seconds:.2f} s, of which the cores worked {cpu:.2f} s")
    return [
        Row(claim=f"{name}: seconds, whole process", value=seconds, bar=SECONDS[name], sense="<="),
        Row(claim=f"{name}: peak memory, GB", value=usage.ru_maxrss * 1024 / 1e9, bar=GIGABYTES, sense="<="),
        Row(claim=f"{name}: seconds to load", value=answer["load"], bar=1, sense="<="),
        Row(claim=f"{name}: ms to find 256 samples", value=answer["lookup"] * 1e3, bar=1, sense="<="),
    ]


def make(folder: Path, num_rows: int, num_parts: int) -> None:
    """The parts, and the rows of each in root.json, which is written last."""
    folder.mkdir(parents=True, exist_ok=True)
    edges = np.linspace(0, num_rows, num_parts + 1).astype(np.int64)
    sizes = np.diff(edges).tolist()
    start = time.perf_counter()
    with multiprocessing.Pool(len(os.sched_getaffinity(0))) as pool:
        pool.starmap(partial(write_part, folder), enumerate(zip(edges[:-1].tolist(), sizes, strict=True)), chunksize=8)
    (folder / "root.json").write_text(json.dumps({"num_samples": sizes}))
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{num_rows} rows in {num_parts} parts made in {time.perf_counter() - start:.0f} s, {size / 1e9:.2f} GB")


def write_part(folder: Path, number: int, place: tuple[int, int]) -> None:
    """One part with the columns that indexing makes, and a score."""
    first, num_rows = place
    draw = np.random.default_rng(number)
    uids = pa.py_buffer(draw.bytes(16 * num_rows))
    digits = (first + np.arange(num_rows))[:, None] // 10 ** np.arange(8, -1, -1) % 10 + ord("0")
    ends = np.arange(num_rows + 1, dtype=np.int32) * 9
    lengths = draw.integers(16, 180, num_rows) * 512
    table = pa.table(
        {
            "uid": pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), num_rows, [None, uids]),
            "shard": pa.repeat(f"{number:05d}.tar", num_rows),
            "key": pa.StringArray.from_buffers(
                num_rows, pa.py_buffer(ends), pa.py_buffer(digits.astype(np.uint8).tobytes())
            ),
            "offset": np.cumsum(lengths) - lengths,
            "length": lengths,
            "width": draw.integers(200, 800, num_rows, dtype=np.int32),
            "height": draw.integers(200, 800, num_rows, dtype=np.int32),
            "caption_hash": draw.integers(0, 1 << 64, num_rows, dtype=np.uint64),
            "label": pa.nulls(num_rows, pa.int64()),
            "score": draw.normal(0.28, 0.05, num_rows).astype(np.float32),
        }
    )
    pq.write_table(table, folder / f"{number:05d}.parquet", compression="zstd")


if __name__ == "__main__":
    sys.exit(main())
