"""Formats in which vision-language models write boxes and points, and their readers.

Each format has a sign that occurs in no other format. So the format of an answer is detected, and a
file may mix the answers of several models. A format also states a unit: Qwen-VL writes thousandths,
Molmo percent. The unit of token formats (`<loc0512>`) cannot be overruled.

Every reader takes any text, and its time is linear in the length of the text.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pg_ground.readers import locations
from pg_ground.readers.locations import Location
from pg_ground.readers.parsers import answer_text
from pg_ground.types import UserError, nearest

AUTO = "auto"


class AnswerFormat(NamedTuple):
    """One way in which models write boxes and points."""

    name: str
    description: str
    box_format: str
    """`ORDER_UNIT` of the boxes. "" means that the format states no unit."""
    point_format: str
    sign: re.Pattern[str] | None = None
    """Occurs in answers of this format only."""
    weak_sign: re.Pattern[str] | None = None
    """Occurs in answers of this format, and in others. It counts if another answer of the same file
    has the sign."""
    read: Callable[[str], list[Location]] | None = None
    """Returns the boxes and points of a text, in its order. None means `locations.read_any`."""
    is_fixed: bool = False
    """The unit cannot be overruled."""

    def stated_format(self, width: int) -> str:
        """Returns `ORDER_UNIT` of the boxes (`width` 4) or points (`width` 2)."""
        return self.box_format if width == 4 else self.point_format


_LOC = re.compile(r"<loc[0-9]{4}>")


def _paligemma(text: str) -> list[Location]:
    """Reads `<loc0064><loc0032><loc0384><loc0320> cat ; …`.

    The label is the text behind the tokens of a segment. So a prompt in front of the first token is
    no label. If there is no text behind them, it is the text in front of them.

    A segment with more than four tokens is one location without numbers. Two boxes without a ";"
    between them are such a segment: training rewards read no box in it either.
    """
    read = []
    for part in text.split(";"):
        ends = [match.end() for match in _LOC.finditer(part)]
        if len(ends) > 4:
            read.append(Location(None))
        elif ends:
            (segment,) = locations.loc_segments(part)
            (behind,) = locations.loc_segments(part[ends[-1] :])
            read.append(segment._replace(label=behind.label or segment.label))
    return read


_FLORENCE = re.compile(r"(<loc_[0-9]+>)")
_FLORENCE_WORDS = re.compile(r"</?(?:poly|s|od|ocr|ncel|grounding|and|sep|pad)>|<[A-Z_]+>")


def _florence(text: str) -> list[Location]:
    """Reads `cat<loc_1><loc_2><loc_3><loc_4>`: a label and the bins of its boxes.

    A bin is a thousandth of the image, and it is decoded to its centre.
    """
    read: list[Location] = []
    label, bins = "", []
    pieces = _FLORENCE.split(_FLORENCE_WORDS.sub("", text))
    for piece in [*pieces, "end"]:
        if _FLORENCE.fullmatch(piece):
            bins.append(int(piece[5:-1]) + 0.5)
        elif piece.strip():
            read += _groups(bins, label, "permille")
            label, bins = _trimmed(piece), []
    return read


PATCHES = 32
"""Cells on each side of Kosmos-2's grid."""

_KOSMOS = re.compile(r"(<patch_index_[0-9]{4}>|</?(?:phrase|object|delimiter_of_multi_objects/)>)")


def _kosmos(text: str) -> list[Location]:
    """Reads `<phrase>cat</phrase><object><patch_index_0044><patch_index_0863></object>`.

    The two cells are the corners of a box.
    """
    read: list[Location] = []
    label, cells, is_phrase = "", [], False
    for piece in [*_KOSMOS.split(text), "</object>"]:
        if piece.startswith("<patch_index_"):
            cells.append(int(piece[13:17]))
        elif piece in ("<phrase>", "</phrase>"):
            is_phrase = piece == "<phrase>"
        elif is_phrase:
            label = piece.strip()
        elif piece.strip():
            read += [_kosmos_location(cells, label)] if cells else []
            label, cells = "" if piece == "</object>" else label, []
    return read


