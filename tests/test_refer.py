import builtins
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from pg_ground.data.records import BadRecord, Records
from pg_ground.data.refer import open_refer
from pg_ground.types import UserError

CONFIGS = {
    "refcoco_unc": {"train": 2, "val": 2, "testA": 2, "testB": 2},
    "refcoco_google": {"train": 2, "val": 2, "test": 2},
    "refcoco+_unc": {"train": 2, "val": 2, "testA": 2, "testB": 2},
    "refcocog_google": {"train": 2, "val": 2},
    "refcocog_umd": {"train": 2, "val": 2, "test": 2},
    "combined": {"train": 6, "val": 6, "test": 10},
}
"""The number of refs in each split of the sample, for all builder configs."""


@pytest.fixture(scope="module")
def samples(data) -> Path:
    return data / "refcoco"


@pytest.fixture
def all_configs(samples, tmp_path) -> tuple[dict[str, Any], Path]:
    """The sample of all builder configs, and the refer toolkit's folders made of it."""
    sample = json.loads((samples / "annotations" / "tfds_dummy_refcoco.json").read_text())
    write_refer(sample, tmp_path / "refer")
    return sample, tmp_path / "refer"


def write_refer(sample: dict[str, Any], folder: Path) -> None:
    """Writes the refer toolkit's files of tfds' refcoco.json, with pickles of Python 2."""
    coco = {
        "images": [image["info"] for image in sample["coco_anns"].values()],
        "annotations": [
            annotation for image in sample["coco_anns"].values() for annotation in image["anns"]
        ],
        "categories": [
            {"id": i, "name": f"category {i}", "supercategory": "thing"} for i in range(1, 91)
        ],
    }
    for ref in sample["ref"]:
        subfolder = folder / ref["dataset"]
        subfolder.mkdir(parents=True, exist_ok=True)
        (subfolder / "instances.json").write_text(json.dumps(coco))
        key = (ref["dataset"], ref["dataset_partition"])
        refs = [
            {
                name: value
                for name, value in other.items()
                if name not in ("ann", "dataset", "dataset_partition")
            }
            for other in sample["ref"]
            if (other["dataset"], other["dataset_partition"]) == key
        ]
        (subfolder / f"refs({key[1]}).p").write_bytes(pickle.dumps(refs, protocol=2))


def small(folder: Path, splits: dict[str, list[tuple[str, int]]]) -> Path:
    """Writes refs of (split, image id) by `dataset_splitby`, each with an annotation."""
    for name, refs in splits.items():
        dataset, split_by = name.rsplit("_", 1)
        subfolder = folder / dataset
        subfolder.mkdir(parents=True)
        entries = [
            {
                "split": split,
                "image_id": image,
                "ann_id": i,
                "ref_id": 100 + i,
                "sentences": [{"raw": f"{name} {i}", "sent": ""}],
            }
            for i, (split, image) in enumerate(refs)
        ]
        coco = {
            "images": [
                {"id": image, "file_name": f"{image}.jpg", "width": 9, "height": 8}
                for _, image in refs
            ],
            "annotations": [
                {
                    "id": i,
                    "image_id": image,
                    "category_id": 1,
                    "bbox": [1, 2, 3, 4],
                    "segmentation": [],
                }
                for i, (_, image) in enumerate(refs)
            ],
            "categories": [{"id": 1, "name": "cat"}],
        }
        (subfolder / f"refs({split_by}).p").write_bytes(pickle.dumps(entries))
        (subfolder / "instances.json").write_text(json.dumps(coco))
    return folder


def uri(folder: Path, name: str, split: str) -> str:
    dataset, _, split_by = name.partition("_")
    return f"{folder}?dataset={dataset}{'&split_by=' if split_by else ''}{split_by}&split={split}"


def all_of(records: Records) -> list[dict[str, Any]]:
    return [records[i] for i in range(len(records))]


