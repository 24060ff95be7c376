"""The whole configuration as one tree of frozen dataclasses, and its strict passage from `ml_collections`.

A recipe in `configs/` starts from `template()`, a `ConfigDict` with every default, changes what it needs and returns it locked;
flags change it further; `parse` turns the result into `Config` and is where a wrong name is caught, with its full path. Functions
take their own section, never the root.
"""

import dataclasses
import difflib
import math
import operator
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ml_collections import config_dict

from pg_ground.types import UserError
from pg_ground.vocab import EOS

REMAT = (
    "none",
    "nothing_saveable",
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
    "everything_saveable",
)
"""Values of `model.remat`: names of jax.checkpoint_policies, or none."""


RESIZES = ("antialias", "big_vision", "hugging_face")
"""Values of `data.resize`."""

DISTANCE_UNITS = ("px", "diagonal", "box")
"""Values of `grpo.reward_settings.distance_unit`."""


@dataclass(frozen=True)
class Vision:
    """The SigLIP tower. Defaults: So400m/14 as in PaliGemma 1 and 2 (arXiv 2407.07726)."""

    width: int = 1152
    depth: int = 27
    mlp_dim: int = 4304
    num_heads: int = 16
    patch_size: int = 14  # pixels


@dataclass(frozen=True)
class Text:
    """The Gemma decoder. Defaults: Gemma 1 2B as in PaliGemma 1 (arXiv 2407.07726)."""

    width: int = 2048
    depth: int = 18
    mlp_dim: int = 16384
    num_heads: int = 8
    num_kv_heads: int = 1
    head_dim: int = 256
    vocab_size: int = 257_152
    query_scale: float = (
        256**-0.5
    )  # queries are multiplied by it: head_dim**-0.5, but 144**-0.5 in Gemma 2 27B
    post_norms: bool = False  # Gemma 2: a second RMSNorm after attention and after the MLP
    attn_softcap: float = 0.0  # Gemma 2: 50; 0 is off
    final_softcap: float = (
        0.0  # Gemma 2 pretraining: 30; PaliGemma 2 transfers with 0 (arXiv 2412.03555)
    )


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (arXiv 2106.09685); which parameters are trained is said by `lr_factors`."""

    rank: int = 0  # 0 is off
    alpha: float = 16.0  # adapters are scaled by alpha / rank
    dropout: float = 0.0  # share of an adapter's inputs dropped in supervised steps; sampling and GRPO drop nothing
    pattern: str = "llm/layers/.*"  # regular expression of whole names of the matrices that get one


@dataclass(frozen=True)
class Model:
    """Sizes and numerics of the policy."""

    image_size: int = 224  # pixels, square
    vision: Vision = field(default_factory=Vision)
    text: Text = field(default_factory=Text)
    lora: Lora = field(default_factory=Lora)
    dtype: str = "float32"  # of activations: float32 or bfloat16
    param_dtype: str = (
        "float32"  # of the parameters that are trained, and so of the optimizer's state
    )
    frozen_dtype: str = "float32"  # of the parameters that are not; bfloat16 loses nothing where the checkpoint is bfloat16
    remat: str = "nothing_saveable"  # one of REMAT: which activations are kept for the backward pass; "none" keeps all
    scan_unroll: int = (
        1  # layers per turn of the loop over layers: more compile slower and, on a CPU, run faster
    )
    logits_block: int = 8  # completion tokens whose vocabulary softmax is held at once
    attention_block: int = (
        0  # queries of a prompt whose attention logits are held at once; 0 is all of them
    )
    coordinate_init: str = (
        "normal"  # of <locNNNN> rows and patch positions, from nothing: "normal", or "sinusoid"
    )


DECODERS: dict[str, Text] = {
    "pg1_3b": Text(),
    "pg2_3b": Text(
        width=2304, depth=26, mlp_dim=9216, num_kv_heads=4, post_norms=True, attn_softcap=50.0
    ),
    "pg2_10b": Text(
        width=3584,
        depth=42,
        mlp_dim=14336,
        num_heads=16,
        num_kv_heads=8,
        post_norms=True,
        attn_softcap=50.0,
    ),
    "pg2_28b": Text(
        width=4608,
        depth=46,
        mlp_dim=36864,
        num_heads=32,
        num_kv_heads=16,
        head_dim=128,
        query_scale=144**-0.5,
        post_norms=True,
        attn_softcap=50.0,
    ),
}
"""The decoders of PaliGemma 1 (arXiv 2407.07726) and 2 (arXiv 2412.03555). The final soft-cap of Gemma 2's pretraining (30) is
off: PaliGemma 2 was transferred without it, and sampler and loss agree either way."""


def variant(name: str, image_size: int = 224) -> Model:
    """Returns the sizes of a published model: pg1_3b, pg2_3b, pg2_10b or pg2_28b, at 224, 448 or 896 pixels.

    Raises:
      UserError: no such model.
    """
    if name not in DECODERS:
        raise UserError(f"there is no variant {name}: {nearest(name, DECODERS)}")
    return Model(image_size=image_size, text=DECODERS[name])


@dataclass(frozen=True)
class Source:
    """One dataset, as an entry."""

    uri: str = ""  # "jsonl:PATH" or "synthetic:SPLIT?side=PIXELS&…"
    image: str = "image"  # dotted path to the image in a record: pixels, encoded bytes, a file name or an http(s) address
    image_sha256: str = ""  # dotted path to the hash that a fetched image must have; "" checks none
    image_root: str = (
        ""  # folder that file names are relative to, itself relative to the folder of the records
    )
    phrase: str = "phrase"  # dotted path to the text that `prompt` and `name` may use as {phrase}
    target: str = "boxes"  # what an answer consists of: "boxes", "points" or "text"
    boxes: str = (
        ""  # dotted path to one box, a list of boxes, or {label: list of boxes}; "" for none
    )
    box_format: str = "xyxy_px"  # {xyxy,yxyx,xywh,cxcywh}_{px,frac,percent,bin}
    points: str = ""  # dotted path to one point or a list of points, pairs or {x, y}; "" for none
    point_format: str = "xy_px"  # {xy,yx}_{px,frac,percent,bin}
    mask: str = ""  # dotted path to the mask of each box or point: COCO polygons (px) or RLE, or an image; needs `data.mask_size`
    label: str = ""  # dotted path to the name of each box or point, one or a list; "" is `name` for all of them
    prompt: str = "detect {phrase}"  # template over the record's fields, without BOS and newline; or a Jinja file, NAME.jinja
    name: str = "{phrase}"  # what stands behind the loc tokens of an answer; "" for nothing
    suffix: str = "loc"  # how the answer is written: "loc", "json" (pixels), "count", or a template such as "{answer}"
    element: str = "all"  # where a path goes through `list[]`: "all" is one example per element, "random" one per reading
    empty: str = "drop"  # records without boxes or points: "drop", or "keep" as questions whose answer is empty
    max_objects: int = (
        0  # boxes or points kept of a record, a random choice in their order; 0 is all
    )
    sampling: str = "all"  # records used: "all", "first:N", "end:N" or "random:N", where N may be a share such as 12.5%
    weight: float = 1.0  # relative share of the mixture


@dataclass(frozen=True)
class Fetch:
    """How images that are urls are fetched, and where they are kept."""

    cache_dir: str = (
        ""  # folder of the contents, shared by any number of runs; needed where an image is a url
    )
    concurrency: int = 16  # images fetched at once by `prefetch`
    retries: int = 3  # tries after the first, where another may help: no connection, status 408, 425, 429 or 5xx
    backoff_s: float = (
        0.5  # seconds before the first of them, doubled each time, give or take a half
    )
    timeout_s: float = (
        20.0  # seconds a connection, and then a request up to the last byte of its answer, may take
    )
    max_bytes: int = 50 * 2**20  # bytes of an image
    allow_private: bool = (
        False  # whether addresses of this machine and of private networks may be asked
    )
    offline: bool = False  # whether only the cache is asked


@dataclass(frozen=True)
class Data:
    """How records become batches; shared by all sources."""

    tokenizer: str = (
        ""  # path of a PaliGemma sentencepiece model; "" is the small one of the package
    )
    prompt_length: int = 32  # tokens, BOS and newline included
    suffix_length: int = 16  # tokens, EOS included
    max_boxes: int = 1  # gold boxes (or points) per question that a batch has room for
    mask_size: int = 0  # cells along each side of a gold mask, over the whole image whatever its shape; 0 carries no masks
    bad_record_share: float = (
        0.1  # a run stops when more than this share of the records read cannot be used
    )
    resize: str = "antialias"  # "antialias" (bilinear), "big_vision" (bilinear without, rounded down), "hugging_face" (bicubic)
    fetch: Fetch = field(default_factory=Fetch)
    read_threads: int = (
        2  # records prepared at once, per process; 0 prepares them in the thread that asks
    )
    workers: int = 0  # processes that prepare records beside this one; 0 prepares them in it
    check_records: int = 10_000  # records of a source whose texts are measured before the first step, spread over it; 0 is none


@dataclass(frozen=True)
class Optimizer:
    """One optax chain: clip, adamw or muon, schedule."""

    name: str = "adamw"  # or "muon" (Jordan 2024) for matrices with adamw for the rest
    lr: float = 1e-5
    schedule: str = "constant"  # after warm-up: "constant", or "cosine" or "linear" down to 0 at the stage's end
    warmup_steps: int = 0
    b1: float = 0.9
    b2: float = 0.999
    weight_decay: float = 0.0
    clip_norm: float = 1.0  # global norm of the gradient; 0 is off


@dataclass(frozen=True)
class Sft:
    """Supervised fine-tuning: cross-entropy on the suffix."""

    steps: int = 1000
    batch_size: int = 16  # questions a step, over all devices
    grad_accum_steps: int = 1  # a step's questions are worked through in this many parts
    label_smoothing: float = 0.0  # share of the target spread over the whole vocabulary
    loc_smoothing_bins: float = (
        0.0  # standard deviation of a Gaussian over neighbouring loc bins; 0 is off
    )
    optimizer: Optimizer = field(default_factory=Optimizer)
    sources: Mapping[str, Source] = field(default_factory=dict)


@dataclass(frozen=True)
class RewardSettings:
    """Constants of the rewards that have any."""

    gaussian_alpha: float = (
        0.5  # sigma of gaussian_point and gaussian_coverage as a share of the box's sides
    )
    distance_unit: str = (
        "px"  # one of DISTANCE_UNITS: what sigma of distance_gaussian is measured in
    )
    distance_sigma_px: float = 100.0  # "px": sigma …
    distance_max_size_px: float = (
        640.0  # … in an image scaled so that its longer side has this many pixels
    )
    distance_sigma_share: float = 0.125  # "diagonal" and "box": sigma as a share of the diagonal of the image or of the gold box
    repetition_ngram: int = 8  # tokens; a list of different boxes repeats none of 8 while its names have at most 5 tokens
    overlong_max_tokens: int = 0  # length from which overlong is -1; 0 is the room of a completion
    overlong_cache_tokens: int = 4  # tokens before it over which overlong falls from 0
    detection_normalise: bool = (
        True  # whether detection is divided by the number of boxes, gold or predicted, the larger
    )
    detection_as_released: bool = (
        False  # whether detection averages its thresholds as big_vision's code does, keys colliding
    )


Weight = float | tuple[float, float, int]
"""Of a reward: fixed, or from one value to another in so many steps, evenly."""


@dataclass(frozen=True)
class RewardWorkerSettings:
    """How text rewards are run, beside the run."""

    count: int = 2  # processes that call them
    timeout_s: float = 5.0  # seconds that one call may take; what it judges then scores 0
    error_share: float = (
        0.05  # a run stops when more than this share of a reward's scores are errors
    )
    memory_bytes: int = 8 * 2**30  # address space that a process may use; 0 is no limit


@dataclass(frozen=True)
class Grpo:
    """Group-relative policy optimisation."""

    steps: int = 1000
    batch_size: int = 8  # prompts a step, over all devices
    group_size: int = 8  # completions a prompt
    grad_accum_steps: int = 1  # an update's prompts are worked through in this many parts
    num_iterations: int = 1  # times a rollout is learned from (mu in the GRPO paper)
    minibatches: int = 1  # optimizer steps each time, on as many parts of the batch
    max_new_tokens: int = 16
    temperature: float = 1.0  # of sampling, and of the log-probabilities in the loss
    top_p: float = 1.0  # nucleus; 1 is the whole distribution
    top_k: int = 0  # likeliest tokens that can be drawn; 0 is all
    suppress_tokens: tuple[int, ...] = ()  # ids that are never drawn, beside the control ids
    dynamic_sampling: int = 0  # times that groups with equal rewards are replaced by fresh ones (DAPO's dynamic sampling)
    algorithm: str = "grpo"  # a row of pg_ground.rl.loss.ALGORITHMS
    advantage: str | None = (
        None  # instead of the row's own: a name in pg_ground.rl.loss.CHOICES; so are the next ones
    )
    ratio: str | None = None
    objective: str | None = None
    average: str | None = None
    clip_low: float | None = None
    clip_high: float | None = None
    ratio_cap: float | None = None  # of negative advantages: dual clip
    kl: str | None = None  # estimator
    kl_coef: float | None = (
        None  # weight of KL(policy || reference policy); 0 needs no reference policy
    )
    kl_in_reward: bool | None = None
    entropy_coef: float | None = None  # weight of the bonus
    focus: str | None = None  # which tokens count: top_entropy, clip_cov, kl_cov
    focus_share: float | None = None
    correction: str | None = (
        None  # weight for a sampler that differs from the trainer: token_truncate, …
    )
    correction_floor: float | None = None
    correction_cap: float | None = None
    off_policy_kl: float | None = (
        None  # completions with a negative advantage are dropped above this many nats a token
    )
    mask_truncated_completions: bool | None = (
        None  # completions cut off at max_new_tokens leave the loss
    )
    advantage_epsilon: float = 1e-4  # added to standard deviations of rewards
    kl_target: float = 0.0  # nats a token that kl_coef is steered to (Ziegler et al. 2019, section 2.2); 0 leaves it fixed
    kl_horizon: int = 10_000  # completions over which it is
    rewards: Mapping[str, Weight] = field(
        default_factory=lambda: {"iou": 1.0, "format": 0.2}
    )  # weight 0: only measured
    text_rewards: Mapping[str, Weight] = field(
        default_factory=dict
    )  # of text, on the host: names, or file.py:function
    rollout_weights: str = (
        "auto"  # for sampling: "gathered" on every device, "sharded" as trained, or what fits
    )
    rollout_parts: int = (
        1  # a batch is sampled in so many parts: text rewards judge one while the next is sampled
    )
    reward_workers: RewardWorkerSettings = field(default_factory=RewardWorkerSettings)
    reward_settings: RewardSettings = field(default_factory=RewardSettings)
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(lr=1e-6))
    sources: Mapping[str, Source] = field(default_factory=dict)

    @property
    def all_rewards(self) -> dict[str, Weight]:
        """Rewards of both kinds."""
        return dict(self.rewards) | dict(self.text_rewards)


@dataclass(frozen=True)
class Eval:
    """Held-out measurement, with greedy and with sampled answers."""

    sources: Mapping[str, Source] = field(default_factory=dict)
    benchmarks: Mapping[str, str] = field(
        default_factory=dict
    )  # source to what it is measured as; else by what it asks for
    examples: int = 0  # of each source; 0 is all, fewer than there are is said in the names: eval/NAME@512/acc50
    batch_size: int = 64
    at_start: bool = True  # whether a run is measured before its first step
    every: int = 0  # steps between measurements; 0 is only at the end of each stage
    every_epochs: float = 0.0  # the same in passes over a stage's questions; 0 is none
    max_new_tokens: int = 16
    temperature: float = 1.0  # of the sampled answers
    rollouts: int = 1  # sampled answers a question; 0 is none
    perplexity: bool = False  # whether the gold suffixes' log-probabilities are measured too
    vqvae: str = ""  # file of the published VQ-VAE of masks (vae-oid.npz), for the benchmarks of segmentation


@dataclass(frozen=True)
class Log:
    """What a run writes, and how often."""

    every: int = 10  # steps between lines of metrics.jsonl
    samples_every: int = 200  # steps between pictures of rollouts; 0 is never
    samples: int = 8  # prompts in such a picture, and in the gallery of report.html
    wandb: str = ""  # project at Weights & Biases that the run is mirrored to (needs wandb installed); "" is none
    profile_steps: tuple[int, int] = (
        0,
        0,
    )  # first and last step (over all stages, from 2 on) that jax's profiler traces


@dataclass(frozen=True)
class Checkpoint:
    """When the run is saved, and how much of that is kept."""

    every: int = 500  # steps; the end of a stage is always saved
    keep: int = 2  # newest checkpoints that stay
    best: str = ""  # held-out measure whose best parameters stay in best/: "eval/boxes/acc50"; "-eval/…" for the least; "" is none


@dataclass(frozen=True)
class Mesh:
    """How devices are laid out."""

    data: int = (
        -1
    )  # devices along the axis that splits prompts and parameters (FSDP); -1 is all there are
    replica: int = (
        1  # such groups of devices: each has all parameters, and its share of the prompts
    )
    model: int = 1  # devices that share each matrix of a layer (tensor parallel)
    rules: tuple[
        tuple[str, tuple[str, ...]], ...
    ] = ()  # (pattern of names, axis of each dimension), before sharding.RULES
    compiler_options: tuple[
        str, ...
    ] = ()  # of XLA, "name=value" each, over sharding.TPU_COMPILER_OPTIONS
    cpu_devices: int = 0  # devices that a CPU counts as: 2 keep two cores busy where a model is small; 0 is as it is
    compile_cache: str = "~/.cache/pg_ground/compiled"  # folder of compiled programs, read by later starts; "" keeps none


@dataclass(frozen=True)
class Config:
    """A run."""

    seed: int = 0
    init: str = ""  # checkpoint to start from (.npz, Hugging Face directory, or a run's); "" is random weights
    resample_positions: bool = False  # of `init`, where it was trained at another `model.image_size`; else that is an error
    lr_factors: tuple[
        tuple[str, float], ...
    ] = ()  # (pattern of names, factor), first match wins; 0 freezes; () is all, or LoRA
    stages: tuple[str, ...] = ("sft", "grpo")  # in this order, one working directory
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    sft: Sft = field(default_factory=Sft)
    grpo: Grpo = field(default_factory=Grpo)
    eval: Eval = field(default_factory=Eval)
    log: Log = field(default_factory=Log)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    mesh: Mesh = field(default_factory=Mesh)


def template() -> config_dict.ConfigDict:
    """Returns every default as a `ConfigDict` for a recipe to change and to return locked."""
    return _to_config_dict(Config())


def section(value: Any) -> config_dict.ConfigDict:
    """Returns a dataclass of this file (a `Source`, say) as a `ConfigDict`, so that flags can reach its fields."""
    return _to_config_dict(value)


def parse(config: Mapping[str, Any] | config_dict.ConfigDict) -> Config:
    """Returns the `Config` that `config` spells out.

    Raises:
      UserError: a name that does not exist (with the nearest that does), a value of another type, or one out of range.
    """
    tree = config.to_dict() if isinstance(config, config_dict.ConfigDict) else config
    parsed = _build(Config, tree, "config")
    _check(parsed)
    return parsed


def parse_model(tree: Any, path: str) -> Model:
    """Returns the `Model` that a mapping spells out; `path` says where it stands.

    Raises:
      UserError: a name that does not exist, or a value of another type.
    """
    return _build(Model, tree, path)


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns `name`'s nearest neighbour among `names` as a question to the user, or the list of them."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(names) or 'none'}"


class _Section(config_dict.ConfigDict):
    """A `ConfigDict` whose keys may hold dots, as the file of a user's reward does."""

    def __init__(
        self, initial: Any = None, type_safe: bool = False, convert_dict: bool = True, **others: Any
    ):
        super().__init__(initial, type_safe, convert_dict, **(others | {"allow_dotted_keys": True}))