def _kosmos_location(cells: Sequence[int], label: str) -> Location:
    """Returns the box between the centres of two cells, in fractions; of one cell, its centre.

    Cells in the same row or column bound the box by their outer edges. This is the decoder of
    Kosmos-2's processor.
    """
    if len(cells) > 2 or max(cells) >= PATCHES**2:
        return Location(None, label, written="xyxy_frac")
    y, x = (list(part) for part in zip(*(divmod(cell, PATCHES) for cell in cells), strict=True))
    if len(cells) == 1:
        return Location(((x[0] + 0.5) / PATCHES, (y[0] + 0.5) / PATCHES), label, written="xy_frac")
    start, end = (0.0, 1.0) if x[0] == x[1] or y[0] == y[1] else (0.5, 0.5)
    corners = (x[0] + start, y[0] + start, x[1] + end, y[1] + end)
    return Location(tuple(corner / PATCHES for corner in corners), label, written="xyxy_frac")


def _tagged(label_tags: str, box_tags: str) -> Callable[[str], list[Location]]:
    """Returns the reader of numbers between tags, with the label in the tags before them.

    Args:
      label_tags: the opening and the closing tag of a label, with a blank between them.
      box_tags: the opening and closing tags of boxes and points.
    """
    label_open, label_close = label_tags.split()
    tags = box_tags.split()
    opening, closing = set(tags[::2]), set(tags[1::2])
    pattern = re.compile("(" + "|".join(map(re.escape, [label_open, label_close, *tags])) + ")")

    def read(text: str) -> list[Location]:
        located: list[Location] = []
        label, state = "", ""
        for piece in pattern.split(text):
            if piece == label_open:
                state = "label"
            elif piece in opening:
                state = "box"
            elif piece == label_close or piece in closing:
                state = ""
            elif state == "label":
                label = piece.strip()
            elif state == "box":
                located += _tag_content(piece, label)
        return located

    return read


_SQUARE = re.compile(r"\[([^\[\]]*)\]")
_NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)")


def _tag_content(text: str, label: str) -> list[Location]:
    """Returns the boxes and points of `[[1, 2, 3, 4], …]`, `(1,2),(3,4)`, `1 2 3 4` or `(1,2)`."""
    lists = _SQUARE.findall(text)
    return [
        location
        for part in lists or [text]
        for location in _groups(list(map(float, _NUMBER.findall(part))), label, "")
    ] or [Location(None, label)]


def _groups(numbers: Sequence[float], label: str, unit: str) -> list[Location]:
    """Returns boxes of four numbers each, or the point of two; else one unreadable location."""
    written = [f"{order}_{unit}" if unit else "" for order in ("xyxy", "xy")]
    if len(numbers) == 2:
        return [Location(tuple(numbers), label, written=written[1])]
    if len(numbers) % 4:
        return [Location(None, label, written=written[0])]
    return [
        Location(tuple(numbers[start : start + 4]), label, written=written[0])
        for start in range(0, len(numbers), 4)
    ]


_deepseek_tags = _tagged("<|ref|> <|/ref|>", "<|det|> <|/det|>")


def _deepseek(text: str) -> list[Location]:
    """Reads DeepSeek-VL2's boxes: 999 is the right or lower edge of the image."""
    return [
        location._replace(numbers=tuple(number * 1000 / 999 for number in location.numbers))
        if location.numbers
        else location
        for location in _deepseek_tags(text)
    ]


_MOLMO_TAG = re.compile(r"<points?\s([^<>]*)(?:>([^<>]*))?")
_MOLMO_XY = re.compile(
    r"""\bx([0-9]*)\s*=\s*["']?([-+0-9.]+)["']?[,\s]*y\1\s*=\s*["']?([-+0-9.]+)"""
)
_ALT = re.compile(r"""\balt\s*=\s*(?:"([^"]*)"|'([^']*)')""")


