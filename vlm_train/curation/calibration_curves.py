"""How many planted copies a rule finds at each of its thresholds, how many it takes for copies of another picture, and
what it finds among the user's own pictures.

Each kind of copy is measured for itself, beside the own pictures alone, so that one kind is no bridge to another. Of a
copy a rule can say four things:

    found        it is a copy of its own picture, and the one that both stand for is one of the two
    wrong        it is a copy of another own picture, of which its own is none by the same rule
    through own  its own picture is a copy of another own one by the same rule, and so is the copy. Nobody knows whether
                 the two own pictures are; so this is neither found nor wrong
    missed       it is a copy of nothing

Recall is found / planted, precision found / (found + wrong). A rule that takes all for one finds nothing by this count,
for nearly all goes through own pictures. What a rule finds among the own pictures is neither right nor wrong: it is
counted beside, with pairs to look at.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_train.curation.calibration import CONTROL, COPIES, OWN, Planted
from vlm_train.curation.chain import Found, Step, Work
from vlm_train.data.home import write_whole
from vlm_train.data.row_folder import text_of
from vlm_train.errors import DataError

FILE = "calibration.json"
TRUE_COPIES = tuple(kind for kind in COPIES if kind != CONTROL)
"""The kinds that a rule should find. The control counts for nothing: data may hold mirrored pictures of its own."""

VERSION = 1
PAIRS_SHOWN = 6
"""Pairs of own pictures that are written down at each threshold."""

Rule = dict[str, Any]
"""Of a rule in calibration.json: `rule`; `setting` that `points` differ in; further `settings`; `points`: of each
threshold {threshold, kinds: {kind: {found, wrong, through_own}}, num_own_dropped}, in the order in which a rule finds
more; `suggested`: a threshold or null; `own_pairs`: {threshold, value, row, like}, rows of the user's manifest."""


def measured(planted: Planted, rule: str, setting: str, steps: Mapping[float, Step], *, work: Work) -> Rule:
    """A rule over its thresholds.

    Args:
        planted: what it looks at.
        rule: what it is called.
        setting: what its threshold is called.
        steps: the rule by threshold, in the order in which it finds more.
        work: see `Work`.

    Raises:
        ConfigError, DataError: as the steps do.
    """
    settings = [step.settings(work) for step in steps.values()]
    points, pairs, known = [], [], np.zeros(len(planted.kinds), bool)
    for number, (threshold, step) in enumerate(steps.items()):
        kinds = {}
        for place, kind in enumerate(COPIES):
            found = step.find(planted.manifest, np.isin(planted.kinds, (OWN, kind)), work)
            kinds[kind] = judged(planted, kind, _kept(found, len(planted.kinds)))
            work.ticking("runs of the rule")((len(COPIES) + 1) * number + place + 1, (len(COPIES) + 1) * len(steps))
        own = step.find(planted.manifest, planted.kinds == OWN, work)
        pairs += _pairs(planted, threshold, own, known)
        known[own.rows] = True
        points.append({"threshold": threshold, "kinds": kinds, "num_own_dropped": len(own.rows)})
    return {
        "rule": rule,
        "setting": setting,
        "settings": {name: value for name, value in settings[0].items() if name != setting},
        "points": points,
        "own_pairs": pairs,
    }


def judged(planted: Planted, kind: str, kept: NDArray[np.int64]) -> dict[str, int]:
    """What a rule says of the copies of one kind. `kept` int64 [M]: the row that each row is taken for a copy of."""
    copies = np.flatnonzero(planted.kinds == kind)
    own_row = np.zeros(int(planted.origin.max(initial=0)) + 1, np.int64)
    own = np.flatnonzero(planted.kinds == OWN)
    own_row[planted.origin[own]] = own
    with_own = kept[copies] == kept[own_row[planted.origin[copies]]]
    of_own = planted.origin[kept[copies]] == planted.origin[copies]
    told = {"found": with_own & of_own, "wrong": ~with_own & ~of_own, "through_own": with_own & ~of_own}
    return {name: int(rows.sum()) for name, rows in told.items()}


