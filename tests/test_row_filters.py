"""`where` of a source: only the rows that satisfy it exist, for training, look, pack and scores."""

import io
import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import call
from PIL import Image

from pg_ground import tokenizer
from pg_ground.config import Data, Eval, Fetch, Source
from pg_ground.data.datasets import Examples, open_examples
from pg_ground.data.packing import pack
from pg_ground.data.records import BadRecord
from pg_ground.data.row_filters import RowFilter
from pg_ground.data.text_budgets import measure_budget
from pg_ground.evals.runner import open_eval_sources
from pg_ground.types import UserError

ROWS: list[dict[str, Any]] = [
    {"task": "Count", "n": 1, "ok": True, "objects": [], "meta": {"a": [1, 2]}},
    {"task": "Depth", "n": 2, "ok": False, "objects": [{"label": "dog"}], "meta": {"a": [3]}},
    {"task": "Count", "n": 3, "ok": True, "objects": [{"label": "cat"}, {"label": "dog"}]},
    {"task": None, "n": -4.5, "ok": False, "objects": [{"label": "cow"}], "a-b": "x", "k.l": 7},
    {"task": "Relation", "n": 5, "ok": True, "objects": [{"label": "a"}, {"label": "b"}]},
]


def png() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (20, 20), (200, 10, 10)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def source(tmp_path) -> Source:
    (tmp_path / "a.png").write_bytes(png())
    rows = [{"image": "a.png", "phrase": f"p{i}", "box": [1, 2, 9, 9], **row} for i, row in
            enumerate(ROWS)]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(uri=f"jsonl:{tmp_path}/rows.jsonl", boxes="box")


def opened(source: Source, where: str, **changes: Any) -> Examples:
    return open_examples("grpo/rows", replace(source, where=where, **changes), Data(), 16)


def kept(source: Source, where: str, **changes: Any) -> list[int]:
    """Returns the numbers of the rows whose questions exist."""
    examples = opened(source, where, **changes)
    return [int(examples[i].prompt.removeprefix("detect p")) for i in range(len(examples))]


def refusal(source: Source, where: str) -> str:
    with pytest.raises(UserError) as refused:
        opened(source, where)
    text = str(refused.value)
    assert text.startswith("config.grpo.sources.rows.where (") and "\n" not in text, text
    assert len(text) < 500, len(text)
    return text.partition(where.strip()[:100])[2]


@pytest.mark.parametrize(
    ("where", "rows"),
    [
        ("task != 'Count'", [1, 3, 4]),
        ('task == "Count"', [0, 2]),
        ("n > 1 and n <= 3", [1, 2]),
        ("1 < n < 5", [1, 2]),
        ("n < 0 or n >= 5", [3, 4]),
        ("n == -4.5", [3]),
        ("task in ['Count', 'Depth']", [0, 1, 2]),
        ("task not in ('Count', 'Depth')", [3, 4]),
        ("task in ['Count', None]", [0, 2, 3]),
        ("'dog' in objects.label", [1, 2]),
        ("len(objects) > 1", [2, 4]),
        ("not (len(objects) > 1 or ok)", [1, 3]),
        ("ok", [0, 2, 4]),
        ("not ok and task == None", [3]),
        ("task is not None and 'epth' in task", [1]),
        ("meta.a[0] == 1", [0]),
        ("meta['a'][-1] != None and meta.a[-1] > 2", [1]),
        ("field('a-b') == 'x'", [3]),
        ("field('k.l') == 7", [3]),
        ("  True ", [0, 1, 2, 3, 4]),
    ],
)
def test_only_the_rows_that_satisfy_a_filter_exist(source, where, rows):
    assert kept(source, where) == rows


def test_a_filter_comes_before_sampling_and_errors_have_the_numbers_of_the_file(source, tmp_path):
    assert kept(source, "n > 1", sampling="first:2") == [1, 2]
    assert kept(source, "n > 1", sampling="end:50%") == [2, 4]
    examples = opened(source, "task == 'Relation'", boxes="no_box", points="")
    with pytest.raises(BadRecord, match=r"^record 4: "):
        examples[0]


def test_the_number_of_rows_kept_is_a_reading(source):
    budget = measure_budget(opened(source, "task != 'Count'"), tokenizer.load(), Data())
    assert budget.notes["where keeps 3 of 5 records"] == "all"


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("task !! 'Count'", r"\): character 6: invalid syntax; a field that is no name of Python"),
        ("é == 'é' and task = 3", r"\): character 19: invalid syntax"),
        ("'é' == task + 'x'", r"\): character 8: this is no field and no literal; a filter has"),
        ("__import__('os')", r"\): character 1: this is no len\(field\) or field\('path'\)"),
        ("task.upper() == 'A'", r"\): character 1: this is no len\(field\)"),
        ("[x for x in task] == []", r"\): character 1: this is no field"),
        ("(lambda: 1) == n", r"\): character 2: this is no field"),
        ("task == f'{n}'", r"\): character 9: this is no field"),
        ("task", r"\): record 0: task is 'Count', not true or false: compare it, as in task !="),
        ("'text'", r"\): character 1: this is no comparison"),
        ("n == '3'", r"\): record 0: n is a number \(1\) and '3' is text, which cannot be compar"),
        ("task != 3", r"\): record 0: task is text \('Count'\) and 3 is a number, which cannot"),
        ("ok == 1", r"\): record 0: ok is true or false \(True\) and 1 is a number"),
        ("n in ['1', '2']", r"\): record 0: n is a number \(1\) and an element of \['1', '2'\] is"),
        ("n in task", r"\): record 0: task is 'Count', but n in task needs a list"),
        ("task > 'A'", r"\): record 3: task is null, which has no order: write task != None and"),
        ("len(n) > 1", r"\): record 0: n is 1, which has no length"),
        ("tsk != 'Count'", r"\): no record has tsk: the fields are .*; did you mean task\?"),
        ("ok or tsk == 1", r"\): no record has tsk: "),
        ("n > 1000", r"\) keeps none of 5 records$"),
        ("not " * 5000 + "ok", r""),
        ("n == " + "(" * 500 + "1" + ")" * 500, r"too many nested"),
    ],
)  # fmt: skip
def test_a_filter_that_cannot_be_used_is_one_line_before_the_first_step(source, where, reason):
    text = refusal(source, where)
    assert re.search(reason, text), text


