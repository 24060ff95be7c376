"""Tests of the worker processes of text rewards: scores, errors, counts, and a user's files."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from pg_ground import config
from pg_ground.config import RewardWorkerSettings
from pg_ground.rewards.workers import RewardWorkers, load_reward
from pg_ground.types import UserError

REWARDS = """
import asyncio, math, os, subprocess, sys, threading, time
from decimal import Decimal
from fractions import Fraction

import numpy as np

def length(completion, example): return len(completion) / 8
def integer(completion, example): return len(completion)
def truth(completion, example): return completion == "bad"
def numpy_scalar(completion, example): return np.float32(0.25)
def zero_d(completion, example): return np.array(0.25)
def fraction(completion, example): return Fraction(1, 4)
def by_default(completion, example, scale=0.25): return scale
def gold(completion, example): return float(completion == example.gold)
def printing(completion, example):
    print("noise", completion * 1000)
    print("noise", file=sys.stderr)
    return 0.25
async def waits(completion, example):
    await asyncio.sleep(0.001)
    return len(completion) / 8
def batch(completions, examples):
    assert len(completions) == len(examples)
    return np.array([len(c) / 8 for c in completions])
async def batch_waits(completions, examples):
    async def one(completion):
        await asyncio.sleep(0.001)
        return len(completion) / 8
    return await asyncio.gather(*map(one, completions))
def not_applicable(completion, example): return None if completion == "bad" else 0.25
def nan(completion, example): return math.nan if completion == "bad" else 0.25
def batch_with_none(completions, examples):
    return [None if c == "bad" else 0.25 for c in completions]
def no_jax(completion, example): return float("jax" in sys.modules)

def only(fault):
    def reward(completion, example):
        return fault() if completion == "bad" else 0.25
    return reward

def _raise(error): raise error
def _recur(): return _recur()
def _spin():
    while True: pass
def _group():
    child = subprocess.Popen(["sleep", "60"])
    with open(os.environ["GRANDCHILD"], "w") as file: file.write(str(child.pid))
    time.sleep(60)
class Mute(Exception):
    def __str__(self): raise self

raising = only(lambda: {}["key"])
exiting = only(lambda: sys.exit(0))
interrupting = only(lambda: _raise(KeyboardInterrupt()))
recurring = only(_recur)
mute = only(lambda: _raise(Mute()))
dying = only(lambda: os._exit(0))
killed = only(lambda: os.kill(os.getpid(), 9))
spinning = only(_spin)
sleeping = only(lambda: time.sleep(60))
with_child = only(_group)
infinite = only(lambda: -math.inf)
enormous = only(lambda: 1e300)
text = only(lambda: "0.5")
a_list = only(lambda: [0.5])
hungry = only(lambda: bytearray(10**12))
async def async_raising(completion, example):
    if completion == "bad": raise ValueError
    return 0.25
async def async_sleeping(completion, example):
    await asyncio.sleep(60 if completion == "bad" else 0)
    return 0.25
def batch_with_text(completions, examples):
    return ["x" if c == "bad" else 0.25 for c in completions]

def too_few(completions, examples): return [1.0]
def a_number(completions, examples): return 1.0
def batch_raising(completions, examples): raise ValueError("no")
def batch_dying(completions, examples): os._exit(3)

def hanging(completion, example): time.sleep(60)
def failing(completion, example): raise ValueError(completion + "\\n" + "!")
def lives_on(completion, example):
    threading.Timer(0.05, os._exit, [1]).start()
    return 0.25
"""

MODULE = """
from typing import Any, NamedTuple

class TextExample(NamedTuple):
    prompt: str
    gold: str
    boxes: Any = None

def exact(completion, example):
    return float(completion == example.gold)