def _molmo(text: str) -> list[Location]:
    """Reads `<point x="1.5" y="2.5" alt="cat">cat</point>` and `<points x1=… y1=… x2=… y2=…>`."""
    read = []
    for attributes, content in _MOLMO_TAG.findall(text):
        alt = _ALT.search(attributes)
        label = ((alt[1] or alt[2] or "") if alt else "") or content.strip()
        pairs = [(x, y) for _, x, y in _MOLMO_XY.findall(attributes)]
        numbers = [_floats(pair) for pair in pairs] or [None]
        read += [Location(pair, label) for pair in numbers]
    return read


_MOLMO2_TAG = re.compile(r"<(?:points|tracks)\s([^<>]*?)/?(?:>([^<>]*)|$)")
_COORDS = re.compile(r"""\bcoords\s*=\s*["']?([0-9\t:;, .]*)""")


def _molmo2(text: str) -> list[Location]:
    """Reads `<points coords="1 1 463 345 2 578 400">boats</points>`.

    The numbers are the number of the image, then the number, x and y of each point.
    """
    read = []
    for attributes, content in _MOLMO2_TAG.findall(text):
        coords = _COORDS.search(attributes)
        for group in re.split(r"[\t:;,]", coords[1] if coords else ""):
            numbers = _floats(group.split()) or ()
            for start in range(1, len(numbers) - 2, 3):
                read.append(Location(numbers[start + 1 : start + 3], content.strip()))
    return read


def _floats(texts: Sequence[str]) -> tuple[float, ...] | None:
    try:
        numbers = tuple(map(float, texts))
    except ValueError:
        return None
    return numbers if all(map(math.isfinite, numbers)) else None


_DOUBLE = re.compile(r"\[\[([^\[\]]*)\]\]")


def _cogvlm(text: str) -> list[Location]:
    """Reads `a cat[[012,034,567,890]]` and `cats[[012,034,567,890;111,222,333,444]]`.

    The label is the text between two lists.
    """
    read: list[Location] = []
    end = 0
    for match in _DOUBLE.finditer(text):
        label = _trimmed(text[end : match.start()])
        for part in match[1].split(";"):
            read += _groups(list(map(float, _NUMBER.findall(part))), label, "")
        end = match.end()
    return read


_MINIGPT = re.compile(r"(<p>|</p>|\{[<>0-9\s]*\})")


def _minigpt(text: str) -> list[Location]:
    """Reads `<p>cat</p> {<10><20><30><40>}`."""
    read: list[Location] = []
    label, is_label = "", False
    for piece in _MINIGPT.split(text):
        if piece in ("<p>", "</p>"):
            is_label = piece == "<p>"
        elif is_label:
            label = piece.strip()
        elif piece.startswith("{"):
            read += _groups(list(map(float, _NUMBER.findall(piece))), label, "")
    return read


def _trimmed(text: str) -> str:
    return text.strip().strip(";,.:-").strip()


_box_tags = _tagged("<ref> </ref>", "<box> </box>")
_D = "[0-9]"

