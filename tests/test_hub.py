import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub.constants
import huggingface_hub.errors
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pg_ground.data import hub
from pg_ground.data.hub import open_hub
from pg_ground.data.records import Records
from pg_ground.data.row_filters import RowFilter
from pg_ground.types import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def no_network(*args, **kwargs):
        raise AssertionError("this asks the network")

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", no_network)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_tree", no_network)
    return tmp_path / "hub"


def put(
    cache: Path,
    files: Mapping[str, bytes],
    repo: str = "org/ds",
    revision: str = "main",
    commit: str = COMMIT,
) -> Path:
    """Writes files as huggingface_hub does: blobs by hash, snapshots with links, and refs."""
    folder = cache / f"datasets--{repo.replace('/', '--')}"
    (folder / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
    (folder / "refs" / revision).write_text(commit)
    (folder / "blobs").mkdir(exist_ok=True)
    for name, data in files.items():
        blob = folder / "blobs" / hashlib.sha256(data).hexdigest()
        blob.write_bytes(data)
        link = folder / "snapshots" / commit / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return folder / "snapshots" / commit


def table(*values: Any) -> bytes:
    out = pa.BufferOutputStream()
    pq.write_table(pa.table({"n": list(values)}), out)
    return out.getvalue().to_pybytes()


def values(location: str) -> list[Any]:
    records = open_hub(location)
    return [records[i]["n"] for i in range(len(records))]


def refusal(location: str) -> str:
    with pytest.raises(UserError) as refused:
        open_hub(location)
    text = str(refused.value)
    assert text.startswith(f"source hf:{location}: ") and "\n" not in text, text
    return text.removeprefix(f"source hf:{location}: ")


LAYOUTS = {
    "lmms-lab/RefCOCO": {
        "data/testA-00000-of-00001.parquet": [1],
        "data/val-00001-of-00002.parquet": [3],
        "data/val-00000-of-00002.parquet": [2],
    },
    "jxu124/refcoco": {
        "data/val-00000-of-00001-40fa6ec8a2f3ef5a.parquet": [2, 3],
        "data/testA-00000-of-00001-0123456789abcdef.parquet": [1],
    },
    "folders": {"val/0000.parquet": [2], "val/0001.parquet": [3], "testA/part.parquet": [1]},
    "folders of data": {"data/val/0000.parquet": [2, 3], "data/testA/0000.parquet": [1]},
    "converted": {
        "default/val/0000.parquet": [2],
        "default/val/0001.parquet": [3],
        "default/testA/0000.parquet": [1],
    },
    "one config": {
        "refcoco/val-00000-of-00001.parquet": [2, 3],
        "refcoco/testA-00000-of-00001.parquet": [1],
    },
    "top": {"val.parquet": [2, 3], "testA.parquet": [1]},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_of_a_split_are_found_at_the_usual_paths_of_the_hub(cache, layout):
    folder = put(
        cache,
        {name: table(*n) for name, n in LAYOUTS[layout].items()}
        | {".gitattributes": b"", "other.txt": b""},
    )
    assert values("org/ds@val?offline=1") == [2, 3] and values("org/ds@testA?offline=1") == [1]
    records = open_hub("org/ds@val?offline=1")
    assert records.root == folder and isinstance(records, Records)
    copy = pickle.loads(pickle.dumps(records))
    assert copy[1] == {"n": 3} and copy.root == folder and len(copy) == 2
    assert (
        "no split 'train'; there are @" in (text := refusal("org/ds@train?offline=1"))
        and "@testA" in text
        and "@val" in text
    )


def test_the_config_must_be_named_if_several_have_the_split(cache):
    put(
        cache,
        {
            "en/train-00000-of-00001.parquet": table(1),
            "de/train-00000-of-00001.parquet": table(2),
            "de/test/0.parquet": table(3),
        },
    )
    assert values("org/ds@train?config=en&offline=1") == [1] and values(
        "org/ds@train?offline=1&config=de"
    ) == [2]
    assert values("org/ds@test?offline=1") == [3] == values("org/ds@test?offline=1&config=de")
    assert "no split 'train'; there are" in (text := refusal("org/ds@train?offline=1"))
    assert "@train?config=de" in text and "@train?config=en" in text
    assert "no split 'train' of config 'fr'; there are" in refusal(
        "org/ds@train?offline=1&config=fr"
    )


README = """---
license: odc-by
configs:
- config_name: {first}
  data_files:
  - split: train
    path: data/part-*.parquet
  - split: val
    path: ["held/a.parquet", "held/deeper/**/*.parquet"]
- config_name: small
  data_files: data/part-1.parquet
- config_name: pairs
  data_dir: held
  data_files: {{train: a.parquet, gone: none/*.parquet}}
- config_name: text
  data_files: [notes.csv]
---
# The dataset
"""
FILES = {
    "data/part-1.parquet": table(1),
    "data/part-2.parquet": table(2),
    "data/deeper/part-3.parquet": table(3),
    "held/a.parquet": table(4),
    "held/deeper/x/y/b.parquet": table(5),
    "notes.csv": b"a,b",
}


@pytest.mark.parametrize("first", ["default", "large\n  default: true"])
def test_the_readme_declares_the_files(cache, first):
    put(cache, FILES | {"README.md": README.format(first=first).encode()})
    assert values("org/ds@train?offline=1") == [1, 2] and values("org/ds@val?offline=1") == [4, 5]
    assert values("org/ds@train?offline=1&config=small") == [1] and values(
        "org/ds@train?config=pairs&offline=1"
    ) == [4]
    assert values(f"org/ds@train?offline=1&config={first.split()[0]}") == [1, 2]
    assert (
        "notes.csv is no parquet" in (text := refusal("org/ds@train?offline=1&config=text"))
        and "refs/convert/parquet" in text
    )
    text = refusal("org/ds@test?offline=1")
    assert (
        "@train, @train?config=" in text
        and "@val" in text
        and "small" in text
        and "gone" not in text
    )


def test_readme_without_a_default_config_needs_the_name_only_if_it_is_ambiguous(cache):
    put(cache, FILES | {"README.md": README.format(first="large").encode()})
    assert values("org/ds@val?offline=1") == [4, 5]
    assert "@train?config=large, @train?config=pairs, @train?config=small" in refusal(
        "org/ds@train?offline=1"
    )


@pytest.mark.parametrize(
    "readme",
    [
        b"# No header",
        b"---\nlicense: mit\n---\n",
        b"---\nconfigs:\n- config_name: default\n---\n",
        b"",
    ],
)
def test_a_readme_that_declares_no_files_leaves_the_usual_paths(cache, readme):
    put(cache, {"README.md": readme, "data/train-00000-of-00001.parquet": table(1)})
    assert values("org/ds@train?offline=1") == [1]


@pytest.mark.parametrize(
    "readme",
    [
        b"---\nconfigs: [\n---\n",
        b"---\n- a\n---\n",
        b"---\nconfigs: [5]\n---\n",
        b"---\nconfigs:\n- data_files: [{split: a}]\n---\n",
    ],
)
def test_readme_that_cannot_be_read_is_refused(cache, readme):
    put(cache, {"README.md": readme, "data/train-00000-of-00001.parquet": table(1)})
    assert "README.md has no valid configs" in refusal("org/ds@train?offline=1")


def test_revision_is_a_branch_or_a_commit(cache):
    other = COMMIT[::-1]
    put(cache, {"train.parquet": table(1)})
    put(
        cache,
        {"default/train/0000.parquet": table(2)},
        revision="refs/convert/parquet",
        commit=other,
    )
    assert values("org/ds@train?offline=1") == [1] == values("org/ds@train?offline=1&revision=main")
    assert (
        values("org/ds@train?offline=1&revision=refs/convert/parquet")
        == [2]
        == values(f"org/ds@train?offline=1&revision={other}")
    )
    assert "org/ds at v2 is not in the cache" in refusal("org/ds@train?offline=1&revision=v2")


def test_a_file_that_is_not_cached_is_refused_offline(cache):
    assert "org/ds at main is not in the cache" in refusal("org/ds@train?offline=1")
    folder = put(cache, {"data/train-00001-of-00003.parquet": table(1)})
    assert "data/train-00000-of-00003.parquet is not in the cache" in refusal(
        "org/ds@train?offline=1"
    )
    (folder / "data" / "train-00001-of-00003.parquet").resolve().unlink()  # the link stays
    assert "it has no parquet; the Hub may have it converted" in refusal("org/ds@train?offline=1")


def test_the_list_of_files_in_the_cache_shows_missing_files(cache):
    from huggingface_hub._tree_cache import TreeCacheEntry, write_tree_cache

    put(cache, {"a/train.parquet": table(1), "b/val.parquet": table(2)})
    names = ["README.md", "a/train.parquet", "a/train2.parquet", "b/val.parquet"]
    write_tree_cache(
        str(cache / "datasets--org--ds"),
        COMMIT,
        {name: TreeCacheEntry(size=1, blob_id=name) for name in names},
    )
    assert values("org/ds@b?offline=1") == [2]
    assert "org/ds at main is not in the cache, or not all of it" in refusal("org/ds@a?offline=1")


def test_broken_parquet_is_refused(cache):
    put(cache, {"train.parquet": table(*range(1000))[:-100], "val.parquet": b""})
    assert "train.parquet is no whole parquet file" in refusal("org/ds@train?offline=1")
    assert "val.parquet is no whole parquet file" in refusal("org/ds@val?offline=1")


def test_uri_of_another_form_is_refused(cache):
    put(cache, {"train.parquet": table(1)})
    assert "no split ''; there are @train" in refusal("org/ds?offline=1")
    assert "no option 'confg'; did you mean config?" in refusal("org/ds@train?confg=x")
    assert "offline is yes, but it must be 0 or 1" in refusal("org/ds@train?offline=yes")
    assert "the form is hf:ORG/NAME@SPLIT" in refusal("a/b/c@train?offline=1")
    assert "the form is hf:ORG/NAME@SPLIT" in refusal("@train?offline=1")


class Online:
    """A hub with the files of a dict. Like the real hub, it writes downloads into the cache."""

    def __init__(self, monkeypatch, cache: Path, files: Mapping[str, bytes]):
        self.files, self.cache, self.asked = files, cache, []
        monkeypatch.setattr(hub.HfApi, "list_repo_files", self.list_repo_files)
        monkeypatch.setattr(hub, "snapshot_download", self.snapshot_download)

    def list_repo_files(self, repo_id, *, repo_type, revision):
        assert (repo_id, repo_type, revision) == ("org/ds", "dataset", "v1")
        return list(self.files)

    def snapshot_download(self, repo_id, *, repo_type, revision, allow_patterns, local_files_only):
        assert (repo_id, repo_type, revision, local_files_only) == (
            "org/ds",
            "dataset",
            "v1",
            False,
        )
        names = list(
            huggingface_hub.utils.filter_repo_objects(self.files, allow_patterns=allow_patterns)
        )
        self.asked.append(names)
        return str(put(self.cache, {name: self.files[name] for name in names}, revision=revision))


def test_only_the_files_of_the_split_are_downloaded(cache, monkeypatch):
    files = {
        "README.md": b"",
        "data/train-00000-of-00001.parquet": table(1),
        "data/val-[x].parquet": table(2),
        "big.zip": b"",
    }
    online = Online(monkeypatch, cache, files)
    assert values("org/ds@train?revision=v1") == [1]
    assert online.asked == [["README.md"], ["data/train-00000-of-00001.parquet"]]
    monkeypatch.undo()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    assert values("org/ds@train?revision=v1&offline=1") == [1]


def test_names_that_look_like_patterns_are_names(cache, monkeypatch):
    Online(monkeypatch, cache, {"val-[x].parquet": table(2), "val-x.parquet": b"no table"})
    assert values("org/ds@val-[x]?revision=v1") == [2]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("GatedRepoError", "accept its terms at https://huggingface.co/datasets/org/ds"),
        ("RepositoryNotFoundError", "the Hub has no dataset 'org/ds'"),
        ("RevisionNotFoundError", "org/ds has no revision 'v1'"),
        (
            "HfHubHTTPError",
            "(503 Server Error Request ID: 1); offline=1 reads what is in the cache",
        ),
    ],
)
def test_errors_of_the_hub_become_one_line(cache, monkeypatch, error, message):
    def refuse(*args, **kwargs):
        response = httpx2.Response(503, request=httpx2.Request("GET", "https://huggingface.co"))
        raise getattr(huggingface_hub.errors, error)(
            "503 Server Error\n\nRequest ID: 1", response=response
        )

    monkeypatch.setattr(hub.HfApi, "list_repo_files", refuse)
    assert message in refusal("org/ds@train?revision=v1")