def test_a_genuine_pair_is_read(samples):
    folder = samples / "annotations" / "emma_refcocog"
    first = {
        "train": (
            40373,
            "person",
            "A smiling woman wearing a black dress with a plaid bow on it. "
            "She is wearing ear rings and a watch.",
        ),
    }
    for split in ("train", "val", "test"):
        records = open_refer(
            f"{folder}?dataset=refcocog&split_by=umd&split={split}&images={samples}/images"
        )
        assert len(records) == 5 and records.root == samples / "images"
        for record in all_of(records):
            x, y, w, h = record["bbox"]
            assert (
                0 <= x < x + w <= record["width"]
                and 0 <= y < y + h <= record["height"]
                and record["split"] == split
            )
            assert (
                record["sentences"][0]["raw"]
                and record["segmentation"]
                and record["image"].startswith("COCO_train2014_")
            )
        if split in first:
            assert (
                records[0]["ref_id"],
                records[0]["category"],
                records[0]["sentences"][0]["raw"],
            ) == first[split]


def test_boxes_equal_another_release_for_the_same_sentences(samples):
    lines = [json.loads(line) for line in (samples / "triples.jsonl").read_text().splitlines()]
    others = {
        (line["image_id"], line["expression"]): line
        for line in lines
        if line["dataset"] == "refcocog_umd"
    }
    folder = samples / "annotations" / "emma_refcocog"
    shared = 0
    for split in ("train", "val", "test"):
        for record in all_of(open_refer(uri(folder, "refcocog_umd", split))):
            for sentence in record["sentences"]:
                other = others.get((record["image_id"], sentence["sent"].strip()))
                if other:
                    assert (
                        record["bbox"] == other["bbox_xywh"]
                        and record["image"] == other["image"]
                        and split == other["split"]
                    )
                    shared += 1
    assert shared == 3


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_has_its_splits_and_the_sample_s_boxes(all_configs, name):
    sample, folder = all_configs
    expected = {(ref["dataset"], ref["ref_id"], ref["ann_id"]): ref for ref in sample["ref"]}
    for split, size in CONFIGS[name].items():
        records = all_of(open_refer(uri(folder, name, split)))
        assert len(records) == size
        for record in records:
            ref = expected[record["dataset"], record["ref_id"], record["ann_id"]]
            info = sample["coco_anns"][str(ref["image_id"])]["info"]
            assert (
                record["bbox"] == ref["ann"]["bbox"]
                and record["segmentation"] == ref["ann"]["segmentation"]
            )
            assert (
                record["sentences"] == ref["sentences"]
                and record["category"] == f"category {ref['category_id']}"
            )
            assert (record["image"], record["width"], record["height"]) == (
                info["file_name"],
                info["width"],
                info["height"],
            )


def test_validation_is_val(all_configs):
    for name in CONFIGS:
        val, validation = (
            all_of(open_refer(uri(all_configs[1], name, split))) for split in ("val", "validation")
        )
        assert val == validation


def test_combined_train_has_no_image_of_any_other_split(tmp_path):
    folder = small(
        tmp_path,
        {
            "refcoco_unc": [("train", 1), ("train", 2), ("val", 3), ("testA", 4)],
            "refcoco+_unc": [("train", 3), ("train", 1), ("train", 4), ("testB", 5)],
            "refcocog_umd": [("train", 5), ("train", 6), ("test", 2), ("val", 7)],
        },
    )
    refs = {
        split: [
            (r["dataset"], r["image_id"], r["split"])
            for r in all_of(open_refer(uri(folder, "combined", split)))
        ]
        for split in ("train", "val", "test")
    }
    assert refs["train"] == [
        ("refcocog", 6, "train"),
        ("refcoco", 1, "train"),
        ("refcoco+", 1, "train"),
    ]
    assert refs["val"] == [("refcocog", 7, "val"), ("refcoco", 3, "val")]
    assert refs["test"] == [
        ("refcocog", 2, "test"),
        ("refcoco", 4, "testA"),
        ("refcoco+", 5, "testB"),
    ]
    assert (
        len(open_refer(uri(folder, "refcoco_unc", "train"))) == 2
    )  # a single dataset leaves nothing out