def test_a_value_that_is_python_code_is_text(source, tmp_path):
    rows = [{"image": "a.png", "phrase": "p0", "box": [1, 2, 9, 9], "code": "__import__('os')"}]
    (tmp_path / "code.jsonl").write_text(json.dumps(rows[0]))
    uri = f"jsonl:{tmp_path}/code.jsonl"
    assert kept(replace(source, uri=uri), "code == \"__import__('os')\"") == [0]


def test_a_line_that_is_no_json_stays_a_bad_record(source, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(file.read_text() + '{"task": \n')
    examples = opened(source, "task == 'Count'")
    assert len(examples) == 3
    assert "where keeps 2 of 6 records; 1 more cannot be read" in examples.notes
    with pytest.raises(BadRecord, match="byte "):
        examples[2]


def test_only_the_columns_of_the_filter_are_read_of_parquet(source, tmp_path, monkeypatch):
    rows = [
        {"image": {"bytes": png(), "path": None}, "phrase": f"p{i}", "box": [1, 2, 9, 9]}
        | {"task": row["task"], "meta": {"n": row["n"], "x": 1}}
        for i, row in enumerate(ROWS)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=2)
    uri = f"parquet:{tmp_path}/rows.parquet"
    columns = []
    read = pq.ParquetFile.read_row_group

    def recorded(file: pq.ParquetFile, number: int, columns_read: Any = None, **options: Any):
        columns.append(options.get("columns", columns_read))
        return read(file, number, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", recorded)
    assert kept(replace(source, uri=uri), "task != 'Count' and meta.n > 0") == [1, 4]
    assert columns[:3] == [["task", "meta"]] * 3
    assert "did you mean task?" in refusal(replace(source, uri=uri), "tsk != 'Count'")


def test_a_packed_source_holds_the_rows_of_the_filter(source, tmp_path):
    chosen = replace(source, where="task != 'Count'")
    done = pack([{"rows": chosen}], Fetch(), tmp_path / "out", 2)
    assert done["rows"]["records"] == 3
    packed = replace(chosen, uri=done["rows"]["uri"])
    assert kept(packed, chosen.where) == kept(packed, "") == kept(chosen, chosen.where)
    with pytest.raises(UserError, match="two sources called rows have different filters"):
        pack([{"rows": chosen}, {"rows": source}], Fetch(), tmp_path / "other", 1)


def test_an_evaluation_asks_the_questions_of_the_filter(source):
    settings = Eval(sources={"rows": replace(source, where="task != 'Count'")})
    examples = open_eval_sources(settings, Data(), 16)["rows"]
    assert len(examples) == 3 and examples.filter_note == "where keeps 3 of 5 records"


def test_drawn_scenes_need_a_number(tmp_path):
    scenes = Source(uri="synthetic:train?side=32&scenes=20", boxes="box")
    examples = open_examples("a", replace(scenes, where="'red' in phrase"), Data(), 16)
    assert 0 < len(examples) < 20
    assert all("red" in examples[i].prompt for i in range(len(examples)))
    endless = Source(uri="synthetic:train", boxes="box", where="'red' in phrase")
    with pytest.raises(UserError, match=r"sources.a.where draws all of .* add scenes=N"):
        open_examples("a", endless, Data(), 16)


def test_look_obeys_a_filter_that_a_flag_sets(source, tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "recipe.py").write_text(
        "from pg_ground import config\n\n\ndef get_config():\n"
        "    c = config.template()\n"
        f"    source = config.Source({source.uri!r}, boxes='box')\n"
        "    c.sft.sources = {'rows': config.section(source)}\n"
        "    c.stages = ('sft',)\n    return c\n"
    )
    recipe = f"--config={tmp_path / 'recipe.py'}"
    where = "--config.sft.sources.rows.where=task != 'Count'"
    call("look", recipe, where, f"--out={tmp_path / 'look.html'}")
    assert "3 of 3 questions" in (tmp_path / "look.html").read_text()
    assert "where keeps 3 of 5 records" in caplog.text
    with pytest.raises(UserError, match=r"config\.sft\.sources\.rows\.where .* character 6: "):
        call("look", recipe, where.replace("!=", "!!"), f"--out={tmp_path / 'look.html'}")


def test_a_filter_reads_the_values_of_numpy():
    row_filter = RowFilter("a == 3 and 1.0 in b and 'x' in c", "where")
    record = {"a": np.int64(3), "b": np.array([0.0, 1.0]), "c": ("x", "y")}
    assert row_filter.keeps(record) and not row_filter.keeps({**record, "a": np.int64(4)})
