"""A plan: what a run takes of memory, time and money on so many GPUs, and what would suit it better."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vlm_train.engine.micro_batches import AUTO, even_sizes
from vlm_train.errors import ConfigError
from vlm_train.plan.batches import Sample
from vlm_train.plan.compute import Part, Work, parts_of, work_of
from vlm_train.plan.dataset import known_samples
from vlm_train.plan.dry import Activations, DryRun, bytes_of, tensors_of
from vlm_train.plan.hardware import Gpu
from vlm_train.plan.memory import Holdings, checkpoint_bytes, holdings
from vlm_train.schema import plain


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a run is planned for. `mfu`: share of the peak that is reached while a step computes; `disk`: bytes a second
    of checkpoints; `price`: dollars an hour of a GPU."""

    gpu: Gpu
    mfu: float
    price: float
    disk: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One way to run: on so many ranks, with micro-batches of so many samples, and its memory in bytes."""

    num_gpus: int
    strategy: str
    micro_batch: int
    num_micro_batches: int
    recompute: bool
    held: Holdings
    batch: float
    activations: Activations
    loss: float
    caches: float
    working: float
    fits: bool

    @property
    def memory(self) -> float:
        """Of the first rank, at most; what is held and what is worked with may not reach their most at once."""
        return self.held.total + self.batch + self.working


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Time and money of a setting. `mfu`: as metrics.jsonl counts it, without what is computed twice."""

    step_seconds: float
    hours: float
    gpu_hours: float
    money: float
    mfu: float
    stall_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All of it, for one config without stages. `settings`, `costs`: for each number of GPUs asked for."""

    name: str
    parts: list[Part]
    work: Work
    sample: Sample
    global_batch: int
    num_steps: int
    settings: list[Setting]
    costs: list[Cost]
    checkpoint: int
    samples: int | None
    advice: list[str] = field(default_factory=list)


class Planner:
    """Plans one config.

    Args:
        config: without stages.
        machine: for what.
        tokens: of each text or dialogue; None: the longest.
        briefly: micro-batches are not run at their size, but follow from two small ones; no advice.

    Raises:
        ConfigError: it cannot be built.
    """

    def __init__(self, config: Any, machine: Machine, tokens: int | None = None, *, briefly: bool = False) -> None:
        self.config, self.machine, self.briefly = config, machine, briefly
        on_gpu = config.trainer.accelerator != "cpu"
        self.dry = DryRun(config, tokens=tokens, like_a_gpu=on_gpu)
        self.work, self.parts = work_of(self.dry), parts_of(self.dry)
        self._row_bytes = bytes_of(tensors_of(self.dry.batch(4))) / 4
        self._recomputing: DryRun | None = None
        self._held: dict[tuple[str, int, bool], Holdings] = {}

    def plan(self, name: str, nums_gpus: Sequence[int]) -> Plan:
        """The plan for these numbers of GPUs. Raises ConfigError where a rank would have no sample."""
        trainer = self.config.trainer
        for num_gpus in nums_gpus:
            if num_gpus > trainer.global_batch:
                raise ConfigError("a rank would have no sample", got=f"gpus={num_gpus}",
                                  allowed=f"at most trainer.global_batch={trainer.global_batch}",
                                  remedy=f"gpus={trainer.global_batch}")  # fmt: skip
        settings = [self.setting(num_gpus) for num_gpus in nums_gpus]
        return Plan(
            name=name,
            parts=self.parts,
            work=self.work,
            sample=self.dry.sample,
            global_batch=trainer.global_batch,
            num_steps=trainer.max_steps,
            settings=settings,
            costs=[self.cost(setting) for setting in settings],
            checkpoint=self.checkpoint,
            samples=known_samples(plain(self.config.data)),
            advice=[] if self.briefly else self._advice(settings[0]),
        )

    @functools.cached_property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint."""
        return checkpoint_bytes(self.dry)

    def setting(self, num_gpus: int) -> Setting:
        """As the config says; with trainer.micro_batch=auto the largest that fits, or the smallest there is."""
        strategy = self.config.strategy.name
        strategy = "ddp" if strategy == "single" and num_gpus > 1 else strategy
        recompute = bool(self.config.strategy.recompute)
        micro_batch, share = self.config.trainer.micro_batch, -(-self.config.trainer.global_batch // num_gpus)
        if micro_batch == AUTO:
            return self._largest(num_gpus, strategy, recompute)
        return self._measured(num_gpus, strategy, micro_batch or share, recompute)

    def cost(self, setting: Setting) -> Cost:
        """Time and money of a setting."""
        trainer, machine = self.config.trainer, self.machine
        is_cached = self.dry.is_coupled and setting.num_micro_batches > 1
        executed = self.work.executed(recompute=setting.recompute, is_cached=is_cached)
        rate = machine.gpu.peak * machine.mfu * setting.num_gpus
        seconds = executed * trainer.global_batch / rate
        hours = seconds * trainer.max_steps / 3600
        return Cost(
            step_seconds=seconds,
            hours=hours,
            gpu_hours=hours * setting.num_gpus,
            money=hours * setting.num_gpus * machine.price,
            mfu=machine.mfu * self.work.useful / executed,
            stall_seconds=self.checkpoint / machine.disk,
        )

    def _largest(self, num_gpus: int, strategy: str, recompute: bool) -> Setting:
        """With the largest micro-batch that fits, measured; the smallest where none does."""
        sizes = even_sizes(self.config.trainer.global_batch, num_gpus)
        fitting = [size for size in sizes if self._expected(num_gpus, strategy, size, recompute).fits] or sizes[-1:]
        for size in fitting:
            setting = self._measured(num_gpus, strategy, size, recompute)
            if setting.fits:
                return setting
        return setting

    def _measured(self, num_gpus: int, strategy: str, micro_batch: int, recompute: bool) -> Setting:
        share = -(-self.config.trainer.global_batch // num_gpus)
        if self.briefly:
            return self._expected(num_gpus, strategy, min(micro_batch, share), recompute)
        return self._made(
            num_gpus, strategy, micro_batch, self._dry(recompute).activations(min(micro_batch, share)), recompute
        )

    def _expected(self, num_gpus: int, strategy: str, micro_batch: int, recompute: bool) -> Setting:
        """As `_measured`, along the line through two small micro-batches."""
        dry = self._dry(recompute)
        small, large = dry.activations(8), dry.activations(16)
        kept, peak, features = (
            (getattr(large, name) - getattr(small, name)) / 8 * (micro_batch - 8) + getattr(small, name)
            for name in ("kept", "peak", "features")
        )
        found = Activations(kept=round(kept), peak=round(max(kept, peak)), features=round(features))
        return self._made(num_gpus, strategy, micro_batch, found, recompute)

    def _dry(self, recompute: bool) -> DryRun:
        if not recompute:
            return self.dry
        if self._recomputing is None:
            self._recomputing = DryRun(self.config, tokens=self.dry.sample.tokens, like_a_gpu=self.dry.like_a_gpu)
            self._recomputing.recompute()
        return self._recomputing

    def _made(self, num_gpus: int, strategy: str, micro_batch: int, found: Activations, recompute: bool) -> Setting:
        global_batch, gpu = self.config.trainer.global_batch, self.machine.gpu
        share = -(-global_batch // num_gpus)
        micro_batch = min(micro_batch, share)
        num_micro_batches = -(-share // micro_batch)
        loss = self.dry.loss.bytes(share, global_batch, gpu.memory)
        caches = found.features / micro_batch * share if num_micro_batches > 1 else 0.0
        if num_micro_batches == 1:  # the loss comes while all activations are kept
            working = max(found.kept + loss, float(found.peak))
        else:  # it comes between the passes; then features and their gradients wait for the second
            working = max(caches + loss, 2 * caches + found.peak)
        held = self._holdings(strategy, num_gpus, num_micro_batches)
        batch = self._row_bytes * share
        return Setting(
            num_gpus=num_gpus,
            strategy=strategy,
            micro_batch=micro_batch,
            num_micro_batches=num_micro_batches,
            recompute=recompute,
            held=held,
            batch=batch,
            activations=found,
            loss=loss,
            caches=2 * caches,
            working=working,
            fits=held.total + batch + working <= gpu.usable,
        )

    def _holdings(self, strategy: str, num_gpus: int, num_micro_batches: int) -> Holdings:
        key = strategy, num_gpus, num_micro_batches > 1
        if key not in self._held:
            self._held[key] = holdings(self.dry, strategy, num_gpus, num_micro_batches)
        return self._held[key]

    def _advice(self, setting: Setting) -> list[str]:
        """What would make a run fit, or run faster where it does."""
        if setting.fits:
            return self._faster(setting)
        for strategy in dict.fromkeys((setting.strategy, "fsdp2")):
            for recompute in dict.fromkeys((setting.recompute, True)):
                better = self._largest(setting.num_gpus, strategy, recompute)
                if better.fits:
                    return [f"fits with {_words(setting, better)}"]
        return [f"does not fit {setting.num_gpus} x {self.machine.gpu.name}: take more of them, or larger ones"]

    def _faster(self, setting: Setting) -> list[str]:
        is_auto = self.config.trainer.micro_batch == AUTO
        advice = [f"trainer.micro_batch=auto will find about {setting.micro_batch}"] if is_auto else []
        if self.config.strategy.name == "single" and setting.num_gpus > 1:
            advice.append("strategy=ddp, since single runs one rank")
        if self.config.precision.name in ("fp32", "fp64"):
            advice.append("precision=bf16: the time told is that of bf16, fp32 takes several times as long")
        if setting.recompute:
            kept = self._largest(setting.num_gpus, setting.strategy, False)
            if kept.fits:
                saved = 1 - self.cost(kept).hours / self.cost(setting).hours
                advice.append(f"{_words(setting, kept)} fits too, and takes {saved:.0%} less time")
        largest = self._largest(setting.num_gpus, setting.strategy, setting.recompute)
        if largest.micro_batch > setting.micro_batch:
            advice.append(f"trainer.micro_batch={largest.micro_batch} fits too")
        return advice


def _words(before: Setting, after: Setting) -> str:
    """The words of the command line that make one setting of another."""
    words = [f"trainer.micro_batch={after.micro_batch if after.num_micro_batches > 1 else 'null'}"]
    words += [f"strategy={after.strategy}"] if after.strategy != before.strategy else []
    words += [f"strategy.recompute={str(after.recompute).lower()}"] if after.recompute != before.recompute else []
    return " ".join(words)