def test_a_folder_may_hold_the_files_itself_and_coco_may_be_elsewhere(tmp_path):
    folder = small(tmp_path / "a", {"refcoco_unc": [("train", 1)]}) / "refcoco"
    assert open_refer(uri(folder, "refcoco_unc", "train"))[0]["image"] == "1.jpg"
    coco = json.loads((folder / "instances.json").read_text())
    coco["images"][0]["file_name"] = "000000000001.jpg"
    (tmp_path / "train2017.json").write_text(json.dumps(coco))
    (folder / "instances.json").unlink()
    records = open_refer(uri(folder, "refcoco_unc", "train") + f"&coco={tmp_path}/train2017.json")
    assert records[0]["image"] == "000000000001.jpg" and records.root == folder
    assert pickle.loads(pickle.dumps(records))[0] == records[0]


def test_text_of_python_2_is_read(tmp_path):
    folder = small(tmp_path, {"refcoco_unc": [("train", 1)]})
    path = folder / "refcoco" / "refs(unc).p"
    with path.open("rb") as file:
        refs = pickle.load(file)
    refs[0]["sentences"] = ["@"]
    by_hand = pickle.dumps(refs, protocol=0).replace(
        b"V@\n", b"S'caf\\xe9'\n"
    )  # S is Python 2's str: bytes
    assert by_hand != pickle.dumps(refs, protocol=0)
    path.write_bytes(by_hand)
    assert open_refer(uri(folder, "refcoco_unc", "train"))[0]["sentences"] == ["café"]


class Attack:
    def __reduce__(self):
        return os.mkdir, ("owned",)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_names_a_function_is_refused_and_runs_nothing(
    tmp_path, monkeypatch, protocol
):
    folder = small(tmp_path, {"refcoco_unc": [("train", 1)]})
    monkeypatch.chdir(tmp_path)
    for payload, name in (
        (Attack(), "mkdir"),
        (builtins.eval, "eval"),
        ({"x": [Path()]}, "Path"),
        ({1}, "set"),
    ):
        (folder / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps([payload], protocol=protocol))
        if name == "set" and protocol >= 4:  # a plain value in these protocols
            name = "not a list of refs"
        with pytest.raises(UserError, match=name) as refused:
            open_refer(uri(folder, "refcoco_unc", "train"))
        assert "refs(unc).p" in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "owned").exists()


def test_a_pickle_cut_off_anywhere_is_refused(tmp_path):
    folder = small(tmp_path, {"refcoco_unc": [("train", 1)]})
    path = folder / "refcoco" / "refs(unc).p"
    with path.open("rb") as file:
        refs = pickle.load(file)
    for protocol in (0, 2, 4):
        whole = pickle.dumps(refs, protocol=protocol)
        for end in range(len(whole)):
            path.write_bytes(whole[:end])
            with pytest.raises(UserError, match="no pickle of refs|not a list of refs"):
                open_refer(uri(folder, "refcoco_unc", "train"))


@pytest.mark.parametrize(
    "noise",
    [
        b"text",
        b"\x80\x04]",
        b"\xff" * 100,
        b"(dp0\nS'a'\n",
        pickle.dumps([{"split": "train", "image_id": [1]}]),
        b"\x80\x04N.",
        b"\x8e" + b"\xff" * 8,
    ],
)
def test_a_file_that_is_no_pickle_of_refs_is_refused(tmp_path, noise):
    folder = small(tmp_path, {"refcoco_unc": [("train", 1)]})
    (folder / "refcoco" / "refs(unc).p").write_bytes(noise)
    with pytest.raises(UserError, match=r"refs\(unc\).p"):
        open_refer(uri(folder, "refcoco_unc", "train"))


