"""One image and one prompt to boxes and points: JSON on stdout, and the picture.

python -m pg_ground.predict --params=P --image=I --prompt="detect red circle" [--out=O.png] [--tokenizer=M] [--max_new_tokens=64]

P is a big_vision .npz, a Hugging Face directory, or a run. M is found in the latter two where they have one. One prompt may ask
for several things: --prompt="detect cat ; dog".
"""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from pg_ground.checkpoints import weights
from pg_ground.data.examples import resize
from pg_ground.data.records import BadRecord, load_image
from pg_ground.evals.answers import loc_answers
from pg_ground.rl.rollout import sample
from pg_ground.tokenizer import check_vocab_size
from pg_ground.tokenizer import load as load_tokenizer
from pg_ground.types import UserError


def predict(
    params_path: Path, image_path: Path, prompt: str, tokenizer_path: str, max_new_tokens: int
) -> tuple[dict[str, Any], UInt8[np.ndarray, "H W 3"]]:
    """Returns the greedy answer (`text`, `boxes`, `points` in pixels of the original image), and the image itself.

    Raises:
      UserError: the checkpoint, the tokenizer or the image cannot be used.
    """
    tokenizer = load_tokenizer(tokenizer_path or weights.tokenizer_of(params_path))
    try:
        image = load_image(str(image_path), Path())
    except BadRecord as bad:
        raise UserError(f"--image={image_path}: {bad}") from None
    model, params = weights.load(params_path)
    check_vocab_size(tokenizer, model.config.text.vocab_size)
    pixels = resize(image, model.config.image_size).astype(np.float32) / 127.5 - 1
    ids = jnp.array([tokenizer.prefix(prompt)], jnp.int32)
    answer = jax.jit(
        partial(sample, model, group_size=1, max_new_tokens=max_new_tokens, temperature=0.0)
    )
    rollout = answer(params, pixels[None], ids, jnp.ones(ids.shape, bool), jax.random.key(0))
    tokens = rollout.tokens[0, 0][np.asarray(rollout.mask[0, 0])].tolist()
    height, width = image.shape[:2]
    return {
        "text": tokenizer.decode(tokens),
        **loc_answers(tokens, tokenizer, (width, height)),
    }, image
