"""Laws of `pg_ground.metrics`: lines are exact, survive a kill, and a resumed file is a prefix of the old one."""

import json
import math

import numpy as np
import pytest

from pg_ground import metrics
from pg_ground.types import UserError


def write_run(workdir, steps, resume_step=None):
    with metrics.open_metrics(workdir, resume_step) as writer:
        for step in steps:
            writer.write(step, "grpo", {"reward/total": float(np.float32(0.1)) * step, "policy/kl": 1 / (step + 1)})


def test_lines_start_with_step_and_stage_and_keep_every_bit(tmp_path):
    values = {"a/third": 1 / 3, "a/tiny": 5e-324, "a/f32": float(np.float32(0.1)), "a/count": 7.0}
    with metrics.open_metrics(tmp_path, None) as writer:
        writer.write(3, "sft", values)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.startswith('{"step": 3, "stage": "sft", ') and text.endswith("}\n")
    assert metrics.read_metrics(tmp_path) == [{"step": 3, "stage": "sft", **values}]


def test_what_is_not_finite_becomes_null(tmp_path):
    with metrics.open_metrics(tmp_path, None) as writer:
        writer.write(0, "grpo", {"a": math.nan, "b": math.inf, "c": -math.inf, "d": float(np.float32("nan")), "e": 1.0})
    line = (tmp_path / "metrics.jsonl").read_text()
    strict = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert strict == {"step": 0, "stage": "grpo", "a": None, "b": None, "c": None, "d": None, "e": 1.0}


def test_a_line_is_on_disk_when_write_returns(tmp_path):
    with metrics.open_metrics(tmp_path, None) as writer:
        writer.write(1, "sft", {"sft/loss": 2.0})
        assert metrics.read_metrics(tmp_path) == [{"step": 1, "stage": "sft", "sft/loss": 2.0}]


def test_identical_runs_write_identical_bytes(tmp_path):
    write_run(tmp_path / "a", range(5))
    write_run(tmp_path / "b", range(5))
    assert (tmp_path / "a/metrics.jsonl").read_bytes() == (tmp_path / "b/metrics.jsonl").read_bytes()


@pytest.mark.parametrize("torn", [b"", b'{"step": 6, "sta', b'{"step": 6, "stage": "grpo"}', b'{"step"\n'])
def test_resume_drops_later_lines_and_a_torn_one_and_keeps_the_other_bytes(tmp_path, torn):
    write_run(tmp_path, range(6))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert [row["step"] for row in metrics.read_metrics(tmp_path)] == list(range(6))
    metrics.open_metrics(tmp_path, 3).close()
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:4])


def test_a_resumed_run_ends_with_the_bytes_of_one_that_was_never_killed(tmp_path):
    write_run(tmp_path / "whole", range(10))
    write_run(tmp_path / "killed", range(7))
    write_run(tmp_path / "killed", range(5, 10), resume_step=4)
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (tmp_path / "killed/metrics.jsonl").read_bytes()


def test_starting_over_forgets_every_line(tmp_path):
    write_run(tmp_path, range(4))
    metrics.open_metrics(tmp_path, None).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "stage": "sft"}\nnonsense\n{"step": 1, "stage": "sft"}\n')
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"metrics\.jsonl:2 is b'nonsense"):
        metrics.open_metrics(tmp_path, 1)
    assert path.read_bytes() == before


def test_no_file_reads_as_no_lines(tmp_path):
    assert metrics.read_metrics(tmp_path) == []


def test_tensorboard_has_the_finite_values_and_is_told_what_resume_purges(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    write_run(tmp_path, range(3))
    with metrics.open_metrics(tmp_path, 1) as writer:
        writer.write(2, "grpo", {"reward/total": 0.5, "policy/kl": math.nan})
    events = []
    for path in sorted((tmp_path / "tb").iterdir()):
        data, at = path.read_bytes(), 0  # records: length u64, its checksum u32, the event, its checksum u32
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            events.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 12 + length + 4
    values = {(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value}
    assert (2, "reward/total", 0.5) in values and (1, "policy/kl", 0.5) in values
    assert all(math.isfinite(value) for _, _, value in values)
    starts = [e.step for e in events if e.session_log.status == 1]
    assert starts == [0, 2]


def test_progress_line_says_where_how_well_and_how_long():
    values = {"reward/total": 0.75, "reward/iou": 0.5, "policy/kl": 0.01, "time/step_s": 2.0, "optim/lr": 1e-6}
    line = metrics.progress_line(40, 100, "grpo", values)
    assert line == "grpo  40/100  reward 0.75  iou 0.5  kl 0.01  2 s/step  ETA 2m00s"


def test_progress_line_of_an_evaluation_names_the_benchmarks():
    values = {"eval/val/acc50": 0.5, "eval/val/acc95": 0.1, "eval/val/mean_iou": 0.25, "eval/clicks/hit": 0.9}
    assert metrics.progress_line(0, 9, "sft", values) == "sft  0/9  val: acc50 0.5 mean_iou 0.25  clicks: hit 0.9"


def test_progress_line_is_one_line_whatever_the_numbers():
    line = metrics.progress_line(1, 2, "sft", {"sft/loss": math.nan, "time/step_s": math.inf})
    assert "\n" not in line and "loss nan" in line and "ETA" not in line