def test_files_that_cannot_be_opened_are_refused_by_name(tmp_path):
    folder = small(tmp_path / "a", {"refcoco_unc": [("train", 1), ("val", 2), ("val", 3)]})
    (folder / "refcocog").mkdir()
    (folder / "refcocog" / "refs(umd).p").write_bytes(
        pickle.dumps([{"split": "train", "image_id": 1, "ann_id": 1}])
    )
    for location, message in (
        (
            uri(folder, "refcoco_unc", "testC"),
            r"no split 'testC'; there are train \(1\), val \(2\)",
        ),
        (
            uri(folder, "refcoco_unc", "train").replace("&split=train", ""),
            r"no split ''; there are train \(1\)",
        ),
        (
            uri(folder, "refcoco_google", "train"),
            r"refs\(google\).p: No such file .*the refs files in the folder: refs\(unc\).p",
        ),
        (uri(folder, "refcoco+_unc", "train"), r"refcoco\+/refs\(unc\).p: No such file"),
        (uri(folder, "combined", "train"), r"refcoco\+/refs\(unc\).p: No such file"),
        (uri(folder, "refcocog_umd", "train"), "No such file .*instances.json'; coco=FILE"),
        (uri(folder, "refcoco_unc", "train") + "&coco=none.json", "No such file .*none.json"),
        (uri(folder, "refcoc_unc", "train"), "no dataset 'refcoc'; did you mean refcoco"),
        (uri(folder, "refcoco", "train"), "split_by"),
        (uri(folder, "combined", "train") + "&split_by=unc", "combined takes no split_by"),
        (
            uri(folder, "refcoco_unc", "train") + "&splitby=unc",
            "no option 'splitby'; did you mean split_by",
        ),
        (uri(tmp_path / "b", "refcoco_unc", "train"), "there is no folder .*/b;"),
        (f"{folder}", "no dataset ''; there are combined, grefcoco, refcoco, refcoco\\+, refcocog"),
    ):
        with pytest.raises(UserError, match=message) as refused:
            open_refer(location)
        assert "\n" not in str(refused.value)
    for text in (
        "",
        "[]",
        '{"images": []}',
        '{"images": [1], "annotations": [], "categories": []}',
        "\xff",
    ):
        (folder / "refcoco" / "instances.json").write_text(text, encoding="latin1")
        with pytest.raises(UserError, match="instances.json does not hold COCO's"):
            open_refer(uri(folder, "refcoco_unc", "train"))


@pytest.mark.parametrize(
    ("table", "kind"),
    [
        ("images", "missing_image"),
        ("annotations", "missing_annotation"),
        ("categories", "missing_category"),
    ],
)
def test_a_ref_whose_annotation_is_missing_is_bad_and_other_refs_are_not(tmp_path, table, kind):
    folder = small(tmp_path, {"refcoco_unc": [("train", 1), ("train", 2)]})
    path = folder / "refcoco" / "instances.json"
    coco = json.loads(path.read_text())
    if table == "categories":
        coco["annotations"][1]["category_id"] = 5
    else:
        del coco[table][1]
    path.write_text(json.dumps(coco))
    records = open_refer(uri(folder, "refcoco_unc", "train"))
    assert len(records) == 2 and records[0]["bbox"] == [1, 2, 3, 4]
    with pytest.raises(BadRecord, match=f"no {table[:4]}") as bad:
        records[1]
    assert bad.value.kind == kind


def test_a_ref_without_a_field_is_bad(tmp_path):
    folder = small(tmp_path, {"refcoco_unc": [("train", 1)]})
    path = folder / "refcoco" / "refs(unc).p"
    path.write_bytes(pickle.dumps([{"split": "train", "image_id": 1, "ann_id": 0, "ref_id": 3}]))
    with pytest.raises(BadRecord, match="sentences") as bad:
        open_refer(uri(folder, "refcoco_unc", "train"))[0]
    assert bad.value.kind == "missing_field"


