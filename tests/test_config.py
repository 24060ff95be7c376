"""`parse` accepts every valid setting and refuses all others.

Other tests check that some code reads each setting, and that every recipe in `configs/` parses.
"""

import ast
import dataclasses
import importlib
import json
import typing
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from pg_ground import config
from pg_ground.config import Config, Grpo, Sft, Source, parse, section, template
from pg_ground.rl.algorithms import SETTINGS
from pg_ground.types import UserError

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "configs").glob("[a-z]*.py"))
BOXES = Source(uri="synthetic:train", boxes="box")


def valid_tree(**changes) -> dict:
    """Returns the smallest tree that parses, with `changes` by name.

    A name has `__` for each dot: `grpo__group_size` is the setting grpo.group_size.
    """
    tree = {"sft": {"sources": {"a": {"uri": "jsonl:x", "boxes": "box"}}}}
    tree["grpo"] = {"sources": dict(tree["sft"]["sources"])}
    tree = json.loads(json.dumps(tree))
    for name, value in changes.items():
        *parents, leaf = name.split("__")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def error_message(tree: dict | ConfigDict) -> str:
    """Returns the message of the error that `parse` raises. The message has one line."""
    with pytest.raises(UserError) as error:
        parse(tree)
    message = str(error.value)
    assert "\n" not in message
    return message


def sections(kind: type = Config) -> list[type]:
    """Returns the dataclass and the dataclasses of its fields, down to the leaves."""
    dataclass_types = [kind]
    for hint in typing.get_type_hints(kind).values():
        for inner in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(inner):
                dataclass_types += [s for s in sections(inner) if s not in dataclass_types]
    return dataclass_types


# Valid settings


def test_an_absent_setting_has_its_default():
    settings = parse(valid_tree(grpo__group_size=4))
    assert settings.grpo == dataclasses.replace(
        Grpo(), group_size=4, sources={"a": Source(uri="jsonl:x", boxes="box")}
    )
    assert settings.model == Config().model and settings.seed == 0


def test_a_whole_number_becomes_a_float_if_the_setting_is_a_float():
    grpo = parse(valid_tree(grpo__temperature=1, grpo__clip_low=0, grpo__rewards={"iou": 1})).grpo
    assert type(grpo.temperature) is float and type(grpo.clip_low) is float
    assert grpo.rewards == {"iou": 1.0} and type(grpo.rewards["iou"]) is float


def test_template_and_parse_are_inverses():
    tree = template()
    for stage in (tree.sft, tree.grpo, tree.eval):
        stage.sources = {"a": section(BOXES)}
    sources = {"a": BOXES}
    expected = Config(
        sft=Sft(sources=sources),
        grpo=Grpo(sources=sources),
        eval=dataclasses.replace(Config().eval, sources=sources),
    )
    assert parse(tree) == expected
    assert parse(tree.lock()) == expected


def test_template_accepts_a_value_for_a_setting_with_default_none():
    tree = template()
    tree.sft.sources = tree.grpo.sources = {"a": section(BOXES)}
    assert parse(tree).grpo.clip_low is None
    tree.grpo.clip_low = 0.1
    assert parse(tree).grpo.clip_low == 0.1


def test_a_locked_recipe_refuses_a_name_that_does_not_exist():
    tree = template().lock()
    with pytest.raises(AttributeError):
        tree.grpo.group_sise = 4


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_every_recipe_is_locked_and_parses(path):
    module = importlib.import_module(f"configs.{path.stem}")
    recipe = module.get_config()
    assert recipe.is_locked and isinstance(parse(recipe), Config)
    assert f"configs/{path.name}" in module.__doc__, "the docstring gives the command"


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_a_config_written_as_json_parses_back(path):
    """A run writes config.json at its start. It reads the file at its end and when it resumes."""
    module = importlib.import_module(f"configs.{path.stem}")
    settings = parse(module.get_config())
    assert parse(json.loads(json.dumps(dataclasses.asdict(settings)))) == settings


def test_the_tiny_recipe_is_in_the_list():
    assert "tiny" in [path.stem for path in RECIPES]


