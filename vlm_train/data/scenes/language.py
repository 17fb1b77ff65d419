"""What is said about a scene: captions, true negations, and pairs of a true and a false caption.

Every pair is checked against the scene before it is given out. In each kind of pair the true and the false caption come
from the same distribution of texts (colours, shapes, sides and counts are exchangeable, see `world`), so a model that
does not look at the picture cannot do better than 50 %.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from vlm_train.data.scenes.claims import (
    NUMBERS,
    RELATIONS,
    Claim,
    Count,
    Listing,
    Presence,
    Relation,
    Thing,
    View,
    plural,
    related,
)
from vlm_train.data.scenes.world import COLORS, SHAPES, WHOLE, World

CONTRASTS = ("attribute", "replacement", "relation", "order", "count", "negation")
"""In which one way a false caption may differ from the true one: two things have exchanged their colours; one has a
colour that is not in the scene; the opposite relation; subject and object exchanged; another number; yes for no."""
COMPLETE = ("attribute", "replacement", "relation", "order")
"""Those whose true side names every object of the scene, as captions do."""
PREFIXES = ("a picture of", "an image of", "a drawing of", "here we see")


def relations_of(view: View) -> list[tuple[int, str, int]]:
    """Every plain relation as (subject, relation, object), by position in `view`."""
    return [
        (first, relation, second)
        for first in range(len(view))
        for second in range(len(view))
        for relation in RELATIONS
        if first != second and related(view[first], relation, view[second])
    ]


def counts_of(view: View) -> dict[str, int]:
    """How many things have each word that at least one has; `object` counts them all."""
    words = ["object", *SHAPES, *COLORS]
    counts = {word: sum(thing.has(word) for thing in view) for word in words}
    return {word: num for word, num in counts.items() if num}


def captions_of(rng: random.Random, view: View) -> list[str]:
    """Several phrasings, each of which names every object of the scene; the first is the plainest."""
    orders = [tuple(rng.sample(view, len(view))) for _ in range(3)]
    captions = [
        Listing(orders[0]).text,
        f"{rng.choice(PREFIXES)} {Listing(orders[1], sized=True).text}",
        f"{NUMBERS[len(view)]} {plural('object', len(view))}: {Listing(orders[2]).text}",
    ]
    relation = pick_relation(rng, view)
    if relation is not None:
        captions.append(relation.complete(view).text)
    return captions


def pick_relation(rng: random.Random, view: View) -> Relation | None:
    """One plain relation of the scene; None where there is none."""
    found = relations_of(view)
    if not found:
        return None
    first, relation, second = rng.choice(found)
    return Relation(view[first], relation, view[second])


def negations_of(rng: random.Random, view: View, world: World = WHOLE) -> list[str]:
    """True statements of absence: of a shape, of a colour, and of a colour on a shape though both are there."""
    claims = [
        Presence((rng.choice(found),), False)
        for words in (world.shapes, world.colors)
        if (found := absent(words, view))
    ]
    mixed = [
        Presence((first.color, second.shape), False)
        for first in view
        for second in view
        if not any(thing.has(first.color) and thing.has(second.shape) for thing in view)
    ]
    claims += [rng.choice(mixed)] if mixed else []
    return [claim.text for claim in claims]


def absent(words: Sequence[str], view: View) -> list[str]:
    """Those of the words that no thing has."""
    return [word for word in words if not any(thing.has(word) for thing in view)]


def contrasts_of(rng: random.Random, view: View, world: World = WHOLE) -> list[dict[str, str]]:
    """Pairs {true, false, type}; types: those of `CONTRASTS`."""
    pairs: list[tuple[str, Claim, Claim]] = []
    pairs += attribute_contrast(rng, view, world)
    turned, exchanged = pick_relation(rng, view), pick_relation(rng, view)
    if turned is not None and exchanged is not None:
        turned, exchanged = turned.complete(view), exchanged.complete(view)
        pairs += [("relation", turned, turned.opposite()), ("order", exchanged, exchanged.reversed())]
    pairs += [*count_contrast(rng, view, world), *negation_contrast(rng, view, world)]
    return [
        {"true": true.text, "false": false.text, "type": kind}
        for kind, true, false in pairs
        if true.verdict(view) is True and false.verdict(view) is False
    ]


def attribute_contrast(rng: random.Random, view: View, world: World) -> list[tuple[str, Claim, Claim]]:
    """Two things of different shape exchange their colours, which only who knows what belongs together can tell; where
    no two can, a `replacement`: one thing gets a colour not in the scene, which a bag of words tells.

    Only colours that occur once are touched: then the false caption is what the true one would be in a scene with two
    colours renamed, a scene just as likely. Otherwise naming one thing twice would give falsehood away.
    """
    things: list[Thing] = rng.sample(view, len(view))
    changed = list(things)
    single = [place for place, thing in enumerate(things) if sum(other.has(thing.color) for other in view) == 1]
    pairs = [(i, j) for i in single for j in single if i < j and things[i].shape != things[j].shape]
    if pairs:
        i, j = rng.choice(pairs)
        changed[i], changed[j] = replace(things[i], color=things[j].color), replace(things[j], color=things[i].color)
    elif single and (others := absent(world.colors, view)):
        i = rng.choice(single)
        changed[i] = replace(things[i], color=rng.choice(others))
    else:
        return []
    return [("attribute" if pairs else "replacement", Listing(tuple(things)), Listing(tuple(changed)))]


def count_contrast(rng: random.Random, view: View, world: World) -> list[tuple[str, Claim, Claim]]:
    """The number of objects, and one more or one fewer, inside the range of numbers that scenes have; none where all
    scenes have the same."""
    num = len(view)
    near = [other for other in (num - 1, num + 1) if other in world.count_odds]
    return [("count", Count("object", num), Count("object", rng.choice(near)))] if near else []


def negation_contrast(rng: random.Random, view: View, world: World) -> list[tuple[str, Claim, Claim]]:
    """`there is a star` against `there is no star`; which of them is true is drawn first. None where every shape is in
    the scene, since nothing but the first could be true then."""
    others = absent(world.shapes, view)
    if not others:
        return []
    present = rng.random() < 0.5
    words = sorted({thing.shape for thing in view}) if present else others
    claim = Presence((rng.choice(words),), present)
    return [("negation", claim, replace(claim, present=not present))]
