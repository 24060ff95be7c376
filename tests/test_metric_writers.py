"""Laws of the metric writers: a line is exact, survives a kill, and a resumed file keeps it."""

import errno
import io
import json
import math
import sys
import types

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from pg_ground.reporting import metric_writers
from pg_ground.types import UserError


def write_run(workdir, steps, resume_step=None):
    """Writes two metrics for each step."""
    with metric_writers.open_metrics(workdir, resume_step) as writer:
        for step in steps:
            reward = float(np.float32(0.1)) * step
            writer.write(step, "grpo", {"reward/total": reward, "policy/kl": 1 / (step + 1)})


# metrics.jsonl


def test_a_line_starts_with_step_and_stage_and_keeps_every_bit(tmp_path):
    values = {"a/third": 1 / 3, "a/tiny": 5e-324, "a/f32": float(np.float32(0.1)), "a/count": 7.0}
    with metric_writers.open_metrics(tmp_path, None) as writer:
        writer.write(3, "sft", values)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.startswith('{"step": 3, "stage": "sft", ')
    assert text.endswith("}\n")
    assert metric_writers.read_metrics(tmp_path) == [{"step": 3, "stage": "sft", **values}]


def test_values_that_are_not_finite_become_null(tmp_path):
    infinite = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": float(np.float32("nan"))}
    with metric_writers.open_metrics(tmp_path, None) as writer:
        writer.write(0, "grpo", {**infinite, "e": 1.0})
    text = (tmp_path / "metrics.jsonl").read_text()
    line = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert line == {"step": 0, "stage": "grpo", **dict.fromkeys(infinite), "e": 1.0}


def test_a_line_is_on_disk_when_write_returns(tmp_path):
    with metric_writers.open_metrics(tmp_path, None) as writer:
        writer.write(1, "sft", {"sft/loss": 2.0})
        lines = metric_writers.read_metrics(tmp_path)
    assert lines == [{"step": 1, "stage": "sft", "sft/loss": 2.0}]


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    class FullDisk(io.StringIO):
        def flush(self):
            raise OSError(errno.ENOSPC, "No space left on device")

    writer = metric_writers.open_metrics(tmp_path, None)
    writer._file.close()
    writer._file = FullDisk()
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics\.jsonl'"):
        writer.write(1, "sft", {"sft/loss": 2.0})


def test_identical_runs_write_identical_bytes(tmp_path):
    write_run(tmp_path / "a", range(5))
    write_run(tmp_path / "b", range(5))
    first, second = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in "ab")
    assert first == second


@pytest.mark.parametrize(
    "torn", [b"", b'{"step": 6, "sta', b'{"step": 6, "stage": "grpo"}', b'{"step"\n']
)
def test_resuming_drops_later_lines_and_a_torn_line_and_keeps_the_other_bytes(tmp_path, torn):
    write_run(tmp_path, range(6))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert [line["step"] for line in metric_writers.read_metrics(tmp_path)] == list(range(6))
    metric_writers.open_metrics(tmp_path, 3).close()
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:4])


def test_a_resumed_run_ends_with_the_bytes_of_a_run_without_a_kill(tmp_path):
    write_run(tmp_path / "whole", range(10))
    write_run(tmp_path / "killed", range(7))
    write_run(tmp_path / "killed", range(5, 10), resume_step=4)
    whole, killed = (
        (tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "killed")
    )
    assert whole == killed


def test_a_run_that_starts_over_has_no_old_line(tmp_path):
    write_run(tmp_path, range(4))
    metric_writers.open_metrics(tmp_path, None).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "stage": "sft"}\nnonsense\n{"step": 1, "stage": "sft"}\n')
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"metrics\.jsonl:2 is b'nonsense"):
        metric_writers.open_metrics(tmp_path, 1)
    assert path.read_bytes() == before


def test_a_run_without_a_file_has_no_lines(tmp_path):
    assert metric_writers.read_metrics(tmp_path) == []


# TensorBoard


def events(workdir):
    """Returns every event that TensorBoard would read, in its order."""
    parsed = []
    for path in sorted((workdir / "tb").iterdir()):
        data = path.read_bytes()
        offset = 0
        # a record: length u64, its checksum u32, the event, its checksum u32
        while offset < len(data):
            length = int.from_bytes(data[offset : offset + 8], "little")
            parsed.append(Event.FromString(data[offset + 12 : offset + 12 + length]))
            offset += 12 + length + 4
    return parsed