# Invalid settings


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("grpo__group_sise", "config.grpo.group_sise does not exist: did you mean group_size?"),
        ("model__text__widht", "config.model.text.widht does not exist: did you mean width?"),
        (
            "grpo__optimizer__learning_rate",
            "config.grpo.optimizer.learning_rate does not exist: there are b1, b2, clip_norm",
        ),
        (
            "sft__sources__a__box_formats",
            "config.sft.sources.a.box_formats does not exist: did you mean box_format?",
        ),
        ("gpro", "config.gpro does not exist: did you mean grpo?"),
    ],
)
def test_the_error_for_an_unknown_name_has_the_full_name_and_the_nearest_name(name, message):
    assert error_message(valid_tree(**{name: 1})).startswith(message)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("grpo__group_size", 4.0, "config.grpo.group_size is 4.0, but it must be of type int"),
        ("grpo__group_size", True, "config.grpo.group_size is True, but it must be of type int"),
        ("grpo__group_size", "4", "config.grpo.group_size is '4', but it must be of type int"),
        ("grpo__group_size", None, "config.grpo.group_size is None, but it must be of type int"),
        (
            "grpo__temperature",
            True,
            "config.grpo.temperature is True, but it must be of type float",
        ),
        ("grpo__clip_low", "a", "config.grpo.clip_low is 'a', but it must be of type float"),
        (
            "model__text__post_norms",
            1,
            "config.model.text.post_norms is 1, but it must be of type bool",
        ),
        (
            "grpo__rewards",
            {"iou": "1"},
            "config.grpo.rewards.iou is '1', but it must be of type float",
        ),
        ("stages", ["sft", 3], "config.stages[1] is 3, but it must be of type str"),
        ("stages", "sft", "config.stages is 'sft', but it must be of type tuple"),
        ("grpo__optimizer", 3, "config.grpo.optimizer is 3, but it is a section with name, lr"),
        ("grpo__rewards", 3, "config.grpo.rewards is 3, but it must be"),
        ("grpo__rewards", "iou", "config.grpo.rewards is 'iou', but it must be"),
    ],
)
def test_the_error_for_a_value_of_another_type_has_the_full_name(name, value, message):
    assert error_message(valid_tree(**{name: value})).startswith(message)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("grpo__group_size", 1, "config.grpo.group_size is 1: it must be at least 2"),
        ("grpo__temperature", 0.0, "config.grpo.temperature is 0.0: it must be above 0"),
        ("grpo__top_p", 0.0, "config.grpo.top_p is 0.0: it must be in (0, 1]"),
        ("grpo__top_p", 1.1, "config.grpo.top_p is 1.1"),
        (
            "grpo__reward_settings__distance_unit",
            "metres",
            "config.grpo.reward_settings.distance_unit is 'metres'",
        ),
        (
            "grpo__reward_settings__distance_sigma_share",
            0.0,
            "config.grpo.reward_settings.distance_sigma_share is 0.0: it must",
        ),
        (
            "grpo__reward_settings__gaussian_alpha",
            -0.5,
            "config.grpo.reward_settings.gaussian_alpha is -0.5",
        ),
        (
            "grpo__reward_settings__repetition_ngram",
            0,
            "config.grpo.reward_settings.repetition_ngram is 0: it must be above 0",
        ),
        (
            "grpo__reward_settings__overlong_cache_tokens",
            0,
            "config.grpo.reward_settings.overlong_cache_tokens is 0",
        ),
        (
            "grpo__reward_settings__overlong_max_tokens",
            -1,
            "config.grpo.reward_settings.overlong_max_tokens is -1",
        ),
        ("data__mask_size", -1, "config.data.mask_size is -1: it must be 0 or more"),
        ("eval__temperature", 0.0, "config.eval.temperature is 0.0"),
        ("sft__label_smoothing", 1.0, "config.sft.label_smoothing is 1.0: it must be in [0, 1)"),
        ("sft__loc_smoothing_bins", -1.0, "config.sft.loc_smoothing_bins is -1.0"),
        (
            "grpo__grad_accum_steps",
            3,
            "config.grpo.batch_size is 8: it must be a multiple of grad_accum_steps, 3",
        ),
        ("sft__grad_accum_steps", 0, "config.sft.grad_accum_steps is 0"),
        (
            "sft__grad_accum_steps",
            5,
            "config.sft.batch_size is 16: it must be a multiple of grad_accum_steps, 5",
        ),
        (
            "grpo__optimizer__name",
            "adam",
            "config.grpo.optimizer.name is 'adam': it must be one of adamw, muon",
        ),
        (
            "sft__optimizer__schedule",
            "step",
            "config.sft.optimizer.schedule is 'step': it must be one of constant",
        ),
        (
            "model__remat",
            "nothing_savable",
            "config.model.remat is 'nothing_savable': it must be one of none, ",
        ),
        # `jax.checkpoint_policies.save_only_these_names` returns a policy. It is no policy itself.
        (
            "model__remat",
            "save_only_these_names",
            "config.model.remat is 'save_only_these_names'",
        ),
        (
            "model__dtype",
            "float16",
            "config.model.dtype is 'float16': it must be one of float32, bfloat16",
        ),
        ("model__image_size", 225, "config.model.image_size is 225: it must be a multiple of"),
        (
            "model__vision__num_heads",
            7,
            "config.model.vision.width is 1152: it must be a multiple of num_heads",
        ),
        (
            "model__text__num_kv_heads",
            3,
            "config.model.text.num_heads is 8: it must be a multiple of num_kv_heads",
        ),
        (
            "model__text__vocab_size",
            1152,
            "config.model.text.vocab_size is 1152: it must be above 1152",
        ),
        ("stages", [], "config.stages is ()"),
        ("stages", ["sft", "sft"], "config.stages is ('sft', 'sft')"),
        ("stages", ["ppo"], "config.stages is 'ppo': it must be one of sft, grpo"),
        ("grpo__sources", {}, "config.grpo.sources is {}: it must be at least one source"),
        (
            "sft__sources__a__target",
            "masks",
            "config.sft.sources.a.target is 'masks': it must be one of boxes, points",
        ),
        ("sft__sources__a__target", "points", "config.sft.sources.a.points is ''"),
        (
            "grpo__sources__a__weight",
            0.0,
            "config.grpo.sources.a.weight is 0.0: it must be above 0",
        ),
        (
            "grpo__sources__a__weight",
            float("inf"),
            "config.grpo.sources.a.weight is inf: it must be above 0 and finite",
        ),
        (
            "grpo__sources__a__weight",
            float("nan"),
            "config.grpo.sources.a.weight is nan: it must be above 0 and finite",
        ),
        (
            "eval__every_epochs",
            -1.0,
            "config.eval.every_epochs is -1.0: it must be 0 or more and finite",
        ),
        ("checkpoint__keep", 0, "config.checkpoint.keep is 0: it must be above 0"),
        ("model__logits_block", 0, "config.model.logits_block is 0: it must be above 0"),
        ("model__image_size", 0, "config.model.image_size is 0"),
        ("model__vision__patch_size", 0, "config.model.vision.patch_size is 0"),
        ("model__vision__num_heads", 0, "config.model.vision.num_heads is 0"),
        ("model__text__num_kv_heads", 0, "config.model.text.num_kv_heads is 0"),
        ("model__text__depth", -1, "config.model.text.depth is -1"),
        ("mesh__replica", 0, "config.mesh.replica is 0: it must be at least 1"),
        ("mesh__model", -1, "config.mesh.model is -1: it must be at least 1"),
        ("mesh__data", 0, "config.mesh.data is 0: it must be at least 1, or -1"),
        (
            "mesh__rules",
            (("llm/(", ("data",)),),
            "config.mesh.rules[0][0] is 'llm/(': it must be a regular expression",
        ),
        (
            "mesh__rules",
            (("llm", ("data", "data")),),
            "config.mesh.rules[0][1] is ('data', 'data'): it must be each axis once",
        ),
        (
            "mesh__compiler_options",
            ("xla_flag",),
            "config.mesh.compiler_options[0] is 'xla_flag': it must be name=value",
        ),
        (
            "grpo__rollout_weights",
            "whole",
            "config.grpo.rollout_weights is 'whole': it must be one of auto, gathered, sharded",
        ),
        (
            "log__profile_steps",
            (1, 5),
            "config.log.profile_steps is (1, 5): it must be (first, last) with 2 <= first <= last",
        ),
    ],
)
def test_a_value_that_no_run_could_use_is_refused(name, value, message):
    assert error_message(valid_tree(**{name: value})).startswith(message)


