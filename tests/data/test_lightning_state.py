"""The loader under a Trainer that is nobody's but Lightning's: stopped in mid-epoch, it goes on from Lightning's own
checkpoint, under DDP and under FSDP2 with a sharded checkpoint, on as many processes or on another number."""

import json
import os
import socket
import warnings
from pathlib import Path

import lightning
import pytest
import torch
from data_fixtures import COUNTS, NUM_STEPS, G, loader_of, write_dataset
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from vlm_train.data.selection import Selection
from vlm_train.data.sources.shards import ShardSource
from vlm_train.distributed import collectives
from vlm_train.distributed.testing import run_ranks

STOP = 3


class Tiny(lightning.LightningModule):
    """Learns a little from each picture, and writes down whom it saw."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(3, 2)
        self.seen = []

    def configure_model(self):
        mesh = self.device_mesh
        if mesh is not None:
            torch.distributed.fsdp.fully_shard(self.head, mesh=mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        self.seen.append((batch["step"], batch["keys"]))
        return self.head(batch["images"].float().mean((2, 3)) / 255).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(folder, kind, resume, stop, broken=False):
    """One rank of a run: until `stop` steps, or to the end of the epoch. Returns what this rank saw."""
    warnings.filterwarnings("ignore", module="lightning.*")
    rank, world_size = collectives.rank(), collectives.world_size()
    source = ShardSource(shards=str(Path(folder) / "data"))
    loader = loader_of(source, Selection.all(len(source)), rank, world_size)
    if broken:
        loader.load_state_dict = lambda state: None
    os.environ["LOCAL_WORLD_SIZE"] = str(world_size)
    strategies = {
        "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
        "fsdp": lambda: ModelParallelStrategy(
            data_parallel_size=world_size, tensor_parallel_size=1, save_distributed_checkpoint=True
        ),
    }
    trainer = lightning.Trainer(
        accelerator="cpu", devices=world_size, strategy=strategies[kind](), plugins=[TorchElasticEnvironment()],
        max_epochs=1, max_steps=stop or -1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, use_distributed_sampler=False,
        callbacks=[ModelCheckpoint(folder, filename="stock", every_n_train_steps=STOP, save_top_k=-1)] if stop else [],
        enable_checkpointing=bool(stop),
    )  # fmt: skip
    model = Tiny()
    trainer.fit(model, loader, ckpt_path=resume)
    return [[step, list(keys)] for step, keys in model.seen]


def whole_steps(ranks):
    """{step: keys of the global batch in order}."""
    steps = {}
    for seen in ranks:
        for step, keys in seen:
            steps.setdefault(step, []).extend(keys)
    return steps


def run(world_size, folder, kind, resume=None, stop=None, broken=False):
    with socket.socket() as server:  # Lightning reads the address even where the group is there already
        server.bind(("127.0.0.1", 0))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(server.getsockname()[1]), TORCHELASTIC_RUN_ID="t")
    return whole_steps(run_ranks(fit, world_size, str(folder), kind, resume, stop, broken, timeout=150.0))


def loader_state(checkpoint):
    """The state of the loader where stock Lightning put it."""
    path = checkpoint / "meta.pt" if checkpoint.is_dir() else checkpoint
    content = torch.load(path, weights_only=True)
    (state,) = content["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    return state


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = write_dataset(tmp_path_factory.mktemp("reference") / "data", COUNTS)
    source = ShardSource(shards=str(folder))
    return {batch["step"]: batch["keys"] for batch in loader_of(source, Selection.all(len(source)))}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_stock_lightning_stops_and_goes_on(tmp_path, reference, kind):
    write_dataset(tmp_path / "data", COUNTS)
    first = run(2, tmp_path, kind, stop=STOP)
    assert first == {step: reference[step] for step in range(STOP)}
    checkpoint = tmp_path / "stock.ckpt"
    assert checkpoint.is_dir() == (kind == "fsdp")
    state = loader_state(checkpoint)
    assert len(json.dumps(state)) < 1000 and state["consumed"] == STOP * G
    rest = {step: reference[step] for step in range(STOP, NUM_STEPS)}
    for world_size in (2, 1):
        assert run(world_size, tmp_path, kind, resume=str(checkpoint)) == rest
    if kind == "ddp":  # the wrong twin: a loader whose state is not restored begins anew
        again = run(1, tmp_path, kind, resume=str(checkpoint), broken=True)
        assert again != rest and again[0] == reference[0]
