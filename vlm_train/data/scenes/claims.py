"""Statements about a scene as structures: each has a text and a verdict, so a text cannot say what was not checked.

A relation is claimed only where it is plain: "left of" is true when the boxes do not meet along x and the first lies on
the left, false when they do not meet and it lies on the right, and otherwise nobody claims it either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vlm_train.data.scenes.world import GRID, SHAPES, SceneObject

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
RELATIONS = {"left of": "to the left of", "right of": "to the right of", "above": "above", "below": "below"}
"""Name of a relation and how a sentence says it."""
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
"""What the cells of a scene's 3 x 3 grid are called, row by row."""
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@dataclass(frozen=True, slots=True)
class Thing:
    """An object as it can be seen: its kind, its size class, the box [x0, y0, x1, y1] of its visible pixels, and the
    cell of the grid where the centre of that lies."""

    shape: str
    color: str
    size: str
    box: tuple[int, int, int, int]
    place: str

    @classmethod
    def of(cls, item: SceneObject, box: Sequence[int], side: int) -> Thing:
        """The object of a scene of `side` pixels together with its measured box."""
        x0, y0, x1, y1 = box
        row, column = ((low + high) * GRID // (2 * side) for low, high in ((y0, y1), (x0, x1)))
        return cls(item.shape, item.color, item.size, (x0, y0, x1, y1), PLACES[row * GRID + column])

    @property
    def name(self) -> str:
        """Colour and shape, which together name one object of a scene."""
        return f"{self.color} {self.shape}"

    def has(self, word: str) -> bool:
        """Whether `word` (a shape, a colour, a size, or `object`) is true of this thing."""
        return word in (self.shape, self.color, self.size, "object")


View = Sequence[Thing]


def with_article(words: str) -> str:
    """`a red circle`, `an orange star`."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def plural(word: str, num: int) -> str:
    """A shape, or a colour said of objects, in the number that `num` asks for."""
    noun = word if word in SHAPES or word == "object" else f"{word} object"
    if num == 1:
        return noun
    return noun + ("es" if noun.endswith("s") else "s")


def listed(phrases: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def related(subject: Thing, relation: str, other: Thing) -> bool | None:
    """Whether `subject` stands in `relation` to `other`; None where one could argue."""
    axis = 0 if relation in ("left of", "right of") else 1
    before = subject.box[axis + 2] <= other.box[axis]
    after = other.box[axis + 2] <= subject.box[axis]
    if before == after:
        return None
    return before if relation in ("left of", "above") else after


@dataclass(frozen=True, slots=True)
class Listing:
    """All of these things are in the scene: `a red circle and a blue square`."""

    things: tuple[Thing, ...]
    sized: bool = False

    @property
    def text(self) -> str:
        """The sentence."""
        return listed(
            [with_article(f"{thing.size} {thing.name}" if self.sized else thing.name) for thing in self.things]
        )

    def verdict(self, view: View) -> bool | None:
        """True when every thing named is seen."""
        return all(
            any(seen.name == thing.name and (not self.sized or seen.size == thing.size) for seen in view)
            for thing in self.things
        )


@dataclass(frozen=True, slots=True)
class Relation:
    """`a red circle to the left of a blue square, with a green star`; `rest` are the things only mentioned."""

    subject: Thing
    relation: str
    other: Thing
    rest: tuple[Thing, ...] = ()

    @property
    def text(self) -> str:
        """The sentence."""
        core = f"{with_article(self.subject.name)} {RELATIONS[self.relation]} {with_article(self.other.name)}"
        return f"{core}, with {Listing(self.rest).text}" if self.rest else core

    def verdict(self, view: View) -> bool | None:
        """None where the boxes meet along the axis of the relation."""
        seen = {thing.name: thing for thing in view}
        if not {thing.name for thing in (self.subject, self.other, *self.rest)} <= set(seen):
            return False
        return related(seen[self.subject.name], self.relation, seen[self.other.name])

    def complete(self, view: View) -> Relation:
        """The same sentence, mentioning every other thing of the scene too."""
        return replace(self, rest=tuple(thing for thing in view if thing not in (self.subject, self.other)))

    def reversed(self) -> Relation:
        """The same words with subject and object changed over."""
        return replace(self, subject=self.other, other=self.subject)

    def opposite(self) -> Relation:
        """The same things with the opposite relation."""
        return replace(self, relation=OPPOSITE[self.relation])


@dataclass(frozen=True, slots=True)
class Count:
    """Exactly `num` objects have the word: `there are two circles`."""

    word: str
    num: int

    @property
    def text(self) -> str:
        """The sentence."""
        return f"there {'is' if self.num == 1 else 'are'} {NUMBERS[self.num]} {plural(self.word, self.num)}"

    def verdict(self, view: View) -> bool | None:
        """True when exactly `num` things have the word."""
        return sum(thing.has(self.word) for thing in view) == self.num


@dataclass(frozen=True, slots=True)
class Presence:
    """Something with all of the words is in the scene, or (`present` False) nothing is: `there is no red circle`."""

    words: tuple[str, ...]
    present: bool

    @property
    def phrase(self) -> str:
        """The words as a noun: `star`, `red object`, `red circle`."""
        return plural(self.words[0], 1) if len(self.words) == 1 else " ".join(self.words)

    @property
    def text(self) -> str:
        """The sentence."""
        return f"there is {with_article(self.phrase) if self.present else f'no {self.phrase}'}"

    def verdict(self, view: View) -> bool | None:
        """Whether the scene agrees."""
        return any(all(thing.has(word) for word in self.words) for thing in view) == self.present


Claim = Listing | Relation | Count | Presence
