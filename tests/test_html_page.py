"""Laws of `pg_ground.reporting.html_page`: tables line up, pages are whole and safe, files are written at once."""

import json
import re

from pg_ground.reporting import html_page
from pg_ground.reporting.html_page import Table

TABLE = Table(
    "Held out <b>",
    ("after", "acc50", "n", "note"),
    (("sft", 0.5, 256, None), ("grpo & more", 0.75, 8, "x")),
    "greedy",
)


def test_ascii_table_lines_up_and_numbers_stand_right():
    assert html_page.ascii_table(TABLE).splitlines() == [
        "Held out <b>",
        "after         acc50    n  note",
        "-----------  ------  ---  ----",
        "sft          0.5000  256  –",
        "grpo & more  0.7500    8  x",
        "greedy",
    ]


def test_numbers_that_come_as_text_stand_right_too():
    table = Table(
        "", ("name", "a", "b"), (("x", "0.5", "1e-05"), ("y", "", "12.25%"), ("z", "-10.5", "3"))
    )
    assert [html._is_number_column(table, i) for i in range(3)] == [False, True, True]


def test_ascii_table_without_rows_is_its_head():
    assert html_page.ascii_table(Table("", ("a", "bc"), ())) == "a  bc\n-  --"


def test_a_table_on_a_page_has_its_texts_escaped():
    text = html_page.table_html(TABLE)
    assert "Held out &lt;b&gt;" in text and "grpo &amp; more" in text and "<b>" not in text


def test_data_cannot_end_its_element():
    evil = "</script><script>alert(1)</script>"
    text = html_page.page(evil, "", {"a": evil, "é": "漢"}, "report.js")
    assert "alert" in text and evil not in text
    data = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert [json.loads(one) for one in data] == [{"a": evil, "é": "漢"}]


def test_a_page_without_a_script_has_none():
    assert "<script" not in html_page.page("a", "<p>b</p>")


def test_a_file_is_written_whole(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    for content in ("é", b"b"):
        html_page.write_whole(path, content)
        assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert [one.name for one in path.parent.iterdir()] == ["a.txt"]
