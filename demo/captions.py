"""Template captions of a scene, their truth, and the ways they go wrong.

A `Statement` is what a caption claims; `holds` decides whether a scene makes it true, so no caption is
ever called wrong by accident. `word_list` turns a statement into words, each tagged with the claim it carries.
"""
import random
from dataclasses import dataclass, replace

from scenes import BACKGROUNDS, COLOUR_NAMES, COUNT_MAX, SHAPES, SIZES, Scene

NOISE_KINDS = ("other_image", "wrong_colour", "wrong_shape", "wrong_size", "wrong_count", "wrong_relation",
               "wrong_background", "swapped", "garbled")
COUNT_WORDS = {1: ("a", "one"), 2: ("two",), 3: ("three",), 4: ("four",)}
SIZE_WORDS = {"small": ("small", "tiny", "little"), "large": ("large", "big")}
PLURAL = {"cross": "crosses"}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
OPENINGS = ("", "", "", "", "a picture of", "an image of", "this shows", "we see", "a photo with")
# Words that no template uses today but a person may type at the demo.
EXTRA_WORDS = ("is", "are", "at", "by", "it", "dog", "cat", "man", "woman", "and", "or", "but", "not", "no")


@dataclass(frozen=True)
class Claim:
    """`count` objects of this shape and colour; size None means not mentioned."""

    shape: str
    colour: str
    size: str | None
    count: int


@dataclass(frozen=True)
class Statement:
    """Claims; `relation` (left, right, above, below) puts claim 0 against claim 1."""

    claims: tuple
    relation: str | None
    background: str | None


def describe(scene: Scene, rng: random.Random) -> Statement:
    """A true statement about some or all of the scene."""
    order = list(range(len(scene.groups)))
    rng.shuffle(order)
    if len(order) > 1 and rng.random() < 0.2:
        order.pop()
    claims = []
    for index in order:
        group = scene.groups[index]
        claims.append(Claim(group.shape, group.colour, group.size if rng.random() < 0.5 else None, group.count))
    relation = None
    if len(order) == 2 and scene.layout != "free" and rng.random() < 0.75:
        first, second = ("left", "right") if scene.layout == "row" else ("above", "below")
        relation = first if order[0] == 0 else second
    background = scene.background if rng.random() < 0.3 else None
    return Statement(tuple(claims), relation, background)


def holds(statement: Statement, scene: Scene) -> bool:
    """Whether everything the statement says is true of the scene."""
    places = []
    for claim in statement.claims:
        named = (claim.shape, claim.colour)
        index = next((i for i, g in enumerate(scene.groups) if (g.shape, g.colour) == named), None)
        if index is None or scene.groups[index].count != claim.count:
            return False
        if claim.size is not None and scene.groups[index].size != claim.size:
            return False
        places.append(index)
    if statement.background is not None and statement.background != scene.background:
        return False
    if statement.relation is None:
        return True
    axis = "row" if statement.relation in ("left", "right") else "column"
    forward = statement.relation in ("left", "above")
    return scene.layout == axis and (places[0] < places[1]) == forward


def word_list(statement: Statement, rng: random.Random) -> list:
    """[(word, slot)]: slot names the claim a word carries, such as ("colour", 0), or is None."""
    words = [(w, None) for w in rng.choice(OPENINGS).split()]
    for index, claim in enumerate(statement.claims):
        if index > 0:
            words += _joint(statement, index, rng)
        number = rng.choice(COUNT_WORDS[claim.count])
        if number == "a" and claim.size is None and claim.colour == "orange":
            number = "an"
        words.append((number, ("count", index)))
        if claim.size is not None:
            words.append((rng.choice(SIZE_WORDS[claim.size]), ("size", index)))
        words.append((claim.colour, ("colour", index)))
        noun = claim.shape if claim.count == 1 else PLURAL.get(claim.shape, claim.shape + "s")
        words.append((noun, ("shape", index)))
    if statement.background is not None:
        words += [("on", None), ("a", None), (statement.background, ("background", 0)), ("background", None)]
    return words


def _joint(statement, index, rng):
    if index == 1 and statement.relation is not None:
        side = (statement.relation, ("relation", 0))
        if statement.relation in ("above", "below"):
            return [side]
        return [(w, None) for w in rng.choice(("to the", "on the")).split()] + [side, ("of", None)]
    if index + 1 < len(statement.claims):
        return [(",", None)]
    return [(rng.choice(("and", "and", "with")), None)]


def sentence(words: list, rng: random.Random) -> str:
    """Words to a caption: spaces, sometimes a capital and a full stop (the tokenizer ignores case)."""
    text = " ".join(words).replace(" ,", ",")
    if rng.random() < 0.3:
        text = text[:1].upper() + text[1:] + "."
    return text