def recall(point: Mapping[str, Any], num_planted: int, kinds: tuple[str, ...] = TRUE_COPIES) -> float:
    """Share of the planted copies of some kinds that are found."""
    return sum(point["kinds"][kind]["found"] for kind in kinds) / max(1, num_planted * len(kinds))


def precision(point: Mapping[str, Any], kinds: tuple[str, ...] = TRUE_COPIES) -> float | None:
    """Share of the copies of some kinds that are taken for a copy of their own picture, among those taken for a copy of
    any; None where none is."""
    found, wrong = (sum(point["kinds"][kind][name] for kind in kinds) for name in ("found", "wrong"))
    return found / (found + wrong) if found + wrong else None


def suggested(rule: Rule, num_planted: int, target: float) -> float | None:
    """The threshold of the largest recall at a precision of `target` or more, of equals the first; None where none
    finds anything at that."""
    fit = [point for point in rule["points"] if (precision(point) or 0) >= target and recall(point, num_planted) > 0]
    return max(fit, key=lambda point: recall(point, num_planted))["threshold"] if fit else None


def save(
    folder: Path, planted: Planted, rules: list[Rule], *, manifest: str, seed: int, target: float
) -> dict[str, Any]:
    """Writes calibration.json; returns what it holds. `manifest`: fingerprint of the user's."""
    num_planted = planted.num_copied()
    content = {
        "version": VERSION,
        "manifest": manifest,
        "seed": seed,
        "num_planted": num_planted,
        "num_own": int((planted.kinds == OWN).sum()),
        "num_unreadable": planted.num_unreadable,
        "precision": target,
        "rules": [{**rule, "suggested": suggested(rule, num_planted, target)} for rule in rules],
    }
    write_whole(folder / FILE, text_of(content))
    return content


def read(folder: Path) -> dict[str, Any]:
    """What `save` wrote. Raises DataError where it is missing, damaged or of a newer version."""
    try:
        content = json.loads((folder / FILE).read_text())
        if content["version"] > VERSION:
            raise ValueError(f"version {content['version']} of the format, this release knows {VERSION}")
        return _checked(content)
    except Exception as error:  # whatever a damaged file makes of it
        raise DataError(f"calibration `{folder}` cannot be read", got=f"{type(error).__name__}: {error}",
                        allowed=f"a folder with {FILE}", remedy="vlm-train data calibrate SHARDS --out DIR"
                        ) from None  # fmt: skip


def _checked(content: dict[str, Any]) -> dict[str, Any]:
    """Touches all that a page shows; raises whatever it likes of what is not whole."""
    for rule in content["rules"]:
        rule["settings"].items(), rule["suggested"], rule["rule"] + rule["setting"]
        for point in rule["points"]:
            float(point["threshold"]), recall(point, content["num_planted"]), precision(point)
            int(point["num_own_dropped"])
        for pair in rule["own_pairs"]:
            int(pair["row"]), int(pair["like"]), float(pair["threshold"]), float(pair["value"] or 0)
    int(content["num_own"]), int(content["num_unreadable"]), float(content["precision"]), int(content["seed"])
    return content


def _kept(found: Found, num_rows: int) -> NDArray[np.int64]:
    kept = np.arange(num_rows)
    kept[found.rows] = found.like
    return kept


def _pairs(planted: Planted, threshold: float, own: Found, known: NDArray[np.bool_]) -> list[dict[str, Any]]:
    """Some of the own pairs that are found at a threshold and not before, those that the draw puts first."""
    new = np.flatnonzero(~known[own.rows])
    new = new[np.argsort(planted.origin[own.rows[new]])][:PAIRS_SHOWN]
    rows, likes = (planted.rows[planted.origin[rows[new]]].tolist() for rows in (own.rows, own.like))
    values = [None if np.isnan(value) else float(value) for value in own.values[new]]
    return [
        {"threshold": threshold, "value": value, "row": row, "like": like}
        for row, like, value in zip(rows, likes, values, strict=True)
    ]
