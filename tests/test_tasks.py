"""The recipes of configs/tasks.py parse, read samples and train. The docs use names that exist."""

import ast
import importlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT, rows, run
from PIL import Image

from configs.tasks import TASKS
from pg_ground import cli, config, tokenizer
from pg_ground.data.batch_rows import stack_rows
from pg_ground.data.datasets import Examples, open_examples
from pg_ground.data.mixture import UnusableRow, prepare_row
from pg_ground.data.text_budgets import check_budgets, measure_budget
from pg_ground.rewards.device_rewards import REWARDS
from pg_ground.rewards.reward_functions import weighted_rewards
from pg_ground.rewards.text_questions import text_question
from pg_ground.rewards.text_rewards import TEXT_REWARDS
from pg_ground.rl.algorithms import ALGORITHMS, CHOICES, make_algorithm
from pg_ground.types import UserError

SAMPLES = ROOT.parent / "shared" / "data"
needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason="shared/data does not exist")
REWARD_PAGE, ALGORITHM_PAGE = (
    (ROOT / "docs" / f"{name}.md").read_text() for name in ("rewards", "algorithms")
)


def recipe(name: str, *flags: str) -> config.Config:
    return cli.parse_config([f"--config={ROOT}/configs/tasks.py:{name}", *flags])