FORMATS: dict[str, AnswerFormat] = {
    form.name: form
    for form in (
        AnswerFormat(
            "paligemma",
            "`<loc0512>` tokens: bins 0 to 1023, y first",
            "yxyx_bin",
            "yx_bin",
            re.compile(r"<loc[0-9]{4}>"),
            read=_paligemma,
            is_fixed=True,
        ),
        AnswerFormat(
            "florence",
            "Florence-2's `<loc_512>` tokens: bins 0 to 999, x first",
            "xyxy_permille",
            "xy_permille",
            re.compile(r"<loc_[0-9]+>"),
            read=_florence,
            is_fixed=True,
        ),
        AnswerFormat(
            "kosmos",
            "Kosmos-2's `<patch_index_0044>` tokens: cells of a 32 x 32 grid",
            "xyxy_frac",
            "xy_frac",
            re.compile(r"<patch_index_[0-9]{4}>"),
            read=_kosmos,
            is_fixed=True,
        ),
        AnswerFormat(
            "qwen2_vl",
            "Qwen2-VL's `<|box_start|>(1,2),(3,4)<|box_end|>`: thousandths",
            "xyxy_permille",
            "xy_permille",
            re.compile(r"<\|(?:box|point|quad)_start\|>"),
            read=_tagged(
                "<|object_ref_start|> <|object_ref_end|>",
                "<|box_start|> <|box_end|> <|point_start|> <|point_end|> "
                "<|quad_start|> <|quad_end|>",
            ),
        ),
        AnswerFormat(
            "internvl",
            "InternVL's `<ref>cat</ref><box>[[1, 2, 3, 4]]</box>`: thousandths",
            "xyxy_permille",
            "xy_permille",
            re.compile(r"<box>\s*\["),
            read=_box_tags,
        ),
        AnswerFormat(
            "qwen_vl",
            "Qwen-VL's `<ref>cat</ref><box>(1,2),(3,4)</box>`: thousandths",
            "xyxy_permille",
            "xy_permille",
            re.compile(r"<box>\s*\("),
            read=_box_tags,
        ),
        AnswerFormat(
            "minicpm",
            "MiniCPM-V's `<ref>cat</ref><box>1 2 3 4</box>`: thousandths",
            "xyxy_permille",
            "xy_permille",
            re.compile(r"<box>\s*[0-9]"),
            read=_box_tags,
        ),
        AnswerFormat(
            "deepseek_vl2",
            "DeepSeek-VL2's `<|ref|>cat<|/ref|><|det|>[[1, 2, 3, 4]]<|/det|>`: 0 to 999",
            "xyxy_permille",
            "xy_permille",
            re.compile(r"<\|det\|>"),
            read=_deepseek,
        ),
        AnswerFormat(
            "glm_v",
            "GLM-V's `<|begin_of_box|>[1, 2, 3, 4]<|end_of_box|>`: thousandths",
            "xyxy_permille",
            "xy_permille",
            re.compile(r"<\|begin_of_box\|>"),
            read=_tagged("<|label|> <|/label|>", "<|begin_of_box|> <|end_of_box|>"),
        ),
        AnswerFormat(
            "minigpt",
            "MiniGPT-v2's `<p>cat</p> {<1><2><3><4>}`: percent",
            "xyxy_percent",
            "xy_percent",
            re.compile(r"\{<[0-9]+><[0-9]+>[<>0-9]*\}"),
            read=_minigpt,
        ),
        AnswerFormat(
            "molmo",
            'Molmo\'s `<point x="1.5" y="2.5" alt="cat">cat</point>`: percent',
            "xyxy_percent",
            "xy_percent",
            re.compile(r"<points?\s+x"),
            read=_molmo,
        ),
        AnswerFormat(
            "molmo2",
            'Molmo2\'s `<points coords="1 1 463 345 2 578 400">cats</points>`: thousandths',
            "xyxy_permille",
            "xy_permille",
            re.compile(r"<(?:points|tracks)\s[^<>]*\bcoords\s*="),
            read=_molmo2,
        ),
        AnswerFormat(
            "gemini",
            'Gemini\'s `{"box_2d": [y1, x1, y2, x2], "label": "cat"}` or `"point": [y, x]`: '
            "thousandths, y first",
            "yxyx_permille",
            "yx_permille",
            re.compile(
                r"""["']box_2d["']\s*:"""
                r"""|["']point["']\s*:\s*\[[^\[\]]*\]\s*,\s*["']label["']\s*:"""
                r"""|["']label["']\s*:\s*["'][^"']*["']\s*,\s*["']point["']\s*:\s*\["""
            ),
            re.compile(r"""["']point["']\s*:\s*\["""),
        ),
        AnswerFormat(
            "label_studio",
            'Label Studio\'s `{"x": 10, "y": 20, "width": 30, "height": 40, "rectanglelabels": '
            '["cat"]}`: percent',
            "xywh_percent",
            "xy_percent",
            re.compile(r"""["'](?:rectangle|keypoint)labels["']\s*:"""),
        ),
        AnswerFormat(
            "moondream",
            'Moondream\'s `{"x_min": .1, "y_min": .2, "x_max": .3, "y_max": .4}` or '
            '`{"x": .1, "y": .2}`: fractions',
            "xyxy_frac",
            "xy_frac",
            re.compile(r"""["']x_min["']\s*:|["']x["']\s*:\s*0?\.[0-9]"""),
            re.compile(r"""["']x["']\s*:"""),
        ),
        AnswerFormat(
            "cogvlm",
            "CogVLM's `[[012,034,567,890;111,222,333,444]]`: thousandths of three digits",
            "xyxy_permille",
            "xy_permille",
            re.compile(
                rf"\[\[(?={_D}{{3}},{_D}{{3}},{_D}{{3}},{_D}{{3}}[;\]])"
                rf"(?:0|[0-9]+,0{_D}|[0-9]+,[0-9]+,0{_D}|[0-9]+,[0-9]+,[0-9]+,0{_D}"
                rf"|[0-9]+,[0-9]+,[0-9]+,[0-9]+;)"
            ),
            re.compile(rf"\[\[{_D}{{3}},{_D}{{3}},{_D}{{3}},{_D}{{3}}\]\]"),
            read=_cogvlm,
        ),
        AnswerFormat(
            "plain",
            "lists, objects, JSON, Python literals or numbers in prose, in the unit of "
            "--box-format or --point-format",
            "",
            "",
        ),
    )
}
"""Every format, by name. `plain` has no sign: it is the format of all other answers.
"""

