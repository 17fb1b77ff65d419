"""report.html: what a run was, what it measured and how it went, in one file that needs nothing else.

Everything comes from the records in the run directory (config.yaml, events.jsonl, metrics.jsonl, evals/, media/,
data_errors.jsonl), so a report can be written at any time, by any process, also of a run that was killed.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

import yaml

from vlm_train.engine import report_page as page
from vlm_train.engine.charts import Chart, Series, number, share
from vlm_train.engine.prompts_page import prompt_cards
from vlm_train.engine.report_time import time_section
from vlm_train.engine.rundir import RunDirectory, read_lines, write_atomic
from vlm_train.engine.scores import cells, controls_of, counts_of, scores_of
from vlm_train.locations import in_texts, scrubbed

Rows = list[dict[str, Any]]

_PLACE_COLUMNS = ("step", "samples")
_TITLES = {
    "lr": "Learning rate", "grad_norm": "Gradient norm", "param_norm": "Weight norm",
    "logit_scale": "Scale (1 / temperature)", "logit_bias": "Bias",
    "samples_per_second": "Samples per second", "data_wait": "Waiting for data", "mfu": "Model FLOP utilisation",
}  # fmt: skip
_SHARES = ("data_wait", "mfu")
_ALT = {
    "retrieval_grid": "Validation captions, each with the five images that the model ranks highest; the right image "
    "has a green frame",
    "similarity": "Matrix of the cosines between the first validation images and captions; right pairs lie on the "
    "outlined diagonal",
    "first_batch": "The first training images after augmentation with the captions that their tokens spell, and "
    "statistics of pixels and tokens",
}


def write_report(run: RunDirectory) -> None:
    """Writes report.html from the records of the run. Raises VlmError when it cannot be written."""
    write_atomic(run.report, render_report(run))


def render_report(run: RunDirectory) -> str:
    """The document."""
    config = in_texts(scrubbed, yaml.safe_load(run.config.read_text(encoding="utf-8")))
    events, metrics = list(read_lines(run.events, "event")), list(read_lines(run.metrics, "step"))
    history = _history(run)
    media = run.media
    body = [
        page.section("Results", *_tables(history)),
        page.section("Answers over steps", prompt_cards(history, media)),
        page.section("What texts find", page.picture(media / "retrieval_grid.png", _ALT["retrieval_grid"])),
        page.section("Training", _training_charts(metrics, _restarts(events))),
        page.section("Evaluation over steps", _evaluation_charts(history)),
        page.section("Time", time_section(run)),
        page.section("Images against captions", page.picture(media / "similarity.png", _ALT["similarity"])),
        page.section("First batch", page.picture(media / "first_batch.png", _ALT["first_batch"])),
        page.section("Data errors", _data_errors(run)),
        page.section("Records", _folded_records(config, events)),
    ]
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime(events[-1]["time"])) if events else ""
    title = f"{config['run']['experiment']} {config['run']['id']}"
    return page.page(title, _header(config, events, metrics, history), [part for part in body if part],
                     f"vlm-train, as recorded until {written}.")  # fmt: skip


def _header(config: Mapping[str, Any], events: Rows, metrics: Rows, history: Rows) -> str:
    status, kind = _status(config, events, metrics)
    machine = next((event for event in reversed(events) if event["event"] == "environment"), {})
    last = metrics[-1] if metrics else {}
    lead = [*_headline(history)]
    lead += [("training loss", number(last["loss"]))] if last else []
    lead += [("parameters", _short(machine["num_parameters"]))] if machine else []
    lead += [("samples seen", _short(last["samples"]))] if last else []
    lead += [("duration", _duration(_seconds(events)))] if events else []
    experiment, name = escape(str(config["run"]["experiment"])), escape(str(config["run"]["id"]))
    return (
        f'<div class="brand">vlm-train report</div><h1>{experiment} <small>{name}</small></h1>'
        f'<span class="pill {kind}">{status}</span>{page.tiles(lead)}{page.facts(_facts(config, events, machine))}'
    )


def _facts(config: Mapping[str, Any], events: Rows, machine: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    data, trainer, model = config["data"], config["trainer"], config["model"]
    parts = machine.get("parts", {})
    towers = [f"{name} {_class(model[name])} ({_short(parts[name])})" for name in parts if _class(model.get(name))]
    versions = machine.get("versions", {})
    num_restarts = len(_restarts(events))
    yield "Objective", _class(config["objective"])
    yield "Model", ", ".join([_class(model), *towers])
    yield "Training data", _paths(data["train"]["shards"])
    yield "Validation data", _paths(data["val"]["shards"])
    yield "Selection", str(data.get("selection") or "")
    yield "Groups", "{size} neighbours on {walk}".format_map(data["groups"]) if data.get("groups") else ""
    yield "Steps", f"{trainer['max_steps']:,} of {trainer['global_batch']:,} samples"
    peak = f"peak rate {number(config['optim']['lr'])}"
    for found in [event for event in events if event["event"] == "micro_batch"][-1:]:
        share = -(-trainer["global_batch"] // found["ranks"])
        yield "Micro-batch", f"{found['micro_batch']:,} of {share:,} samples of a rank at once"
    yield "Optimiser", f"{_class(config['optim'])}, {peak}, {_class(config['schedule'])}"
    yield "Precision", str(config["precision"]["name"])
    yield "Machine", "{num_ranks} x {device}, {num_cores} cores".format_map(machine) if machine else ""
    yield "Versions", ", ".join(f"{name} {text}" for name, text in versions.items())
    yield "Restarts", f"{num_restarts}" if num_restarts else "none"
    yield "Seed", str(config["seed"])


def _status(config: Mapping[str, Any], events: Rows, metrics: Rows) -> tuple[str, str]:
    steps = f"step {metrics[-1]['step'] if metrics else 0:,} of {config['trainer']['max_steps']:,}"
    names = [event["event"] for event in events if event["event"] in ("start", "resume", "interrupted", "finished")]
    if names[-1:] == ["finished"]:
        return "finished", "good"
    return (f"stopped at {steps}", "warn") if names[-1:] == ["interrupted"] else (f"unfinished: {steps}", "warn")


def _headline(history: Rows) -> Iterable[tuple[str, str]]:
    """The first score of each evaluator's newest result."""
    for row in _newest(history):
        first = next(iter(scores_of(row)), None)
        if first is not None:
            chance = "" if first.chance is None else f" (chance {first.chance:.1f})"
            yield f"{row['name'].replace('_', ' ')}: {first.name}{chance}", f"{first.value:.1f}"


