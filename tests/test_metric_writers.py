"""Laws of `pg_ground.reporting.metric_writers`: lines are exact, survive a kill, and a resumed file is a prefix of the old one."""

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
    with metric_writers.open_metrics(workdir, resume_step) as writer:
        for step in steps:
            writer.write(
                step,
                "grpo",
                {"reward/total": float(np.float32(0.1)) * step, "policy/kl": 1 / (step + 1)},
            )


def test_lines_start_with_step_and_stage_and_keep_every_bit(tmp_path):
    values = {"a/third": 1 / 3, "a/tiny": 5e-324, "a/f32": float(np.float32(0.1)), "a/count": 7.0}
    with metric_writers.open_metrics(tmp_path, None) as writer:
        writer.write(3, "sft", values)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.startswith('{"step": 3, "stage": "sft", ') and text.endswith("}\n")
    assert metric_writers.read_metrics(tmp_path) == [{"step": 3, "stage": "sft", **values}]


def test_what_is_not_finite_becomes_null(tmp_path):
    with metric_writers.open_metrics(tmp_path, None) as writer:
        writer.write(
            0,
            "grpo",
            {"a": math.nan, "b": math.inf, "c": -math.inf, "d": float(np.float32("nan")), "e": 1.0},
        )
    line = (tmp_path / "metrics.jsonl").read_text()
    strict = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert strict == {
        "step": 0,
        "stage": "grpo",
        "a": None,
        "b": None,
        "c": None,
        "d": None,
        "e": 1.0,
    }


def test_a_line_is_on_disk_when_write_returns(tmp_path):
    with metric_writers.open_metrics(tmp_path, None) as writer:
        writer.write(1, "sft", {"sft/loss": 2.0})
        assert metric_writers.read_metrics(tmp_path) == [
            {"step": 1, "stage": "sft", "sft/loss": 2.0}
        ]


def test_identical_runs_write_identical_bytes(tmp_path):
    write_run(tmp_path / "a", range(5))
    write_run(tmp_path / "b", range(5))
    assert (tmp_path / "a/metrics.jsonl").read_bytes() == (
        tmp_path / "b/metrics.jsonl"
    ).read_bytes()


@pytest.mark.parametrize(
    "torn", [b"", b'{"step": 6, "sta', b'{"step": 6, "stage": "grpo"}', b'{"step"\n']
)
def test_resume_drops_later_lines_and_a_torn_one_and_keeps_the_other_bytes(tmp_path, torn):
    write_run(tmp_path, range(6))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert [row["step"] for row in metric_writers.read_metrics(tmp_path)] == list(range(6))
    metric_writers.open_metrics(tmp_path, 3).close()
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:4])


def test_a_resumed_run_ends_with_the_bytes_of_one_that_was_never_killed(tmp_path):
    write_run(tmp_path / "whole", range(10))
    write_run(tmp_path / "killed", range(7))
    write_run(tmp_path / "killed", range(5, 10), resume_step=4)
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (
        tmp_path / "killed/metrics.jsonl"
    ).read_bytes()


def test_starting_over_forgets_every_line(tmp_path):
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


def test_no_file_reads_as_no_lines(tmp_path):
    assert metric_writers.read_metrics(tmp_path) == []


def events(workdir):
    """Returns every event that TensorBoard would read, in its order."""
    found = []
    for path in sorted((workdir / "tb").iterdir()):
        data, at = (
            path.read_bytes(),
            0,
        )  # records: length u64, its checksum u32, the event, its checksum u32
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            found.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 12 + length + 4
    return found


def test_tensorboard_has_the_finite_values_and_is_told_what_resume_purges(tmp_path):
    write_run(tmp_path, range(3))
    with metric_writers.open_metrics(tmp_path, 1) as writer:
        writer.write(2, "grpo", {"reward/total": 0.5, "policy/kl": math.nan})
    values = {(e.step, v.tag, v.simple_value) for e in events(tmp_path) for v in e.summary.value}
    assert (2, "reward/total", 0.5) in values and (1, "policy/kl", 0.5) in values
    assert all(math.isfinite(value) for _, _, value in values)
    starts = [e.step for e in events(tmp_path) if e.session_log.status == 1]
    assert starts == [0, 2]


def test_a_run_that_starts_over_leaves_nothing_of_the_one_before_in_tensorboard(tmp_path):
    write_run(tmp_path, range(5))
    (tmp_path / "tb" / "notes.txt").write_bytes(b"")
    write_run(tmp_path, range(2))
    assert {e.step for e in events(tmp_path) if e.summary.value} == {0, 1}
    assert (tmp_path / "tb" / "notes.txt").exists()


def test_tensorboard_has_the_pictures(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 9, 3), dtype=np.uint8))
    with metric_writers.open_metrics(tmp_path, None) as writer:
        writer.picture(7, "samples", picture)
    ((step, value),) = [(e.step, v) for e in events(tmp_path) for v in e.summary.value]
    assert (step, value.tag) == (7, "samples")
    with Image.open(io.BytesIO(value.image.encoded_image_string)) as stored:
        np.testing.assert_array_equal(np.asarray(stored.convert("RGB")), np.asarray(picture))


class Mirror(types.ModuleType):
    """Stands for wandb, and remembers what it is told."""

    class Error(Exception):
        pass

    def __init__(self):
        super().__init__("wandb")
        self.begun, self.logged, self.finished, self.refuses = [], [], 0, False

    def init(self, **given):
        if self.refuses:
            raise self.Error("No API key configured.\nUse `wandb login`")
        self.begun.append(given)
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


def test_a_mirrored_run_sends_what_is_finite_and_goes_on_under_its_id(tmp_path, mirror):
    with metric_writers.open_metrics(tmp_path, None, "grounding", {"seed": 3}) as writer:
        writer.write(1, "sft", {"sft/loss": 2.0, "policy/kl": math.nan})
        writer.picture(1, "samples", Image.new("RGB", (4, 2)))
    assert (
        mirror.logged == [(1, {"sft/loss": 2.0}), (1, {"samples": ("image", (4, 2))})]
        and mirror.finished == 1
    )
    with metric_writers.open_metrics(tmp_path, 1, "grounding", {"seed": 3}) as writer:
        writer.write(2, "sft", {"sft/loss": 1.0})
    metric_writers.open_metrics(tmp_path, None, "grounding", {"seed": 3}).close()
    first, resumed, over = mirror.begun
    assert first == resumed and first["project"] == "grounding" and first["config"] == {"seed": 3}
    assert over["id"] != first["id"], "what starts over is another run"
    assert [row["step"] for row in metric_writers.read_metrics(tmp_path)] == [], "as it is here"


def test_a_run_is_mirrored_only_if_asked(tmp_path, mirror):
    write_run(tmp_path, range(2))
    assert mirror.begun == mirror.logged == [] and not (tmp_path / "wandb.json").exists()


def test_a_mirror_that_cannot_be_opened_is_one_line_and_changes_nothing(tmp_path, mirror):
    write_run(tmp_path, range(3))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    mirror.refuses = True
    with pytest.raises(UserError, match=r"config\.log\.wandb=grounding: No API key"):
        metric_writers.open_metrics(tmp_path, None, "grounding")
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_mirror_that_is_not_installed_is_said_at_the_start(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # what makes an import fail
    metric_writers.check_mirror("")
    with pytest.raises(UserError, match=r"wandb is not installed: pip install"):
        metric_writers.check_mirror("grounding")
