"""Names of objects: what an answer can hold, and what its reader reads as it was written."""

import re

from pg_ground.config import Source
from pg_ground.data.records import BadRecord, short

SPECIAL_TOKENS = r"</?s>|<(?:bos|eos|pad|unk)>"
"""Special tokens as text. The readers of answers leave them out."""

GRAMMAR = re.compile(rf";|<(?:loc\d{{4}}|seg\d{{3}})>|{SPECIAL_TOKENS}")
"""The parts of an answer in loc tokens that are no part of a name."""

SIMILAR = str.maketrans({";": "\uff1b", "<": "\u2039", ">": "\u203a"})
"""The characters of `unsafe_names="escape"`."""

_ALWAYS_INVISIBLE = (
    "\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e"
    "\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\u2800\u3164\ufeff\uffa0\ufff9-\ufffb"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
)
"""Controls, marks of the writing direction, and characters without a width or without ink."""

INVISIBLE = re.compile(
    f"[{_ALWAYS_INVISIBLE}]"
    # Joiners belong to words of Persian and Indic scripts, and to emoji.
    r"|(?<![^\x00-\x7f])[\u200c\u200d]|[\u200c\u200d](?![^\x00-\x7f])"
    r"|(?<=[A-Za-z])[\ufe00-\ufe0f]"
    # Tags belong to the emoji of flags.
    r"|(?<![\U0001f3f4\U000e0020-\U000e007f])[\U000e0000-\U000e007f]+"
)
"""Characters that nobody sees. A name with one looks like another name and has other tokens."""


def safe_name(name: str, source: Source) -> str:
    """Returns a name that looks as it is, and that the reader of the answer reads as it is.

    Raises:
      BadRecord: bad_text, if the name has an invisible character or a part of `GRAMMAR` and the
        source refuses these, or if nothing is left of it.
    """
    check_unicode(name)
    if source.suffix not in ("loc", "json"):
        return name
    has_grammar = source.suffix == "loc" and GRAMMAR.search(name) is not None
    if not has_grammar and not INVISIBLE.search(name):
        return name
    if source.unsafe_names == "refuse":
        raise BadRecord("bad_text", f"the name {short(name)} {_reason(name)}")
    text = INVISIBLE.sub("", name)
    if source.suffix == "loc" and source.unsafe_names == "replace":
        text = GRAMMAR.sub(lambda match: "," if match[0] == ";" else " ", text).strip(" ,")
    elif source.suffix == "loc":
        text = GRAMMAR.sub(lambda match: match[0].translate(SIMILAR), text)
    text = " ".join(text.split())
    if not text:
        raise BadRecord("bad_text", f"nothing is left of the name {short(name)}")
    return text


def _reason(name: str) -> str:
    """Returns what is unsafe in a name, and the setting that cleans it."""
    remedy = "set unsafe_names to replace or escape"
    if invisible := INVISIBLE.search(name):
        remedy = "set unsafe_names to replace"
        return f"has the invisible character {code_point(invisible[0][0])}: {remedy}"
    if ";" in name:
        return f"has ';', which separates objects: {remedy}"
    match = GRAMMAR.search(name)
    token = match[0] if match else ""
    kind = "a token of coordinates" if token[:4] in ("<loc", "<seg") else "a special token"
    return f"has {kind}, {token}: {remedy}"


def code_point(character: str) -> str:
    """Returns, for example, U+200B."""
    return f"U+{ord(character):04X}"


def check_unicode(text: str) -> None:
    """Raises BadRecord (bad_text) if a text has half a surrogate pair. JSON can hold one.

    A text that was cut inside an emoji ends in one. No tokenizer takes it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise BadRecord("bad_text", f"{short(text)} has half a character: {half!r}") from None
