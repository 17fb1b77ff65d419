"""The same towers, data, batch, threads and time: open_clip's own trainer against ours, judged by the same evaluator.

    python scripts/bench/open_clip_race.py                 on the openmoji shards, about 4 minutes each
    python scripts/bench/open_clip_race.py --full          three seeds
    VLM_TRAIN_SHARDS=train_dir VLM_TRAIN_VAL=val_dir python scripts/bench/open_clip_race.py      on your own shards

open_clip 3.3.0 is run as its users run it: `open_clip_train.main` with its optimizer, schedule, crop and loss, our
tokenizer, and as many whole epochs as fill the time that our quickstart took. It reads the same pictures as files from
a CSV, its quickest way here: its tar reader needs a webdataset older than the locked one. Both sides use one recipe:
batch, learning rate, weight decay, warm-up share and crop are those of experiment=quickstart.
"""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "proof"))
import _runs
from _table import Row, arguments, report

from vlm_train import build
from vlm_train.cli.compose import compose_config
from vlm_train.data.sources.shards import ShardSource
from vlm_train.evaluation.retrieval import Retrieval

CALIBRATION_STEPS = 25
CROP = "[0.7,1.0]"


def main() -> int:
    options = arguments(__doc__)
    shards = Path(os.environ.get("VLM_TRAIN_SHARDS", "data/openmoji/train")).resolve()
    val = Path(os.environ.get("VLM_TRAIN_VAL", "data/openmoji/val")).resolve()
    rows = []
    for seed in range(3 if options.full else 1):
        with tempfile.TemporaryDirectory() as folder:
            rows += race(Path(folder), shards, val, seed)
    return report(rows, options.json)


def race(folder: Path, shards: Path, val: Path, seed: int) -> list[Row]:
    """Trains ours, then open_clip for the same number of seconds; rows of recall at 1 and 10."""
    run = folder / "ours"
    words = ["experiment=quickstart", "data=shards", f"data.train.shards={shards}", f"data.val.shards={val}",
             f"data.augment.scale={CROP}", "evaluation=retrieval", f"seed={seed}", f"run.dir={run}"]  # fmt: skip
    config = compose_config(words)
    begin = time.perf_counter()
    _runs.call(folder, ["train", *words], timeout=3600)
    seconds = sum(config.trainer.global_batch / row["samples_per_second"] for row in _runs.rows(run))
    ours = json.loads((run / "evals" / "retrieval.json").read_text())
    print(
        f"ours: {config.trainer.max_steps} steps in {seconds:.0f} s ({time.perf_counter() - begin:.0f} s with start-up)"
    )
    definition = describe_towers(config, run / "tokenizer", folder / "models")
    theirs, their_steps, their_seconds = open_clip(folder, definition, config, shards, seconds, seed)
    print(f"open_clip: {their_steps} steps in {their_seconds:.0f} s")
    other = evaluate(config, run, theirs, definition)
    rows = []
    for key in ("R@1", "R@10"):
        for way in ("text_to_image", "image_to_text"):
            claim = f"seed {seed}, {way} {key} in {seconds:.0f} s, bar: open_clip in {their_seconds:.0f} s"
            rows.append(Row(claim=claim, value=ours[way][key], bar=other[way][key], sense=">="))
    return rows


