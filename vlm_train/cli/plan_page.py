"""What `vlm-train plan` prints."""

from __future__ import annotations

from collections.abc import Sequence

from vlm_train.cli.tables import table
from vlm_train.plan.compute import Part
from vlm_train.plan.estimate import Machine, Plan, Setting
from vlm_train.plan.hardware import USABLE

HEADER = (
    f"{'experiment':22} {'parameters':>10} {'learning':>8} {'GFLOP':>8} {'samples':>8} {'GPUs':>5} {'micro':>6} "
    f"{'GB a rank':>9}  {'':12} {'hours':>9} {'GPU hours':>9} {'cost':>10} {'checkpoint':>10}"
)


def described(plans: Sequence[Plan], machine: Machine, walltime: int | None, samples: int | None) -> list[str]:
    """Each stage of a run by itself, all together, and what was assumed."""
    lines = []
    for plan in plans:
        lines += [plan.name, *_modules(plan), "", *_memory(plan, machine), "", *_time(plan, samples), ""]
        lines += [f"  -> {advice}" for advice in plan.advice] + ([""] if plan.advice else [])
    lines += [*_sweep(plans, machine, walltime), ""]
    return lines + assumptions(machine, plans)


def summary(name: str, plans: Sequence[Plan]) -> str:
    """One line for a run: sizes and memory of its hungriest stage, time and money of all."""
    plan = max(plans, key=lambda each: each.settings[0].memory)
    setting, costs = plan.settings[0], [each.costs[0] for each in plans]
    parameters = sum(part.parameters for part in plan.parts)
    learning = sum(part.trainable for part in plan.parts)
    total = sum(each.num_steps * each.global_batch for each in plans)
    fits = "" if setting.fits else "does not fit"
    return (
        f"{name:22} {_count(parameters):>10} {_count(learning):>8} {plan.work.useful / 1e9:>8.3g} {_count(total):>8} "
        f"{setting.num_gpus:>5} {setting.micro_batch:>6} {setting.memory / 1e9:>9.3g}  {fits:12} "
        f"{sum(c.hours for c in costs):>9,.3g} {sum(c.gpu_hours for c in costs):>9,.4g} "
        f"{_money(sum(c.money for c in costs)):>10} {_gb(plan.checkpoint):>10}"
    )


def assumptions(machine: Machine, plans: Sequence[Plan] = ()) -> list[str]:
    """What the figures stand on."""
    gpu = machine.gpu
    lines = [
        f"  {gpu.name}: {gpu.peak / 1e12:.0f} TFLOP/s dense bf16, {gpu.memory / 1e9:.0f} GB of which {USABLE:.0%} may "
        "be used (the rest: CUDA, NCCL, pieces)",
        f"  {machine.mfu:.0%} of that peak while a step computes; a forward pass that is computed again takes its time "
        "on top",
        "  no time for exchange between ranks, waiting for data, evaluation and checkpoints",
        f"  ${machine.price:.2f} for a GPU and hour (a guess of what clouds ask; price= sets it); "
        f"{machine.disk / 1e9:g} GB/s to the disk",
    ]
    for sample in {plan.sample for plan in plans}:
        text = "dialogues" if sample.images is not None else "texts"
        images = f" with {sample.images} image(s)" if sample.images is not None else ""
        lines.append(f"  {text} of {sample.tokens} tokens{images}, the longest unless tokens= was given")
    lines.append("  a tokenizer that is trained has as many entries as asked for; few captions may give fewer")
    return ["assumed", *lines]


def _modules(plan: Plan) -> list[str]:
    rows = [
        [
            part.name,
            f"{part.parameters:,}",
            _learning(part),
            "" if part.flops is None else f"{part.flops / 1e9:,.2f}",
        ]
        for part in plan.parts
    ]
    total = [sum(part.parameters for part in plan.parts), sum(part.trainable for part in plan.parts)]
    useful = plan.work.useful + plan.work.teacher
    rows.append(["all", f"{total[0]:,}", f"{total[1]:,} learn", f"{useful / 1e9:,.2f}"])
    return table(["module", "parameters", "", "GFLOP a sample"], rows)


def _learning(part: Part) -> str:
    if part.trainable == part.parameters:
        return "learns"
    return f"{part.trainable:,} learn" if part.trainable else "frozen"


def _memory(plan: Plan, machine: Machine) -> list[str]:
    setting = plan.settings[0]
    held, found = setting.held, setting.activations
    named = {
        "weights": held.weights,
        "gradients": held.gradients,
        "optimizer state": held.optimizer,
        "moving average": held.average,
        "gradients on their way (ddp)": held.exchange,
        "gathered while it computes (fsdp2)": held.gathered,
        "batch": setting.batch,
        "activations" + (", recomputed" if setting.recompute else ""): found.peak,
        "loss over the global batch": setting.loss,
        "features between the passes": setting.caches,
    }
    rows = [[name, _gb(value)] for name, value in named.items() if value]
    fits = "fits" if setting.fits else "DOES NOT FIT"
    rows.append(["at most at once", f"{_gb(setting.memory)}"])
    passes = f"{setting.num_micro_batches} micro-batches of {setting.micro_batch}"
    title = f"memory of a rank of {setting.num_gpus}, {setting.strategy}, {passes}"
    return [*table([title, ""], rows), f"  {fits} a {machine.gpu.name}, {_gb(machine.gpu.usable)} of it"]


def _time(plan: Plan, samples: int | None) -> list[str]:
    total = plan.num_steps * plan.global_batch
    samples = samples or plan.samples
    epochs = f", {total / samples:.3g} epochs of {samples:,}" if samples else ", epochs unknown (samples=N)"
    tokens = total * plan.sample.tokens
    return [
        f"  {plan.num_steps:,} steps of {plan.global_batch:,} samples: {_count(total)} samples{epochs}, "
        f"{_count(tokens)} tokens",
        f"  checkpoint {_gb(plan.checkpoint)}, {plan.costs[0].stall_seconds:.3g} s to write",
    ]


def _sweep(plans: Sequence[Plan], machine: Machine, walltime: int | None) -> list[str]:
    """A line for each number of GPUs, all stages together."""
    header = ["GPUs", "", "micro-batch", "GB a rank", "step", "MFU", "hours", "GPU hours", "cost"]
    header += ["jobs"] if walltime else []
    rows = []
    for index in range(len(plans[0].settings)):
        settings, costs = [plan.settings[index] for plan in plans], [plan.costs[index] for plan in plans]
        hours = sum(cost.hours for cost in costs)
        largest: Setting = max(settings, key=lambda each: each.memory)
        row = [
            f"{largest.num_gpus} x {machine.gpu.name}",
            largest.strategy,
            ", ".join(dict.fromkeys(f"{each.micro_batch} x {each.num_micro_batches}" for each in settings)),
            f"{largest.memory / 1e9:.3g}" + ("" if largest.fits else " (too much)"),
            ", ".join(f"{cost.step_seconds:.3g} s" for cost in costs),
            ", ".join(dict.fromkeys(f"{cost.mfu:.0%}" for cost in costs)),
            f"{hours:,.3g}",
            f"{sum(cost.gpu_hours for cost in costs):,.4g}",
            _money(sum(cost.money for cost in costs)),
        ]
        if walltime:
            jobs = -(-round(hours * 3600) // walltime)
            row.append("1" if jobs <= 1 else f"{jobs:,} in turn")
        rows.append(row)
    return table(header, rows)


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.3g} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.3g} MB"


def _count(value: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.3g}"


def _money(dollars: float) -> str:
    return f"${dollars:,.0f}" if dollars >= 10 else f"${dollars:.2f}"
