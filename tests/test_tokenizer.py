import json
from importlib import resources
from pathlib import Path

import pytest
from sentencepiece import sentencepiece_model_pb2

from pg_ground import tokenizer
from pg_ground.types import UserError
from pg_ground.vocab import BOS, EOS, NEWLINE, PAD, UNK, Vocab

PREPROCESSING = Path(__file__).parents[2] / "shared" / "golden" / "preprocessing"
needs_golden = pytest.mark.skipif(not PREPROCESSING.exists(), reason="shared/golden is not here")


@pytest.fixture(scope="module")
def tiny() -> tokenizer.Tokenizer:
    return tokenizer.load()


def test_packaged_model_has_paligemmas_layout(tiny):
    assert tiny.vocab._replace(separators=(), spaces=()) == Vocab(size=2048, loc0=896, seg0=1920)
    pieces = [
        tiny.pieces.IdToPiece(i)
        for i in (0, 1, 2, 3, 4, 5, 6, 7, 105, 106, 107, 108, 896, 1919, 1920, 2047)
    ]
    assert pieces == (
        [
            "<pad>",
            "<eos>",
            "<bos>",
            "<unk>",
            "<mask>",
            "<2mass>",
            "[@BOS@]",
            "<unused0>",
            "<unused98>",
            "<start_of_turn>",
            "<end_of_turn>",
            "\n",
            "<loc0000>",
            "<loc1023>",
            "<seg000>",
            "<seg127>",
        ]
    )


def test_packaged_model_is_what_its_script_makes(tiny):
    make_tokenizer = pytest.importorskip(
        "pg_ground.assets.make_tokenizer", reason="protobuf is not installed"
    )
    path = Path(make_tokenizer.__file__).with_name("tiny.model")
    assert make_tokenizer.make_model() == make_tokenizer.make_model() == path.read_bytes()


@pytest.mark.parametrize(
    "text", ["detect", "point", "segment", " to", " ;", " red", " circle", "red", " small", " left"]
)
def test_everyday_words_are_single_pieces(tiny, text):
    assert len(tiny.text(text)) == 1


def test_separators_and_spaces_are_the_ids_between_two_answers(tiny):
    ids = tiny.text("<loc0001><loc0002> cat ; <loc0003><loc0004> cat;")
    cat = tiny.text(" cat")
    semicolon, space = ids[3], ids[4]
    assert ids == [897, 898, *cat, semicolon, space, 899, 900, *cat, tiny.text(";")[0]]
    assert set(tiny.vocab.separators) == {semicolon, tiny.text(";")[0]}
    assert tiny.vocab.spaces == (space,)


@pytest.mark.parametrize("name", ["red circle", "café 猫 12345", "x", "guy's hat", "Ball"])
def test_name_behind_a_loc_token_reads_as_the_name_with_its_space(tiny, name):
    assert tiny.text(f"<loc0001>{' ' + name}") == [897, *tiny.text(" " + name)]


@pytest.mark.parametrize(
    "text",
    ["detect cat", "detect cat ", "detect cat\n", "", "two  spaces", "café 猫 12345", "tab\tç"],
)
def test_decode_inverts_text(tiny, text):
    assert tiny.decode(tiny.text(text)) == text


def test_prefix_ends_in_a_newline_of_its_own(tiny):
    assert tiny.prefix("cat\n") == [BOS, *tiny.text("cat"), NEWLINE, NEWLINE]
    assert tiny.prefix("") == [BOS, NEWLINE]


def test_decode_stops_at_eos_and_drops_control_ids_only(tiny):
    ids = [BOS, *tiny.text("<loc0005><seg007> cat"), UNK, PAD, EOS, *tiny.text(" dog")]
    assert tiny.decode(ids) == "<loc0005><seg007> cat"


@needs_golden
def test_ids_and_texts_equal_big_visions():
    golden = json.loads((PREPROCESSING / "tokens.json").read_text())
    tokens = tokenizer.load(str(PREPROCESSING / "tiny_paligemma_sp.model"))
    assert (tokens.vocab.loc0, tokens.vocab.seg0) == (golden["loc0"], golden["seg0"])
    for case in golden["cases"]:
        prefix, suffix = tokens.prefix(case["prefix"]), tokens.suffix(case["suffix"])
        assert prefix == [BOS, *case["ids_prefix"], NEWLINE]
        assert suffix == [*case["ids_suffix"], EOS]
        assert tokens.decode(suffix) == case["decoded_suffix"]
        whole = (prefix + suffix + [PAD] * golden["text_len"])[: golden["text_len"] + 1]
        assert whole == case["train"]["text"]


@needs_golden
def test_plain_gemmas_model_gets_the_pieces_that_paligemmas_has():
    plain, baked = (
        tokenizer.load(str(PREPROCESSING / f"tiny_{name}_sp.model"))
        for name in ("gemma", "paligemma")
    )
    assert plain.vocab == baked.vocab
    names = [plain.pieces.IdToPiece(i) for i in range(plain.vocab.size)]
    assert names == [baked.pieces.IdToPiece(i) for i in range(plain.vocab.size)]
    for text in (
        "detect cat",
        "<loc0000><loc1023> cat ; <loc0007><seg000><seg127> a b",
        "<loc1024> <loc12>",
    ):
        assert plain.text(text) == baked.text(text)
    assert plain.decode(plain.suffix("<loc0001><seg127> cat")) == "<loc0001><seg127> cat"


def with_pieces(names: list[str]) -> bytes:
    """Returns the package's model with other pieces at its end."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(
        (resources.files("pg_ground.assets") / "tiny.model").read_bytes()
    )
    del proto.pieces[-1152:]
    for name in names:
        proto.pieces.add(piece=name, score=0.0, type=proto.SentencePiece.USER_DEFINED)
    return proto.SerializeToString()


def test_loc_pieces_that_are_not_contiguous_are_refused_by_name(tmp_path):
    locs, segs = [f"<loc{i:04d}>" for i in range(1024)], [f"<seg{i:03d}>" for i in range(128)]
    (tmp_path / "right.model").write_bytes(with_pieces(locs + segs))
    tokenizer.load(str(tmp_path / "right.model"))
    for names, said in (
        (segs + locs, "<loc0000> is not piece 896"),
        (
            [*locs[:500], "other", *locs[500:], *segs[:-1]],
            "<loc0000> is not piece 896|<loc0500> is not piece",
        ),
        (locs[::-1] + segs, "<loc0000> is not piece 896"),
        (locs[:1000] + segs, "is not piece"),
    ):
        (tmp_path / "odd.model").write_bytes(with_pieces(names))
        with pytest.raises(UserError, match=rf"odd\.model: .*({said})") as refused:
            tokenizer.load(str(tmp_path / "odd.model"))
        assert "\n" not in str(refused.value)


def test_missing_and_corrupt_models_are_refused_in_one_line(tmp_path):
    (tmp_path / "empty.model").write_bytes(b"")
    (tmp_path / "text.model").write_text("not a model")
    for name in ("missing.model", "empty.model", "text.model", "."):
        with pytest.raises(UserError) as refused:
            tokenizer.load(str(tmp_path / name))
        assert name in str(refused.value) and "\n" not in str(refused.value)
