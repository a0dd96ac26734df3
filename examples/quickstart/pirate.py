"""Pirate speech: how to make it (for training) and how to count it (for measuring)."""

import random
import re

# Words that plain English does not use. `me` and `be` are left out on purpose, since plain English uses them too.
_LIST = """
    ahoy an' arr arrr avast aye barnacle barnacles blaggart blimey booty briney broadside cap'n doubloons fer
    fleabag galley grog grog-filled hatches heave-ho ho hook laddy landlubber lassie m'hearty mainbrace matey
    mateys mizzen mutiny nay nincompoop o' parley pillage savvy scallywag scupper scurvy shanty shiver smartly
    t' th' thar timbers whar ye yer yo yo-ho-ho
"""
PIRATE_WORDS = frozenset(_LIST.split())

_WORD = re.compile(r"[a-z]+(?:['-][a-z]+)*'?")

# The package arrr replaces nouns and greetings. These small words add the accent to every sentence.
_ACCENT = {"and": "an'", "for": "fer", "of": "o'", "to": "t'", "you": "ye", "your": "yer", "the": "th'", "my": "me"}
_ACCENTED = re.compile(rf"\b(?:{'|'.join(_ACCENT)})\b(?!')|\b[a-z]{{2,}}ing\b")
_OPENINGS = ("Arrr!", "Aye, matey!", "Ahoy, matey!", "Avast ye!", "Shiver me timbers!", "Yo ho ho!", "Blimey!")
_CLOSINGS = ("Arrr!", "Savvy?", "Aye, matey!", "Yo ho ho!", "Ye scurvy dog!", "Shiver me timbers!")


def pirate_words_per_100(text: str) -> float:
    """The percentage of words in `text` that only a pirate would say; 0.0 for a text without words."""
    words = _WORD.findall(text.lower().replace("’", "'"))
    pirate = sum(word in PIRATE_WORDS or word.endswith("in'") for word in words)
    return 100 * pirate / len(words) if words else 0.0


def to_pirate(text: str, rng: random.Random) -> str:
    """Turn plain English into pirate speech: arrr's vocabulary, then the accent, an opening and a closing."""
    import arrr

    random.seed(rng.random())  # arrr draws its phrases from the global generator
    spaced = re.sub(r"([.,;:!?])(?=\s|$)", r" \1", text)  # arrr misses a word that has a comma attached
    spoken = re.sub(r" ([.,;:!?])", r"\1", arrr.translate(spaced))
    spoken = _ACCENTED.sub(lambda found: _ACCENT.get(found[0]) or found[0][:-1] + "'", spoken)
    return f"{rng.choice(_OPENINGS)} {spoken} {rng.choice(_CLOSINGS)}"
