"""The programs of docs/serving.md run, one after the other, on an exported directory."""

import re
from contextlib import chdir
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import PG1, PG2, random_params
from PIL import Image

from pg_ground.assets import make_tokenizer
from pg_ground.checkpoints import export
from pg_ground.checkpoints.conversion import convert
from pg_ground.models import PaliGemma

PAGE = (Path(__file__).parents[1] / "docs" / "serving.md").read_text()
PROGRAMS = re.findall(r"<!-- tested -->\n```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_page_has_a_program_for_the_format_of_answers():
    exec(PROGRAMS[0], {})


def test_the_page_is_in_the_contents():
    contents = (Path(__file__).parents[1] / "mkdocs.yml").read_text()
    assert "serving.md" in contents


def export_model(folder: Path, kind: str) -> None:
    """Writes `exports/photos` and `photo.jpg`, which the programs read."""
    base = PG1 if kind == "pg1" else PG2
    sizes = replace(base, text=replace(base.text, vocab_size=2048))
    export.save(folder / "src", random_params(PaliGemma(sizes)), sizes)
    tokenizer = Path(make_tokenizer.__file__).with_name("tiny.model")
    convert(folder / "src", folder / "exports" / "photos", "", str(tokenizer))
    Image.fromarray(np.full((40, 30, 3), 90, np.uint8)).save(folder / "photo.jpg")


@pytest.mark.slow
@pytest.mark.needs("torch", "transformers")
@pytest.mark.filterwarnings("ignore")  # torch and transformers have warnings of their own
@pytest.mark.parametrize("kind", ["pg1", "pg2"])
def test_every_check_passes_on_an_exported_directory(tmp_path, capsys, kind):
    export_model(tmp_path, kind)
    names: dict = {}
    with chdir(tmp_path):
        for program in PROGRAMS[1:]:
            exec(program, names)
    assert len(PROGRAMS) == 8 and capsys.readouterr().out.strip()


@pytest.mark.slow
@pytest.mark.needs("torch", "transformers")
@pytest.mark.filterwarnings("ignore")  # torch and transformers have warnings of their own
@pytest.mark.parametrize(
    ("word", "change"),
    [
        ("-1152", None),
        ("token_type_ids", lambda x: x.pop("token_type_ids")),
        ("BOS … newline", lambda x: x.update(input_ids=x["input_ids"][:, :-1])),
        ("vision_config", lambda x: x.update(pixel_values=x["pixel_values"] * 2 + 2)),
    ],
)
def test_a_check_fails_on_wrong_inputs(tmp_path, word, change):
    """Each check of the page finds the fault that it is there for."""
    export_model(tmp_path, "pg1")
    names: dict = {}
    with chdir(tmp_path):
        exec(PROGRAMS[1], names)
    if change is None:
        shifted = replace_locs(names["processor"])
        names |= {"processor": shifted, "image_id": 2048}
        program = next(program for program in PROGRAMS[2:] if "skip_special_tokens" in program)
    else:
        change(names["inputs"])
        program = next(program for program in PROGRAMS[2:] if word in program)
        names |= {"image_id": 2048, "ids": names["inputs"]["input_ids"][0].tolist()}
    with pytest.raises(AssertionError):
        exec(program, names)


def replace_locs(processor):
    """Returns the processor with loc tokens that are special."""
    names = [f"<loc{i:04d}>" for i in range(1024)]
    processor.tokenizer.add_special_tokens({"additional_special_tokens": names})
    return processor