def rewrite(folder: Path, refs: Any = None, coco: Any = None) -> None:
    """Changes the refs and the annotations of refcoco in place, by two functions."""
    path = folder / "refcoco" / "refs(unc).p"
    with path.open("rb") as file:
        entries = pickle.load(file)
    path.write_bytes(pickle.dumps(refs(entries) if refs else entries))
    path = folder / "refcoco" / "instances.json"
    value = json.loads(path.read_text())
    if coco:
        coco(value)
    path.write_text(json.dumps(value))


def five(folder: Path) -> Path:
    return small(folder, {"refcoco_unc": [("train", number) for number in range(5)]})


def good_and_bad(folder: Path, split: str = "train") -> tuple[list[int], list[tuple[str, str]]]:
    """Returns the ref_id of the good refs, and kind and message of the bad ones."""
    records = open_refer(uri(folder, "refcoco_unc", split))
    good, bad = [], []
    for index in range(len(records)):
        try:
            good.append(records[index]["ref_id"])
        except BadRecord as fault:
            bad.append((fault.kind, str(fault)))
    return good, bad


@pytest.mark.parametrize(
    ("table", "change", "entries"),
    [
        ("images", {"id": 0}, r"entries 0 \(0.jpg\) and 3 \(3.jpg\) of images .* id 0"),
        ("images", {"id": "1"}, r"entries 1 \(1.jpg\) and 3 \(3.jpg\) of images .* id '1'"),
        ("annotations", {"id": 4.0}, r"entries 3 and 4 of annotations .* id 4"),
        ("annotations", {"id": 2, "bbox": [9, 9, 9, 9]}, r"entries 2 and 3 of annotations"),
    ],
)
def test_two_instances_with_the_same_id_are_refused(tmp_path, table, change, entries):
    folder = five(tmp_path)
    rewrite(folder, coco=lambda coco: coco[table][3].update(change))
    with pytest.raises(UserError, match=f"instances.json: {entries}") as refused:
        good_and_bad(folder)
    assert "\n" not in str(refused.value)


def test_two_categories_with_the_same_id_are_refused(tmp_path):
    folder = five(tmp_path)
    rewrite(folder, coco=lambda coco: coco["categories"].append({"id": 1, "name": "dog"}))
    with pytest.raises(UserError, match=r"entries 0 \(cat\) and 1 \(dog\) of categories"):
        good_and_bad(folder)
    # An id that no ref names is refused too.
    folder = five(tmp_path / "b")
    rewrite(folder, coco=lambda coco: coco["annotations"].extend([{"id": 77}, {"id": 77}]))
    with pytest.raises(UserError, match="entries 5 and 6 of annotations"):
        good_and_bad(folder)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda ref: None, "bad_entry", "ref 3 of refs(unc).p is None, not a dict"),
        (lambda ref: "x" * 9000, "bad_entry", "not a dict"),
        (lambda ref: ref | {"ann_id": None}, "missing_field", "ann_id is None"),
        (lambda ref: ref | {"ann_id": [3]}, "bad_entry", "ref 3 of refs(unc).p: ann_id is [3]"),
        (lambda ref: ref | {"image_id": True}, "bad_entry", "image_id is True"),
        (lambda ref: ref | {"split": None}, "missing_field", "split is None"),
        (lambda ref: ref | {"split": 1}, "bad_entry", "split is 1"),
        (lambda ref: ref | {"ann_id": 99}, "missing_annotation", "the ann_id 99"),
        (lambda ref: ref | {"image_id": 4}, "bad_entry", "is about image 4, but its annotation 3"),
        (
            lambda ref: ref | {"sentences": None},
            "missing_field",
            "ref of ann_id 3 has no sentences",
        ),
        (
            lambda ref: {name: value for name, value in ref.items() if name != "split"},
            "missing_field",
            "split is None",
        ),
    ],
)
def test_a_bad_ref_is_one_bad_record(tmp_path, change, kind, message):
    folder = five(tmp_path)
    rewrite(folder, refs=lambda refs: [*refs[:3], change(refs[3]), refs[4]])
    good, bad = good_and_bad(folder)
    assert good == [100, 101, 102, 104] and [kind for kind, _ in bad] == [kind]
    assert message in bad[0][1] and len(bad[0][1]) < 300
    with pytest.raises(UserError, match="no split 'val'; there are train"):
        good_and_bad(folder, "val")


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"bbox": []}, "bad_box", "annotation 3: bbox is [], not 4 numbers"),
        ({"bbox": None}, "bad_box", "annotation 3: bbox is None"),
        ({"bbox": [1, 2, 3]}, "bad_box", "annotation 3: bbox: [1, 2, 3] is not"),
        ({"image_id": 77}, "missing_image", "no image with the image_id 77"),
        ({"image_id": None}, "missing_image", "no image with the image_id None"),
        ({"category_id": [1]}, "missing_category", "category_id [1]"),
    ],
)
def test_a_bad_annotation_is_one_bad_record(tmp_path, change, kind, message):
    folder = five(tmp_path)
    rewrite(folder, coco=lambda coco: coco["annotations"][3].update(change))
    good, bad = good_and_bad(folder)
    assert good == [100, 101, 102, 104] and bad[0][0] == kind and message in bad[0][1]


