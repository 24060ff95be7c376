r"""Real datasets as entries: look at one, train on it, or copy it into your own recipe.

python -m pg_ground.look --config=configs/data.py:refcoco_refer --out=look.html \
    --config.sft.sources.refcoco_refer.uri='refer:DIR?…'

The argument names an entry of `ENTRIES`, or several entries joined by "+", which are mixed. The
uris below show the form. A flag sets the uri of your files. Images at addresses are fetched once
into `data.fetch.cache_dir`. `python -m pg_ground.prefetch` fetches them before a run. To train a
published model, put the entries into configs/paligemma.py. The model here is small and has
PaliGemma 1's shape.

Hardware: any CPU. Time: a minute. Expected: the model learns nothing in 20 steps from random
weights. The page and the pictures show whether the entry fits the data.
"""

from ml_collections import ConfigDict

from pg_ground import config
from pg_ground.config import Source
from pg_ground.types import UserError, nearest

ENTRIES: dict[str, Source] = {
    # ---- Referring expressions: one question for each sentence ----
    # Files of the UNC refer toolkit: refcoco, refcoco+, refcocog, or big_vision's combined set.
    "refcoco_refer": Source(
        uri="refer:DIR?dataset=refcoco&split_by=unc&split=train&images=DIR/train2014",
        phrase="sentences[].raw",
        boxes="bbox",
        box_format="xywh_px",
        prompt="detect {phrase}",
    ),
    # gRefCOCO's files: several targets, one or none. Set c.eval.benchmarks = {"grefcoco": "grec"}.
    "grefcoco": Source(
        uri="refer:DIR?dataset=grefcoco&split_by=unc&split=val&images=DIR/train2014",
        phrase="sentences[].raw",
        boxes="boxes",
        box_format="xywh_px",
        empty="keep",
        prompt="detect {phrase}",
    ),
    # The builder of tensorflow_datasets, prepared as array_record.
    "refcoco_tfds": Source(
        uri="tfds:ref_coco/refcoco_unc?split=train&data_dir=DIR",
        phrase="objects[].refexp.raw",
        boxes="objects[].bbox",
        box_format="yxyx_frac",
        element="random",
        prompt="detect {phrase}",
    ),
    # The builder of big_vision: one row for each sentence.
    "refcoco_big_vision": Source(
        uri="tfds:ref_coco_bv/refcocox_combined?split=train_flat&data_dir=DIR",
        phrase="objects.refs.sentence",
        boxes="objects.bbox",
        box_format="yxyx_frac",
        prompt="detect {phrase}",
    ),
    # GroundingME: the questions of the dimension "Rejection" have no target.
    # Set c.eval.benchmarks = {"groundingme": "groundingme"}.
    "groundingme": Source(
        uri="hf:lirang04/GroundingME@test",
        phrase="description",
        boxes="bbox",
        empty="keep",
        flat_boxes="drop",
        prompt="detect {phrase}",
        name="",
    ),
    # Expressions that were changed so that they describe nothing: train and validation.
    # Set c.eval.benchmarks = {"refcocog_rej": "rejection"}.
    "refcocog_rej": Source(
        uri="hf:lirang04/RefCOCOg_rej@validation",
        phrase="rejected_exp",
        empty="keep",
        prompt="detect {phrase}",
    ),
    # The public part of Ref-Adv. Set c.eval.benchmarks = {"ref_adv_s": "ref_adv_s"}.
    "ref_adv_s": Source(
        uri="hf:dddraxxx/ref-adv-s@train",
        phrase="normal_caption",
        boxes="solution",
        prompt="detect {phrase}",
        name="",
    ),
    # Has a train split. `bbox` is xyxy. The images are COCO's files.
    "refcoco_jxu124": Source(
        uri="hf:jxu124/refcoco@train",
        image="image_path",
        image_root="coco",
        phrase="sentences[].raw",
        boxes="bbox",
        box_format="xyxy_px",
        prompt="detect {phrase}",
    ),
    # Has val and test splits only. The expressions are in `answer`.
    "refcoco_lmms": Source(
        uri="hf:lmms-lab/RefCOCO@val",
        phrase="answer[]",
        boxes="bbox",
        box_format="xywh_px",
        prompt="detect {phrase}",
    ),
    # ---- Points and counts ----
    # Points are percents, although the dataset card says otherwise.
    "pixmo_points": Source(
        uri="hf:allenai/pixmo-points@train",
        image="image_url",
        image_sha256="image_sha256",
        phrase="label",
        target="points",
        points="points",
        point_format="xy_percent",
        max_objects=8,
        prompt="point to {phrase}",
    ),
    "pixmo_count": Source(
        uri="hf:allenai/pixmo-count@train",
        image="image_url",
        image_sha256="image_sha256",
        phrase="label",
        target="text",
        suffix="{count}",
        prompt="answer en how many {phrase} are there?",
    ),
    # Point-Bench: each question has a mask. Set c.eval.benchmarks = {"point_bench": "point_bench"}.
    "point_bench": Source(
        uri="pointarena:DIR",
        phrase="user_input",
        target="points",
        mask="mask",
        empty="keep",
        prompt="{phrase}",
        name="",
    ),
    "count_jsonl": Source(
        uri="jsonl:pixmo_count.jsonl",
        image="image_path",
        phrase="question",
        target="text",
        suffix="{ground_truth}",
        prompt="answer en how many {phrase} are there?",
    ),
    # The question is a whole sentence, as in SuperCLEVR: "How many items are there?".
    "count_questions": Source(
        uri="jsonl:superclevr.jsonl",
        image="image_path",
        phrase="question",
        target="text",
        suffix="{ground_truth}",
        prompt="answer en {phrase}",
    ),
    # The whole test split. Set c.eval.benchmarks = {"cv_bench": "cv_bench"}.
    "cv_bench": Source(
        uri="hf:nyu-visionx/CV-Bench@test",
        target="text",
        phrase="prompt",
        prompt="{phrase}",
        suffix="{answer}",
        name="",
    ),
    # ---- Several objects ----
    # One question for each image and category.
    "coco_detection": Source(
        uri="coco:DIR/annotations/instances_train2017.json?ask=category&images=DIR/train2017",
        phrase="category",
        boxes="boxes",
        box_format="xywh_px",
        max_objects=10,
        prompt="detect {phrase}",
    ),
    # LVIS v1. DIR has COCO's folders train2017 and val2017. One question for each image and each
    # category that is annotated in it. Set c.eval.benchmarks = {"lvis_detection": "detection_f1"}.
    "lvis_detection": Source(
        uri="coco:DIR/lvis_v1_val.json?ask=category&images=DIR",
        phrase="category",
        boxes="boxes",
        box_format="xywh_px",
        prompt="detect {phrase}",
    ),
    # One question for each image.
    "coco_all_classes": Source(
        uri="coco:DIR/annotations/instances_train2017.json?ask=image&images=DIR/train2017",
        boxes="boxes",
        box_format="xywh_px",
        label="categories",
        max_objects=10,
        prompt="detect all classes",
        name="",
    ),
    # {"0": [[x1, y1, x2, y2]], "1": []}: the keys are the names. Published boxes without a height
    # are trained on, as in the original.
    "easydistill_multi": Source(
        uri="json:multi_box.json",
        image="image_path",
        phrase="instruction",
        boxes="abs_box",
        empty="keep",
        flat_boxes="widen",
        prompt="{phrase}",
    ),
    "easydistill_single": Source(
        uri="json:single_box.json",
        image="image_path",
        phrase="instruction",
        boxes="bbox",
        flat_boxes="widen",
        prompt="{phrase}",
        name="",
    ),
    # EasyDistill's list of datasets: each dataset has its sampling.
    "easydistill_yaml": Source(
        uri="yaml:datasets.yaml",
        image="image_path",
        phrase="instruction",
        boxes="abs_box",
        empty="keep",
        flat_boxes="widen",
        prompt="{phrase}",
    ),
    # ---- Answers as text: the boxes come from the answer ----
    # A chat is one question: its first turn. The start-up table counts the chats with more turns.
    # PaliGemma's own files: {"image", "prefix", "suffix"}, with loc tokens (and seg tokens) in the
    # suffix. Roboflow exports this form.
    "paligemma_jsonl": Source(
        uri="jsonl:dataset/_annotations.train.jsonl",
        phrase="prefix",
        boxes="suffix",
        prompt="{prefix}",
        name="",
    ),
    # LLaVA: "conversations" of a human and gpt. Boxes are lists of numbers in the answer.
    "llava": Source(
        uri="json:llava.json",
        boxes="conversations.1.value",
        prompt="{conversations.0.value}",
        name="",
        remove="<image>",
    ),
    # ShareGPT and OpenAI's form: "messages" and a list of images. If rows have a system message,
    # the paths are messages.-2.content and messages.-1.content.
    "sharegpt": Source(
        uri="jsonl:sharegpt.jsonl",
        image="images",
        boxes="messages.1.content",
        prompt="{messages.0.content}",
        name="",
        remove="<image>",
    ),
    # Answers of Qwen-VL, Qwen2-VL and InternVL, <|box_start|>(x1,y1),(x2,y2)<|box_end|> or
    # <ref>cat</ref><box>[[…]]</box>, are in thousandths. Those of Qwen2.5-VL are in pixels.
    "qwen_grounding": Source(
        uri="jsonl:qwen.jsonl",
        image="images",
        boxes="messages.1.content",
        box_format="xyxy_permille",
        prompt="{messages.0.content}",
        name="",
        remove=r"<image>|<\|[^|]*\|>",
    ),
    # ms-swift: the boxes are in "objects".
    "ms_swift": Source(
        uri="jsonl:swift.jsonl",
        image="images",
        phrase="objects.ref.0",
        boxes="objects.bbox",
        label="objects.ref",
        prompt="detect {phrase}",
    ),
    # ---- Interfaces ----
    # One question for each element of a screenshot.
    "gui_boxes": Source(
        uri="jsonl:gui.jsonl",
        image="image_filename",
        phrase="test_samples[].name",
        boxes="test_samples[].bbox",
        prompt="detect {phrase}",
    ),
    "gui_points": Source(
        uri="jsonl:gui.jsonl",
        image="image_filename",
        phrase="test_samples[].name",
        target="points",
        boxes="test_samples[].bbox",
        points="test_samples[].point",
        prompt="point to {phrase}",
    ),
    # ScreenSpot-v2's three files. The ground truth is a box. A point in it is right, and so is a
    # box whose centre lies in it (prompt="detect {phrase}").
    # Set c.eval.benchmarks = {"screenspot_v2": "screenspot_v2"}.
    "screenspot_v2": Source(
        uri="json:DIR/screenspot_*_v2.json",
        image="img_filename",
        image_root="screenspotv2_image",
        phrase="instruction",
        boxes="bbox",
        box_format="xywh_px",
        prompt="point to {phrase}",
        name="",
    ),
    # ScreenSpot-Pro has a file for each application.
    # Set c.eval.benchmarks = {"screenspot_pro": "screenspot_pro"}.
    "screenspot_pro": Source(
        uri="json:DIR/annotations/*.json",
        image="img_filename",
        image_root="../images",
        phrase="instruction",
        boxes="bbox",
        prompt="point to {phrase}",
        name="",
    ),
    "grounding_synthetic": Source(
        uri="hf:UlrickBL/grounding-dataset-synthetic@train",
        phrase="question",
        target="points",
        points="point",
        prompt="point to {phrase}",
        name="",
    ),
}
"""The entries by name.

The field names of `grounding_synthetic` come from its dataset card. Run `look` before you train.
"""


def get_config(argument: str = "refcoco_refer") -> ConfigDict:
    """Returns the settings for one entry, or for several entries joined by "+"."""
    names = argument.split("+")
    unknown = [name for name in names if name not in ENTRIES]
    if unknown:
        raise UserError(
            f"configs/data.py:{unknown[0]} does not exist: {nearest(unknown[0], ENTRIES)}"
        )
    c = config.template()
    c.stages = ("sft",)

    c.model.image_size = 224
    c.model.vision.update(width=64, depth=2, mlp_dim=128, num_heads=4, patch_size=14)
    c.model.text.update(width=64, depth=2, mlp_dim=256, num_heads=4, num_kv_heads=1, head_dim=16)
    c.model.text.vocab_size = 2048
    c.model.coordinate_init = "sinusoid"
    c.data.prompt_length = 96
    c.data.suffix_length = 128
    c.data.max_boxes = 10
    c.data.fetch.cache_dir = "images"

    c.sft.steps = 20
    c.sft.batch_size = 8
    c.sft.optimizer.lr = 1e-3
    c.sft.sources = {name: config.section(ENTRIES[name]) for name in names}
    c.log.every = 5
    c.checkpoint.every = 20
    return c.lock()