def _tables(history: Rows) -> list[str]:
    tables = []
    for row in _newest(history):
        if not scores_of(row):
            continue
        header, lines = cells(scores_of(row), interval=".1f")
        facts = [f"{key.replace('_', ' ')} {value:.1f}" for key, value in controls_of(row).items()]
        facts += [f"{value:,} {key.replace('_', ' ')}" for key, value in counts_of(row).items()]
        facts += [f"after step {row['step']:,}"]
        caption = row["name"].replace("_", " ").capitalize()
        tables.append(page.table(caption, ["", *header], lines, ", ".join(facts)))
    return [f'<div class="tables">{"".join(tables)}</div>'] if tables else []


def _training_charts(metrics: Rows, restarts: list[tuple[float, str]]) -> str:
    if not metrics:
        return ""
    columns = [name for name in dict.fromkeys(key for row in metrics for key in row) if name not in _PLACE_COLUMNS]
    accuracies = [name for name in columns if name.startswith("accuracy")]
    order = ["loss", "lr", "grad_norm", "param_norm", "logit_scale"]
    known = [name for name in order if name in columns]
    by_part = {norm: [name for name in columns if name.startswith(f"{norm}/")] for norm in ("grad_norm", "param_norm")}
    grouped = {*known, *accuracies, *(name for names in by_part.values() for name in names), *_TITLES}
    rest = [name for name in columns if name not in grouped]
    machine = [name for name in _TITLES if name in columns and name not in known]
    big = _chart("Loss", metrics, ["loss"], restarts).html()
    groups = [(_TITLES.get(name, name.replace("_", " ").capitalize()), [name]) for name in known[1:]]
    groups += [(f"{_TITLES[norm]} by part", names) for norm, names in by_part.items() if names]
    groups += [("Accuracy within the batch", accuracies)] if accuracies else []
    groups += [(_TITLES.get(name, name.replace("_", " ").capitalize()), [name]) for name in [*rest, *machine]]
    charts = "".join(_chart(title, metrics, names, restarts).html() for title, names in groups)
    note = '<p class="note">Dashed vertical lines: the run was resumed there.</p>' if restarts else ""
    return f'<div class="big-chart">{big}</div><div class="charts" style="margin-top:16px">{charts}</div>{note}'