@pytest.mark.parametrize(
    "error",
    [
        httpx2.ConnectError("[Errno -2] Name or service not known"),
        huggingface_hub.errors.OfflineModeIsEnabled("off"),
    ],
)
def test_a_missing_network_becomes_one_line(cache, monkeypatch, error):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(hub.HfApi, "list_repo_files", refuse)
    assert "offline=1 reads what is in the cache" in refusal("org/ds@train")


def test_slices_and_sums_of_splits_are_those_of_datasets(cache):
    put(
        cache,
        {
            "data/train-00000-of-00002.parquet": table(*range(6)),
            "data/train-00001-of-00002.parquet": table(*range(6, 10)),
            "data/validation-00000-of-00001.parquet": table(20, 21, 22),
        },
    )
    for split, expected in {
        "train[:10%]": [0],
        "train[:25%]": [0, 1],  # round(2.5) of Python, as `datasets`
        "train[5:7]": [5, 6],
        "train[-2:]": [8, 9],
        "train[-20%:-10%]": [8],
        "train[:20%]+validation": [0, 1, 20, 21, 22],
        "validation[1:]+train[50%:80%]+validation[:1]": [21, 22, 5, 6, 7, 20],
        "train[:]": list(range(10)),
    }.items():
        assert values(f"org/ds@{split}?offline=1") == expected, split
    for split, reason in {
        "train[:11]": "the slice train[:11] reaches beyond the split, which has 10 rows",
        "train[:101%]": "the slice train[:101%] reaches beyond the split, which has 100 percent",
        "validation[:10%]": "the slice validation[:10%] holds none of the 3 rows of the split",
        "train[:2]+test": "no split 'test'; there are @train, @validation",
        "train[1]": "no split 'train[1]'; there are @train, @validation",
    }.items():
        assert refusal(f"org/ds@{split}?offline=1").startswith(reason), split


def test_several_datasets_are_one_source(cache):
    put(cache, {"train.parquet": table(1, 2), "test.parquet": table(3)})
    put(cache, {"train.parquet": table(4, 5, 6), "test.parquet": table(7)}, repo="org/other")
    assert values("org/ds,org/other@train?offline=1") == [1, 2, 4, 5, 6]
    assert values("org/ds,org/other@train[:34%]+test?offline=1") == [1, 3, 4, 7]
    assert values("org/other@test,org/ds@train?offline=1") == [7, 1, 2]
    assert "no split 'val'; there are " in refusal("org/ds,org/other@val?offline=1")


def test_only_the_columns_of_a_filter_are_read_of_a_slice(cache):
    put(cache, {"train.parquet": table(*range(10)), "test.parquet": table(20, 21)})
    records = open_hub("org/ds@train[2:8]+test?offline=1")
    kept = RowFilter("n > 6", "where").choose(records)
    assert [records[i]["n"] for i in kept.indices.tolist()] == [7, 20, 21]
    assert kept.note == "where keeps 3 of 8 records"