def _to_config_dict(value: Any) -> config_dict.ConfigDict:
    out = _Section()
    for f in dataclasses.fields(value):
        child = getattr(value, f.name)
        if dataclasses.is_dataclass(child):
            child = _to_config_dict(child)
        elif isinstance(child, Mapping):
            child = _Section(dict(child))
        elif child is None:
            child = config_dict.placeholder(_type_behind_none(value, f.name))
        out[f.name] = child
    return out


def _type_behind_none(owner: Any, name: str) -> type:
    hint = typing.get_type_hints(type(owner))[name]
    return next(t for t in typing.get_args(hint) if t is not types.NoneType)


def _build(kind: type, tree: Any, path: str) -> Any:
    if not isinstance(tree, Mapping):
        raise UserError(
            f"{path} is {tree!r}, but it is a section with {', '.join(f.name for f in dataclasses.fields(kind))}"
        )
    hints = typing.get_type_hints(kind)
    for name in tree:
        if name not in hints:
            raise UserError(f"{path}.{name} does not exist: {nearest(name, hints)}")
    return kind(
        **{name: _convert(hints[name], value, f"{path}.{name}") for name, value in tree.items()}
    )


def _convert(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, path)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        if value is None and types.NoneType in args:
            return None
        of_lists = [kind for kind in args if typing.get_origin(kind) is tuple]
        return _convert(
            of_lists[0] if of_lists and isinstance(value, (tuple, list)) else args[0], value, path
        )
    if origin is tuple and isinstance(value, (tuple, list)):
        inner = args[:1] * len(value) if args[-1] is Ellipsis else args
        if len(inner) != len(value):
            raise UserError(f"{path} is {value!r}, but it must have {len(inner)} elements")
        return tuple(
            _convert(kind, v, f"{path}[{i}]")
            for i, (kind, v) in enumerate(zip(inner, value, strict=True))
        )
    if isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return {k: _convert(args[1], v, f"{path}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if origin is not None or type(value) is not hint:
        raise UserError(
            f"{path} is {value!r}, but it must be of type {getattr(hint, '__name__', hint)}"
        )
    return value


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _check(c: Config) -> None:
    """Raises UserError for a value that no run could use."""

    def need(ok: bool, path: str, value: Any, right: str) -> None:
        if not ok:
            raise UserError(f"config.{path} is {value!r}: it must be {right}")

    def one_of(path: str, value: str, names: tuple[str, ...]) -> None:
        need(value in names, path, value, f"one of {', '.join(names)}")

    need(
        len(c.stages) > 0 and len(set(c.stages)) == len(c.stages),
        "stages",
        c.stages,
        "some of sft, grpo, each once",
    )
    for stage in c.stages:
        one_of("stages", stage, ("sft", "grpo"))
        sources = c.sft.sources if stage == "sft" else c.grpo.sources
        need(len(sources) > 0, f"{stage}.sources", dict(sources), "at least one source")
    positive = (
        "model.image_size", "model.vision.width", "model.vision.depth", "model.vision.mlp_dim", "model.vision.num_heads",
        "model.vision.patch_size", "model.text.width", "model.text.depth", "model.text.mlp_dim", "model.text.num_heads",
        "model.text.num_kv_heads", "model.text.head_dim", "model.logits_block", "model.scan_unroll",
        "sft.steps", "sft.batch_size", "sft.grad_accum_steps", "grpo.steps", "grpo.batch_size", "grpo.grad_accum_steps",
        "grpo.num_iterations", "grpo.minibatches", "grpo.max_new_tokens", "grpo.advantage_epsilon",
        "grpo.kl_horizon", "eval.batch_size", "eval.max_new_tokens",
        "data.fetch.concurrency", "data.fetch.timeout_s", "data.fetch.max_bytes", "data.prompt_length",
        "data.suffix_length", "data.max_boxes", "log.every", "log.samples", "checkpoint.every", "checkpoint.keep",
        "grpo.reward_workers.count", "grpo.reward_workers.timeout_s", "grpo.rollout_parts",
        "grpo.reward_settings.gaussian_alpha", "grpo.reward_settings.distance_sigma_px",
        "grpo.reward_settings.distance_max_size_px", "grpo.reward_settings.distance_sigma_share",
        "grpo.reward_settings.repetition_ngram", "grpo.reward_settings.overlong_cache_tokens")  # fmt: skip
    for path in positive:
        value = operator.attrgetter(path)(c)
        need(value > 0, path, value, "above 0")
    zero_or_more = (
        "model.attention_block", "grpo.top_k", "grpo.dynamic_sampling", "grpo.kl_target",
        "seed", "eval.every", "eval.examples", "eval.rollouts", "log.samples_every", "mesh.cpu_devices", "data.workers",
        "data.read_threads", "data.check_records",
        "data.fetch.retries", "data.fetch.backoff_s", "data.mask_size", "grpo.reward_workers.memory_bytes",
        "grpo.reward_settings.overlong_max_tokens")  # fmt: skip
    for path in zero_or_more:
        value = operator.attrgetter(path)(c)
        need(value >= 0, path, value, "0 or more")
    need(
        c.model.text.head_dim % 2 == 0,
        "model.text.head_dim",
        c.model.text.head_dim,
        "even: RoPE turns pairs",
    )
    vision, text = c.model.vision, c.model.text
    for name in ("dtype", "param_dtype", "frozen_dtype"):
        one_of(f"model.{name}", getattr(c.model, name), ("float32", "bfloat16"))
    lora = c.model.lora
    need(lora.rank >= 0, "model.lora.rank", lora.rank, "0 or more")
    need(lora.alpha > 0, "model.lora.alpha", lora.alpha, "above 0")
    need(0 <= lora.dropout < 1, "model.lora.dropout", lora.dropout, "in [0, 1)")
    need(_compiles(lora.pattern), "model.lora.pattern", lora.pattern, "a regular expression")
    for i, (_, factor) in enumerate(c.lr_factors):
        need(factor >= 0, f"lr_factors[{i}][1]", factor, "0 (frozen) or more")
    one_of("model.coordinate_init", c.model.coordinate_init, ("normal", "sinusoid"))
    one_of("model.remat", c.model.remat, REMAT)
    one_of("data.resize", c.data.resize, RESIZES)
    need(
        c.model.image_size % vision.patch_size == 0,
        "model.image_size",
        c.model.image_size,
        "a multiple of patch_size",
    )
    need(
        vision.width % vision.num_heads == 0,
        "model.vision.width",
        vision.width,
        "a multiple of num_heads",
    )
    need(
        text.num_heads % text.num_kv_heads == 0,
        "model.text.num_heads",
        text.num_heads,
        "a multiple of num_kv_heads",
    )
    need(
        text.vocab_size > 1152,
        "model.text.vocab_size",
        text.vocab_size,
        "more than its 1,152 loc and seg tokens",
    )
    group = c.grpo.group_size
    need(
        group >= 2,
        "grpo.group_size",
        group,
        "at least 2: a completion is compared with the others of its group",
    )
    need(c.grpo.temperature > 0, "grpo.temperature", c.grpo.temperature, "above 0")
    need(0 < c.grpo.top_p <= 1, "grpo.top_p", c.grpo.top_p, "in (0, 1]")
    suppress_tokens, size = c.grpo.suppress_tokens, text.vocab_size
    need(
        all(0 <= i < size and i != EOS for i in suppress_tokens),
        "grpo.suppress_tokens",
        suppress_tokens,
        f"ids below {size}, without EOS ({EOS})",
    )
    need(c.grpo.top_k <= size, "grpo.top_k", c.grpo.top_k, f"at most {size}, the tokens there are")
    for i, option in enumerate(c.mesh.compiler_options):
        need(
            0 < option.find("=") < len(option) - 1,
            f"mesh.compiler_options[{i}]",
            option,
            "name=value",
        )
    for axis in ("replica", "model"):
        need(getattr(c.mesh, axis) >= 1, f"mesh.{axis}", getattr(c.mesh, axis), "at least 1")
    need(
        c.mesh.data == -1 or c.mesh.data >= 1,
        "mesh.data",
        c.mesh.data,
        "at least 1, or -1 for all devices there are",
    )
    for i, (pattern, axes) in enumerate(c.mesh.rules):
        need(_compiles(pattern), f"mesh.rules[{i}][0]", pattern, "a regular expression")
        named = [axis for part in axes for axis in part.split("+") if axis]
        need(len(named) == len(set(named)), f"mesh.rules[{i}][1]", axes, "each axis once")
    first, last = c.log.profile_steps
    traced = (first, last) == (0, 0) or 2 <= first <= last
    need(
        traced,
        "log.profile_steps",
        c.log.profile_steps,
        "(first, last) with 2 <= first <= last, or (0, 0) for none",
    )
    one_of("grpo.rollout_weights", c.grpo.rollout_weights, ("auto", "gathered", "sharded"))
    share = c.grpo.focus_share
    need(share is None or 0 < share <= 1, "grpo.focus_share", share, "in (0, 1]")
    measures = (
        " or ".join(f'"eval/{name}/…"' for name in c.eval.sources)
        or '"", since config.eval.sources is empty'
    )
    of = c.checkpoint.best.removeprefix("-").rpartition("/")[0].removesuffix(f"@{c.eval.examples}")
    need(
        not of or of in {f"eval/{name}" for name in c.eval.sources},
        "checkpoint.best",
        c.checkpoint.best,
        measures,
    )
    often = c.eval.every_epochs
    need(
        0 <= often < math.inf and not (often and c.eval.every),
        "eval.every_epochs",
        often,
        "above 0, and eval.every then 0",
    )
    need(c.eval.temperature > 0, "eval.temperature", c.eval.temperature, "above 0")
    need(0 <= c.sft.label_smoothing < 1, "sft.label_smoothing", c.sft.label_smoothing, "in [0, 1)")
    need(
        c.sft.loc_smoothing_bins >= 0,
        "sft.loc_smoothing_bins",
        c.sft.loc_smoothing_bins,
        "0 or more",
    )
    one_of(
        "grpo.reward_settings.distance_unit", c.grpo.reward_settings.distance_unit, DISTANCE_UNITS
    )
    need(
        0 <= c.grpo.reward_workers.error_share <= 1,
        "grpo.reward_workers.error_share",
        c.grpo.reward_workers.error_share,
        "in [0, 1]",
    )
    for table in ("rewards", "text_rewards"):
        for name, weight in getattr(c.grpo, table).items():
            ends = weight[:2] if isinstance(weight, tuple) else (weight,)
            need(all(map(math.isfinite, ends)), f"grpo.{table}.{name}", weight, "finite")
            steps = weight[2] if isinstance(weight, tuple) else 1
            need(steps > 0, f"grpo.{table}.{name}", weight, "(from, to, steps) with steps above 0")
    for name in (
        "clip_low",
        "clip_high",
        "ratio_cap",
        "kl_coef",
        "entropy_coef",
        "correction_floor",
        "correction_cap",
    ):
        own = getattr(c.grpo, name)
        need(own is None or own >= 0, f"grpo.{name}", own, "0 or more")
    need(
        0 <= c.data.bad_record_share <= 1,
        "data.bad_record_share",
        c.data.bad_record_share,
        "in [0, 1]",
    )
    for name, stage in (("sft", c.sft), ("grpo", c.grpo)):
        one_of(f"{name}.optimizer.name", stage.optimizer.name, ("adamw", "muon"))
        need(
            stage.optimizer.warmup_steps >= 0,
            f"{name}.optimizer.warmup_steps",
            stage.optimizer.warmup_steps,
            "0 or more",
        )
        one_of(
            f"{name}.optimizer.schedule", stage.optimizer.schedule, ("constant", "cosine", "linear")
        )
        parts = stage.grad_accum_steps * (c.grpo.minibatches if name == "grpo" else 1)
        right = f"a multiple of grad_accum_steps{' * minibatches' if parts != stage.grad_accum_steps else ''}, {parts}"
        need(stage.batch_size % parts == 0, f"{name}.batch_size", stage.batch_size, right)
    whole = c.grpo.batch_size % c.grpo.rollout_parts == 0
    need(
        whole,
        "grpo.batch_size",
        c.grpo.batch_size,
        f"a multiple of rollout_parts, {c.grpo.rollout_parts}",
    )
    for head, sources in (
        ("sft", c.sft.sources),
        ("grpo", c.grpo.sources),
        ("eval", c.eval.sources),
    ):
        for name, source in sources.items():
            path = f"{head}.sources.{name}"
            one_of(f"{path}.target", source.target, ("boxes", "points", "text"))
            one_of(f"{path}.element", source.element, ("all", "random"))
            one_of(f"{path}.empty", source.empty, ("drop", "keep"))
            need(
                source.max_objects >= 0,
                f"{path}.max_objects",
                source.max_objects,
                "0 (all) or more",
            )
            need(
                0 < source.weight < math.inf, f"{path}.weight", source.weight, "above 0 and finite"
            )
            asked = {"boxes": source.boxes, "points": source.points, "text": "{" in source.suffix}[
                source.target
            ]
            right = (
                'a template such as "{answer}"'
                if source.target == "text"
                else f"the path of the {source.target} it asks for"
            )
            field, value = (
                ("suffix", source.suffix) if source.target == "text" else (source.target, asked)
            )
            need(bool(asked), f"{path}.{field}", value, right)
            written = source.suffix in ("loc", "json", "count") or "{" in source.suffix
            need(
                written,
                f"{path}.suffix",
                source.suffix,
                'loc, json, count or a template such as "{answer}"',
            )