def test_stages_that_do_not_run_need_no_sources():
    tree = valid_tree(stages=["grpo"])
    del tree["sft"]
    assert parse(tree).stages == ("grpo",)
    assert error_message({"stages": ["sft"]}).startswith("config.sft.sources is {}")


# Each setting has a reader


def attributes_read(source: str) -> set[str]:
    """Returns the names of the attributes that `source` reads."""
    return {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }


def attributes_read_outside_config() -> set[str]:
    """Returns the attributes that the package reads outside `config.py`.

    `config.py` does not count, because it only checks the values of settings.
    """
    files = [path for path in (ROOT / "pg_ground").rglob("*.py") if path.name != "config.py"]
    return set().union(*(attributes_read(path.read_text(encoding="utf-8")) for path in files))


def unread_settings(kind: type, read_names: set[str]) -> list[str]:
    """Returns the settings of a dataclass whose names are not in `read_names`."""
    return [
        f"{section_type.__name__}.{field.name}"
        for section_type in sections(kind)
        for field in dataclasses.fields(section_type)
        if field.name not in read_names
    ]


def test_every_setting_has_a_reader():
    """An option of an algorithm always has a reader.

    The option is a parameter of the component that reads it.
    """
    assert unread_settings(Config, attributes_read_outside_config() | set(SETTINGS)) == []


def test_unread_settings_returns_a_setting_without_a_reader():
    @dataclasses.dataclass(frozen=True)
    class SftWithUnreadSetting(Sft):
        nobody_reads_this: int = 0

    unread = unread_settings(SftWithUnreadSetting, attributes_read_outside_config())
    assert unread == ["SftWithUnreadSetting.nobody_reads_this"]
    declared = {
        name
        for name, value in vars(config).items()
        if dataclasses.is_dataclass(value) and value.__module__ == config.__name__
    }
    # From Python 3.12 on, a dataclass made by a function has the module of its caller.
    declared.discard("AlgorithmSettings")  # the base class of Grpo
    assert {section_type.__name__ for section_type in sections()} == declared


def test_every_setting_has_a_default():
    for kind in sections():
        assert dataclasses.asdict(kind()).keys() == typing.get_type_hints(kind).keys()