def write_picture(path: Path) -> str:
    """Writes a random picture of 96 × 72 pixels and returns its file name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (72, 96, 3), np.uint8)).save(path)
    return path.name


def write_records(path: Path, records: list[dict]) -> str:
    """Writes a JSONL file and returns its uri."""
    path.write_text("\n".join(map(json.dumps, records)))
    return f"jsonl:{path}"


def open_questions(name: str, uri: str) -> Examples:
    """Returns the questions of a recipe after a check of their lengths."""
    c = recipe(name, f"--config.grpo.sources.questions.uri={uri}")
    examples = open_examples("questions", c.grpo.sources["questions"], c.data, 28)
    check_budgets([measure_budget(examples, tokenizer.load(), c.data)], c.data)
    return examples


@pytest.mark.parametrize("name", TASKS)
def test_a_recipe_uses_names_that_exist_and_one_flag_sets_the_data_of_both_stages(name):
    for weights in ("", "+pg2_3b_448"):
        c = recipe(name + weights, "--config.grpo.sources.questions.uri=jsonl:mine")
        assert set(c.grpo.rewards) <= set(REWARDS)
        assert set(c.grpo.text_rewards) <= set(TEXT_REWARDS)
        assert weighted_rewards(c.grpo)
        assert make_algorithm(c.grpo.algorithm, c.grpo.algorithm_overrides) is not None
        assert c.grpo.batch_size % c.grpo.minibatches == 0
        assert c.sft.sources == c.grpo.sources
        assert c.sft.sources["questions"].uri == "jsonl:mine"
    assert f"\n{name} " in (ROOT / "configs/tasks.py").read_text(), (
        "the docstring of configs/tasks.py must show a line of the data"
    )


def test_the_error_of_an_unknown_task_names_the_nearest_task():
    with pytest.raises(UserError, match="did you mean counting"):
        recipe("countin")


@needs_samples
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("point_environment", "gui/test.jsonl"),
        ("grounding", "refcoco/triples.jsonl"),
        ("single_box", "refcoco/triples.jsonl"),
    ],
)
def test_a_recipe_reads_published_samples(name, file):
    examples = open_questions(name, f"jsonl:{SAMPLES / file}")
    for i in range(0, len(examples), 30):
        assert re.fullmatch(r"(<loc\d{4}>)+( .+)?", examples[i].suffix)


@pytest.mark.slow
@needs_samples
def test_the_answer_to_a_pixmo_count_starts_with_thinking(tmp_path):
    records = [
        json.loads(line)
        for line in (SAMPLES / "counting/pixmo_count_val540.jsonl").read_text().splitlines()
    ]
    write_picture(tmp_path / records[0]["image_path"])
    example = open_questions("counting", write_records(tmp_path / "c.jsonl", records))[0]
    assert example.prompt == "answer en how many cows are there?"
    assert example.suffix == "<think>I see 8 cows.</think> <answer>8</answer>"


@needs_samples
def test_easydistills_classes_are_the_names_of_the_answer(tmp_path):
    records = json.loads((SAMPLES / "multi_box/multi_box_grounding_RL_sample.json").read_text())
    for record in records:
        Image.new("RGB", (record["width"], record["height"])).save(tmp_path / record["image_path"])
    (tmp_path / "m.json").write_text(json.dumps(records))
    examples = open_questions("multi_box", f"json:{tmp_path}/m.json")
    assert examples[0].names == ("0", "2")
    # a published box is [641, 422, 643, 422]: it has no height, and EasyDistill trains on it
    (box,) = [box for boxes in records[2]["abs_box"].values() for box in boxes if box[0] == 641]
    assert box == [641, 422, 643, 422]
    width, height = examples[2].size
    corners = examples[2].boxes.yxyx * [height, width, height, width]
    assert np.abs(corners - [422, 641, 423, 643]).max(axis=1).min() < 1e-3


GOLD = {
    "open_vocabulary": (
        {
            "problem": "Detect all dogs",
            "solution": "<answer>[{'Position': [1, 2, 30, 40], 'Confidence': 1}]</answer>",
        },
        {"ovd_iou": 1, "ovd_confidence": 1, "ovd_format": 1, "ovd": 1},
    ),
    "counting": (
        {"question": "cows", "ground_truth": 8},
        {"think_answer_format": 1, "count_exact": 1, "count_graded": 1},
    ),
    "spatial": (
        {
            "question": "Where is the vase relative to the sofa?",
            "cot": "I need the places of the vase and the sofa. I see the vase on a table by the "
            "window, and the sofa by a door. The vase is to the left of the sofa.",
            "answer": "left",
        },
        {"spatial": 1.3},
    ),
}


@pytest.mark.parametrize("name", GOLD)
def test_the_supervised_answer_earns_the_most_in_its_own_recipe(name, tmp_path):
    record, expected = GOLD[name]
    write_picture(tmp_path / "1.png")
    examples = open_questions(
        name, write_records(tmp_path / "q.jsonl", [record | {TASKS[name].source.image: "1.png"}])
    )
    tokens = tokenizer.load()
    c = recipe(name)
    row = prepare_row(examples, 0, tokens, c.data, 0, 0)
    assert not isinstance(row, UnusableRow)
    question = text_question(stack_rows([row]), 0, tokens)
    scores = {
        reward: TEXT_REWARDS[reward](examples[0].suffix, question) for reward in c.grpo.text_rewards
    }
    assert scores == pytest.approx(expected)


@pytest.mark.slow
def test_counting_trains_end_to_end(environment, tmp_path):
    records = [
        {"image_path": f"{i}.png", "question": "cows", "ground_truth": i % 3 + 1} for i in range(8)
    ]
    for record in records:
        write_picture(tmp_path / record["image_path"])
    uri = write_records(tmp_path / "c.jsonl", records)
    finished = run(
        environment,
        "train",
        "--config=configs/tasks.py:counting",
        f"--workdir={tmp_path}/run",
        f"--config.grpo.sources.questions.uri={uri}",
        "--config.model.image_size=28",
        "--config.sft.steps=2",
        "--config.grpo.steps=2",
        "--config.log.every=1",
        "--config.log.samples_every=0",
    )
    assert finished.returncode == 0, finished.stderr
    grpo_rows = [row for row in rows(tmp_path / "run") if row["stage"] == "grpo"]
    assert len(grpo_rows) == 2
    for row in grpo_rows:
        assert {f"reward/{name}" for name in TASKS["counting"].text_rewards} <= row.keys()
        assert row["reward/errors/count_exact"] == 0
        assert row["policy/kl"] >= 0


PAGES = [page.read_text() for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))]
DOCSTRINGS = [
    ast.get_docstring(ast.parse(path.read_text())) or ""
    for path in sorted((ROOT / "configs").glob("[a-z]*.py"))
]


def documented_commands() -> list[str]:
    """Returns the commands with a recipe in README, docs/ and the docstrings of configs/."""
    blocks = [block for page in PAGES for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL)]
    text = "\n".join([*blocks, *DOCSTRINGS]).replace("\\\n", " ")
    return re.findall(r"-m pg_ground\.(\w+ --config=configs/[^&#\n]*)", text)


@pytest.mark.parametrize("command", documented_commands())
def test_a_documented_command_has_settings_that_exist_and_the_data_that_it_needs(command):
    module, *flags = command.replace("=configs/", f"={ROOT}/configs/").split()
    c = cli.parse_config([flag for flag in flags if flag.startswith("--config")])
    sections = {"sft": c.sft.sources, "grpo": c.grpo.sources, "eval": c.eval.sources}
    flag_sources = {flag.partition(".sources.")[2].partition("=")[0] for flag in flags}
    reads = {"look": sections, "train": (*c.stages, "eval")}
    for section in reads.get(module, ()):
        for name, source in sections[section].items():
            assert (
                source.uri.startswith(("synthetic:", "relations:synthetic:"))
                or f"{name}.uri" in flag_sources
                or ("{dir}" in source.uri and c.data.dir)
            ), f"{section}/{name} is {source.uri}"


def test_the_docs_have_commands():
    commands = documented_commands()
    assert {command.split()[0] for command in commands} >= {"train", "look"}
    assert len(commands) > 9


def test_a_setting_in_a_sentence_has_a_name_and_a_value_that_exist(tmp_path):
    recipe_file = tmp_path / "recipe.py"
    recipe_file.write_text(
        "from pg_ground import config\n\ndef get_config():\n    c = config.template()\n"
        '    source = config.section(config.Source(uri="synthetic:train", boxes="box"))\n'
        '    c.sft.sources = c.grpo.sources = c.eval.sources = {"boxes": source}\n    return c\n'
    )
    settings = re.findall(
        r"--(config\.(?!\w+\.sources)[\w.]+)=('[^']*'|[^\s`…]+)", "\n".join([*PAGES, *DOCSTRINGS])
    )
    assert len(settings) > 12
    for name, value in settings:
        quote = "'"
        cli.parse_config([f"--config={recipe_file}", f"--{name}={value.strip(quote)}"])


def test_a_command_in_a_sentence_has_the_flags_that_it_requires():
    commands = re.findall(
        r"`python (-m pg_ground\.\w+|benchmarks/\w+\.py)([^`]*)`", "\n".join(PAGES)
    )
    assert len(commands) > 12
    for program, flags in commands:
        if program.startswith("-m") and not flags:
            continue  # the sentence only names the program
        if program.startswith("-m"):
            required = importlib.import_module(program.split()[1]).COMMAND.required
        else:
            required = re.findall(r'"(\w+)": cli\.REQUIRED', (ROOT / program).read_text())
        assert not [name for name in required if f"--{name}=" not in flags], f"{program}{flags}"


def example(mark: str) -> str:
    """Returns the example under the comment `<!-- mark -->` in docs/rewards.md."""
    match = re.search(rf"<!-- {mark} -->\n```python\n(.*?)```", REWARD_PAGE, re.DOTALL)
    assert match, mark
    return match[1]


@pytest.mark.slow
def test_the_examples_of_docs_rewards_train(environment, tmp_path):
    (tmp_path / "rewards.py").write_text(example("device"))
    (tmp_path / "words.py").write_text(example("text"))
    (tmp_path / "recipe.py").write_text(f"""
