"""What `vlm-train plan` prints."""

from __future__ import annotations

from collections.abc import Sequence

from vlm_train.cli.quantities import count, figures, many, money, size, span
from vlm_train.cli.tables import table
from vlm_train.plan.compute import Part
from vlm_train.plan.estimate import Machine, Plan, Setting
from vlm_train.plan.hardware import USABLE

HEADER = (
    f"{'experiment':22} {'parameters':>10} {'learning':>8} {'GFLOP':>8} {'samples':>8} {'GPUs':>5} {'micro':>6} "
    f"{'GB a rank':>9}  {'':12} {'time':>9} {'GPU hours':>9} {'cost':>10} {'checkpoint':>10}"
)


def described(plans: Sequence[Plan], machine: Machine, walltime: int | None, samples: int | None) -> list[str]:
    """Each stage of a run by itself, all together, and what was assumed."""
    lines = []
    for plan in plans:
        lines += [plan.name, *_modules(plan), "", *_memory(plan, machine), "", *_time(plan, samples), ""]
        lines += [f"  -> {advice}" for advice in plan.advice] + ([""] if plan.advice else [])
    lines += [*_sweep(plans, machine, walltime), ""]
    return lines + assumptions(machine, plans)


def brief(plans: Sequence[Plan], machine: Machine, walltime: int | None) -> list[str]:
    """Memory, time and money of all stages together, and what would suit the run better."""
    advice = dict.fromkeys(advice for plan in plans for advice in plan.advice)
    return [*_sweep(plans, machine, walltime), *(f"  -> {each}" for each in advice)]


def summary(name: str, plans: Sequence[Plan]) -> str:
    """One line for a run: sizes and memory of its hungriest stage, time and money of all."""
    plan = max(plans, key=lambda each: each.settings[0].memory)
    setting, costs = plan.settings[0], [each.costs[0] for each in plans]
    parameters = sum(part.parameters for part in plan.parts)
    learning = sum(part.trainable for part in plan.parts)
    total = sum(each.num_steps * each.global_batch for each in plans)
    fits = "" if setting.fits else "does not fit"
    return (
        f"{name:22} {count(parameters):>10} {count(learning):>8} {figures(plan.work.useful / 1e9):>8} "
        f"{count(total):>8} {setting.num_gpus:>5} {setting.micro_batch:>6} {figures(setting.memory / 1e9):>9}  "
        f"{fits:12} {span(3600 * sum(c.hours for c in costs)):>9} {figures(sum(c.gpu_hours for c in costs)):>9} "
        f"{money(sum(c.money for c in costs)):>10} {size(plan.checkpoint):>10}"
    )


def assumptions(machine: Machine, plans: Sequence[Plan] = ()) -> list[str]:
    """What the figures stand on."""
    gpu = machine.gpu
    source = "a guess of what clouds ask; price= sets it" if machine.price == gpu.price else "as price= says"
    lines = [
        f"  {gpu.name}: {gpu.peak / 1e12:.0f} TFLOP/s dense bf16, {gpu.memory / 1e9:.0f} GB of which {USABLE:.0%} may "
        "be used (the rest: CUDA, NCCL, pieces)",
        f"  {machine.mfu:.0%} of that peak while a step computes; a forward pass that is computed again takes its time "
        "on top",
        "  no time for exchange between ranks, waiting for data, evaluation and checkpoints",
        f"  ${machine.price:.2f} for a GPU and hour ({source}); {machine.disk / 1e9:g} GB/s to the disk",
    ]
    for sample in {plan.sample for plan in plans}:
        text = "dialogues" if sample.images is not None else "texts"
        images = f" with {many(sample.images, 'image', 'images')}" if sample.images is not None else ""
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
    rows = [[name, size(value)] for name, value in named.items() if value]
    fits = "fits into" if setting.fits else "DOES NOT FIT into"
    rows.append(["at most at once", size(setting.memory)])
    passes = f"{many(setting.num_micro_batches, 'micro-batch', 'micro-batches')} of {setting.micro_batch:,}"
    title = f"memory of a rank of {setting.num_gpus:,}, {setting.strategy}, {passes}"
    return [
        *table([title, ""], rows),
        f"  {fits} the {size(machine.gpu.usable)} of {machine.gpu.name} that may be used",
    ]


def _time(plan: Plan, samples: int | None) -> list[str]:
    total = plan.num_steps * plan.global_batch
    samples = samples or plan.samples
    epochs = f", {_epochs(total / samples)} of {samples:,}" if samples else ", epochs unknown (samples=N)"
    tokens = total * plan.sample.tokens
    return [
        f"  {many(plan.num_steps, 'step', 'steps')} of {many(plan.global_batch, 'sample', 'samples')}: "
        f"{count(total)} samples{epochs}, "
        f"{count(tokens)} tokens",
        f"  checkpoint {size(plan.checkpoint)}, {span(plan.costs[0].stall_seconds)} to write",
    ]


def _sweep(plans: Sequence[Plan], machine: Machine, walltime: int | None) -> list[str]:
    """A line for each number of GPUs, all stages together."""
    header = ["GPUs", "", "micro-batch", "GB a rank", "step", "MFU", "time", "GPU hours", "cost"]
    header += ["jobs"] if walltime else []
    rows = []
    for index in range(len(plans[0].settings)):
        settings, costs = [plan.settings[index] for plan in plans], [plan.costs[index] for plan in plans]
        hours = sum(cost.hours for cost in costs)
        largest: Setting = max(settings, key=lambda each: each.memory)
        row = [
            f"{largest.num_gpus:,} x {machine.gpu.name}",
            largest.strategy,
            ", ".join(dict.fromkeys(f"{each.micro_batch} x {each.num_micro_batches}" for each in settings)),
            figures(largest.memory / 1e9) + ("" if largest.fits else " (too much)"),
            ", ".join(span(cost.step_seconds) for cost in costs),
            ", ".join(dict.fromkeys(f"{cost.mfu:.0%}" for cost in costs)),
            span(3600 * hours),
            figures(sum(cost.gpu_hours for cost in costs)),
            money(sum(cost.money for cost in costs)),
        ]
        if walltime:
            jobs = -(-round(hours * 3600) // walltime)
            row.append("1" if jobs <= 1 else f"{jobs:,} in turn")
        rows.append(row)
    return table(header, rows)


def _epochs(number: float) -> str:
    return "1 epoch" if number == 1 else f"{figures(number)} epochs"
