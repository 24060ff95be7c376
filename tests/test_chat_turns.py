"""Chats with several turns: one question is read, and the others are counted and not silent."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from commands import call
from PIL import Image

from configs.data import ENTRIES
from pg_ground import tokenizer
from pg_ground.config import Data, Source
from pg_ground.data.datasets import Examples, open_examples
from pg_ground.data.records import BadRecord
from pg_ground.data.text_budgets import measure_budget

DATA = Data(prompt_length=64, suffix_length=64)


def messages(turns: int, names: tuple[str, str, str], system: bool = False) -> list[dict[str, str]]:
    """Returns a chat of so many turns. `names` are the keys of speaker and text, and the speakers:
    "user assistant"."""
    speaker, text, speakers = names
    user, assistant = speakers.split()
    chat = [{speaker: "system", text: "You find objects."}] if system else []
    for i in range(turns):
        chat += [{speaker: user, text: f"Find cat {i}."}]
        chat += [{speaker: assistant, text: f"It is at [{i}, 10, 40, 30]."}]
    return chat


OPENAI = ("role", "content", "user assistant")
LLAVA = ("from", "value", "human gpt")


def open_rows(folder: Path, rows: list[dict], source: Source) -> Examples:
    Image.new("RGB", (80, 40)).save(folder / "i.png")
    rows = [{"image": "i.png", "images": ["i.png"]} | row for row in rows]
    (folder / "rows.json").write_text(json.dumps(rows))
    return open_examples("a", replace(source, uri=f"json:{folder}/rows.json"), DATA, 28)


def pairs(turns: int) -> list[dict[str, str]]:
    return [{"user": f"Find cat {i}.", "assistant": f"[{i}, 10, 40, 30]"} for i in range(turns)]


PAIRS = Source(boxes="texts.0.assistant", prompt="{texts[0].user}", name="")
LAST = replace(ENTRIES["sharegpt"], boxes="messages.-1.content", prompt="{messages.-2.content}")
FLAT = Source(boxes="chat.1", prompt="{phrase}", phrase="chat.0", name="")


def parts(turns: int) -> list[dict]:
    """Returns a chat whose contents are lists of an image and a text."""
    image = {"type": "image"}
    return [
        {"role": m["role"], "content": [image, {"type": "text", "text": m["content"]}]}
        for m in messages(turns, OPENAI)
    ]


PARTS = Source(boxes="messages.1.content.1.text", prompt="{messages.0.content.1.text}", name="")

CHATS = {
    "contents as parts": (
        PARTS,
        lambda turns: {"messages": parts(turns)},
        "more than one turn: only messages.0 and messages.1 are read",
    ),
    "sharegpt": (
        ENTRIES["sharegpt"],
        lambda turns: {"messages": messages(turns, OPENAI)},
        "more than one turn: only messages.0 and messages.1 are read",
    ),
    "llava": (
        ENTRIES["llava"],
        lambda turns: {"conversations": messages(turns, LLAVA)},
        "more than one turn: only conversations.0 and conversations.1 are read",
    ),
    "qwen, speakers in capitals": (
        replace(ENTRIES["qwen_grounding"], box_format="xyxy_px"),
        lambda turns: {"messages": messages(turns, ("role", "content", "USER Assistant"))},
        "more than one turn: only messages.0 and messages.1 are read",
    ),
    "the last turn, behind a system message": (
        LAST,
        lambda turns: {"messages": messages(turns, OPENAI, system=True)},
        "more than one turn: only messages.-2 and messages.-1 are read",
    ),
    "a speaker that is not known": (
        ENTRIES["sharegpt"],
        lambda turns: {"messages": messages(turns, ("role", "content", "user Jane"))},
        "more than one turn: only messages.0 and messages.1 are read",
    ),
    "turns as pairs": (
        PAIRS,
        lambda turns: {"texts": pairs(turns)},
        "more than one turn: only texts.0 is read",
    ),
    "messages without speakers": (
        ENTRIES["sharegpt"],
        lambda turns: {"messages": messages(turns, ("who", "content", "a b"))},
        "more elements in messages: only messages.0 and messages.1 are read",
    ),
    "a list of texts": (
        FLAT,
        lambda turns: {"chat": [m["content"] for m in messages(turns, OPENAI)]},
        "more elements in chat: only chat.0 and chat.1 are read",
    ),
}


@pytest.mark.parametrize("form", CHATS)
def test_chats_with_more_turns_are_counted_at_the_start(tmp_path, form):
    source, row, note = CHATS[form]
    opened = open_rows(tmp_path, [row(1)] * 40 + [row(2), row(3)], source)
    assert opened[0].prompt == "Find cat 0." and note not in opened[0].notes
    assert opened[41].prompt == ("Find cat 2." if source is LAST else "Find cat 0.")
    budget = measure_budget(opened, tokenizer.load(), DATA)
    assert budget.notes[note] == "2 of 42"
    assert [text for text in budget.notes if "only" in text] == [note]


def test_a_check_of_all_records_prints_them(tmp_path, capsys):
    source, row, note = CHATS["sharegpt"]
    open_rows(tmp_path, [row(1), row(2), row(5)], source)
    config = Path(__file__).parents[1] / "configs" / "data.py"
    uri = f"--config.sft.sources.sharegpt.uri=json:{tmp_path}/rows.json"
    call("look", f"--config={config}:sharegpt", uri, "--check")
    assert any(note in line and " 2 " in line for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ({"objects": {"ref": ["cat", "cat"], "bbox": [[1, 1, 9, 9]] * 2}}, ENTRIES["ms_swift"]),
        ({"phrase": "cat", "box": [1, 1, 9, 9]}, Source(boxes="box.0,box.1,box.2,box.3")),
        ({"messages": [*messages(1, OPENAI), {"role": "user", "content": "Thanks."}]}, None),
        ({"messages": parts(1)}, PARTS),
    ],
)
def test_lists_without_another_answer_have_no_note(tmp_path, row, settings):
    opened = open_rows(tmp_path, [row], settings or ENTRIES["sharegpt"])
    assert not any("only" in note for note in opened[0].notes)


@pytest.mark.parametrize("speaker", ["system", "tool", "Developer", "assistant", "gpt"])
def test_a_prompt_that_is_no_message_of_the_user_is_a_bad_record(tmp_path, speaker):
    chat = [{"role": speaker, "content": "You find cats at [1, 2, 3, 4]."}, *messages(1, OPENAI)]
    opened = open_rows(tmp_path, [{"messages": chat}], ENTRIES["sharegpt"])
    with pytest.raises(
        BadRecord, match="the prompt reads messages.0, which is a message of"
    ) as bad:
        opened[0]
    assert bad.value.kind == "bad_text" and "messages.-2" in str(bad.value)
    both = replace(ENTRIES["sharegpt"], prompt="{messages.0.content} {messages.1.content}")
    both = replace(both, boxes="messages.2.content")
    assert open_rows(tmp_path, [{"messages": chat}], both)[0].prompt.endswith("Find cat 0.")