PLAIN = FORMATS["plain"]


def find_format(name: str, setting: str) -> AnswerFormat | None:
    """Returns a format by its name. None means that the format of each answer is detected (`auto`).

    Raises:
      UserError: there is no such format. The message names `setting`.
    """
    if name == AUTO:
        return None
    if name not in FORMATS:
        raise UserError(f"{setting}={name} does not exist: {nearest(name, [AUTO, *FORMATS])}")
    return FORMATS[name]


def detect(value: object) -> AnswerFormat:
    """Returns the format of one answer: the format whose sign it has, else `plain`."""
    return _with_sign(_as_text(value), FORMATS.values())


def detect_all(values: Sequence[object]) -> list[AnswerFormat]:
    """Returns the format of each answer of a file.

    An answer with a weak sign has the format if another answer of the file has the sign.
    """
    texts = list(map(_as_text, values))
    detected = [_with_sign(text, FORMATS.values()) for text in texts]
    weak = [form for form in FORMATS.values() if form.weak_sign and form in detected]
    if not weak:
        return detected
    return [
        next((f for f in weak if f.weak_sign and f.weak_sign.search(text)), form)
        if form is PLAIN
        else form
        for text, form in zip(texts, detected, strict=True)
    ]


def _with_sign(text: str, formats: Any) -> AnswerFormat:
    return next((form for form in formats if form.sign and form.sign.search(text)), PLAIN)


def _as_text(value: object) -> str:
    """Returns the answer of a text, or the JSON text of a value."""
    if isinstance(value, str):
        return answer_text(value, strict=False)
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return ""


def read(
    value: object, width: int, form: AnswerFormat | None = None, stated: str = ""
) -> list[Location]:
    """Returns the boxes (`width` 4) or points (`width` 2) of an answer.

    `written` of a location is `ORDER_UNIT` of its numbers. It is "" if neither the answer nor
    `stated` says it.

    Args:
      form: the format of the answer. None means that it is detected.
      stated: `ORDER_UNIT` that replaces the unit of a format that is not fixed.
    """
    form = form or detect(value)
    default = stated or form.stated_format(width)
    located = _read_all(value, form)
    if located is None:
        located = locations.read_any(value, width)
    return [
        location._replace(written=_written(location.written, default))
        for location in located
        if location.numbers is None or len(location.numbers) == width
    ]


def _written(written: str, default: str) -> str:
    """Returns `ORDER_UNIT`: what the text states, completed by the default."""
    if not written or "_" in written:
        return written or default
    order, _, unit = default.rpartition("_")
    if written == "xywh" and order == "cxcywh":  # some detectors name the centre x and y
        written = order
    return f"{written}_{unit}" if unit else written


