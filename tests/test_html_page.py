"""An HTML page is complete and safe, and the columns of a text table line up."""

import json
import re

from pg_ground.reporting import html_page
from pg_ground.reporting.tables import Table, ascii_table, is_number_column

TABLE = Table(
    "Held out <b>",
    ("after", "acc50", "n", "note"),
    (("sft", 0.5, 256, None), ("grpo & more", 0.75, 8, "x")),
    "greedy",
)


def test_columns_line_up_and_numbers_are_aligned_to_the_right():
    assert ascii_table(TABLE).splitlines() == [
        "Held out <b>",
        "after         acc50    n  note",
        "-----------  ------  ---  ----",
        "sft          0.5000  256  –",
        "grpo & more  0.7500    8  x",
        "greedy",
    ]


def test_numbers_written_as_text_are_aligned_to_the_right_too():
    rows = (("x", "0.5", "1e-05"), ("y", "", "12.25%"), ("z", "-10.5", "3"))
    table = Table("", ("name", "a", "b"), rows)
    assert [is_number_column(table, i) for i in range(3)] == [False, True, True]


def test_a_table_without_rows_is_its_head():
    assert ascii_table(Table("", ("a", "bc"), ())) == "a  bc\n-  --"


def test_a_table_on_a_page_has_its_texts_escaped():
    text = html_page.table_html(TABLE)
    assert "Held out &lt;b&gt;" in text
    assert "grpo &amp; more" in text
    assert "<b>" not in text


def test_data_cannot_end_its_script_element():
    script = "</script><script>alert(1)</script>"
    text = html_page.page(script, "", {"a": script, "é": "漢"}, "report.js")
    assert "alert" in text
    assert script not in text
    elements = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert [json.loads(element) for element in elements] == [{"a": script, "é": "漢"}]


def test_a_page_without_a_script_has_no_script_element():
    assert "<script" not in html_page.page("a", "<p>b</p>")