import runpy
def get_config():
    c = runpy.run_path("{ROOT}/configs/tiny.py")["get_config"]().unlock()
    c.stages = ("grpo",)
    c.grpo.steps = 3
    # the points of this recipe need a reward too
    c.grpo.rewards = {{"iou": 1.0, "{tmp_path}/rewards.py:centred": 0.5, "format": 0.2}}
    words = "{tmp_path}/words.py"
    c.grpo.text_rewards = {{f"{{words}}:brief": 0.1, f"{{words}}:share_of_longest": 0.0}}
    c.log.every = 1
    return c.lock()
""")
    finished = run(
        environment, "train", f"--config={tmp_path}/recipe.py", f"--workdir={tmp_path}/run"
    )
    assert finished.returncode == 0, finished.stderr
    training_rows = [row for row in rows(tmp_path / "run") if "policy/loss" in row]
    assert len(training_rows) == 3
    last_row = training_rows[-1]
    assert 0 <= last_row[f"reward/{tmp_path}/rewards.py:centred"] <= 1
    for name in ("brief", "share_of_longest"):
        assert 0 < last_row[f"reward/{tmp_path}/words.py:{name}"] <= 1
        assert last_row[f"reward/errors/{tmp_path}/words.py:{name}"] == 0


def table(page: str, head: str) -> str:
    """Returns the table of a page whose first row begins with `head`."""
    return page[page.index(f"| {head}") :].partition("\n\n")[0]


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (REWARDS, table(REWARD_PAGE, "`config.grpo.rewards`")),
        (TEXT_REWARDS, table(REWARD_PAGE, "`config.grpo.text_rewards`")),
        (ALGORITHMS, table(ALGORITHM_PAGE, "row")),
    ],
    ids=["rewards", "text_rewards", "algorithms"],
)
def test_a_table_of_the_docs_has_every_name_and_no_other_name(names, text):
    listed = [cell.split("|")[1] for cell in text.splitlines()[2:]]
    assert sorted(re.findall(r"`(\w+)`", "".join(listed))) == sorted(names)


RATIO_WORDS = {
    "token": "per_token",
    "sequence mean": "per_sequence",
    "sequence": "whole_sequence",
    "–": "per_token",
}


def test_the_table_of_algorithms_describes_the_rows():
    for line in table(ALGORITHM_PAGE, "row").splitlines()[2:]:
        cells = [cell.strip(" `") for cell in line.strip("|").split("|")]
        name, _, advantage, ratio, objective, loss_agg_mode, clip, kl = cells
        row = ALGORITHMS[name]
        assert advantage == row.advantage.__name__
        assert RATIO_WORDS[ratio] == row.ratio.__name__
        assert objective == row.objective.__name__
        assert loss_agg_mode == row.loss_agg_mode.__name__
        numbers = [float(number) for number in re.findall(r"[\d.]+(?:e-\d)?", clip)]
        options = [row.option(setting) for setting in ("clip_low", "clip_high", "ratio_cap")]
        assert numbers == [
            option for option in options if option is not None and np.isfinite(option)
        ], name
        assert float(kl.split()[0].strip(",")) == row.kl_coef
        assert ("in the reward" in kl) == row.kl_in_reward
        estimator = re.search(r"`(\w+)", kl)
        assert (estimator[1] if estimator else "k3_corrected") == row.kl_estimator.__name__


def test_the_docs_name_every_choice_and_setting():
    for choices in CHOICES.values():
        assert all(f"`{name}`" in ALGORITHM_PAGE for name in choices)
    for section, page in (
        (config.RewardSettings, REWARD_PAGE),
        (config.RewardWorkerSettings, REWARD_PAGE),
    ):
        assert all(f"`{field}`" in page for field in section.__dataclass_fields__)
