"""Learning-rate schedules: pure functions from the step (0-based) to a factor of the peak rate."""

from __future__ import annotations

import math

from vlm_train.errors import ConfigError


class Schedule:
    """Linear warm-up, then whatever `after_warmup` says."""

    def __init__(self, *, warmup_steps: int, total_steps: int, final: float = 0.0) -> None:
        if not 0 <= warmup_steps <= total_steps:
            raise ConfigError(
                "schedule.warmup_steps does not fit the run",
                got=f"{warmup_steps} of trainer.max_steps={total_steps}",
                allowed=f"0 to {total_steps}",
                remedy=f"schedule.warmup_steps={total_steps // 4}",
            )
        self.warmup_steps, self.total_steps, self.final = warmup_steps, total_steps, final

    def __call__(self, step: int) -> float:
        """Factor for the optimizer step number `step`, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return self.after_warmup(step)

    def after_warmup(self, step: int) -> float:
        """Factor for step >= warmup_steps."""
        raise NotImplementedError


class Cosine(Schedule):
    """Half a cosine from 1 to `final` (Loshchilov and Hutter, SGDR, without restarts)."""

    def after_warmup(self, step: int) -> float:
        """1 right after warm-up, `final` at total_steps."""
        progress = (step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


class WarmupStableDecay(Schedule):
    """Constant at the peak, then linear down to `final` over the last `decay_steps` (MiniCPM)."""

    def __init__(self, *, warmup_steps: int, decay_steps: int, total_steps: int, final: float = 0.0) -> None:
        super().__init__(warmup_steps=warmup_steps, total_steps=total_steps, final=final)
        if not 0 <= decay_steps <= total_steps - warmup_steps:
            raise ConfigError(
                "schedule.decay_steps does not fit between warm-up and the end",
                got=decay_steps,
                allowed=f"0 to {total_steps - warmup_steps}",
            )
        self.decay_steps = decay_steps

    def after_warmup(self, step: int) -> float:
        """1 until the last `decay_steps`, then a straight line to `final` at total_steps."""
        remaining = self.total_steps - step
        if remaining >= self.decay_steps:
            return 1.0
        return self.final + (1 - self.final) * max(remaining, 0) / self.decay_steps
