import importlib.resources
import io
import json
import pickle
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image, ImageDraw
from test_refer import CONFIGS, all_of, uri, write_refer

tfds = pytest.importorskip(
    "tensorflow_datasets",
    reason="tensorflow_datasets is not installed: pip install -e '.[interop]'",
)

from tensorflow_datasets.core import features as feature_lib  # noqa: E402
from tensorflow_datasets.datasets.ref_coco import ref_coco_dataset_builder  # noqa: E402

from pg_ground.data import tfds as ours  # noqa: E402
from pg_ground.data.arrayrecord import open_array_record  # noqa: E402
from pg_ground.data.images import load_image  # noqa: E402
from pg_ground.data.records import BadRecord  # noqa: E402
from pg_ground.data.refer import open_refer  # noqa: E402
from pg_ground.data.tfds import open_tfds  # noqa: E402
from pg_ground.types import UserError  # noqa: E402

pytestmark = pytest.mark.needs("tensorflow_datasets")

NAMES = {"combined": "refcocox_combined", "refcoco+_unc": "refcocoplus_unc"}
"""The names in tfds of configs that have another name in the refer toolkit."""

CLASSES = [f"category {i}" for i in range(1, 91)]


class Config(tfds.core.BuilderConfig):
    """A config of big_vision's builder. It has nothing but a name."""


class RefCocoBv(tfds.core.GeneratorBasedBuilder):
    """A dataset like big_vision's datasets/refcoco/refcoco.py.

    Name, version, configs, splits and features are the same.
    """

    VERSION = tfds.core.Version("1.4.0")
    BUILDER_CONFIGS = [Config(name=NAMES.get(name, name)) for name in CONFIGS]  # noqa: RUF012
    MANUAL_DOWNLOAD_INSTRUCTIONS = "none: the test writes the files"

    def _info(self):
        scalar, text = tfds.features.Scalar, tfds.features.Text
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "id": scalar(np.int32),
                    "image": tfds.features.Image(encoding_format="jpeg"),
                    "height": scalar(np.int32),
                    "width": scalar(np.int32),
                    "license": tfds.features.ClassLabel(names=["BY", "BY-NC"]),
                    "file_name": text(),
                    "objects": tfds.features.Sequence(
                        {
                            "id": scalar(np.int64),
                            "area": scalar(np.float32),
                            "bbox": tfds.features.BBoxFeature(),
                            "mask": tfds.features.Image(encoding_format="png"),
                            "category": tfds.features.ClassLabel(names=CLASSES),
                            "iscrowd": scalar(np.bool_),
                            "refs": tfds.features.Sequence(
                                {"id": scalar(np.int32), "sentence": text()}
                            ),
                        }
                    ),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        name = {tfds_name: name for name, tfds_name in NAMES.items()}.get(
            self.builder_config.name, self.builder_config.name
        )
        return {
            ("validation" if split == "val" else split) + suffix: self._generate_examples(
                dl_manager.manual_dir, name, split, suffix
            )
            for split in CONFIGS[name]
            for suffix in ("", "_flat")
        }

    def _generate_examples(self, folder, name, split, suffix):
        objects: dict[str, dict[int, dict]] = {}
        shared = {}
        for ref in all_of(open_refer(uri(Path(folder) / "refer", name, split))):
            x, y, w, h = ref["bbox"]
            width, height = ref["width"], ref["height"]
            shared[ref["image"]] = {
                "id": ref["image_id"],
                "height": height,
                "width": width,
                "license": 0,
                "file_name": ref["image"],
            }
            box = tfds.features.BBox(
                ymin=y / height, xmin=x / width, ymax=(y + h) / height, xmax=(x + w) / width
            )
            thing = objects.setdefault(ref["image"], {}).setdefault(
                ref["ann_id"],
                {
                    "id": ref["ann_id"],
                    "area": w * h,
                    "bbox": box,
                    "category": ref["category"],
                    "iscrowd": 0,
                    "refs": [],
                }
                | {"mask": png(polygon_mask(ref, ref))},
            )
            thing["refs"] += [{"id": s["sent_id"], "sentence": s["sent"]} for s in ref["sentences"]]
        for image, things in objects.items():
            example = {"image": Path(folder) / "coco_train2014" / image} | shared[image]
            if suffix:
                pairs = [(thing, ref) for thing in things.values() for ref in thing["refs"]]
                for i, (thing, ref) in enumerate(pairs):
                    yield f"{image}/{i}", example | {"objects": [thing | {"refs": [ref]}]}
            else:
                yield image, example | {"objects": list(things.values())}


