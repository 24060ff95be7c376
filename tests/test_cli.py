"""Laws of the command line: flags, settings, help, errors of one line, and exit codes."""

import errno
import importlib
import re
import subprocess
import sys

import pytest
from absl import flags
from commands import ROOT, call, run_here

from pg_ground import __main__ as program
from pg_ground import cli
from pg_ground.config import Config, Source
from pg_ground.reporting import progress
from pg_ground.types import UserError

TRAIN = importlib.import_module("pg_ground.train").COMMAND

TINY = f"--config={ROOT}/configs/tiny.py"

RECIPE = """
from pg_ground import config

def get_config(argument="none"):
    c = config.template()
    source = config.section(config.Source(uri="synthetic:train", boxes="box"))
    c.stages = ("grpo",)
    c.grpo.sources = {"my-data": source}
    c.grpo.rewards = {"iou": 1.0, "mine.py:centred": 0.5}
    c.log.wandb = argument
    return c
"""


@pytest.fixture
def recipe(tmp_path):
    """The flag of a recipe with keys that are not names of Python."""
    (tmp_path / "recipe.py").write_text(RECIPE)
    return f"--config={tmp_path / 'recipe.py'}"


def error_of(*argv: str) -> str:
    """Returns the error of a command line of `train`."""
    with pytest.raises(UserError) as caught:
        cli.parse(TRAIN, argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# flags


def test_a_value_stands_behind_an_equals_sign_or_a_space():
    for argv in (
        [TINY, "--workdir=a"],
        ["--workdir", "a", *TINY.split("=")],
        [TINY.replace("--", "-"), "-workdir", "a"],
    ):
        args = cli.parse(TRAIN, argv)
        assert args.flags.workdir == "a"
        assert args.config.sft.steps == 6


def test_a_switch_needs_no_value():
    for argv, value in (([], False), (["--dry_run"], True), (["--dry_run=false"], False)):
        assert cli.parse(TRAIN, [TINY, *argv]).flags.dry_run is value


def test_two_calls_share_nothing():
    assert cli.parse(TRAIN, [TINY, "--workdir=a"]).flags.workdir == "a"
    assert cli.parse(TRAIN, [TINY]).flags.workdir == ""
    assert "workdir" not in flags.FLAGS


def test_a_dash_in_a_flag_is_an_underscore():
    evaluate = importlib.import_module("pg_ground.evaluate")
    for flag in ("--box-format=yxyx_px", "--box_format=yxyx_px"):
        assert cli.parse(evaluate.COMMAND, [flag]).flags.box_format == "yxyx_px"


def test_a_path_starts_at_the_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.parse(TRAIN, [TINY, "--workdir=~/run"]).flags.workdir == f"{tmp_path}/run"
    (tmp_path / "mine.py").write_text(RECIPE)
    assert cli.parse_config(["--config=~/mine.py"]).stages == ("grpo",)


def test_flags_of_a_script_have_the_types_of_their_defaults():
    defaults = {"name": "a", "count": 3, "share": 0.5, "fast": False, "out": cli.REQUIRED}
    values = cli.parse_script_flags(["--count=4", "--fast", "--out=b", "--share=1"], defaults)
    assert values == {"name": "a", "count": 4, "share": 1.0, "fast": True, "out": "b"}
    with pytest.raises(UserError, match="--out is needed"):
        cli.parse_script_flags(["--count=4"], defaults)


# settings


def test_a_setting_may_stand_before_the_file_and_its_last_value_counts():
    argv = ["--config.grpo.steps=3", TINY, "--config.grpo.steps=4", "--config.stages=sft,"]
    settings = cli.parse_config([*argv, "--config.stages=grpo,"])
    assert settings.grpo.steps == 4
    assert settings.stages == ("grpo",)


def test_the_last_file_counts(recipe):
    assert cli.parse_config([TINY, recipe]).stages == ("grpo",)


@pytest.mark.parametrize(
    ("flag", "path", "value"),
    [
        ("grpo.temperature=2", "grpo.temperature", 2.0),
        ("grpo.clip_low=0.1", "grpo.clip_low", 0.1),
        ("eval.at_start=False", "eval.at_start", False),
        ("eval.at_start=0", "eval.at_start", False),
        ('stages=("sft",)', "stages", ("sft",)),
        ("stages=sft,grpo", "stages", ("sft", "grpo")),
        ("grpo.suppress_tokens=7", "grpo.suppress_tokens", (7,)),
        ("log.profile_steps=(5, 6)", "log.profile_steps", (5, 6)),
        ("mesh.compiler_options=a=1,b=2", "mesh.compiler_options", ("a=1", "b=2")),
        ("lr_factors=(('.*', 0.5),)", "lr_factors", ((".*", 0.5),)),
        ("checkpoint.best=-eval/boxes/acc50", "checkpoint.best", "-eval/boxes/acc50"),
        ("init=", "init", ""),
    ],
)
def test_a_value_has_the_type_of_its_setting(flag, path, value):
    node = cli.parse_config([TINY, f"--config.{flag}"])
    for name in path.split("."):
        node = getattr(node, name)
    assert node == value
    assert type(node) is type(value)


def test_a_key_may_be_any_text(recipe):
    settings = cli.parse_config([recipe, "--config.grpo.sources.my-data.weight=2.0"])
    source = Source(uri="synthetic:train", boxes="box", weight=2.0)
    assert settings.grpo.sources == {"my-data": source}
    assert settings.grpo.rewards == {"iou": 1.0, "mine.py:centred": 0.5}
    settings = cli.parse_config([recipe, '--config.grpo.rewards["mine.py:centred"]=0.25'])
    assert settings.grpo.rewards["mine.py:centred"] == 0.25


def test_flags_add_change_and_remove_rewards(recipe):
    rewards = cli.parse_config([TINY]).grpo.rewards
    assert rewards == {"iou": 1.0, "gaussian_point": 1.0, "format": 0.2}
    added = ["--config.grpo.rewards.detection=0.5", "--config.grpo.rewards.iou=(1, 0.5, 100)"]
    settings = cli.parse_config([*added, TINY, "--config.grpo.rewards.format", "None"])
    assert settings.grpo.rewards == {
        "iou": (1.0, 0.5, 100),
        "gaussian_point": 1.0,
        "detection": 0.5,
    }
    name = "--config.grpo.text_rewards.mine.py:centred"
    assert cli.parse_config([TINY, f"{name}=-1"]).grpo.text_rewards == {"mine.py:centred": -1.0}
    changed = cli.parse_config([recipe, "--config.grpo.rewards.mine.py:centred=None"])
    assert changed.grpo.rewards == {"iou": 1.0}
    emptied = cli.parse_config([TINY, "--config.grpo.rewards=None", "--config.grpo.rewards.iou=2"])
    assert emptied.grpo.rewards == {"iou": 2.0}


def test_flags_add_and_remove_sources_and_benchmarks(recipe):
    settings = cli.parse_config(
        [
            TINY,
            "--config.eval.sources.val.uri=jsonl:val.jsonl",
            "--config.eval.sources.val.boxes=box",
            "--config.eval.sources.val.where=task != 'Count'",
            "--config.eval.sources.points=None",
            "--config.eval.benchmarks.val=refcoco_val",
        ]
    )
    assert list(settings.eval.sources) == ["boxes", "val"]
    expected = Source(uri="jsonl:val.jsonl", boxes="box", where="task != 'Count'")
    assert settings.eval.sources["val"] == expected
    assert settings.eval.benchmarks == {"val": "refcoco_val"}
    replaced = cli.parse_config(
        [
            recipe,
            "--config.grpo.sources=None",
            "--config.grpo.sources.my-data.uri=jsonl:a",
            '--config.grpo.sources["b.c"].uri=jsonl:b',
            "--config.grpo.sources.my-data.target=points",
            "--config.grpo.sources.my-data.points=p",
            '--config.grpo.sources["b.c"].boxes=box',
        ]
    )
    assert replaced.grpo.sources == {
        "my-data": Source(uri="jsonl:a", target="points", points="p"),
        "b.c": Source(uri="jsonl:b", boxes="box"),
    }


def test_flags_add_to_a_table_that_the_recipe_leaves_out(tmp_path):
    source = {"uri": "synthetic:train", "boxes": "box"}
    content = {"stages": ("sft",), "sft": {"steps": 1, "sources": {"a": source}}}
    file = tmp_path / "part.py"
    file.write_text(
        "from ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict({content!r})\n"
    )
    flags = ("eval.benchmarks.val=refcoco_val", "eval.sources.val.uri=jsonl:val.jsonl")
    more = ("eval.sources.val.boxes=box", "grpo.rewards.detection=0.5")
    settings = cli.parse_config([f"--config={file}", *(f"--config.{f}" for f in (*flags, *more))])
    assert settings.eval.benchmarks == {"val": "refcoco_val"}
    assert settings.eval.sources == {"val": Source(uri="jsonl:val.jsonl", boxes="box")}
    assert settings.grpo.rewards == {**Config().grpo.rewards, "detection": 0.5}
    assert settings.sft.steps == 1


def test_flags_change_the_source_that_two_stages_share():
    file = f"--config={ROOT}/configs/tasks.py:relations"
    for flags_of_both in (
        ["--config.sft.sources.questions=None", "--config.grpo.sources.questions=None"],
        ["--config.sft.sources.questions=None"],
    ):
        settings = cli.parse_config(
            [
                file,
                *flags_of_both,
                "--config.grpo.sources.mine.uri=jsonl:a",
                "--config.grpo.sources.mine.boxes=box",
            ]
        )
        assert list(settings.grpo.sources) == list(settings.sft.sources) == ["mine"]


def test_a_file_gets_its_argument(recipe):
    assert cli.parse_config([f"{recipe}:project"]).log.wandb == "project"


def test_a_file_that_changes_is_read_again(tmp_path, recipe):
    assert cli.parse_config([recipe]).stages == ("grpo",)
    (tmp_path / "recipe.py").write_text(RECIPE.replace("0.5", "0.7"))
    assert cli.parse_config([recipe]).grpo.rewards["mine.py:centred"] == 0.7


# errors

ERRORS = {
    "unknown flag": ([TINY, "--wrokdir=x"], "--wrokdir does not exist: did you mean workdir?"),
    "no value": ([TINY, "--workdir"], "--workdir has no value: flags look like --name=value"),
    "no file": (["--config"], "--config has no value: flags look like --name=value"),
    "no value of a setting": (
        [TINY, "--config.grpo.steps"],
        "--config.grpo.steps has no value: flags look like --name=value",
    ),
    "misspelt setting": (
        [TINY, "--config.grpo.group_sise=4"],
        "config.grpo.group_sise does not exist: did you mean group_size?",
    ),
    "misspelt section": (
        [TINY, "--config.gpro.group_size=4"],
        "config.gpro does not exist: did you mean grpo?",
    ),
    "a word for a whole number": (
        [TINY, "--config.grpo.steps=many"],
        "--config.grpo.steps=many: it must be of type int",
    ),
    "a fraction for a whole number": (
        [TINY, "--config.grpo.steps=4.5"],
        "--config.grpo.steps=4.5: it must be of type int",
    ),
    "a word for a fraction": (
        [TINY, "--config.grpo.temperature=a: b"],
        "--config.grpo.temperature=a: b: it must be of type float",
    ),
    "a word for a switch": ([TINY, "--dry_run=mabye"], "--dry_run=mabye: it must be of type bool"),
    "a word for a switch among the settings": (
        [TINY, "--config.eval.at_start=mabye"],
        "--config.eval.at_start=mabye: it must be of type bool",
    ),
    "a section": (
        [TINY, "--config.checkpoint=4"],
        "--config.checkpoint is a section: set one of best, every, keep",
    ),
    "a value as a section": (
        [TINY, "--config.seed.a=4"],
        "--config.seed.a: config.seed is a value, not a section",
    ),
    "an unknown benchmark": (
        [TINY, "--config.eval.benchmarks.boxes=refcoco_vall"],
        "config.eval.benchmarks.boxes 'refcoco_vall' does not exist: did you mean refcoco_val?",
    ),
    "an unknown reward": (
        [TINY, "--config.grpo.rewards.detecton=1"],
        "config.grpo.rewards.detecton does not exist: did you mean detection?",
    ),
    "an unknown text reward": (
        [TINY, "--config.grpo.text_rewards.list_iuo=1"],
        "config.grpo.text_rewards.list_iuo does not exist: did you mean list_iou?",
    ),
    "a text reward among the others": (
        [TINY, "--config.grpo.rewards.list_iou=1"],
        "config.grpo.rewards.list_iou does not exist: the reward is "
        "config.grpo.text_rewards.list_iou",
    ),
    "a word for a weight": (
        [TINY, "--config.grpo.rewards.iou=high"],
        "--config.grpo.rewards.iou=high: it must be a number or (start, end, steps); None removes",
    ),
    "a schedule of two numbers": (
        [TINY, "--config.grpo.rewards.iou=(1, 2)"],
        "config.grpo.rewards.iou is (1, 2), but it must have 3 elements",
    ),
    "a weight without a value": (
        [TINY, "--config.grpo.rewards.iou"],
        "--config.grpo.rewards.iou has no value: flags look like --name=value",
    ),
    "a reward that cannot be removed": (
        [TINY, "--config.grpo.rewards.iuo=None"],
        "config.grpo.rewards.iuo cannot be removed: did you mean iou?",
    ),
    "a misspelt source": (
        [TINY, "--config.grpo.sources.box.weight=2"],
        "config.grpo.sources.box does not exist: did you mean boxes? "
        "(--config.grpo.sources.box.uri=… adds a source)",
    ),
    "a misspelt field of a new source": (
        [TINY, "--config.eval.sources.a.uri=jsonl:a", "--config.eval.sources.a.promt=b"],
        "config.eval.sources.a.promt does not exist: did you mean prompt?",
    ),
    "a source as a value": (
        [TINY, "--config.eval.sources.a=jsonl:a"],
        "--config.eval.sources.a is a section: set one of uri, image, ",
    ),
    "a table as a value": (
        [TINY, "--config.eval.sources=jsonl:a"],
        "--config.eval.sources is a table with boxes, points: set one of its entries; None remo",
    ),
    "a field of a source that a later flag removes": (
        [TINY, "--config.eval.sources.boxes.uri=jsonl:a", "--config.eval.sources.boxes=None"],
        "--config.eval.sources.boxes.uri has no meaning: a later flag removes "
        "config.eval.sources.boxes",
    ),
    "a stage without sources": (
        [TINY, "--config.grpo.sources=None"],
        "config.grpo.sources is {}: it must be at least one source",
    ),
    "an entry without a file": (
        ["--config.grpo.rewards.iou=1"],
        "--config.grpo.rewards.iou needs --config=FILE beside it",
    ),
    "no such file": (
        ["--config=configs/nowhere.py"],
        "--config=configs/nowhere.py: there is no file configs/nowhere.py",
    ),
    "a setting without a file": (
        ["--config.seed=1"],
        "--config.seed needs --config=FILE beside it",
    ),
    "no config": (
        ["--workdir=x"],
        "--config is needed: pg-ground train needs --config=FILE and --workdir=DIR (or --dry_run)",
    ),
    "a file without its flag": (
        ["configs/tiny.py:a", "--workdir=x"],
        "'configs/tiny.py:a' is not a flag: did you mean --config=configs/tiny.py:a?",
    ),
    "a flag in place of a file": (
        ["--config", "--workdir=x"],
        "--config has no value: flags look like --name=value",
    ),
    "an argument of a recipe that takes none": (
        [f"{TINY}:small"],
        f"{TINY}:small: get_config() of {TINY.removeprefix('--config=')} takes no argument",
    ),
    "no flag": ([TINY, "runs/x"], "'runs/x' is not a flag: flags look like --name=value"),
    "a value that no run could use": (
        [TINY, "--config.grpo.group_size=1"],
        "config.grpo.group_size is 1: it must be at least 2",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_one_line_that_names_the_flag(name):
    argv, text = ERRORS[name]
    assert error_of(*argv).startswith(text)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("1 +", r"does not run: SyntaxError: invalid syntax"),
        ("import nowhere", r"does not run: ModuleNotFoundError: No module named 'nowhere'"),
        ("def get_config():\n    raise ValueError('a\\nb')", r"does not run: ValueError: a b$"),
        ("raise SystemExit(4)", r"does not run: SystemExit: 4"),
        ("x = 1", r"has no function get_config"),
        (
            "def get_config():\n    pass",
            r"get_config\(\) of .*\.py returns NoneType: it must return",
        ),
        ("def get_config(a):\n    return a", r"does not run: TypeError: get_config\(\) missing"),
    ],
)
def test_a_config_file_that_does_not_run_is_one_line(tmp_path, source, text):
    file = tmp_path / "broken.py"
    file.write_text(source)
    assert re.search(rf"^--config={re.escape(str(file))}.*{text}", error_of(f"--config={file}"))


@pytest.mark.parametrize("name", program.COMMANDS)
def test_a_command_without_arguments_says_what_it_needs(name):
    command = importlib.import_module(f"pg_ground.{name}").COMMAND
    if name == "bench":
        assert cli.parse(command, []).config.stages == ("sft", "grpo")
        return
    with pytest.raises(UserError) as caught:
        cli.parse(command, [])
    text = str(caught.value)
    assert text.startswith(f"pg-ground {name} needs ")
    assert text.endswith(f"; see pg-ground {name} --help")


def test_paths_are_counted():
    with pytest.raises(UserError, match="1 path given, but pg-ground convert SRC DST takes 2"):
        call("convert", "a.npz")


# help


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("name", program.COMMANDS)
def test_help_has_purpose_flags_example_and_settings(name, flag, capsys):
    module = importlib.import_module(f"pg_ground.{name}")
    with pytest.raises(SystemExit) as ended:
        cli.parse(module.COMMAND, [flag])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert text.startswith(f"Usage: pg-ground {name} ")
    assert str(module.__doc__).splitlines()[0] in text
    assert "\n  -h, --help " in text
    assert f"\nExample:\n  pg-ground {name} " in text
    assert ("How settings are found:" in text) == module.COMMAND.takes_config
    assert max(map(len, text.splitlines())) <= 100
    own = flags.FlagValues()
    module.define_flags(own)
    for flag_name in own:
        assert f"\n  --{flag_name}" in text
        assert own[flag_name].help


@pytest.mark.parametrize("name", program.COMMANDS)
def test_the_example_of_a_help_can_be_parsed(name, monkeypatch):
    module = importlib.import_module(f"pg_ground.{name}")
    example = module.COMMAND.example.replace('"detect circle"', "detect")
    monkeypatch.chdir(ROOT)
    cli.parse(module.COMMAND, example.split())


def test_help_with_a_config_lists_its_settings(capsys):
    with pytest.raises(SystemExit):
        cli.parse(TRAIN, ["--help", TINY, "--config.grpo.steps=77"])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert any(line.startswith("config.grpo.steps = 77") for line in lines)
    assert any(line.startswith("config.grpo.sources.boxes.boxes = 'box'") for line in lines)
    assert any(re.match(r"config.grpo.rewards = {.*'iou': 1.0", line) for line in lines)


def test_the_program_lists_its_commands(capsys):
    for argv in ([], ["--help"], ["-h"]):
        with pytest.raises(SystemExit) as ended:
            program.main(argv)
        assert ended.value.code == 0
        text = capsys.readouterr().out
        assert re.findall(r"^  (\w+) ", text, re.M) == list(program.COMMANDS)
        assert max(map(len, text.splitlines())) <= 100


def test_an_unknown_command_is_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        program.main(["trian"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: there is no command 'trian': did you mean train?\n"


# ends


def end_of(
    error: BaseException | None, capsys, position: progress.Position | None = None
) -> tuple[int, list[str]]:
    """Returns the exit code and the lines of stderr of a command that ends with `error`.

    Args:
      position: the stage, the step and the phase in which the error is raised.
    """

    def main(args: cli.Arguments) -> None:
        if position is not None:
            progress.set_step(position.stage, position.step)
            with progress.phase(position.phase):
                if error is not None:
                    raise error
        if error is not None:
            raise error

    with pytest.raises(SystemExit) as ended:
        cli.run(TRAIN, main, [TINY])
    code = ended.value.code
    assert isinstance(code, int)
    return code, capsys.readouterr().err.splitlines()


def test_a_command_that_succeeds_ends_with_0(capsys):
    assert end_of(None, capsys) == (0, [])


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("config.a is\n  wrong"), "error: config.a is wrong"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "a.png"),
            "error: [Errno 2] No such file or directory: 'a.png'",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/root/run"),
            "error: [Errno 13] Permission denied: '/root/run'",
        ),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_ends_with_2(error, line, capsys):
    assert end_of(error, capsys) == (2, [line])


def test_the_line_names_the_position_of_a_run(capsys):
    position = progress.Position("grpo", 141, "score")
    code, lines = end_of(UserError("a reward fails"), capsys, position)
    assert (code, lines) == (2, ["error: a reward fails (at step 141 of grpo, phase score)"])
    assert end_of(UserError("no"), capsys) == (2, ["error: no"]), "a new command has no position"


def test_a_full_disk_ends_with_1_and_names_the_file(capsys):
    error = OSError(errno.ENOSPC, "No space left on device", "runs/a/metrics.jsonl")
    code, lines = end_of(error, capsys)
    assert code == 1
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == (
        "error: OSError: [Errno 28] No space left on device: 'runs/a/metrics.jsonl' (process 0)"
    )


def test_a_fault_of_the_program_ends_with_1_a_traceback_and_the_position(capsys):
    position = progress.Position("sft", 3, "update")
    code, lines = end_of(ValueError("shapes\ndiffer"), capsys, position)
    assert code == 1
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == (
        "error: ValueError: shapes differ (process 0, at step 3 of sft, phase update)"
    )


def test_an_interrupt_ends_with_130_and_one_line_that_says_how_to_go_on(capsys):
    code, lines = end_of(KeyboardInterrupt(), capsys, progress.Position("grpo", 9, "update"))
    assert code == 130
    assert lines == [
        "error: stopped by Ctrl-C at step 9 of grpo, phase update: the same command continues from "
        "the newest checkpoint"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help", TINY]], ids=["", "train"])
def test_a_reader_that_ends_early_is_no_error(arguments):
    """`pg-ground train --help | head` closes the pipe before the command has written everything."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pg_ground", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout and process.stderr
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 141


def test_a_script_ends_as_a_command_does(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["versus.py", "--a=1"])

    def main(argv):
        cli.parse_script_flags(argv, {"b": 0})

    with pytest.raises(SystemExit) as ended:
        cli.run_script(main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: --a does not exist: there are b, help\n"


ADDRESSES = {
    "train": ["--config=configs/tiny.py", "--workdir=ftp://host/run"],
    "train, weights": ["--config=configs/tiny.py", "--workdir=w", "--config.init=ftp://b/w.npz"],
    "train, tokenizer": [
        "--config=configs/tiny.py", "--workdir=w", "--config.data.tokenizer=ftp://h/t",
    ],
    "train, data": [
        "--config=configs/tiny.py", "--workdir=w", "--config.sft.sources.boxes.uri=jsonl:ftp://h/a",
    ],
    "evaluate": ["--config=configs/tiny.py", "--params=ftp://host/w.npz"],
    "evaluate, workdir": ["--config=configs/tiny.py", "--workdir=ftp://host/run"],
    "evaluate, out": ["--config=configs/tiny.py", "--params=w.npz", "--out=ftp://host/out"],
    "evaluate, predictions": ["--predictions=ftp://host/a.jsonl"],
    "predict": ["--params=ftp://host/w.npz", "--image=a.png", "--prompt=x"],
    "predict, image": ["--params=w.npz", "--image=ftp://host/a.png", "--prompt=x"],
    "predict, out": ["--params=w.npz", "--image=a.png", "--prompt=x", "--out=ftp://host/a.png"],
    "report": ["ftp://host/run"],
    "report, out": ["run", "--out=ftp://host/a.html"],
    "look": ["--config=configs/tiny.py", "--out=ftp://host/look.html"],
    "pack": ["--config=configs/tiny.py", "--out=ftp://host/packed"],
    "convert": ["run", "ftp://host/out.npz"],
    "convert, source": ["ftp://host/a.npz", "out.npz"],
    "convert, tokenizer": ["a.npz", "out", "--tokenizer=gs:/bucket/t.model"],
    "compile": ["--config=configs/tiny.py", "--topology=v5e:2x4", "--json=ftp://host/o.json"],
}  # fmt: skip


@pytest.mark.parametrize("name", ADDRESSES)
def test_an_address_that_cannot_be_used_is_refused_and_nothing_is_written(name, tmp_path):
    """`Path("ftp://host/run")` is a local folder `ftp:`, where results would be lost."""
    arguments = [argument.replace("configs/", f"{ROOT}/configs/") for argument in ADDRESSES[name]]
    finished = run_here(name.partition(",")[0], *arguments, cwd=tmp_path)
    assert finished.returncode == 2
    assert re.match(r"error: .*: \S+:/\S+ is an address, but ", finished.stderr)
    assert finished.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
