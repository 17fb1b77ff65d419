"""How long a run computes, by arithmetic: the FLOPs of a step over what the GPUs do in a second.

What a run learns costs `engine.flops.training_flops_per_sample`. What is computed twice comes on top, since it takes
time and is no progress: a forward pass where blocks are recomputed, and another where a coupled objective runs in
several micro-batches (`engine.steps`). Exchange between ranks, loading, evaluation and checkpoints are not in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from vlm_train.engine.flops import runs_backward, training_flops_by_part
from vlm_train.models.nf4 import num_weights
from vlm_train.plan.dry import DryRun


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A module of the model. `flops`: forward and backward of a sample, None where they are told with another part."""

    name: str
    parameters: int
    trainable: int
    flops: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """FLOPs of one sample. `useful`: forward and backward once; `forward`: forward of all; `recomputed`: forward of
    what blocks compute again; `teacher`: forward of a model that only teaches."""

    useful: float
    forward: float
    recomputed: float
    teacher: float

    def executed(self, *, recompute: bool, is_cached: bool) -> float:
        """All that is computed; `is_cached`: in two passes."""
        second = self.forward + self.teacher if is_cached else 0.0
        return self.useful + self.teacher + second + (self.recomputed if recompute else 0.0)


def work_of(dry: DryRun) -> Work:
    """The work of a sample of a run."""
    model, sample = dry.parts.model, dry.sample
    counts = (sample.tokens,) if sample.images is None else (sample.tokens, float(sample.images))
    forward = model.forward_flops(*counts)  # type: ignore[operator]
    if sample.hard:  # a sample brings so many more texts
        forward["text"] *= 1 + sample.hard
    teacher = 0.0 if dry.teacher is None else sum(dry.teacher.forward_flops(sample.tokens).values())  # type: ignore[operator]
    return Work(
        useful=sum(_flops(dry).values()),
        forward=sum(forward.values()),
        recomputed=sum(flops for part, flops in forward.items() if runs_backward(model, part)),
        teacher=teacher,
    )


def _flops(dry: DryRun) -> dict[str, float]:
    flops = training_flops_by_part(dry.parts.model, dry.sample.tokens, dry.sample.images)
    if dry.sample.hard:
        flops["text"] *= 1 + dry.sample.hard
    return flops


def parts_of(dry: DryRun) -> list[Part]:
    """Towers, connectors and heads, the objective, and a teacher."""
    flops = _flops(dry)
    modules: dict[str, nn.Module] = {}
    for name, child in dry.parts.model.named_children():
        inside = {f"{name}.{key}": part for key, part in child.named_children() if f"{name}.{key}" in flops}
        modules |= inside or {name: child}
    modules["objective"] = dry.parts.objective
    parts = [_part(name, module, flops.get(name)) for name, module in modules.items()]
    if dry.teacher is not None:
        parts.append(_part("teacher", dry.teacher, work_of(dry).teacher))
    return [part for part in parts if part.parameters]


def _part(name: str, module: nn.Module, flops: float | None) -> Part:
    trainable = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    return Part(name=name, parameters=num_weights(module), trainable=trainable, flops=flops)