def test_tensorboard_has_the_finite_values_and_drops_later_events_of_a_resumed_run(tmp_path):
    write_run(tmp_path, range(3))
    with metric_writers.open_metrics(tmp_path, 1) as writer:
        writer.write(2, "grpo", {"reward/total": 0.5, "policy/kl": math.nan})
    values = {(e.step, v.tag, v.simple_value) for e in events(tmp_path) for v in e.summary.value}
    assert (2, "reward/total", 0.5) in values
    assert (1, "policy/kl", 0.5) in values
    assert all(math.isfinite(value) for _, _, value in values)
    starts = [event.step for event in events(tmp_path) if event.session_log.status == 1]
    assert starts == [0, 2]


def test_a_run_that_starts_over_leaves_no_old_events_in_tensorboard(tmp_path):
    write_run(tmp_path, range(5))
    (tmp_path / "tb" / "notes.txt").write_bytes(b"")
    write_run(tmp_path, range(2))
    assert {event.step for event in events(tmp_path) if event.summary.value} == {0, 1}
    assert (tmp_path / "tb" / "notes.txt").exists()


def test_tensorboard_has_the_pictures(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (6, 9, 3), dtype=np.uint8)
    with metric_writers.open_metrics(tmp_path, None) as writer:
        writer.picture(7, "samples", Image.fromarray(pixels))
    ((step, value),) = [(e.step, v) for e in events(tmp_path) for v in e.summary.value]
    assert (step, value.tag) == (7, "samples")
    with Image.open(io.BytesIO(value.image.encoded_image_string)) as stored:
        np.testing.assert_array_equal(np.asarray(stored.convert("RGB")), pixels)


# Weights & Biases


class Mirror(types.ModuleType):
    """A module in place of wandb, which records its calls."""

    class Error(Exception):
        pass

    def __init__(self):
        super().__init__("wandb")
        self.inits, self.logged, self.finished, self.refuses = [], [], 0, False

    def init(self, **arguments):
        if self.refuses:
            raise self.Error("No API key configured.\nUse `wandb login`")
        self.inits.append(arguments)
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def Image(self, picture):
        return ("image", picture.size)

    def finish(self):
        self.finished += 1


@pytest.fixture
def mirror(monkeypatch):
    mirror = Mirror()
    monkeypatch.setitem(sys.modules, "wandb", mirror)
    return mirror


def test_a_mirror_gets_finite_values_and_a_resumed_run_keeps_its_id(tmp_path, mirror):
    settings = {"seed": 3}
    with metric_writers.open_metrics(tmp_path, None, "grounding", settings) as writer:
        writer.write(1, "sft", {"sft/loss": 2.0, "policy/kl": math.nan})
        writer.picture(1, "samples", Image.new("RGB", (4, 2)))
    assert mirror.logged == [(1, {"sft/loss": 2.0}), (1, {"samples": ("image", (4, 2))})]
    assert mirror.finished == 1
    with metric_writers.open_metrics(tmp_path, 1, "grounding", settings) as writer:
        writer.write(2, "sft", {"sft/loss": 1.0})
    metric_writers.open_metrics(tmp_path, None, "grounding", settings).close()
    first, resumed, new = mirror.inits
    assert first == resumed
    assert first["project"] == "grounding"
    assert first["config"] == settings
    assert new["id"] != first["id"], "a run that starts over is another run"
    assert metric_writers.read_metrics(tmp_path) == []


def test_a_run_without_a_project_has_no_mirror(tmp_path, mirror):
    write_run(tmp_path, range(2))
    assert mirror.inits == mirror.logged == []
    assert not (tmp_path / "wandb.json").exists()


def test_a_mirror_that_cannot_be_opened_is_one_line_and_changes_no_file(tmp_path, mirror):
    write_run(tmp_path, range(3))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    mirror.refuses = True
    with pytest.raises(UserError, match=r"config\.log\.wandb=grounding: No API key"):
        metric_writers.open_metrics(tmp_path, None, "grounding")
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_missing_wandb_is_reported_at_the_start(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # the import fails
    metric_writers.check_mirror("")
    with pytest.raises(UserError, match=r"wandb is not installed: pip install"):
        metric_writers.check_mirror("grounding")
