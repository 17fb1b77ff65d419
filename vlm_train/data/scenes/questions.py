"""What is asked about a scene: questions with one right answer, dialogues, and questions that hang on a context.

A yes/no question is made by drawing the answer first, so the answers are even by construction. A context question is
asked twice about one picture, in two contexts with two different answers, as in CODIS (github.com/THUNLP-MT/CODIS): a
model that ignores the context answers one of the two rightly at best, and never both.
"""

from __future__ import annotations

import random
from typing import Any

from vlm_train.data.scenes.claims import OPPOSITE, RELATIONS, Thing, View, plural, with_article
from vlm_train.data.scenes.language import absent, pick_relation
from vlm_train.data.scenes.world import WHOLE, World


def questions_of(rng: random.Random, view: View, world: World = WHOLE) -> list[dict[str, str]]:
    """Dicts {question, answer, type}; types: color, shape, size, count, existence, position, spatial."""
    found = [_color(rng, view), _shape(rng, view), _size(rng, view), _count(rng, view, world)]
    found += [_existence(rng, view, world), _position(rng, view), _spatial(rng, view)]
    return [{"question": row[0], "answer": row[1], "type": row[2]} for row in found if row is not None]


def conversation_of(rng: random.Random, questions: list[dict[str, str]]) -> list[dict[str, str]]:
    """The questions in any order as turns of user and assistant; the first turn carries the image."""
    turns: list[dict[str, str]] = []
    for row in rng.sample(questions, len(questions)):
        image = "" if turns else "<image>\n"
        turns.append({"role": "user", "content": f"{image}{row['question']}"})
        turns.append({"role": "assistant", "content": row["answer"]})
    return turns


def contexts_of(rng: random.Random, view: View) -> list[dict[str, Any]]:
    """Dicts {question, contexts, answers, category}: one question, two contexts, the answer in each."""
    found = []
    only = [thing for thing in view if _alone(thing.color, view)]
    if len(only) >= 2:
        pair = rng.sample(only, 2)
        contexts, answers = (
            [f"I want something {thing.color}." for thing in pair],
            [f"the {thing.name}" for thing in pair],
        )
        found.append(("which object should I pick?", contexts, answers, "preference"))
    relation = pick_relation(rng, view)
    if relation is not None and relation.relation in ("left of", "right of"):
        asked = relation if rng.random() < 0.5 else relation.opposite()
        ways = [("The picture shows the scene as it is.", asked == relation)]
        ways.append(("The picture shows the scene in a mirror.", asked != relation))
        rng.shuffle(ways)
        question = f"in the scene itself, is {_said(asked.subject, asked.relation, asked.other)}?"
        found.append((question, [way for way, _ in ways], [_yes_or_no(answer) for _, answer in ways], "orientation"))
    return [{"question": row[0], "contexts": row[1], "answers": row[2], "category": row[3]} for row in found]


def _alone(word: str, view: View) -> bool:
    return sum(thing.has(word) for thing in view) == 1


def _said(subject: Thing, relation: str, other: Thing) -> str:
    return f"the {subject.name} {RELATIONS[relation]} the {other.name}"


def _yes_or_no(answer: bool) -> str:
    return "yes" if answer else "no"


def _color(rng: random.Random, view: View) -> tuple[str, str, str] | None:
    only = [thing for thing in view if _alone(thing.shape, view)]
    if not only:
        return None
    thing = rng.choice(only)
    return f"what color is the {thing.shape}?", thing.color, "color"


def _shape(rng: random.Random, view: View) -> tuple[str, str, str] | None:
    only = [thing for thing in view if _alone(thing.color, view)]
    if not only:
        return None
    thing = rng.choice(only)
    return f"what shape is the {thing.color} object?", thing.shape, "shape"


def _size(rng: random.Random, view: View) -> tuple[str, str, str]:
    thing = rng.choice(view)
    return f"is the {thing.name} small or large?", thing.size, "size"


def _count(rng: random.Random, view: View, world: World) -> tuple[str, str, str]:
    seen = [word for thing in view for word in (thing.shape, thing.color)]
    word = rng.choice(["object", *seen, rng.choice(world.shapes), rng.choice(world.colors)])
    return f"how many {plural(word, 2)} are there?", str(sum(thing.has(word) for thing in view)), "count"


def _existence(rng: random.Random, view: View, world: World) -> tuple[str, str, str]:
    answer = rng.random() < 0.5
    thing = rng.choice(view)
    color, shape = thing.color, thing.shape
    colors = [other for other in world.colors if not any(t.has(other) and t.has(shape) for t in view)]
    shapes = absent(world.shapes, [t for t in view if t.has(color)])
    if not answer and (rng.random() < 0.5 or not shapes) and colors:
        color = rng.choice(colors)
    elif not answer and shapes:
        shape = rng.choice(shapes)
    else:
        answer = True
    return f"is there {with_article(f'{color} {shape}')}?", _yes_or_no(answer), "existence"


def _position(rng: random.Random, view: View) -> tuple[str, str, str]:
    thing = rng.choice(view)
    return f"where is the {thing.name}?", thing.place, "position"


def _spatial(rng: random.Random, view: View) -> tuple[str, str, str] | None:
    relation = pick_relation(rng, view)
    if relation is None:
        return None
    answer = rng.random() < 0.5
    name = relation.relation if answer else OPPOSITE[relation.relation]
    return f"is {_said(relation.subject, name, relation.other)}?", _yes_or_no(answer), "spatial"
