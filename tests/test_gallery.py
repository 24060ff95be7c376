"""Laws of `pg_ground.look`: every source appears once, its gold where it belongs, its bad records in words."""

import json
import re

import numpy as np
import pytest
from commands import call
from PIL import Image

from pg_ground import cli, config, tokenizer
from pg_ground.data.records import BadRecord
from pg_ground.reporting import drawing, gallery
from pg_ground.types import BOXES, POINTS, Boxes, Example, Points, UserError


def example(target=BOXES, label=0, size=(200, 100), names=("cat",)):
    slot, used = np.array([label]), np.array([True])
    return Example(
        image=np.full((32, 32, 3), 90, np.uint8), size=size, prompt="detect <b>", suffix="<loc0001> cat",
        boxes=Boxes(np.array([[0.2, 0.25, 0.8, 0.75]], np.float32), slot, used),
        points=Points(np.array([[0.5, 0.5]], np.float32), slot, used & (target == POINTS)),
        target=target, names=names, masks=np.zeros((0, 0, 0), bool), source="toy", index=7,
    )  # fmt: skip


class Fakes(list):
    """Examples of which some are exceptions."""

    def __getitem__(self, index):
        one = super().__getitem__(index)
        if isinstance(one, Exception):
            raise one
        return one


def opened(*examples):
    return gallery.Look("toy", ("sft", "eval"), config.Source(uri="jsonl:x&y"), Fakes(examples))


def count(picture, color):
    return int((np.asarray(picture) == color).all(-1).sum())


def test_page_says_what_an_example_is_and_escapes_it():
    text = gallery.look_page([opened(example())], 16, tokenizer.load())
    assert "detect &lt;b&gt;" in text and "&lt;loc0001&gt; cat" in text and "jsonl:x&amp;y" in text
    assert "toy 7 · 200×100 px · 1 box, 0 points" in text and "sft, eval" in text
    assert "detect <b>" not in text and "http:" not in text


def test_bad_record_is_a_line_of_kind_and_message_and_the_others_are_shown():
    bad = BadRecord("corrupt_image", "<cat>.jpg is cut off")
    text = gallery.look_page([opened(example(), bad, example())], 16, tokenizer.load())
    assert '<p class="bad">toy 1: corrupt_image: &lt;cat&gt;.jpg is cut off</p>' in text
    assert text.count("<img") == 2


def test_page_holds_no_more_than_n_of_each_source():
    text = gallery.look_page(
        [opened(*[example()] * 5), opened(*[example()] * 2)], 3, tokenizer.load()
    )
    assert text.count("<img") == 5 and "3 of 5 questions" in text and "2 of 2 questions" in text


def test_gold_is_drawn_in_the_aspect_of_the_original():
    picture = gallery.example_picture(example(size=(300, 100)))
    assert picture.width == 3 * picture.height or abs(picture.width / picture.height - 3) < 0.05
    rows, columns = np.nonzero((np.asarray(picture) == drawing.LABEL_COLORS[0]).all(-1))
    assert (
        abs(columns.max() - 0.75 * picture.width) <= 1
        and abs(rows.max() - 0.8 * picture.height) <= 1
    )


def test_points_are_drawn_over_the_objects_they_lie_on():
    picture = gallery.example_picture(example(target=POINTS))
    assert count(picture, drawing.LABEL_COLORS[0]) > 20 and count(picture, drawing.GOLD) > 100


def test_a_label_that_is_not_among_the_names_is_drawn_without_text():
    assert (
        count(gallery.example_picture(example(label=-1, names=())), drawing.LABEL_COLORS[-1]) > 100
    )


def test_a_source_that_several_sections_share_is_opened_once():
    toy = config.Source(uri="synthetic:train?side=32", boxes="box")
    other = config.Source(uri="synthetic:heldout?side=32", boxes="box")
    c = config.Config(
        sft=config.Sft(sources={"toy": toy}),
        grpo=config.Grpo(sources={"toy": toy}),
        eval=config.Eval(sources={"toy": other, "toy2": toy}),
    )
    assert [(one.name, one.sections) for one in gallery.open_sources(c)] == [
        ("toy", ("sft", "grpo")), ("toy", ("eval",)), ("toy2", ("eval",)),
    ]  # fmt: skip


def test_a_source_that_is_not_there_is_told_by_its_setting(tmp_path):
    lost = config.Source(uri=f"jsonl:{tmp_path}/none.jsonl", boxes="box")
    with pytest.raises(
        UserError, match=r"^config\.grpo\.sources\.toy\.uri \(jsonl:.*none.jsonl\): No such file"
    ):
        gallery.open_sources(
            config.Config(
                grpo=config.Grpo(sources={"toy": lost}), eval=config.Eval(sources={"toy": lost})
            )
        )


def test_look_writes_one_whole_page_of_real_sources(tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    records = [
        {"image": "a.png", "phrase": "dot", "box": [10, 10, 30, 30]},
        {"image": "no.png", "box": [0, 0, 9, 9]},
    ]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n{broken\n")
    source = config.Source(uri=f"jsonl:{tmp_path / 'r.jsonl'}", boxes="box")
    c = config.Config(sft=config.Sft(sources={"dots": source}), stages=("sft",))
    out = gallery.look(c, n=16, out=tmp_path / "deep" / "look.html")
    text = out.read_text(encoding="utf-8")
    assert text.count("<img") == 1 and len(re.findall('class="bad"', text)) == 2
    assert "detect dot" in text and "60×40 px" in text
    assert [p.name for p in out.parent.iterdir()] == ["look.html"]


@pytest.mark.filterwarnings(
    "ignore:the load_module:DeprecationWarning"
)  # ml_collections loads config files with it
@pytest.mark.parametrize("flags", [["--n=0", "--out=x.html"], ["--n=3"]])
def test_flags_that_cannot_be_used_end_in_one_line(tmp_path, flags):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from pg_ground import config\n\ndef get_config():\n    c = config.template()\n"
        '    with c.unlocked():\n        c.sft.sources.toy = config.section(config.Source(uri="synthetic:train", boxes="box"))\n'
        '    c.stages = ("sft",)\n    return c\n'
    )
    with pytest.raises(UserError, match=r"^--n is 0|^--out is"):
        call("look", f"--config={recipe}", *flags)
    assert cli.parse_config([f"--config={recipe}"]).sft.sources["toy"].boxes == "box"
