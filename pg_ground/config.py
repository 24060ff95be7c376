"""The whole configuration as one tree of frozen dataclasses, and its strict conversion from
`ml_collections`.

A recipe in `configs/` starts from `template()`, a `ConfigDict` with every default. It changes what
it needs and returns it locked. Flags change it further. `parse` makes a `Config` of the result, and
refuses a wrong name with its full path. Each setting declares its help text and its range where it
is defined. Library functions take their own section, not the root.
"""

import copy
import dataclasses
import math
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ml_collections import config_dict

from pg_ground.rl import algorithms
from pg_ground.rl.scored_rollouts import Weight
from pg_ground.types import UserError, nearest
from pg_ground.vocab import EOS

REMAT = (
    "none",
    "nothing_saveable",
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
    "everything_saveable",
)
"""Values of `model.remat`: "none", or names of jax.checkpoint_policies."""

FLOATS = ("float32", "bfloat16")


class Range(NamedTuple):
    """The values that a setting can have."""

    minimum: int | float | None = None
    above: int | float | None = None
    maximum: int | float | None = None
    below: int | float | None = None
    choices: tuple[str, ...] = ()
    regex: bool = False

    def accepts(self, value: Any) -> bool:
        """Returns whether `value` lies in the range."""
        if self.choices:
            return value in self.choices
        if self.regex:
            return _is_regex(value)
        return (
            (self.minimum is None or value >= self.minimum)
            and (self.above is None or value > self.above)
            and (self.maximum is None or value <= self.maximum)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        """Returns the range in words, after "it must be"."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.regex:
            return "a regular expression"
        above = -math.inf if self.above is None else self.above
        low = f"({above:g}" if self.minimum is None else f"[{self.minimum:g}"
        if self.maximum is not None:
            return f"in {low}, {self.maximum:g}]"
        if self.below is not None and math.isfinite(self.below):
            return f"in {low}, {self.below:g})"
        finite = " and finite" if self.below is not None else ""
        if self.above is not None:
            return f"above {self.above:g}{finite}"
        if self.minimum == 0:
            return f"0 or more{finite}"
        return f"at least {self.minimum:g}{finite}"


def setting(
    default: object,
    help: str,
    *,
    minimum: int | float | None = None,
    above: int | float | None = None,
    maximum: int | float | None = None,
    below: int | float | None = None,
    choices: tuple[str, ...] = (),
    regex: bool = False,
) -> Any:
    """Returns a dataclass field with a help text and a range.

    Sections and mappings are made anew for every instance.
    """
    bounds = Range(minimum, above, maximum, below, choices, regex)
    metadata = {"help": help, "range": None if bounds == Range() else bounds}
    if isinstance(default, dict) or dataclasses.is_dataclass(default):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _is_regex(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


@dataclass(frozen=True)
class Vision:
    """The SigLIP tower. Defaults: So400m/14 as in PaliGemma 1 and 2 (arXiv 2407.07726)."""

    width: int = setting(1152, "width of the residual stream", above=0)
    depth: int = setting(27, "number of layers", above=0)
    mlp_dim: int = setting(4304, "hidden units of the MLP", above=0)
    num_heads: int = setting(16, "attention heads", above=0)
    patch_size: int = setting(14, "side of a patch in pixels", above=0)


@dataclass(frozen=True)
class Text:
    """The Gemma decoder. Defaults: Gemma 1 2B as in PaliGemma 1 (arXiv 2407.07726)."""

    width: int = setting(2048, "width of the residual stream", above=0)
    depth: int = setting(18, "number of layers", above=0)
    mlp_dim: int = setting(16384, "hidden units of the MLP", above=0)
    num_heads: int = setting(8, "query heads", above=0)
    num_kv_heads: int = setting(1, "key-value heads", above=0)
    head_dim: int = setting(256, "dimension of a head", above=0)
    vocab_size: int = setting(257_152, "number of tokens", above=1152)
    query_scale: float | None = setting(
        None, "factor of queries; None is head_dim**-0.5 (Gemma 2 27B has 144**-0.5)", above=0
    )
    post_norms: bool = setting(False, "Gemma 2: a second RMSNorm after attention and after the MLP")
    attn_softcap: float = setting(
        0.0, "soft cap of attention logits (Gemma 2: 50); 0 is off", minimum=0
    )
    final_softcap: float = setting(
        0.0,
        "soft cap of final logits (Gemma 2 pretraining: 30; PaliGemma 2: 0, arXiv 2412.03555)",
        minimum=0,
    )

    @property
    def attention_scale(self) -> float:
        """The factor of queries before the dot product with keys."""
        return self.head_dim**-0.5 if self.query_scale is None else self.query_scale


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (arXiv 2106.09685).

    `lr_factors` selects the parameters that are trained.
    """

    rank: int = setting(0, "rank of the adapters; 0 is off", minimum=0)
    alpha: float = setting(16.0, "adapters are scaled by alpha / rank", above=0)
    dropout: float = setting(
        0.0,
        "share of an adapter's inputs dropped in supervised steps; sampling and GRPO drop nothing",
        minimum=0,
        below=1,
    )
    pattern: str = setting(
        "llm/layers/.*",
        "regular expression: full names of the matrices that get an adapter",
        regex=True,
    )


@dataclass(frozen=True)
class Model:
    """Sizes and numerics of the policy."""

    image_size: int = setting(224, "side of the square image in pixels", above=0)
    vision: Vision = setting(Vision(), "the SigLIP tower")
    text: Text = setting(Text(), "the Gemma decoder")
    lora: Lora = setting(Lora(), "low-rank adapters")
    dtype: str = setting("float32", "dtype of activations", choices=FLOATS)
    param_dtype: str = setting(
        "float32", "dtype of trained parameters, and so of the optimizer's state", choices=FLOATS
    )
    frozen_dtype: str = setting(
        "float32",
        "dtype of frozen parameters: bfloat16 loses nothing if the checkpoint is bfloat16; "
        "int8 stores matrices in int8 and everything else in bfloat16",
        choices=(*FLOATS, "int8"),
    )
    remat: str = setting(
        "nothing_saveable",
        "activations that are kept for the backward pass; none keeps all",
        choices=REMAT,
    )
    scan_unroll: int = setting(
        1,
        "layers per iteration of the loop over layers: more compile slower and can run faster",
        above=0,
    )
    logits_block: int = setting(
        8, "completion tokens whose logits are in memory at a time", above=0
    )
    attention_block: int = setting(
        0, "prompt queries whose attention logits are in memory at a time; 0 is all", minimum=0
    )
    coordinate_init: str = setting(
        "normal",
        "random initialisation of <locNNNN> embeddings and patch positions",
        choices=("normal", "sinusoid"),
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
"""The decoders of PaliGemma 1 (arXiv 2407.07726) and 2 (arXiv 2412.03555).

The final soft cap of Gemma 2's pretraining (30) is off: PaliGemma 2 was transferred without it.
Sampler and loss agree either way.
"""


def variant(name: str, image_size: int = 224) -> Model:
    """Returns the sizes of a published model: pg1_3b, pg2_3b, pg2_10b or pg2_28b, at 224, 448 or
    896 pixels.

    Raises:
      UserError: there is no such model.
    """
    if name not in DECODERS:
        raise UserError(f"there is no variant {name}: {nearest(name, DECODERS)}")
    return Model(image_size=image_size, text=DECODERS[name])


@dataclass(frozen=True)
class Source:
    """One dataset. A path is a dotted path to a field of a record."""

    uri: str = setting(
        "", 'where the records are: "jsonl:PATH", "synthetic:SPLIT?side=PIXELS&…" and others'
    )
    image: str = setting(
        "image",
        "path of the image: pixels, encoded bytes or their base64 text, a file name or an http(s) "
        "address",
    )
    image_sha256: str = setting(
        "", 'path of the hash that a fetched image must have; "" checks none'
    )
    image_root: str = setting("", "folder of image files, relative to the folder of the records")
    phrase: str = setting("phrase", "path of the text that prompt and name can use as {phrase}")
    target: str = setting(
        "boxes", "what an answer consists of", choices=("boxes", "points", "text")
    )
    boxes: str = setting(
        "",
        "path of the boxes: numbers, objects such as {xmin, ymin, xmax, ymax}, {label: boxes} or "
        'text; or several paths, as "x1,y1,x2,y2"; "" for none',
    )
    box_format: str = setting("xyxy_px", "{xyxy,yxyx,xywh,cxcywh}_{px,frac,percent,permille,bin}")
    points: str = setting(
        "",
        'path of the points: pairs, objects {x, y} or text; or several paths, as "x,y"; "" is none',
    )
    point_format: str = setting("xy_px", "{xy,yx}_{px,frac,percent,permille,bin}")
    size: str = setting(
        "auto",
        'paths of the image size that the coordinates belong to, as "meta.width,meta.height"; auto '
        'is width,height, image_width,image_height and the like; "" compares nothing',
    )
    frame: str = setting(
        "auto",
        "frame of the coordinates: upright (as viewers show the image), stored (before EXIF turns "
        "it), or auto: the frame that the record's size fits, upright if both fit",
        choices=("auto", "upright", "stored"),
    )
    mask: str = setting(
        "",
        "path of the mask of each box or point: COCO polygons (px), RLE or an image; needs "
        "data.mask_size",
    )
    label: str = setting(
        "", 'path of the name of each box or point, one or a list; "" is name for all'
    )
    prompt: str = setting(
        "detect {phrase}",
        "template over the record's fields, without BOS and newline; or a Jinja file, NAME.jinja",
    )
    name: str = setting("{phrase}", 'text behind the loc tokens of an answer; "" for none')
    suffix: str = setting(
        "loc", 'form of the answer: loc, json (pixels), count, or a template such as "{answer}"'
    )
    element: str = setting(
        "all",
        "if a path goes through list[]: all makes one example per element, random one per reading",
        choices=("all", "random"),
    )
    empty: str = setting(
        "drop",
        "records without boxes or points: drop, or keep as questions with an empty answer; with "
        "keep, the path of boxes or points may be absent",
        choices=("drop", "keep"),
    )
    max_objects: int = setting(
        0,
        "boxes or points that a record keeps, a random choice in their order; 0 is all",
        minimum=0,
    )
    where: str = setting(
        "",
        "filter over the record's fields, as \"task != 'Count' and len(objects) > 1\": only the "
        'records that satisfy it exist; "" keeps all',
    )
    sampling: str = setting(
        "all",
        'records used: "all", "first:N", "end:N" or "random:N"; N can be a share such as 12.5%',
    )
    flat_boxes: str = setting(
        "bad",
        "a box without width or height: bad makes the record bad, drop leaves the box out, widen "
        "gives it one pixel",
        choices=("bad", "drop", "widen"),
    )
    unsafe_names: str = setting(
        "refuse",
        'a name with ";", a token such as <loc0000> or <eos>, or an invisible character, which the '
        'answer cannot hold: refuse (a bad record), replace ("," for ";", the others are left out) '
        "or escape (similar characters); invisible characters of prompts are left out too",
        choices=("refuse", "replace", "escape"),
    )
    remove: str = setting(
        "",
        'regular expression of what is left out of prompts, names and answers, such as "<image>"',
    )
    weight: float = setting(1.0, "relative share in the mixture", above=0, below=math.inf)


@dataclass(frozen=True)
class Fetch:
    """How images at addresses are fetched and cached."""

    cache_dir: str = setting(
        "", "folder of fetched images, shared by any number of runs; needed for addresses"
    )
    concurrency: int = setting(16, "images that `prefetch` fetches at the same time", above=0)
    retries: int = setting(
        3,
        "tries after the first for no connection and for status 408, 425, 429 and 5xx",
        minimum=0,
    )
    backoff_s: float = setting(
        0.5, "seconds before the first retry, doubled each time, with 50 % jitter", minimum=0
    )
    timeout_s: float = setting(
        20.0, "seconds for a connection, and then for the whole answer", above=0
    )
    max_bytes: int = setting(50 * 2**20, "largest image in bytes", above=0)
    allow_private: bool = setting(
        False, "whether addresses of this machine and of private networks are allowed"
    )
    offline: bool = setting(False, "whether only the cache is used")


@dataclass(frozen=True)
class Data:
    """How records become batches. All sources share these settings."""

    dir: str = setting(
        "", 'folder that "{dir}" in the uris of sources stands for: a path or a gs:// address'
    )
    tokenizer: str = setting(
        "",
        "a PaliGemma sentencepiece model, or a Hugging Face directory or ORG/NAME on the Hub with "
        'one; "" is the small one of the package',
    )
    prompt_length: int = setting(32, "tokens of a prompt, BOS and newline included", above=0)
    suffix_length: int = setting(16, "tokens of a suffix, EOS included", above=0)
    max_boxes: int = setting(
        1, "gold boxes (or points) per question that a batch has room for", above=0
    )
    mask_size: int = setting(
        0,
        "cells along each side of a gold mask, over the whole image; 0 carries no masks",
        minimum=0,
    )
    bad_record_share: float = setting(
        0.1, "a run stops if more than this share of the records read are bad", minimum=0, maximum=1
    )
    resize: str = setting(
        "antialias",
        "antialias (bilinear), big_vision (bilinear without antialiasing) or "
        "hugging_face (bicubic)",
        choices=("antialias", "big_vision", "hugging_face"),
    )
    deep_images: str = setting(
        "dtype",
        "how 16-bit, 32-bit and float images become 8 bits: dtype scales the range of the type (16 "
        "bits by 65535; 32 bits by 255 or 65535 if all values fit; floats are 0 to 1), percentile "
        "stretches the 1st to 99th percentile of each image",
        choices=("dtype", "percentile"),
    )
    fetch: Fetch = setting(Fetch(), "how images at addresses are fetched")
    read_threads: int = setting(
        2,
        "threads per process that prepare records; 0 prepares them in the calling thread",
        minimum=0,
    )
    workers: int = setting(
        0, "extra processes that prepare records; 0 prepares them in this one", minimum=0
    )
    check_records: int = setting(
        10_000,
        "records of a source whose texts are measured before the first step; 0 is none",
        minimum=0,
    )


@dataclass(frozen=True)
class Optimizer:
    """One optax chain: clip, adamw or muon, schedule."""

    name: str = setting(
        "adamw",
        "adamw, or muon for matrices (Jordan 2024) with adamw for the others",
        choices=("adamw", "muon"),
    )
    lr: float = setting(1e-5, "learning rate after warm-up")
    schedule: str = setting(
        "constant",
        "after warm-up: constant, or cosine or linear down to 0 at the end of the stage",
        choices=("constant", "cosine", "linear"),
    )
    warmup_steps: int = setting(0, "updates of the linear warm-up", minimum=0)
    b1: float = setting(0.9, "decay of the first moment")
    b2: float = setting(0.999, "decay of the second moment")
    weight_decay: float = setting(0.0, "decoupled weight decay")
    clip_norm: float = setting(1.0, "largest global norm of the gradient; 0 is off")


@dataclass(frozen=True)
class Sft:
    """Supervised fine-tuning: cross-entropy on the suffix."""

    steps: int = setting(1000, "steps of the stage", above=0)
    batch_size: int = setting(16, "questions per step, over all devices", above=0)
    grad_accum_steps: int = setting(1, "parts that a step computes one after the other", above=0)
    label_smoothing: float = setting(
        0.0, "share of the target that is spread over the whole vocabulary", minimum=0, below=1
    )
    loc_smoothing_bins: float = setting(
        0.0, "standard deviation of a Gaussian over neighbouring loc bins; 0 is off", minimum=0
    )
    optimizer: Optimizer = setting(Optimizer(), "the optimizer of this stage")
    sources: Mapping[str, Source] = setting({}, "datasets by name")

    @property
    def updates_per_step(self) -> int:
        """Number of optimizer updates in one step."""
        return 1

    @property
    def parts_per_step(self) -> int:
        """Number of parts that the batch is split into: its size must be a multiple."""
        return self.grad_accum_steps


@dataclass(frozen=True)
class RewardSettings:
    """Constants of the rewards."""

    gaussian_alpha: float = setting(
        0.5, "sigma of gaussian_point and gaussian_coverage as a share of the box's sides", above=0
    )
    distance_unit: str = setting(
        "px", "unit of distance_gaussian's sigma", choices=("px", "diagonal", "box")
    )
    distance_sigma_px: float = setting(
        100.0, 'unit "px": sigma in pixels of the scaled image', above=0
    )
    distance_max_size_px: float = setting(
        640.0, 'unit "px": longer side of the scaled image', above=0
    )
    distance_sigma_share: float = setting(
        0.125,
        'units "diagonal" and "box": sigma as a share of the diagonal of the image or of the gold '
        "box",
        above=0,
    )
    repetition_ngram: int = setting(
        8,
        "tokens; a list of different boxes repeats none of 8 if its names have at most 5 tokens",
        above=0,
    )
    overlong_max_tokens: int = setting(
        0, "length from which overlong is -1; 0 is the maximum length of a completion", minimum=0
    )
    overlong_cache_tokens: int = setting(
        4, "tokens before overlong_max_tokens over which overlong falls from 0 to -1", above=0
    )
    detection_normalise: bool = setting(
        True, "whether detection is divided by the larger number of boxes, gold or predicted"
    )
    detection_as_released: bool = setting(
        False,
        "whether detection averages its thresholds as big_vision's released code does (keys "
        "collide)",
    )


@dataclass(frozen=True)
class RewardWorkerSettings:
    """The processes that compute text rewards."""

    count: int = setting(2, "number of processes", above=0)
    timeout_s: float = setting(
        5.0, "seconds that one call can take; its completions then score 0", above=0
    )
    error_share: float = setting(
        0.05,
        "a run stops if more than this share of a reward's scores are errors",
        minimum=0,
        maximum=1,
    )
    memory_bytes: int = setting(8 * 2**30, "address space of a process; 0 is no limit", minimum=0)


AlgorithmSettings = dataclasses.make_dataclass(
    "AlgorithmSettings",
    [
        (
            name,
            declared.type | None,
            setting(
                None,
                declared.help,
                minimum=None if declared.minimum == -math.inf else declared.minimum,
                maximum=None if declared.maximum == math.inf else declared.maximum,
            ),
        )
        for name, declared in algorithms.SETTINGS.items()
    ],
    frozen=True,
)
"""Settings that replace a choice of the algorithm's row.

They are derived from the components in `pg_ground.rl`.
"""


@dataclass(frozen=True)
class Grpo(AlgorithmSettings):
    """Group-relative policy optimisation."""

    steps: int = setting(1000, "steps of the stage", above=0)
    batch_size: int = setting(8, "prompts per step, over all devices", above=0)
    group_size: int = setting(8, "completions per prompt", minimum=2)
    grad_accum_steps: int = setting(1, "parts that an update computes one after the other", above=0)
    num_iterations: int = setting(1, "passes over each rollout (mu in the GRPO paper)", above=0)
    minibatches: int = setting(
        1, "optimizer steps per pass, each on its share of the batch", above=0
    )
    max_new_tokens: int = setting(16, "longest completion in tokens", above=0)
    temperature: float = setting(
        1.0, "temperature of sampling and of the log-probabilities in the loss", above=0
    )
    top_p: float = setting(1.0, "probability mass that can be drawn; 1 is all", above=0, maximum=1)
    top_k: int = setting(0, "most likely tokens that can be drawn; 0 is all", minimum=0)
    suppress_tokens: tuple[int, ...] = setting(
        (), "ids that are never drawn, beside the control ids"
    )
    dynamic_sampling: int = setting(
        0, "times that groups with equal rewards are replaced by fresh groups (DAPO)", minimum=0
    )
    algorithm: str = setting(
        "grpo", "a row of pg_ground.rl.algorithms.ALGORITHMS, or path/to/file.py:row"
    )
    kl_target: float = setting(
        0.0,
        "nats per token that kl_coef is steered to (Ziegler et al. 2019, section 2.2); 0 leaves it "
        "fixed",
        minimum=0,
    )
    kl_horizon: int = setting(10_000, "completions over which kl_coef is steered", above=0)
    rewards: Mapping[str, Weight] = setting(
        {"iou": 1.0, "format": 0.2},
        "rewards on token ids with weights; 0 only measures, (start, end, steps) is a schedule",
    )
    text_rewards: Mapping[str, Weight] = setting(
        {}, "rewards on text, on the host: names, or file.py:function"
    )
    rollout_weights: str = setting(
        "auto",
        "weights for sampling: gathered on every device, sharded as trained, or auto (what fits)",
        choices=("auto", "gathered", "sharded"),
    )
    rollout_parts: int = setting(
        1,
        "parts of a batch that are sampled one after the other, so that text rewards overlap with "
        "sampling",
        above=0,
    )
    reward_workers: RewardWorkerSettings = setting(
        RewardWorkerSettings(), "processes of text rewards"
    )
    reward_settings: RewardSettings = setting(RewardSettings(), "constants of the rewards")
    optimizer: Optimizer = setting(Optimizer(lr=1e-6), "the optimizer of this stage")
    sources: Mapping[str, Source] = setting({}, "datasets by name")

    @property
    def updates_per_step(self) -> int:
        """Number of optimizer updates in one step."""
        return self.num_iterations * self.minibatches

    @property
    def parts_per_step(self) -> int:
        """Number of parts that the batch is split into: its size must be a multiple."""
        return self.grad_accum_steps * self.minibatches

    @property
    def all_rewards(self) -> dict[str, Weight]:
        """The weights of rewards of both kinds."""
        return dict(self.rewards) | dict(self.text_rewards)

    @property
    def algorithm_overrides(self) -> dict[str, Any]:
        """The settings that replace a choice of the algorithm's row."""
        values = {name: getattr(self, name) for name in algorithms.SETTINGS}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Eval:
    """Held-out evaluation with greedy and with sampled answers."""

    sources: Mapping[str, Source] = setting({}, "held-out datasets by name")
    benchmarks: Mapping[str, str] = setting(
        {}, "benchmark of a source, by the source's name; else by its target"
    )
    examples: int = setting(
        0, "questions of each source; 0 is all; fewer are named eval/NAME@512/acc50", minimum=0
    )
    interim_examples: int = setting(
        0,
        "questions of each source in evaluations before the end of a stage; 0 is eval.examples",
        minimum=0,
    )
    batch_size: int = setting(
        64, "questions that are answered at a time, over all devices", above=0
    )
    at_start: bool = setting(True, "whether a run is evaluated before its first step")
    every: int = setting(
        0, "steps between evaluations; 0 is only at the end of each stage", minimum=0
    )
    every_epochs: float = setting(
        0.0,
        "passes over the questions of a stage between evaluations, in place of every; 0 is none",
        minimum=0,
        below=math.inf,
    )
    max_new_tokens: int = setting(16, "longest answer in tokens", above=0)
    temperature: float = setting(1.0, "temperature of the sampled answers", above=0)
    rollouts: int = setting(1, "sampled answers per question; 0 is none", minimum=0)
    perplexity: bool = setting(
        False, "whether the gold suffixes' log-probabilities are measured too"
    )
    vqvae: str = setting(
        "",
        "file of the published VQ-VAE of masks (vae-oid.npz), for benchmarks and rewards of "
        "segmentation",
    )


@dataclass(frozen=True)
class Log:
    """What a run writes, and how often."""

    every: int = setting(10, "steps between lines of metrics.jsonl", above=0)
    samples_every: int = setting(200, "steps between pictures of rollouts; 0 is never", minimum=0)
    samples: int = setting(8, "prompts in a picture, and in the gallery of report.html", above=0)
    wandb: str = setting(
        "", 'project at Weights & Biases that mirrors the run (needs wandb); "" is none'
    )
    profile_steps: tuple[int, int] = setting(
        (0, 0), "first and last step, over all stages and from 2 on, that jax's profiler traces"
    )


@dataclass(frozen=True)
class Checkpoint:
    """When a run is saved, and how many checkpoints are kept."""

    every: int = setting(
        500, "steps between checkpoints; the end of a stage is always saved", above=0
    )
    keep: int = setting(2, "newest checkpoints that are kept", above=0)
    best: str = setting(
        "",
        'held-out metric whose best parameters stay in best/: "eval/boxes/acc50", "-eval/…" for '
        'the least; "" is none',
    )


@dataclass(frozen=True)
class Mesh:
    """The layout of the devices."""

    data: int = setting(
        -1, "devices along the axis that splits prompts and parameters (FSDP); -1 is all"
    )
    replica: int = setting(
        1, "groups of devices that each hold all parameters and a share of the prompts", minimum=1
    )
    model: int = setting(
        1, "devices that share each matrix of a layer (tensor parallel)", minimum=1
    )
    rules: tuple[tuple[str, tuple[str, ...]], ...] = setting(
        (), "(pattern of names, axis of each dimension), tried before sharding.RULES"
    )
    compiler_options: tuple[str, ...] = setting(
        (), 'XLA options as "name=value", added to sharding.TPU_COMPILER_OPTIONS or replacing them'
    )
    cpu_devices: int = setting(
        0,
        "devices that a CPU counts as: 2 keep two cores busy for a small model; 0 changes nothing",
        minimum=0,
    )
    compile_cache: str = setting(
        "~/.cache/pg_ground/compiled",
        'folder of compiled programs that later starts read; "" keeps none',
    )


@dataclass(frozen=True)
class Config:
    """The configuration of a run."""

    seed: int = setting(0, "seed of parameters, data order and sampling", minimum=0)
    init: str = setting(
        "",
        "checkpoint to start from: .npz, Hugging Face directory, ORG/NAME on the Hub, or a run; "
        '"" is random',
    )
    resample_positions: bool = setting(
        False, "whether `init` can have another image_size: position embeddings are then resampled"
    )
    lr_factors: tuple[tuple[str, float], ...] = setting(
        (),
        "(pattern of names, factor), first match wins; 0 freezes; () trains all, or the adapters",
    )
    stages: tuple[str, ...] = setting(
        ("sft", "grpo"), "stages in this order, in one working directory"
    )
    model: Model = setting(Model(), "sizes and numerics of the policy")
    data: Data = setting(Data(), "how records become batches")
    sft: Sft = setting(Sft(), "supervised fine-tuning")
    grpo: Grpo = setting(Grpo(), "group-relative policy optimisation")
    eval: Eval = setting(Eval(), "held-out evaluation")
    log: Log = setting(Log(), "metrics and pictures")
    checkpoint: Checkpoint = setting(Checkpoint(), "checkpoints")
    mesh: Mesh = setting(Mesh(), "devices")

    @property
    def sources_by_section(self) -> dict[str, Mapping[str, Source]]:
        """The sources of every stage and of the evaluation, by the name of the section."""
        return {stage: self.stage_settings(stage).sources for stage in STAGES} | {
            "eval": self.eval.sources
        }

    def stage_settings(self, name: str) -> Any:
        """Returns the section of a stage: `Sft` or `Grpo`."""
        return getattr(self, name)


STAGES = ("sft", "grpo")
"""The sections of `Config` that are stages."""

RENAMED: Mapping[str, str] = {
    "sft.micro_batches": "sft.grad_accum_steps",
    "grpo.micro_batches": "grpo.grad_accum_steps",
    "grpo.updates_per_rollout": "grpo.num_iterations",
    "grpo.resample": "grpo.dynamic_sampling",
    "grpo.suppress": "grpo.suppress_tokens",
    "grpo.average": "grpo.loss_agg_mode",
    "grpo.kl": "grpo.kl_estimator",
    "grpo.focus": "grpo.token_selection",
    "grpo.focus_share": "grpo.token_selection_share",
    "grpo.correction": "grpo.importance_sampling_mode",
    "grpo.correction_floor": "grpo.importance_sampling_floor",
    "grpo.correction_cap": "grpo.importance_sampling_cap",
    "grpo.mask_unfinished": "grpo.mask_truncated_completions",
    "grpo.judging": "grpo.reward_workers",
    "grpo.judging.workers": "grpo.reward_workers.count",
    "*.sources.*.asks": "*.sources.*.target",
}
"""Old names of settings and their new names, for one release. A `*` stands for any one name."""


class Description(NamedTuple):
    """One setting, for `--help` and for documentation."""

    name: str
    """Dotted name without `config.`."""
    type: str
    value: Any
    help: str
    allowed: str
    """The range in words; "" if every value of the type is allowed."""


def describe(config: Any, prefix: str = "") -> Iterator[Description]:
    """Yields every setting of a config or of a section, in order.

    Entries of mappings are named by their keys.
    """
    hints = typing.get_type_hints(type(config))
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        name = f"{prefix}{f.name}"
        if dataclasses.is_dataclass(value):
            yield from describe(value, f"{name}.")
        elif isinstance(value, Mapping) and any(map(dataclasses.is_dataclass, value.values())):
            for key, entry in value.items():
                yield from describe(entry, f"{name}.{key}.")
        else:
            bounds = f.metadata["range"]
            yield Description(
                name,
                _type_name(hints[f.name]),
                value,
                f.metadata["help"],
                str(bounds) if bounds else "",
            )


def renamed_setting(path: str) -> str | None:
    """Returns the new name of an old setting, or None. Both names are dotted, without `config.`."""
    for old, new in RENAMED.items():
        match = re.fullmatch(re.escape(old).replace(r"\*", "([^.]+)"), path)
        if match:
            for value in match.groups():
                new = new.replace("*", value, 1)
            return new
    return None


def unknown_setting(path: str, names: Any) -> str:
    """Returns the error line for a setting that does not exist among `names`, the settings
    beside it."""
    new = renamed_setting(path.removeprefix("config."))
    if new is not None:
        return f"{path} is now config.{new}"
    return f"{path} does not exist: {nearest(path.rpartition('.')[2], names)}"


def template() -> config_dict.ConfigDict:
    """Returns every default as a `ConfigDict`. A recipe changes it and returns it locked."""
    return _to_config_dict(Config())


def section(value: object) -> config_dict.ConfigDict:
    """Returns a dataclass of this file (for example a `Source`) as a `ConfigDict`, so that flags
    can set its fields."""
    return _to_config_dict(value)


def parse(config: Mapping[str, Any] | config_dict.ConfigDict) -> Config:
    """Returns the `Config` that `config` describes.

    Raises:
      UserError: a name does not exist (the error names the nearest one), a value has another type
        or is out of range.
    """
    tree = config.to_dict() if isinstance(config, config_dict.ConfigDict) else config
    parsed = _build(Config, tree, "config")
    _check_ranges(parsed, "config")
    _check_relations(parsed)
    return parsed


def parse_model(tree: object, path: str) -> Model:
    """Returns the `Model` that a mapping describes.

    Args:
      path: the dotted name of the mapping in error messages.

    Raises:
      UserError: a name does not exist, or a value has another type.
    """
    return _build(Model, tree, path)


class _Section(config_dict.ConfigDict):
    """A `ConfigDict` whose keys can contain dots, because names of a user's rewards do
    (`mine.py:centred`)."""

    def __init__(
        self,
        initial: Any = None,
        type_safe: bool = False,
        convert_dict: bool = True,
        **options: Any,
    ):
        super().__init__(
            initial, type_safe, convert_dict, **(options | {"allow_dotted_keys": True})
        )


def _to_config_dict(value: Any) -> config_dict.ConfigDict:
    tree = _Section()
    for f in dataclasses.fields(value):
        child = getattr(value, f.name)
        if dataclasses.is_dataclass(child):
            child = _to_config_dict(child)
        elif isinstance(child, Mapping):
            child = _Section(dict(child))
        elif child is None:
            child = config_dict.placeholder(_type_behind_none(value, f.name))
        tree[f.name] = child
    return tree


def _type_behind_none(owner: object, name: str) -> type:
    hint = typing.get_type_hints(type(owner))[name]
    return next(kind for kind in typing.get_args(hint) if kind is not types.NoneType)


def _type_name(hint: object) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _build(kind: type, tree: object, path: str) -> Any:
    if not isinstance(tree, Mapping):
        fields = ", ".join(f.name for f in dataclasses.fields(kind))
        raise UserError(f"{path} is {tree!r}, but it is a section with {fields}")
    hints = typing.get_type_hints(kind)
    for name in tree:
        if name not in hints:
            raise UserError(unknown_setting(f"{path}.{name}", hints))
    values = {name: _convert(hints[name], value, f"{path}.{name}") for name, value in tree.items()}
    return kind(**values)


def _convert(hint: object, value: object, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, path)
    origin = typing.get_origin(hint)
    args = typing.get_args(hint)
    if origin is types.UnionType:
        return _convert_union(args, value, path)
    if origin is tuple and isinstance(value, (tuple, list)):
        return _convert_tuple(args, value, path)
    if isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return {key: _convert(args[1], entry, f"{path}.{key}") for key, entry in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if origin is not None or type(value) is not hint:
        kind = getattr(hint, "__name__", hint)
        raise UserError(f"{path} is {value!r}, but it must be of type {kind}")
    return value


def _convert_union(kinds: tuple[Any, ...], value: object, path: str) -> Any:
    if value is None and types.NoneType in kinds:
        return None
    tuples = [kind for kind in kinds if typing.get_origin(kind) is tuple]
    if tuples and isinstance(value, (tuple, list)):
        return _convert(tuples[0], value, path)
    return _convert(kinds[0], value, path)


def _convert_tuple(kinds: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    element_kinds = (kinds[0],) * len(value) if kinds[-1] is Ellipsis else kinds
    if len(element_kinds) != len(value):
        raise UserError(f"{path} is {value!r}, but it must have {len(element_kinds)} elements")
    return tuple(
        _convert(kind, element, f"{path}[{i}]")
        for i, (kind, element) in enumerate(zip(element_kinds, value, strict=True))
    )


def _check_ranges(value: Any, path: str) -> None:
    """Raises UserError for a setting outside the range that its field declares, in `value` and
    all sections below it."""
    for f in dataclasses.fields(value):
        child = getattr(value, f.name)
        child_path = f"{path}.{f.name}"
        bounds: Range | None = f.metadata["range"]
        if bounds is not None and child is not None:
            _need(bounds.accepts(child), child_path, child, str(bounds))
        if dataclasses.is_dataclass(child):
            _check_ranges(child, child_path)
        elif isinstance(child, Mapping):
            for name, entry in child.items():
                if dataclasses.is_dataclass(entry):
                    _check_ranges(entry, f"{child_path}.{name}")


def _need(ok: bool, path: str, value: object, right: str) -> None:
    if not ok:
        raise UserError(f"{path} is {value!r}: it must be {right}")


def _check_relations(c: Config) -> None:
    """Raises UserError for settings that do not fit together."""
    checks: tuple[Callable[[Config], None], ...] = (
        _check_stages,
        _check_model,
        _check_sampling,
        _check_mesh,
        _check_rewards,
        _check_batches,
        _check_sources,
        _check_eval,
    )
    for check in checks:
        check(c)


def _check_stages(c: Config) -> None:
    unique = len(c.stages) > 0 and len(set(c.stages)) == len(c.stages)
    _need(unique, "config.stages", c.stages, f"some of {', '.join(STAGES)}, each once")
    for stage in c.stages:
        _need(stage in STAGES, "config.stages", stage, f"one of {', '.join(STAGES)}")
        sources = c.stage_settings(stage).sources
        _need(len(sources) > 0, f"config.{stage}.sources", dict(sources), "at least one source")
    first, last = c.log.profile_steps
    traced = (first, last) == (0, 0) or 2 <= first <= last
    right = "(first, last) with 2 <= first <= last, or (0, 0) for none"
    _need(traced, "config.log.profile_steps", c.log.profile_steps, right)
    for i, (_, factor) in enumerate(c.lr_factors):
        _need(factor >= 0, f"config.lr_factors[{i}][1]", factor, "0 (frozen) or more")


def _check_model(c: Config) -> None:
    vision = c.model.vision
    text = c.model.text
    path = "config.model"
    _need(
        text.head_dim % 2 == 0, f"{path}.text.head_dim", text.head_dim, "even: RoPE rotates pairs"
    )
    whole_patches = c.model.image_size % vision.patch_size == 0
    _need(whole_patches, f"{path}.image_size", c.model.image_size, "a multiple of patch_size")
    whole_heads = vision.width % vision.num_heads == 0
    _need(whole_heads, f"{path}.vision.width", vision.width, "a multiple of num_heads")
    whole_groups = text.num_heads % text.num_kv_heads == 0
    _need(whole_groups, f"{path}.text.num_heads", text.num_heads, "a multiple of num_kv_heads")


def _check_sampling(c: Config) -> None:
    suppressed = c.grpo.suppress_tokens
    size = c.model.text.vocab_size
    usable = all(0 <= token < size and token != EOS for token in suppressed)
    right = f"ids below {size}, without EOS ({EOS})"
    _need(usable, "config.grpo.suppress_tokens", suppressed, right)
    top_k = c.grpo.top_k
    _need(top_k <= size, "config.grpo.top_k", top_k, f"at most {size}, the size of the vocabulary")


def _check_mesh(c: Config) -> None:
    for i, option in enumerate(c.mesh.compiler_options):
        named = 0 < option.find("=") < len(option) - 1
        _need(named, f"config.mesh.compiler_options[{i}]", option, "name=value")
    data = c.mesh.data
    _need(data == -1 or data >= 1, "config.mesh.data", data, "at least 1, or -1 for all devices")
    for i, (pattern, axes) in enumerate(c.mesh.rules):
        _need(_is_regex(pattern), f"config.mesh.rules[{i}][0]", pattern, "a regular expression")
        named_axes = [axis for part in axes for axis in part.split("+") if axis]
        each_once = len(named_axes) == len(set(named_axes))
        _need(each_once, f"config.mesh.rules[{i}][1]", axes, "each axis once")


def _check_rewards(c: Config) -> None:
    for table in ("rewards", "text_rewards"):
        for name, weight in getattr(c.grpo, table).items():
            path = f"config.grpo.{table}.{name}"
            ends = weight[:2] if isinstance(weight, tuple) else (weight,)
            _need(all(map(math.isfinite, ends)), path, weight, "finite")
            steps = weight[2] if isinstance(weight, tuple) else 1
            _need(steps > 0, path, weight, "(from, to, steps) with steps above 0")


def _check_batches(c: Config) -> None:
    for stage in STAGES:
        settings = c.stage_settings(stage)
        parts = settings.parts_per_step
        names = "grad_accum_steps"
        if parts != settings.grad_accum_steps:
            names = "grad_accum_steps * minibatches"
        right = f"a multiple of {names}, {parts}"
        whole = settings.batch_size % parts == 0
        _need(whole, f"config.{stage}.batch_size", settings.batch_size, right)
    whole = c.grpo.batch_size % c.grpo.rollout_parts == 0
    right = f"a multiple of rollout_parts, {c.grpo.rollout_parts}"
    _need(whole, "config.grpo.batch_size", c.grpo.batch_size, right)


def _check_sources(c: Config) -> None:
    for name, entries in c.sources_by_section.items():
        for source_name, source in entries.items():
            path = f"config.{name}.sources.{source_name}"
            _check_source(source, path)
            has_dir = "{dir}" not in source.uri or bool(c.data.dir)
            right = f'the folder that {path}.uri ("{source.uri}") needs'
            _need(has_dir, "config.data.dir", c.data.dir, right)


def _check_source(source: Source, path: str) -> None:
    is_template = "{" in source.suffix
    if source.target == "text":
        _need(is_template, f"{path}.suffix", source.suffix, 'a template such as "{answer}"')
    else:
        field_path = getattr(source, source.target)
        right = f"the path of the {source.target} it asks for"
        # with empty="keep", questions without boxes are meant: the right answer is empty
        is_there = bool(field_path) or source.empty == "keep"
        _need(is_there, f"{path}.{source.target}", field_path, right)
    written = source.suffix in ("loc", "json", "count") or is_template
    _need(
        written,
        f"{path}.suffix",
        source.suffix,
        'loc, json, count or a template such as "{answer}"',
    )


def _check_eval(c: Config) -> None:
    if c.eval.sources:
        metrics = " or ".join(f'"eval/{name}/…"' for name in c.eval.sources)
    else:
        metrics = '"", since config.eval.sources is empty'
    prefix = c.checkpoint.best.removeprefix("-").rpartition("/")[0]
    for limit in (c.eval.examples, c.eval.interim_examples):
        prefix = prefix.removesuffix(f"@{limit}")
    evaluated = not prefix or prefix in {f"eval/{name}" for name in c.eval.sources}
    _need(evaluated, "config.checkpoint.best", c.checkpoint.best, metrics)
    fewer = not c.eval.examples or c.eval.interim_examples <= c.eval.examples
    right = f"at most eval.examples, {c.eval.examples}"
    _need(fewer, "config.eval.interim_examples", c.eval.interim_examples, right)
    one_period = not (c.eval.every_epochs and c.eval.every)
    right = "0 if eval.every is not 0"
    _need(one_period, "config.eval.every_epochs", c.eval.every_epochs, right)
