"""Makes `tiny.model`, a small sentencepiece model with PaliGemma's ids.

    python -m pg_ground.assets.make_tokenizer

The base vocabulary has the settings of Gemma's: BPE, byte fallback, single digits, no
normalisation, no dummy prefix. It is trained on sentences that this module composes. The 1,024 loc
and 128 seg pieces are appended as in big_vision. The script needs protobuf. Reading the model does
not.
"""

import io
import itertools
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from pg_ground.vocab import BOS, EOS, LOC_TOKENS, PAD, SEG_TOKENS, UNK

BASE_SIZE = 896
FIRST_IDS = (
    ["<mask>", "<2mass>", "[@BOS@]"]
    + [f"<unused{i}>" for i in range(99)]
    + ["<start_of_turn>", "<end_of_turn>"]
    + ["\n" * n for n in (1, 2, 3)]
)
"""Pieces 4 to 110, where Gemma has them: the newline is 108."""

COLOURS = [
    "red",
    "green",
    "blue",
    "yellow",
    "purple",
    "orange",
    "cyan",
    "pink",
    "white",
    "black",
    "gray",
    "brown",
]
FORMS = ["circle", "square", "triangle", "diamond", "cross", "ring", "star"]
SIZES = ["small", "large", "big", "tiny"]
PLACES = ["left", "right", "top", "bottom", "middle", "upper", "lower"]
CORNERS = [
    f"{height} {side}"
    for height in ("upper", "lower", "top", "bottom")
    for side in ("left", "right")
]
OBJECTS = [
    "person",
    "man",
    "woman",
    "boy",
    "girl",
    "child",
    "kid",
    "guy",
    "lady",
    "dog",
    "cat",
    "horse",
    "cow",
    "sheep",
    "bird",
    "elephant",
    "giraffe",
    "zebra",
    "bear",
    "car",
    "bus",
    "truck",
    "train",
    "boat",
    "bike",
    "chair",
    "couch",
    "table",
    "bed",
    "shirt",
    "hat",
    "jacket",
    "umbrella",
    "bag",
    "bottle",
    "cup",
    "plate",
    "bowl",
    "pizza",
    "cake",
    "sandwich",
    "banana",
    "apple",
    "phone",
    "book",
    "clock",
    "vase",
    "tv",
    "laptop",
    "ball",
    "player",
    "surfboard",
    "button",
    "window",
]
WORDS = [
    "one",
    "two",
    "three",
    "four",
    "first",
    "second",
    "third",
    "last",
    "other",
    "front",
    "back",
    "side",
    "center",
    "far",
    "tall",
    "short",
    "long",
    "old",
    "young",
]
LINKS = [
    "in",
    "with",
    "holding",
    "wearing",
    "standing on",
    "sitting on",
    "closest to",
    "on the far side of",
]
RELATIONS = ["left of", "right of", "above", "below", "next to", "behind", "in front of", "near"]


def main() -> None:
    """Writes `tiny.model` beside this file."""
    path = Path(__file__).with_name("tiny.model")
    path.write_bytes(make_model())
    print(f"{path.name}: {path.stat().st_size} bytes")


def make_model() -> bytes:
    """Returns the serialised model of 2,048 pieces, the same bytes every time."""
    return append_pieces(train_base(corpus()))


def train_base(sentences: list[str]) -> bytes:
    """Returns a serialised BPE model of `BASE_SIZE` pieces with Gemma's flags."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=BASE_SIZE,
        user_defined_symbols=FIRST_IDS,
        pad_id=PAD,
        eos_id=EOS,
        bos_id=BOS,
        unk_id=UNK,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        byte_fallback=True,
        character_coverage=1.0,
        num_threads=1,
        shuffle_input_sentence=False,
        minloglevel=2,
    )
    return model.getvalue()


def append_pieces(base: bytes) -> bytes:
    """Returns `base` with `<loc0000>`..`<loc1023>` and `<seg000>`..`<seg127>` appended.

    The new pieces are user-defined and have score 0.
    """
    # protobuf makes the class at import
    proto = sentencepiece_model_pb2.ModelProto  # pyright: ignore[reportAttributeAccessIssue]
    model = proto.FromString(base)
    names = [f"<loc{i:04d}>" for i in range(LOC_TOKENS)] + [
        f"<seg{i:03d}>" for i in range(SEG_TOKENS)
    ]
    for name in names:
        model.pieces.add(piece=name, score=0.0, type=proto.SentencePiece.USER_DEFINED)
    model.trainer_spec.vocab_size = len(model.pieces)
    return model.SerializeToString(deterministic=True)


def corpus() -> list[str]:
    """Returns sentences, and every printable ASCII character.

    The frequent words of the sentences become single pieces.
    """
    shapes = [f"{colour} {form}" for colour, form in itertools.product(COLOURS, FORMS)]
    sized = [f"{size} {shape}" for size, shape in itertools.product(SIZES, shapes)]
    pairs = [f"{a} ; {b}" for a, b in zip(shapes, shapes[5:] + shapes[:5], strict=True)]
    things = [f"{colour} {thing}" for colour, thing in itertools.product(COLOURS[:4], OBJECTS)]
    related = [
        f"{a} {relation} the {b}"
        for relation in RELATIONS
        for a, b in zip(shapes, shapes[9:], strict=False)
    ]
    placed = [f"the {place} {form}" for place, form in itertools.product(PLACES, FORMS)]
    cornered = [
        f"{form} in the {corner} corner" for corner, form in itertools.product(CORNERS, FORMS)
    ]
    phrases = shapes * 4 + sized + pairs * 2 + things + related + placed * 8 + cornered * 4
    asked = [f"{verb} {phrase}" for verb in ("detect", "point to", "segment") for phrase in phrases]
    counted = [
        f"answer en how many {thing}s are there"
        for thing in FORMS[:2] + OBJECTS[9:12] + OBJECTS[18:27]
    ] * 3
    described = [f"the {word} {thing}" for word, thing in itertools.product(WORDS, OBJECTS[:6])]
    opened = [f"{place} {thing}" for place, thing in itertools.product(PLACES, OBJECTS[:12])]
    captions = [f"caption en a {a} and a {b}" for a, b in itertools.pairwise(OBJECTS)] * 2
    people = [
        f"{a} {link} {b}"
        for a in ("man", "woman", "person", "guy", "boy", "girl", "kid", "lady")
        for link in LINKS
        for b in (
            "the chair",
            "white shirt",
            "blue shirt",
            "a hat",
            "black jacket",
            "the bench",
            "his hand",
            "her bag",
        )
    ]
    letters = [chr(c) for c in range(33, 127)]
    return phrases + asked + counted + described + opened + captions + people + letters


if __name__ == "__main__":
    main()