def describe_towers(config: Any, tokenizer: Path, folder: Path) -> Path:
    """model=clip_tiny in open_clip's words, with our tokenizer."""
    vision, text = config.model.vision, config.model.text
    vocab_size = json.loads((tokenizer / "text_spec.json").read_text())["vocab_size"]
    folder.mkdir()
    path = folder / "same_towers.json"
    path.write_text(json.dumps({
        "embed_dim": config.model.embed_dim, "quick_gelu": True,
        "vision_cfg": {"image_size": vision.image.size, "patch_size": vision.patch_size, "width": vision.width,
                       "layers": vision.num_layers, "head_width": vision.width // vision.num_heads},
        "text_cfg": {"context_length": config.model.tokenizer.context_length, "vocab_size": vocab_size,
                     "width": text.width, "layers": text.num_layers, "heads": text.num_heads,
                     "hf_tokenizer_name": str(tokenizer)},
    }))  # fmt: skip
    return path


def open_clip(
    folder: Path, definition: Path, config: Any, shards: Path, seconds: float, seed: int
) -> tuple[Path, int, float]:
    """(checkpoint, steps, seconds): a short run measures the speed, a full one uses the time."""
    _, _, pilot = open_clip_run(folder, definition, config, shards, CALIBRATION_STEPS, "pilot", seed)
    steps = int(seconds / pilot)
    path, steps, per_step = open_clip_run(folder, definition, config, shards, steps, "full", seed)
    return path, steps, steps * per_step


def as_files(shards: Path, folder: Path) -> tuple[Path, int]:
    """(CSV, number of samples): the pictures of the shards as files, once."""
    source, table = ShardSource(shards=str(shards)), folder / "captions.csv"
    if not table.exists():
        folder.mkdir()
        with open(table, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["filepath", "title"])
            for row in range(len(source)):
                parts = source.read(row).parts
                suffix = next(suffix for suffix in parts if suffix in ("png", "jpg", "webp"))
                (folder / f"{row}.{suffix}").write_bytes(parts[suffix])
                writer.writerow([folder / f"{row}.{suffix}", parts["txt"].decode()])
    return table, len(source)


def open_clip_run(
    folder: Path, definition: Path, config: Any, shards: Path, num_steps: int, name: str, seed: int
) -> tuple[Path, int, float]:
    """(checkpoint, steps, seconds a step) of one run of open_clip's trainer: one pass that repeats the shards."""
    batch = config.trainer.global_batch
    warmup = max(1, num_steps * config.schedule.warmup_steps // config.trainer.max_steps)
    low, high = config.data.augment.scale
    table, num_samples = as_files(shards, folder / "files")
    num_epochs = max(1, round(num_steps / (num_samples // batch)))
    num_steps = num_epochs * (num_samples // batch)
    words = ["--train-data", str(table), "--dataset-type", "csv", "--csv-separator", ",", "--csv-img-key", "filepath",
             "--csv-caption-key", "title", "--batch-size", str(batch),
             "--epochs", str(num_epochs), "--warmup", str(warmup),
             "--save-most-recent", "--save-frequency", "0",
             "--lr", str(config.optim.lr), "--wd", str(config.optim.weight_decay),
             "--beta1", str(config.optim.betas[0]), "--beta2", str(config.optim.betas[1]),
             "--eps", str(config.optim.eps), "--grad-clip-norm", "1.0",
             "--precision", "fp32", "--workers", "1", "--device", "cpu", "--model", "same_towers", "--seed", str(seed),
             "--logs", str(folder), "--name", name, "--aug-cfg", f"scale=({low}, {high})",
             "--log-every-n-steps", "10"]  # fmt: skip
    script = (
        "import sys, open_clip; open_clip.add_model_config(sys.argv.pop(1))\n"
        "from open_clip_train.main import main; main(sys.argv[1:])"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, "-c", script, str(definition), *words], env=environment, text=True,
                          capture_output=True, check=False)  # fmt: skip
    checkpoint = folder / name / "checkpoints" / "epoch_latest.pt"
    if not checkpoint.exists():
        raise SystemExit(f"open_clip did not finish:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    log = (folder / name / "out.log").read_text()
    rates = [float(found) for found in re.findall(r", ([0-9.]+)/s", log)]
    rate = sorted(rates)[len(rates) // 2]
    return checkpoint, num_steps, batch / rate


def evaluate(config: Any, run: Path, checkpoint: Path, definition: Path) -> dict[str, Any]:
    """open_clip's towers under our evaluator: same pictures, same texts, same ranking."""
    import open_clip as library

    library.add_model_config(definition)
    model, _, _ = library.create_model_and_transforms("same_towers")
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    model.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    model.eval()
    parts = build.load(run)
    suite = build.evaluation_suite(parts, build.Placement(rank=0, world_size=1))
    spec = parts.image_spec
    mean, std = torch.tensor(spec.mean).view(1, 3, 1, 1), torch.tensor(spec.std).view(1, 3, 1, 1)

    class Embedder:
        def images(self, images: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return F.normalize(model.encode_image((images.float() / 255 - mean) / std), dim=-1)

        def texts(self, texts: Any) -> torch.Tensor:
            with torch.no_grad():
                return F.normalize(model.encode_text(parts.tokenizer(list(texts))[0]), dim=-1)

    return Retrieval().run(Embedder(), iter(suite.loader))


if __name__ == "__main__":
    sys.exit(main())