def _chart(title: str, metrics: Rows, names: list[str], restarts: list[tuple[float, str]]) -> Chart:
    steps = [row["step"] for row in metrics]
    series = [
        Series(
            name=name.rpartition("/")[2].removeprefix("accuracy_").replace("_", " ") if len(names) > 1 else "last",
            steps=steps,
            values=[row.get(name) for row in metrics],
        )
        for name in names
    ]
    is_share = names[0] in _SHARES or (len(names) > 1 and names[0].startswith("accuracy"))
    return Chart(
        title=title, series=series, markers=restarts, form=share if is_share else number,
        from_zero=names[0] != "loss",
    )  # fmt: skip


def _evaluation_charts(history: Rows) -> str:
    charts: dict[tuple[str, str], dict[str, tuple[list[float], list[float | None], float | None]]] = {}
    for row in history:
        for score in scores_of(row):
            curves = charts.setdefault((row["name"], score.group), {})
            steps, values, _ = curves.get(score.metric, ([], [], None))
            curves[score.metric] = [*steps, row["step"]], [*values, score.value], score.chance
    figures = [
        Chart(
            title=" ".join(word for word in (name, group) if word).replace("_", " ").capitalize(),
            series=[
                Series(name=metric.replace("_", " "), steps=steps, values=values, baseline=chance)
                for metric, (steps, values, chance) in curves.items()
            ],
            from_zero=True,
        ).html()
        for (name, group), curves in charts.items()
        if max(len(steps) for steps, _, _ in curves.values()) > 1
    ]
    note = '<p class="note">Dashed horizontal lines: what a model that knows nothing scores.</p>'
    return f'<div class="charts">{"".join(figures)}</div>{note}' if figures else ""


def _data_errors(run: RunDirectory) -> str:
    errors = list(read_lines(run.data_errors))
    if not errors:
        return '<p class="note">No sample was unreadable.</p>'
    reasons = Counter((_found_when(error), str(error["reason"])) for error in errors)
    first = {(_found_when(error), str(error["reason"])): error for error in reversed(errors)}
    rows = [
        [
            when,
            reason,
            f"{num:,}",
            *(str(first[when, reason].get(key, "")) for key in ("step", "shard", "key", "detail")),
        ]
        for (when, reason), num in reasons.most_common()
    ]
    num_samples = len({(error["split"], error["shard"], error["key"]) for error in errors})
    note = f"{num_samples:,} different samples; a line each time one came up is in data_errors.jsonl"
    columns = ("when", "reason", "times", "first step", "shard", "key", "detail")
    return page.table("Samples that could not be used", columns, rows, note)


def _found_when(error: Mapping[str, Any]) -> str:
    """Step 0 stands for the index, as in data_errors.jsonl."""
    if error["split"] == "val":
        return "validation"
    return "index, left out" if error["step"] == 0 else "training, replaced"


def _folded_records(config: Mapping[str, Any], events: Rows) -> str:
    lines = [
        f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(event['time']))}  {event['event']:12} "
        + json.dumps({key: value for key, value in event.items() if key not in ("event", "time")})
        for event in events
    ]
    text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
    return page.folded("Resolved config", text) + page.folded(f"Events ({len(events)})", "\n".join(lines))


def _history(run: RunDirectory) -> Rows:
    """Results by step; of a step that was measured twice, the later."""
    newest = {(row["name"], row["step"]): row for row in read_lines(run.history)}
    return sorted(newest.values(), key=lambda row: row["step"])


def _newest(history: Rows) -> list[dict[str, Any]]:
    return list({row["name"]: row for row in history}.values())


def _restarts(events: Rows) -> list[tuple[float, str]]:
    return [(e["step"], f"resumed after step {e['step']:,}") for e in events if e["event"] == "resume"]


def _seconds(events: Rows) -> float:
    """Time in which a process was at work, as far as events tell: sessions begin with start or resume."""
    total, began = 0.0, None
    previous = events[0]["time"]
    for event in events:
        if event["event"] in ("start", "resume"):
            total += previous - began if began is not None else 0.0
            began = event["time"]
        previous = event["time"]
    return total + (previous - began if began is not None else 0.0)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _short(count: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:g}"


def _class(node: Any) -> str:
    return str(node.get("_target_", "")).rsplit(".", 1)[-1] if isinstance(node, Mapping) else ""


def _paths(shards: Any) -> str:
    return ", ".join(map(str, shards)) if isinstance(shards, list) else str(shards)