class Odd(tfds.core.GeneratorBasedBuilder):
    """Features of other kinds, and sequences of every length."""

    VERSION = tfds.core.Version("1.0.0")
    LINES = (
        {
            "lists": [],
            "things": [],
            "label": -1,
            "bare": 2,
            "yes": True,
            "text": "é\nf",
            "words": ["a", "b"],
        },
        {
            "lists": [[[1, 2], []], []],
            "things": [{"parts": []}, {"parts": [{"n": 1}, {"n": 2}]}],
            "label": 1,
            "bare": 0,
        }
        | {"yes": False, "text": "", "words": []},
    )

    def _info(self):
        features = tfds.features
        return tfds.core.DatasetInfo(
            builder=self,
            features=features.FeaturesDict(
                {
                    "pixels": features.Tensor(
                        shape=(None, None, 3), dtype=np.uint8, encoding="zlib"
                    ),
                    "floats": features.Tensor(shape=(2, 2), dtype=np.float32),
                    "lists": features.Sequence(features.Sequence(features.Sequence(np.int64))),
                    "things": features.Sequence({"parts": features.Sequence({"n": np.int64})}),
                    "label": features.ClassLabel(names=["cat", "dog"]),
                    "bare": features.ClassLabel(num_classes=3),
                    "yes": np.bool_,
                    "text": features.Text(),
                    "words": features.Sequence(features.Text()),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i, line in enumerate(self.LINES):
            pixels = np.full((2, 3 + i, 3), i, np.uint8)
            yield i, line | {"pixels": pixels, "floats": np.float32([[i, 0.5], [1, 2]])}


def polygon_mask(size: dict[str, Any], annotation: dict[str, Any]) -> np.ndarray:
    """Returns the mask of an annotation. The builders call pycocotools for it."""
    mask = Image.new("1", (size["width"], size["height"]))
    for polygon in annotation["segmentation"]:
        ImageDraw.Draw(mask).polygon(polygon, fill=1)
    return np.asarray(mask)


def png(mask: np.ndarray) -> io.BytesIO:
    out = io.BytesIO()
    Image.fromarray(mask).save(out, "PNG")
    out.seek(0)
    return out


@pytest.fixture(scope="module")
def tfds_writes() -> Iterator[None]:
    """Lets tfds write without TensorFlow. Reading needs none of these changes."""
    tfds.disable_progress_bar()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            sys.modules, "importlib_resources", importlib.resources
        )  # tfds 4.9.10 imports it without requiring it
        patch.setattr(
            feature_lib.TensorInfo, "dtype", property(lambda info: info.np_dtype)
        )  # instead of TensorFlow's type
        patch.setattr(ref_coco_dataset_builder, "_compute_mask", polygon_mask)
        yield


@pytest.fixture(scope="module")
def manual(data, tmp_path_factory) -> Path:
    """The files that both builders need, made of the sample of all configs."""
    folder = tmp_path_factory.mktemp("manual")
    text = (data / "refcoco" / "annotations" / "tfds_dummy_refcoco.json").read_text()
    (folder / "refcoco.json").write_text(text)
    write_refer(json.loads(text), folder / "refer")
    (folder / "coco_train2014").mkdir()
    for image in json.loads(text)["coco_anns"].values():
        size = (image["info"]["width"], image["info"]["height"])
        Image.new("RGB", size, (200, 100, 0)).save(
            folder / "coco_train2014" / image["info"]["file_name"]
        )
    return folder


@pytest.fixture(scope="module")
def prepared(manual, tfds_writes, tmp_path_factory) -> Path:
    """All configs of `ref_coco` (tfds' builder) and of `ref_coco_bv`, as tfds writes them."""
    folder = tmp_path_factory.mktemp("tfds")
    download = tfds.download.DownloadConfig(manual_dir=manual)
    for builder in (ref_coco_dataset_builder.Builder, RefCocoBv):
        for config in builder.BUILDER_CONFIGS:
            ready = builder(config=config.name, data_dir=folder, file_format="array_record")
            ready.download_and_prepare(download_config=download)
    return folder


@pytest.fixture(scope="module")
def odd(tfds_writes, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tfds")
    Odd(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def opened(folder: Path, name: str, split: str) -> list[dict[str, Any]]:
    return all_of(open_tfds(f"{name}?split={split}&data_dir={folder}"))


def tfds_box(record: dict[str, Any]) -> list[float]:
    """Returns the box of a ref as tfds stores it: yxyx fractions in float32."""
    x, y, w, h = record["bbox"]
    width, height = record["width"], record["height"]
    return np.float32([y / height, x / width, (y + h) / height, (x + w) / width]).tolist()


def by_sentence(
    refs: list[dict[str, Any]], text: str
) -> dict[tuple[int, int], tuple[str, list[float]]]:
    """Returns (sentence, box) of refs by annotation and sentence id."""
    return {
        (ref["ann_id"], s["sent_id"]): (s[text], tfds_box(ref))
        for ref in refs
        for s in ref["sentences"]
    }


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "combined"])
def test_ref_coco_has_the_boxes_and_expressions_of_the_refer_files(prepared, manual, name):
    for split in CONFIGS[name]:
        records = opened(
            prepared,
            f"ref_coco/{NAMES.get(name, name)}:1.1.0",
            "validation" if split == "val" else split,
        )
        refs = all_of(open_refer(uri(manual / "refer", name, split)))
        assert [r["image/id"] for r in records] and {r["image/id"] for r in records} == {
            ref["image_id"] for ref in refs
        }
        pairs = {
            (thing["id"], expression["refexp_id"]): (expression["raw"], thing["bbox"])
            for record in records
            for thing in record["objects"]
            for expression in thing["refexp"]
        }
        assert pairs == by_sentence(refs, "raw") and sum(len(r["objects"]) for r in records) == len(
            refs
        )
        for record in records:
            assert set(record) == {"coco_annotations", "image", "image/id", "objects"}
            for thing in record["objects"]:
                assert set(thing) == {
                    "area",
                    "bbox",
                    "gt_box_index",
                    "id",
                    "label",
                    "mask",
                    "refexp",
                }
                assert record["coco_annotations"][thing["gt_box_index"]]["bbox"] == thing["bbox"]


@pytest.mark.parametrize("name", CONFIGS)
def test_ref_coco_bv_has_the_boxes_and_sentences_of_the_refer_files(prepared, manual, name):
    for split in CONFIGS[name]:
        tfds_split = "validation" if split == "val" else split
        records, flat = (
            opened(prepared, f"ref_coco_bv/{NAMES.get(name, name)}", tfds_split + suffix)
            for suffix in ("", "_flat")
        )
        refs = all_of(open_refer(uri(manual / "refer", name, split)))
        for rows in (records, flat):
            pairs = {
                (thing["id"], ref["id"]): (ref["sentence"], thing["bbox"])
                for row in rows
                for thing in row["objects"]
                for ref in thing["refs"]
            }
            assert pairs == by_sentence(refs, "sent")
        assert len(flat) == sum(len(ref["sentences"]) for ref in refs)
        categories = {ref["ann_id"]: ref["category"] for ref in refs}
        for thing in [thing for record in records for thing in record["objects"]]:
            assert thing["category"] == categories[thing["id"]] and thing["iscrowd"] is False


def test_images_come_encoded_and_masks_with_them(prepared):
    record = opened(prepared, "ref_coco_bv/refcoco_unc:1.4.0", "testA")[0]
    pixels = load_image(record["image"], None)
    assert pixels.shape == (record["height"], record["width"], 3) and record["image"].startswith(
        b"\xff\xd8"
    )
    mask = load_image(record["objects"][0]["mask"], None)[..., 0] > 0
    top, left, bottom, _ = np.array(record["objects"][0]["bbox"]) * np.tile(mask.shape, 2)
    rows, columns = np.nonzero(mask)
    assert (
        abs(rows.min() - top) < 2 and abs(rows.max() - bottom) < 2 and abs(columns.min() - left) < 2
    )


def test_splits_may_be_sums_and_slices(prepared):
    name = "ref_coco/refcocog_umd:1.1.0"
    whole = {r["image/id"] for r in opened(prepared, name, "train+validation+test")}
    assert whole == {460986, 495169, 510027}
    assert [r["image/id"] for r in opened(prepared, name, "validation[:1]")] == [510027]
    assert opened(prepared, name, "test[:100%]") == opened(prepared, name, "test")


def test_records_are_plain_and_survive_pickling_and_threads(prepared):
    def leaves(value: Any) -> Iterator[Any]:
        children = (
            value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        )
        yield from (
            (leaf for child in children for leaf in leaves(child))
            if isinstance(value, dict | list)
            else [value]
        )

    records = open_tfds(f"ref_coco_bv/refcocox_combined?split=test&data_dir={prepared}")
    assert records.root is None
    assert {type(leaf) for record in all_of(records) for leaf in leaves(record)} == {
        int,
        float,
        bool,
        str,
        bytes,
    }
    again = pickle.loads(pickle.dumps(records))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(again.__getitem__, [*range(len(again))] * 20)) == all_of(records) * 20
    assert "tensorflow" not in sys.modules


def test_other_features_come_as_plain_python(odd):
    records = sorted(opened(odd, "odd:1.0.0", "train"), key=lambda record: record["pixels"].shape)
    assert list(records[0]) == sorted(records[0])
    for i, (record, line) in enumerate(zip(records, Odd.LINES, strict=True)):
        np.testing.assert_array_equal(record.pop("pixels"), np.full((2, 3 + i, 3), i, np.uint8))
        assert record.pop("floats") == [[i, 0.5], [1, 2]]
        assert record == line | {"label": (None, "dog")[i]}


def test_missing_datasets_and_splits_are_refused_by_name(prepared, monkeypatch):
    for location, message in (
        (
            f"ref_coco/refcoco_unc?split=val&data_dir={prepared}",
            r"no split 'val'; there are train \(1\), validation \(1\), testA",
        ),
        (f"ref_coco/refcoco_unc?split=train[:x]&data_dir={prepared}", r"no split 'train\[:x\]'"),
        (
            f"ref_coco/refcoco_unc?split=train[:1%]&data_dir={prepared}",
            r"split train\[:1%\] is empty",
        ),
        (
            f"ref_coco/refcoco_unc?data_dir={prepared}",
            r"no split; .split=SPLIT names one of train \(1\)",
        ),
        (
            f"ref_coco/refcoco_unc?split=train&datadir={prepared}",
            "no option 'datadir'; did you mean data_dir",
        ),
        (
            f"ref_coco/refcoco_umc?split=train&data_dir={prepared}",
            "not prepared in .*did you mean ref_coco/refcoco_unc:1.1.0",
        ),
        (
            f"ref_coco/refcoco_unc:7.0.0?split=train&data_dir={prepared}",
            "not prepared in .*did you mean ref_coco/refcoco_unc:1.1.0",
        ),
        (
            f"coco/2017?split=train&data_dir={prepared}",
            "not prepared in .*ref_coco_bv/refcocox_combined:1.4.0",
        ),
        (f"ref_coco/refcoco_unc?split=train&data_dir={prepared}/none", "not prepared in .*none"),
        (f"?split=train&data_dir={prepared}", "name looks like ref_coco/refcoco_unc:1.1.0"),
        (
            f"ref_coco/refcoco_unc:new?split=train&data_dir={prepared}",
            "name looks like ref_coco/refcoco_unc:1.1.0",
        ),
    ):
        with pytest.raises(UserError, match=message) as refused:
            open_tfds(location)
        assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="tfds:NAME"):
        open_array_record(f"{prepared}/ref_coco/refcoco_unc/1.1.0")

    class Missing:
        def __getattr__(self, name):
            raise ImportError("No module named 'tensorflow_datasets'")

    for name in ("read_only_builder", "registered", "example_parser", "tfds"):
        monkeypatch.setattr(ours, name, Missing())
    with pytest.raises(UserError, match="install the package tensorflow-datasets"):
        open_tfds(f"ref_coco/refcoco_unc?split=train&data_dir={prepared}")