def spoil(statement: Statement, kind: str, rng: random.Random):
    """(spoilt statement, slots that changed), or None where this kind does not apply to it."""
    index = rng.randrange(len(statement.claims))
    claim = statement.claims[index]
    if kind == "wrong_colour":
        change, slots = {"colour": _other(COLOUR_NAMES, claim.colour, rng)}, {("colour", index)}
    elif kind == "wrong_shape":
        change, slots = {"shape": _other(SHAPES, claim.shape, rng)}, {("shape", index)}
    elif kind == "wrong_count":
        change, slots = {"count": _other(range(1, COUNT_MAX + 1), claim.count, rng)}, {("count", index)}
    elif kind == "wrong_size" and claim.size is not None:
        change, slots = {"size": _other(SIZES, claim.size, rng)}, {("size", index)}
    elif kind == "wrong_relation" and statement.relation is not None:
        return replace(statement, relation=OPPOSITE[statement.relation]), {("relation", 0)}
    elif kind == "wrong_background" and statement.background is not None:
        return replace(statement, background=_other(BACKGROUNDS, statement.background, rng)), {("background", 0)}
    elif kind == "swapped" and len(statement.claims) > 1:
        return _swap(statement, rng)
    else:
        return None
    claims = list(statement.claims)
    claims[index] = replace(claim, **change)
    return replace(statement, claims=tuple(claims)), slots


def _other(values, value, rng):
    return rng.choice([v for v in values if v != value])


def _swap(statement, rng):
    """Exchanges the colours or the shapes of the first two claims: every word is right, the binding is wrong."""
    a, b = statement.claims[:2]
    field = rng.choice([f for f in ("colour", "shape") if getattr(a, f) != getattr(b, f)])
    swapped = (replace(a, **{field: getattr(b, field)}), replace(b, **{field: getattr(a, field)}))
    return replace(statement, claims=swapped + statement.claims[2:]), {(field, 0), (field, 1)}


def garble(words: list, rng: random.Random):
    """(words, flags) of broken text: letters scrambled or replaced in most words, or the word order destroyed."""
    if rng.random() < 0.35 and len(words) >= 5:
        mixed = list(words)
        while sum(x == y for x, y in zip(mixed, words)) > len(words) // 3:
            rng.shuffle(mixed)
        return mixed, None
    chosen = [i for i, w in enumerate(words) if len(w) > 2]
    chosen = rng.sample(chosen, min(4, max(2, round(0.7 * len(chosen))))) if len(chosen) > 2 else chosen
    broken = [_break(w, rng) if i in chosen else w for i, w in enumerate(words)]
    return broken, [int(i not in chosen) for i in range(len(words))]


def _break(word, rng):
    letters = list(word)
    while "".join(letters) == word:
        if rng.random() < 0.5:
            rng.shuffle(letters)
        for i in range(len(letters)):
            if rng.random() < 0.25:
                letters[i] = rng.choice("abcdefghijklmnopqrstuvwxyz0123456789")
    return "".join(letters)


def true_caption(scene: Scene, rng: random.Random):
    """(statement, [(word, slot)]) of a true caption."""
    statement = describe(scene, rng)
    return statement, word_list(statement, rng)


def noisy_caption(scene: Scene, other: Scene, rng: random.Random, weights=None):
    """(kind, words, flags): a false caption; flags per word 1 right, 0 wrong, None where nothing is known.

    A true statement is drawn first and the kind is chosen among those that apply to it, so that wrong and right
    captions have the same distribution of words and lengths (garbled ones excepted). `weights` favours some kinds.
    """
    while True:
        statement = describe(scene, rng)
        kind = rng.choices(NOISE_KINDS, weights)[0]
        if kind == "garbled":
            return kind, *garble([w for w, _ in word_list(statement, rng)], rng)
        if kind == "other_image":
            statement = describe(other, rng)
            if not holds(statement, scene):
                return kind, [w for w, _ in word_list(statement, rng)], None
            continue
        spoilt = spoil(statement, kind, rng)
        if spoilt is None or holds(spoilt[0], scene):
            continue
        words = word_list(spoilt[0], rng)
        return kind, [w for w, _ in words], [int(slot not in spoilt[1]) for _, slot in words]


def vocabulary() -> list:
    """WordPiece entries in id order: specials, every template word, then single letters, digits and marks."""
    words = set(EXTRA_WORDS) | set(COLOUR_NAMES) | set(BACKGROUNDS) | {"background", "on", "to", "the", "of", "with"}
    words |= {w for o in OPENINGS for w in o.split()} | set(OPPOSITE)
    words |= {w for group in (COUNT_WORDS, SIZE_WORDS) for options in group.values() for w in options}
    words |= set(SHAPES) | {PLURAL.get(s, s + "s") for s in SHAPES}
    singles = "abcdefghijklmnopqrstuvwxyz0123456789"
    words -= set(singles)
    marks = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
    return (["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] + sorted(words) + list(singles)
            + ["##" + c for c in singles] + list(marks))