def test_entries_that_no_ref_names_may_be_anything(tmp_path):
    folder = five(tmp_path)

    def noise(coco: dict[str, Any]) -> None:
        for table in coco.values():
            table += [None, 5, {"id": None}, {"name": "x"}]

    rewrite(folder, coco=noise)
    assert good_and_bad(folder) == ([100, 101, 102, 103, 104], [])


def test_ids_of_refs_match_by_value(tmp_path):
    folder = five(tmp_path)

    def text_ids(coco: dict[str, Any]) -> None:
        for entry in coco["images"] + coco["annotations"]:
            entry["id"] = str(entry["id"])

    rewrite(folder, coco=text_ids)
    assert good_and_bad(folder) == ([100, 101, 102, 103, 104], [])
    rewrite(folder, refs=lambda refs: [ref | {"ann_id": f"{ref['ann_id']}"} for ref in refs])
    assert good_and_bad(folder) == ([100, 101, 102, 103, 104], [])


def test_fields_that_are_not_needed_are_not_required(tmp_path):
    folder = five(tmp_path)

    def drop(coco: dict[str, Any]) -> None:
        for image in coco["images"]:
            del image["width"], image["height"]
        for annotation in coco["annotations"]:
            del annotation["segmentation"], annotation["category_id"]
        coco["categories"] = []

    needed = ("split", "image_id", "ann_id", "sentences")
    rewrite(folder, lambda refs: [{name: ref[name] for name in needed} for ref in refs], drop)
    records = open_refer(uri(folder, "refcoco_unc", "train"))
    assert records[2] == {
        "image": "2.jpg",
        "image_id": 2,
        "ann_id": 2,
        "bbox": [1, 2, 3, 4],
        "sentences": [{"raw": "refcoco_unc 2", "sent": ""}],
        "split": "train",
        "dataset": "refcoco",
    }


def test_combined_keeps_bad_refs_out_of_the_choice_of_images(tmp_path):
    folder = small(
        tmp_path,
        {
            "refcoco_unc": [("train", 1), ("train", 2), ("val", 3)],
            "refcoco+_unc": [("train", 3), ("testA", 2)],
            "refcocog_umd": [("train", 6), ("test", 7), ("val", 8)],
        },
    )
    rewrite(folder, refs=lambda refs: [None, {"split": "val", "image_id": 6}, *refs])
    records = open_refer(uri(folder, "combined", "train"))
    images = []
    for index in range(len(records)):
        try:
            images.append(records[index]["image_id"])
        except BadRecord as bad:
            images.append(bad.kind)
    assert images == [6, "bad_entry", 1]