def first_width(value: object, form: AnswerFormat | None = None) -> int:
    """Returns 2 if the first location of an answer is a point, 4 if it is a box, 0 without one."""
    located = _read_all(value, form or detect(value))
    if located is None:
        return locations.first_width(value)
    return next((len(location.numbers) for location in located if location.numbers), 0)


def _read_all(value: object, form: AnswerFormat) -> list[Location] | None:
    """Returns the boxes and points of an answer, or None if `locations` reads it."""
    # `locations` reads loc tokens too, and knows the labels of an object that holds them
    if form.read is None or (form.name == "paligemma" and not isinstance(value, str)):
        return None
    return [location for text in _texts(value) for location in form.read(text)]


def _texts(value: object, depth: int = 8) -> Iterator[str]:
    """Yields the texts in a value."""
    if isinstance(value, str):
        yield answer_text(value, strict=False)
    elif depth and isinstance(value, Mapping):
        for part in value.values():
            yield from _texts(part, depth - 1)
    elif depth and isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part, depth - 1)


_SPECIAL = re.compile(
    r"<(?:bos|eos|pad|s|unk|image|end_of_turn|start_of_turn|end_of_utterance|unused[0-9]+)>|</s>"
    r"|<\|(?:im_start|im_end|endoftext|eot_id|end_of_text|begin_of_text|end|end_of_sentence"
    r"|start_header_id|vision_start|vision_end|image_pad|image)\|>"
    r"|<\uff5c(?:end|begin)\u2581of\u2581sentence\uff5c>"
)
_FIRST_HEADER = re.compile(
    r"^\s*(?:<\|im_start\|>|<start_of_turn>|<\|start_header_id\|>)\s*(?:assistant|model)\b"
    r"(?:<\|end_header_id\|>)?\s*"
)
_HEADER_END = re.compile(r"<\|end_header_id\|>")
_ROLE_TOKEN = re.compile(r"<\|(user|assistant|system)\|>")


def without_special_tokens(text: str) -> str:
    """Returns a text without the tokens that begin, end or fill up an answer.

    The names of speakers stay, each at the beginning of a line or in front of a colon.
    """
    text = _HEADER_END.sub("\n", _FIRST_HEADER.sub("", text))
    text = _ROLE_TOKEN.sub(r"\n\1\n", text)
    return _SPECIAL.sub("", text)


_ASKS = re.compile(r"\s*(?:(?:system|user|human)\s*(?::|\n)|\[INST\])\s*", re.IGNORECASE)
_REPLIES = re.compile(
    r"(?:(?:^|(?<=\n))[ ]*(?:assistant|model|gpt)[ ]*(?::|\n)|\bassistant:|\[/INST\])\s*",
    re.IGNORECASE,
)


def without_echo(text: str, prompt: str) -> str:
    """Returns an answer without the prompt that stands in front of it.

    Blanks do not count. A transcript (`USER: … ASSISTANT: …`) ends with its answer. With loc
    tokens, all lines before the line of the first token are the prompt, as in
    `detect cat ; dog\\n<loc0100>…`. A text that is only the prompt is returned as it is.
    """
    start = _end_of_prompt(text, 0, prompt)
    asks = _ASKS.match(text)
    if asks and not start:
        start = _end_of_prompt(text, asks.end(), prompt)
    if asks or start:
        start = max([start, *(reply.end() for reply in _REPLIES.finditer(text))])
    elif reply := _REPLIES.match(text):
        start = reply.end()
    first_loc = _LOC.search(text)
    if first_loc:
        start = max(start, text.rfind("\n", 0, first_loc.start()) + 1)
    return text[start:].lstrip() if start and text[start:].strip() else text


def _end_of_prompt(text: str, start: int, prompt: str) -> int:
    """Returns the position behind the prompt that begins at `start`; 0 if another text begins."""
    letters = "".join(prompt.split())
    position = 0
    for index in range(start, len(text) if letters else start):
        if text[index].isspace():
            continue
        if text[index] != letters[position]:
            return 0
        position += 1
        if position == len(letters):
            return index + 1
    return 0