def test_tfrecord_alone_is_refused_and_array_record_beside_it_is_read(odd, tmp_path):
    shutil.copytree(odd, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "odd" / "1.0.0" / "dataset_info.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(
        UserError,
        match=r"holds tfrecord, .*convert_format .*odd/1.0.0 --out_file_format=array_record",
    ):
        open_tfds(f"odd?split=train&data_dir={tmp_path}")
    path.write_text(
        json.dumps(info | {"fileFormat": "tfrecord", "alternativeFileFormats": ["array_record"]})
    )
    assert len(opened(tmp_path, "odd", "train")) == 2


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_a_dataset_whose_own_files_are_broken_is_refused(odd, tmp_path, name):
    shutil.copytree(odd, tmp_path, dirs_exist_ok=True)
    for text in ("", "{", "[]", '{"a": 1}'):
        (tmp_path / "odd" / "1.0.0" / name).write_text(text)
        with pytest.raises(UserError, match="source tfds:odd:1.0.0.split") as refused:
            open_tfds(f"odd:1.0.0?split=train&data_dir={tmp_path}")
        assert "\n" not in str(refused.value)


def test_a_missing_shard_is_refused_and_a_record_of_something_else_is_bad(odd, tmp_path):
    shutil.copytree(odd, tmp_path, dirs_exist_ok=True)
    shard = tmp_path / "odd" / "1.0.0" / "odd-train.array_record-00000-of-00001"
    records = open_tfds(f"odd?split=train&data_dir={tmp_path}")
    writer = ArrayRecordWriter(str(shard), "group_size:1")
    writer.write(b"text")
    writer.write(b"\n\0")  # an Example without features
    writer.close()
    for i in range(2):
        with pytest.raises(BadRecord) as bad:
            records[i]
        assert bad.value.kind == "bad_record"
    shard.unlink()
    with pytest.raises(
        UserError,
        match="odd-train.array_record-00000-of-00001 is no array_record file.*No such file",
    ):
        open_tfds(f"odd?split=train&data_dir={tmp_path}")