"""

COMPLETIONS = ["good", "bad", "better", "best"]


class UserFiles(NamedTuple):
    """A folder with rewards of a user, and the questions of `COMPLETIONS`."""

    folder: Path
    examples: list

    def spec(self, name: str) -> str:
        return f"{self.folder / 'rewards.py'}:{name}"

    def workers(
        self,
        *names: str,
        count: int = 2,
        timeout_s: float = 1.0,
        error_share: float = 1.0,
        memory_bytes: int = 2**32,
    ):
        settings = RewardWorkerSettings(
            count=count, timeout_s=timeout_s, error_share=error_share, memory_bytes=memory_bytes
        )
        return RewardWorkers({name: self.spec(name) for name in names}, {}, settings)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "user_module.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("GRANDCHILD", str(folder / "grandchild"))
        import user_module  # pyright: ignore[reportMissingImports]

        box = np.zeros((1, 4), np.float32)
        yield UserFiles(folder, [user_module.TextExample("say", "good", box) for _ in COMPLETIONS])


LENGTHS = [0.5, 0.375, 0.75, 0.5]
QUARTERS = [0.25] * 4
APPLIES = [0.25, np.nan, 0.25, 0.25]
SOUND = {
    "length": LENGTHS,
    "integer": [4, 3, 6, 4],
    "truth": [0, 1, 0, 0],
    "numpy_scalar": QUARTERS,
    "zero_d": QUARTERS,
    "fraction": QUARTERS,
    "by_default": QUARTERS,
    "gold": [1, 0, 0, 0],
    "printing": QUARTERS,
    "waits": LENGTHS,
    "batch": LENGTHS,
    "batch_waits": LENGTHS,
    "not_applicable": APPLIES,
    "nan": APPLIES,
    "batch_with_none": APPLIES,
    "no_jax": [0] * 4,
}

FAULTS = {
    "raising": "KeyError: 'key' (rewards.py:",
    "exiting": "SystemExit: 0 (rewards.py:",
    "interrupting": "KeyboardInterrupt",
    "recurring": "RecursionError: maximum recursion depth exceeded (rewards.py:",
    "mute": "Mute: its text is not available (rewards.py:",
    "dying": "it ended its process, exit code 0",
    "killed": "it ended its process, exit code -9",
    "spinning": "it took more than 1 s",
    "sleeping": "it took more than 1 s",
    "with_child": "it took more than 1 s",
    "infinite": "it returned -inf, which is no finite number",
    "enormous": "it returned 1e+300, which is no finite number",
    "text": "it returned '0.5', which is no finite number",
    "a_list": "it returned [0.5], which is no finite number",
    "hungry": "it needed more than 4294967296 bytes",
    "async_raising": "ValueError:  (rewards.py:",
    "async_sleeping": "it took more than 1 s",
    "batch_with_text": "it returned 'x', which is no finite number",
}
"""Rewards that fail for one completion, and the message."""

BROKEN = {
    "too_few": "ValueError: it returned 1 scores for 4 completions",
    "a_number": "TypeError: 'float' object is not iterable",
    "batch_raising": "ValueError: no (rewards.py:",
    "batch_dying": "it ended its process, exit code 3",
}
"""Batch rewards that fail for all completions, and the message."""


def test_scores_are_float32_in_order_and_nan_where_a_reward_does_not_apply(files, capfd):
    with files.workers(*SOUND) as workers:
        scores, errors = workers.submit(COMPLETIONS, files.examples).result()
    for name, expected in SOUND.items():
        assert scores[name].dtype == np.float32
        np.testing.assert_array_equal(scores[name], np.array(expected, np.float32), name)
    assert errors == workers.errors() == dict.fromkeys(SOUND, 0)
    assert capfd.readouterr().out == "", "rewards do not write to the run's stdout"


@pytest.mark.slow
def test_defect_26_an_exception_in_a_reward_kills_the_run(files, caplog):
    """A reward that fails for one completion loses that score and no other. The first error is
    logged, and the run goes on.
    """
    with files.workers(*FAULTS, *BROKEN, "length") as workers:
        for _ in range(2):
            scores, errors = workers.submit(COMPLETIONS, files.examples).result()
            for name in FAULTS:
                np.testing.assert_array_equal(scores[name], [0.25, 0, 0.25, 0.25], name)
            for name in BROKEN:
                np.testing.assert_array_equal(scores[name], [0, 0, 0, 0], name)
            np.testing.assert_array_equal(scores["length"], LENGTHS)
            assert errors == dict.fromkeys(FAULTS, 1) | dict.fromkeys(BROKEN, 4) | {"length": 0}
        workers.check()
    assert workers.errors() == dict.fromkeys(FAULTS, 2) | dict.fromkeys(BROKEN, 8) | {"length": 0}
    messages = [record.getMessage() for record in caplog.records]
    for name, error in (FAULTS | BROKEN).items():
        (line,) = (line for line in messages if line.startswith(f"the reward {name} "))
        assert error in line and line.endswith("for 'good'" if name in BROKEN else "for 'bad'")
    assert len(messages) == len(FAULTS | BROKEN)
    assert ended(int((files.folder / "grandchild").read_text())), (
        "a process that a reward started ends with it"
    )


@pytest.mark.slow
def test_scores_and_counts_do_not_depend_on_the_number_of_workers(files):
    names = ("length", "raising", "dying", "batch", "waits")
    completions = [COMPLETIONS[i % 3] + "." * (i % 7) if i % 29 else "bad" for i in range(75)]
    results = []
    for count in (1, 3):
        with files.workers(*names, count=count) as workers:
            pending = [
                workers.submit(completions[start:], [None] * len(completions[start:]))
                for start in (0, 50)
            ]
            results.append(([p.result() for p in pending], workers.get_state()))
    (by_one, state), (by_three, other_state) = results
    assert (
        state == other_state
        and state["errors"]["dying"] == (completions + completions[50:]).count("bad") > 4
    )
    for a, b in zip(by_one, by_three, strict=True):
        assert a.errors == b.errors
        for name in names:
            np.testing.assert_array_equal(a.scores[name], b.scores[name])


def test_counts_go_on_after_a_resume(files, caplog):
    with files.workers("raising", "length") as workers:
        for _ in range(3):
            workers.submit(COMPLETIONS, files.examples).result()
        whole = workers.get_state()
    caplog.clear()
    with files.workers("raising", "length") as workers:
        first = workers.submit(COMPLETIONS, files.examples)
        assert first.result() is first.result(), "counted once"
        ahead = workers.submit(COMPLETIONS, files.examples)
        state = json.loads(json.dumps(workers.get_state()))
        ahead.result()
    with files.workers("raising", "length") as workers:
        workers.set_state(state)
        for _ in range(2):
            workers.submit(COMPLETIONS, files.examples).result()
        assert workers.get_state() == whole
    assert whole["calls"] == {"raising": 12, "length": 12} and workers.errors() == {
        "raising": 3,
        "length": 0,
    }
    messages = [record.getMessage() for record in caplog.records]
    assert sum("the reward raising" in message for message in messages) == 1, (
        "it was logged before the interruption, and is not logged again"
    )


@pytest.mark.parametrize(
    ("bad", "calls", "fatal"), [(5, 60, False), (6, 60, True), (6, 120, False), (7, 120, True)]
)
def test_a_run_ends_above_the_share_of_errors(files, bad, calls, fatal):
    """5 % of at least 100 calls: 5 of the first 60 may fail, and 6 of 120."""
    with files.workers("raising", error_share=0.05) as workers:
        workers.submit(["bad"] * bad + ["good"] * (calls - bad), [None] * calls).result()
    if not fatal:
        return workers.check()
    with pytest.raises(
        UserError,
        match=rf"the reward raising failed on {bad} of {calls} .* first with: KeyError: 'key'",
    ):
        workers.check()


def test_a_reward_that_always_hangs_ends_the_run_after_a_few_calls(files):
    with files.workers("hanging", "length", error_share=0.02, timeout_s=0.5) as workers:
        start = time.monotonic()
        scores, errors = workers.submit(["good"] * 120, [None] * 120).result()
        assert time.monotonic() - start < 10, "120 calls of 0.5 s are 30 s on two workers"
        assert (
            errors == {"hanging": 120, "length": 0}
            and not scores["hanging"].any()
            and scores["length"].all()
        )
        with pytest.raises(
            UserError,
            match="the reward hanging failed on 120 of 120 .* first with: it took more than 0.5 s",
        ):
            workers.check()


def test_leaving_does_not_wait_for_a_call(files):
    start = time.monotonic()
    with files.workers("hanging", "spinning", timeout_s=60.0) as workers:
        workers.submit(["bad"] * 100, [None] * 100)
        time.sleep(0.5)
        processes = [worker._process for worker in workers._processes]
    assert time.monotonic() - start < 10
    assert all(process.returncode == -9 for process in processes)


def test_a_worker_that_dies_between_calls_costs_nothing(files):
    with files.workers("lives_on", count=1) as workers:
        for _ in range(2):
            assert workers.submit(["good"], [None]).result().errors == {"lives_on": 0}
            time.sleep(0.3)


def test_no_rewards_and_no_completions(files):
    with files.workers() as workers:
        assert workers.submit(COMPLETIONS, files.examples).result() == ({}, {})
    with files.workers("batch", "length") as workers:
        scores, errors = workers.submit([], []).result()
    assert {name: s.shape for name, s in scores.items()} == {
        "batch": (0,),
        "length": (0,),
    } and errors == {
        "batch": 0,
        "length": 0,
    }


def test_a_name_is_looked_up_in_the_registry(files):
    import user_module  # pyright: ignore[reportMissingImports]

    registry = {"exact": user_module.exact}
    with RewardWorkers({"exact": "exact"}, registry, RewardWorkerSettings()) as workers:
        np.testing.assert_array_equal(
            workers.submit(COMPLETIONS, files.examples).result().scores["exact"], [1, 0, 0, 0]
        )
    with pytest.raises(
        UserError, match="the text reward exakt does not exist: did you mean exact?"
    ):
        RewardWorkers({"exakt": "exakt"}, registry, RewardWorkerSettings())


@pytest.mark.parametrize(
    ("source", "kind", "batched"),
    [
        ("def score(completion, example): ...", "text", False),
        ("async def score(completion, example, scale=1): ...", "text", False),
        ("def score(completions, examples, *, scale=1, **more): ...", "text", True),
        ("def score(answer, batch, settings): ...", "device", True),
        (
            "class Score:\n    def __call__(self, completion, example): ...\nscore = Score()",
            "text",
            False,
        ),
        (
            "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int' = 0\n"
            "def score(completion, example): ...",
            "text",
            False,
        ),
    ],
)
def test_the_parameters_say_what_a_reward_is(tmp_path, source, kind, batched):
    (tmp_path / "reward.py").write_text(source)
    reward = load_reward(f"{tmp_path / 'reward.py'}:score")
    assert (reward.kind, reward.batched) == (kind, batched) and callable(reward.function)


@pytest.mark.parametrize(
    ("source", "line"),
    [
        (None, "there is no file {path}"),
        ("def scores(completion, example): ...", "{path} has no score: did you mean scores?"),
        ("def score(completion, example) ...", "does not run: SyntaxError: expected ':'"),
        ("1 / 0", "does not run: ZeroDivisionError: division by zero"),
        (
            "import os\nos.nothing",
            "does not run: AttributeError: module 'os' has no attribute 'nothing'",
        ),
        ("import sys\nsys.exit('enough')", "does not run: SystemExit: enough"),
        ("score = 3", "is 3, not a function"),
        (
            "def score(completion, gold): ...",
            "has the parameters (completion, gold): they must be (completion, example) or "
            "(completions, examples) or (answer, batch, settings)",
        ),
    ],
)
def test_a_reward_that_cannot_be_used_is_one_line(tmp_path, source, line):
    path = tmp_path / "reward.py"
    if source is not None:
        path.write_text(source)
    for _ in range(2):  # a file that failed is not half imported the second time
        with pytest.raises(UserError) as raised:
            load_reward(f"{path}:score")
        message = str(raised.value)
        assert (
            message.startswith(f"the reward {path}:score")
            and line.format(path=path) in message
            and "\n" not in message
        )


def test_a_device_reward_is_no_text_reward(tmp_path):
    (tmp_path / "reward.py").write_text("def score(answer, batch, settings): ...")
    with pytest.raises(UserError, match="is a device reward: it belongs under grpo.rewards"):
        RewardWorkers({"mine": f"{tmp_path / 'reward.py'}:score"}, {}, RewardWorkerSettings())


IMPORTS = """from pg_ground.config import RewardWorkerSettings
from pg_ground.rewards.workers import RewardWorkers
"""


def test_a_worker_runs_neither_the_run_s_program_nor_jax(files):
    """The program has no `if __name__ == "__main__"`, and `-m` runs it, as it runs the commands."""
    (files.folder / "program.py").write_text(
        "print('started')\n"
        + IMPORTS
        + f"rewards = {{'no_jax': {files.spec('no_jax')!r}}}\n"
        + "with RewardWorkers(rewards, {}, RewardWorkerSettings()) as workers:\n"
        + "    print(workers.submit(['a'], [None]).result().scores['no_jax'])\n"
    )
    ran = subprocess.run(
        [sys.executable, "-m", "program"], cwd=files.folder, env=ENV, capture_output=True, text=True
    )
    assert (ran.stdout, ran.stderr) == ("started\n[0.]\n", "")


def test_the_text_rewards_of_the_package_import_no_jax():
    program = (
        "import sys; import pg_ground.rewards.text_rewards, pg_ground.rewards.worker_process; "
        "print([name for name in ('jax', 'optax', 'pg_ground.types') if name in sys.modules])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], env=ENV, capture_output=True, text=True, check=True
    )
    assert ran.stdout == "[]\n"


@pytest.mark.slow
def test_a_worker_ends_with_a_run_that_is_killed(files):
    (files.folder / "killed.py").write_text(
        "import os, time\n"
        + IMPORTS
        + f"rewards = {{'spinning': {files.spec('spinning')!r}}}\n"
        + "workers = RewardWorkers(rewards, {}, RewardWorkerSettings(timeout_s=0.5)).__enter__()\n"
        + "workers.submit(['good'], [None]).result()\n"
        + "workers.submit(['bad'], [None])\n"
        + "time.sleep(0.2)\n"
        + "print(*(worker._process.pid for worker in workers._processes), flush=True)\n"
        + "os.kill(os.getpid(), 9)\n"
    )
    ran = subprocess.run(
        [sys.executable, "killed.py"], cwd=files.folder, env=ENV, stdout=subprocess.PIPE, text=True
    )
    assert ran.returncode == -9 and all(ended(int(pid)) for pid in ran.stdout.split()), ran.stdout


ENV = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}


def ended(pid: int) -> bool:
    """Returns whether a process is gone, or is after a few seconds."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    ("name", "value", "right"),
    [
        ("count", 0, "above 0"),
        ("timeout_s", 0.0, "above 0"),
        ("error_share", 1.5, r"in \[0, 1\]"),
        ("memory_bytes", -1, "0 or more"),
    ],
)
def test_settings_out_of_range(name, value, right):
    tree = config.template()
    tree.stages, tree.grpo.sources = ("grpo",), {"a": {"uri": "synthetic:train", "boxes": "boxes"}}
    assert config.parse(tree).grpo.reward_workers == RewardWorkerSettings()
    tree.grpo.reward_workers[name] = value
    with pytest.raises(
        UserError, match=rf"config.grpo.reward_workers.{name} is {value}: it must be {right}"
    ):
        config.parse(tree)


def test_a_weight_that_is_no_number():
    tree = config.template()
    tree.stages, tree.grpo.sources = ("grpo",), {"a": {"uri": "synthetic:train", "boxes": "boxes"}}
    tree.grpo.text_rewards = {"exact": float("nan")}
    with pytest.raises(UserError, match="config.grpo.text_rewards.exact is nan: it must be finite"):
        config.parse(tree)
