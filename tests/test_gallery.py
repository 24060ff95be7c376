"""Laws of the gallery of examples: every source appears once, bad records appear in words."""

import json
import re

import numpy as np
import pytest
from commands import call
from PIL import Image

from pg_ground import cli, tokenizer
from pg_ground.config import Data, Source
from pg_ground.data.bad_records import BadRecords
from pg_ground.data.records import BadRecord
from pg_ground.reporting import drawing, gallery
from pg_ground.types import BOXES, POINTS, Boxes, Example, Points, UserError

DATA = Data()


def example(target=BOXES, label=0, size=(200, 100), names=("cat",)):
    """Returns an example with one box and, for a question about points, one point."""
    slot = np.array([label])
    used = np.array([True])
    return Example(
        image=np.full((32, 32, 3), 90, np.uint8),
        size=size,
        prompt="detect <b>",
        suffix="<loc0001> cat",
        boxes=Boxes(np.array([[0.2, 0.25, 0.8, 0.75]], np.float32), slot, used),
        points=Points(np.array([[0.5, 0.5]], np.float32), slot, used & (target == POINTS)),
        target=target,
        names=names,
        masks=np.zeros((0, 0, 0), bool),
        source="toy",
        index=7,
    )


class FakeExamples(list):
    """Examples by index. An exception in the list is raised."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        if isinstance(item, Exception):
            raise item
        return item


def opened(*examples):
    source = Source(uri="jsonl:x&y")
    return gallery.OpenSource("toy", ("sft", "eval"), source, FakeExamples(examples))


def count(picture, color):
    return int((np.asarray(picture) == color).all(-1).sum())


def test_an_example_is_described_and_escaped():
    text = gallery.gallery_html([opened(example())], 16, tokenizer.load(), BadRecords())
    assert "detect &lt;b&gt;" in text
    assert "&lt;loc0001&gt; cat" in text
    assert "jsonl:x&amp;y" in text
    assert "toy 7 · 200×100 px · 1 box, 0 points" in text
    assert "sft, eval" in text
    assert "detect <b>" not in text
    assert "http:" not in text


def test_a_bad_record_is_a_line_and_the_other_examples_are_shown():
    bad = BadRecord("corrupt_image", "<cat>.jpg is cut off")
    text = gallery.gallery_html(
        [opened(example(), bad, example())], 16, tokenizer.load(), BadRecords()
    )
    assert '<p class="bad">toy 1: corrupt_image: &lt;cat&gt;.jpg is cut off</p>' in text
    assert text.count("<img") == 2


def test_a_page_has_at_most_n_examples_of_each_source():
    sources = [opened(*[example()] * 5), opened(*[example()] * 2)]
    text = gallery.gallery_html(sources, 3, tokenizer.load(), BadRecords())
    assert text.count("<img") == 5
    assert "the first 3 of 5 questions" in text
    assert "2 of 2 questions" in text


def test_ground_truth_is_drawn_in_the_aspect_of_the_original_image():
    picture = gallery.draw_example(example(size=(300, 100)))
    assert abs(picture.width / picture.height - 3) < 0.05
    rows, columns = np.nonzero((np.asarray(picture) == drawing.LABEL_COLORS[0]).all(-1))
    assert abs(columns.max() - 0.75 * picture.width) <= 1
    assert abs(rows.max() - 0.8 * picture.height) <= 1


def test_points_are_drawn_over_their_objects():
    picture = gallery.draw_example(example(target=POINTS))
    assert count(picture, drawing.LABEL_COLORS[0]) > 20
    assert count(picture, drawing.GOLD) > 100


def test_a_label_that_is_not_among_the_names_is_drawn_without_text():
    picture = gallery.draw_example(example(label=-1, names=()))
    assert count(picture, drawing.LABEL_COLORS[-1]) > 100


def test_a_source_that_several_sections_share_is_opened_once():
    toy = Source(uri="synthetic:train?side=32", boxes="box")
    other = Source(uri="synthetic:heldout?side=32", boxes="box")
    sources = {"sft": {"toy": toy}, "grpo": {"toy": toy}, "eval": {"toy": other, "toy2": toy}}
    opened_sources = gallery.open_sources(sources, DATA, image_size=224)
    assert [(source.name, source.sections) for source in opened_sources] == [
        ("toy", ("sft", "grpo")),
        ("toy", ("eval",)),
        ("toy2", ("eval",)),
    ]


def test_a_source_that_does_not_exist_is_named_by_its_setting(tmp_path):
    missing = Source(uri=f"jsonl:{tmp_path}/none.jsonl", boxes="box")
    message = r"^config\.grpo\.sources\.toy\.uri \(jsonl:.*none.jsonl\): No such file"
    with pytest.raises(UserError, match=message):
        gallery.open_sources({"grpo": {"toy": missing}, "eval": {"toy": missing}}, DATA, 224)


def test_a_source_without_a_usable_example_ends_with_an_error(tmp_path, caplog):
    lines = [{"image": f"{i}.png", "phrase": "dot", "box": [0, 0, 9, 9]} for i in range(3)]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, lines)))
    recipe = write_recipe(tmp_path, f"jsonl:{tmp_path / 'r.jsonl'}")
    out = tmp_path / "look.html"
    with pytest.raises(UserError, match=r"^no example of sft/toy can be used; see .*look.html"):
        call("look", f"--config={recipe}", f"--out={out}")
    text = "3 records cannot be used (3 missing_image); first sft/toy 0: there is no file"
    assert text in caplog.text
    assert out.read_text(encoding="utf-8").count('class="bad"') == 3


def test_the_command_writes_one_whole_page_of_real_sources(tmp_path, capsys, caplog):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    records = [
        {"image": "a.png", "phrase": "dot", "box": [10, 10, 30, 30]},
        {"image": "no.png", "box": [0, 0, 9, 9]},
    ]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n{broken\n")
    recipe = write_recipe(tmp_path, f"jsonl:{tmp_path / 'r.jsonl'}")
    out = tmp_path / "deep" / "look.html"
    call("look", f"--config={recipe}", f"--out={out}")
    assert capsys.readouterr().out == f"{out}\n"
    assert "2 records cannot be used (1 missing_field, 1 bad_json)" in caplog.text
    text = out.read_text(encoding="utf-8")
    assert text.count("<img") == 1
    assert len(re.findall('class="bad"', text)) == 2
    assert "detect dot" in text
    assert "60×40 px" in text
    assert [path.name for path in out.parent.iterdir()] == ["look.html"]


@pytest.mark.parametrize(
    ("count", "shown", "bad"), [(5, 3, 0), (5, 5, 1), (5, 9, 1), (1, 1, 0), (40, 3, 0)]
)
def test_the_command_says_how_many_questions_it_does_not_show(tmp_path, caplog, count, shown, bad):
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    lines = [{"image": "a.png", "phrase": "dot", "box": [10, 10, 30, 30]}] * count
    lines = [*lines[:-1], {"image": "no.png"}] if count > 1 else lines
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, lines)))
    recipe = write_recipe(tmp_path, f"jsonl:{tmp_path / 'r.jsonl'}")
    caplog.set_level("INFO")
    call("look", f"--config={recipe}", f"--n={shown}", f"--out={tmp_path}/look.html")
    text = f"source sft/toy: the page shows the first {shown} of {count} questions; look --check"
    assert (text in caplog.text) == (shown < count)
    assert ("1 record cannot be used" in caplog.text) == bool(bad)


def write_recipe(folder, uri):
    """Returns the path of a recipe with one source."""
    recipe = folder / "recipe.py"
    recipe.write_text(
        "from pg_ground import config\n\n"
        "def get_config():\n"
        "    c = config.template()\n"
        f'    source = config.Source(uri="{uri}", boxes="box")\n'
        "    with c.unlocked():\n"
        "        c.sft.sources.toy = config.section(source)\n"
        '    c.stages = ("sft",)\n'
        "    return c\n"
    )
    return recipe


@pytest.mark.parametrize("flags", [["--n=0", "--out=x.html"], ["--n=3"]])
def test_flags_that_cannot_be_used_are_one_line(tmp_path, flags):
    recipe = write_recipe(tmp_path, "synthetic:train")
    with pytest.raises(UserError, match=r"^--n is 0|^--out is"):
        call("look", f"--config={recipe}", *flags)
    assert cli.parse_config([f"--config={recipe}"]).sft.sources["toy"].boxes == "box"
