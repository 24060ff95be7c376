"""The setup that all stages share: model, layout of the parameters, optimizers, train states."""

from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike
from jaxtyping import PyTree

from pg_ground import config
from pg_ground.checkpoints import weights
from pg_ground.config import Config
from pg_ground.models import PaliGemma
from pg_ground.models.quantization import abstract_frozen, cast_params
from pg_ground.parallel import sharding
from pg_ground.parallel.memory_model import Architecture
from pg_ground.parallel.sharding import AnyMesh
from pg_ground.params import SCALE, AbstractParams, flatten, is_adapter, lr_factors, unflatten
from pg_ground.storage.downloads import checkpoint_path
from pg_ground.training import optimizers
from pg_ground.types import (
    POLICY,
    Batch,
    Boxes,
    Gold,
    Params,
    Points,
    TrainState,
    UserError,
)
from pg_ground.vocab import Vocab, vocab_of_size


class Setup(NamedTuple):
    """The parts of a run that are known before any array exists."""

    config: Config
    mesh: AnyMesh
    model: PaliGemma
    vocab: Vocab
    trained: AbstractParams
    """Shape, dtype and sharding of each trained parameter, by slash-joined name."""
    frozen: AbstractParams
    """The same for the parameters that are not trained."""
    hbm_bytes: float | None
    """Memory of a device in bytes; None if it is unknown, as for a CPU."""

    @property
    def architecture(self) -> Architecture:
        """The sizes that determine memory."""
        return Architecture(self.config.model, self.config.data.prompt_length)

    @property
    def trained_tree(self) -> Params:
        """The trained parameters as a tree."""
        return unflatten(self.trained)

    @property
    def frozen_tree(self) -> Params:
        """The frozen parameters as a tree."""
        return unflatten(self.frozen)


@runtime_checkable
class StageSettings(Protocol):
    """The settings that every stage's section has."""

    @property
    def steps(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def updates_per_step(self) -> int: ...
    @property
    def parts_per_step(self) -> int: ...
    @property
    def optimizer(self) -> config.Optimizer: ...
    @property
    def sources(self) -> Any: ...


def make_setup(
    config: Config, mesh: AnyMesh, hbm_bytes: float | None, vocab: Vocab | None = None
) -> Setup:
    """Returns the setup of a run on `mesh`.

    Raises:
      UserError: a pattern or a rule matches no parameter, or the mesh cannot split an array.
    """
    model = PaliGemma(config.model, sharding.activation_sharding(mesh))
    trained, frozen = abstract_params(config, model, mesh)
    vocab = vocab_of_size(config.model.text.vocab_size) if vocab is None else vocab
    return Setup(config, mesh, model, vocab, trained, frozen, hbm_bytes)


def abstract_params(
    config: Config, model: PaliGemma, mesh: AnyMesh
) -> tuple[AbstractParams, AbstractParams]:
    """Returns shape, dtype and sharding of the trained and of the frozen parameters, by name.

    Raises:
      UserError: a pattern or a rule matches no parameter, or the mesh cannot split an array.
    """
    shapes = model.abstract_params()
    sharding.check_rules(config.mesh.rules, list(shapes))
    if config.model.lora.rank and not any(map(is_adapter, shapes)):
        raise UserError(
            f"config.model.lora.pattern {config.model.lora.pattern!r} matches no matrix, such as "
            "llm/layers/mlp/linear"
        )
    factors = lr_factors(shapes, config.lr_factors)
    param_dtype = jnp.dtype(config.model.param_dtype)
    typed: AbstractParams = {}
    for name, leaf in shapes.items():
        if factors[name]:
            typed[name] = jax.ShapeDtypeStruct(leaf.shape, param_dtype)
        else:  # two arrays for a matrix in int8
            typed |= abstract_frozen(name, leaf.shape, config.model.frozen_dtype)
    placed = with_shardings(typed, sharding.infer_shardings(mesh, typed, config.mesh.rules))
    trained = {name: leaf for name, leaf in placed.items() if factors.get(name)}
    return trained, {name: leaf for name, leaf in placed.items() if name not in trained}


def with_shardings(tree: PyTree, shardings: PyTree) -> PyTree:
    """Returns abstract arrays with the shapes and dtypes of `tree` and these shardings."""
    return jax.tree.map(
        lambda leaf, placement: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement),
        tree,
        shardings,
    )


def init_params(config: Config, model: PaliGemma, abstract: AbstractParams) -> Params:
    """Returns the first parameters, sharded as `abstract` says.

    They come from `config.init` if it is set. New adapters do nothing yet. All other parameters are
    random.
    """
    loaded: dict[str, jax.Array] = {}
    if config.init:
        checkpoint = weights.open_checkpoint(
            checkpoint_path(config.init, "config.init"), config.model, config.resample_positions
        )
        in_checkpoint = {
            name: leaf
            for name, leaf in abstract.items()
            if name.removesuffix(SCALE) in checkpoint.abstract
        }
        loaded = checkpoint.read(in_checkpoint)
    missing = {name: leaf for name, leaf in abstract.items() if name not in loaded}

    def init_missing() -> dict[str, Any]:
        params = flatten(model.init(jax.random.key(config.seed)))
        return cast_params(params, missing)

    if missing:
        shardings = {name: leaf.sharding for name, leaf in missing.items()}
        loaded |= jax.jit(init_missing, out_shardings=shardings)()
    return unflatten(loaded)


def make_optimizer(setup: Setup, settings: StageSettings) -> optax.GradientTransformation:
    """Returns the optimizer of a stage."""
    factors = lr_factors([*setup.trained, *setup.frozen], setup.config.lr_factors)
    by_path = {f"{POLICY}/{name}": factor for name, factor in factors.items() if factor}
    updates = settings.steps * settings.updates_per_step
    return optimizers.make_optimizer(settings.optimizer, updates, by_path)


def abstract_state(setup: Setup, settings: StageSettings) -> TrainState:
    """Returns shapes, dtypes and shardings of a stage's train state."""
    params = {POLICY: setup.trained_tree}
    state = TrainState(
        cast(Any, jax.ShapeDtypeStruct((), jnp.int32)),
        params,
        jax.eval_shape(make_optimizer(setup, settings).init, params),
        cast(Any, jax.ShapeDtypeStruct((), jnp.float32)),
    )
    rules = setup.config.mesh.rules
    return with_shardings(state, sharding.infer_shardings(setup.mesh, state, rules))


def init_state(
    setup: Setup, settings: StageSettings, params: Params, kl_coef: float = 0.0
) -> TrainState:
    """Returns the train state at the start of a stage, sharded over the mesh as `params` are."""
    trees = {POLICY: params}
    init = make_optimizer(setup, settings).init
    shapes = jax.eval_shape(init, trees)
    shardings = sharding.infer_shardings(setup.mesh, shapes, setup.config.mesh.rules)
    opt_state = jax.jit(init, out_shardings=shardings)(trees)
    scalars = (np.int32(0), np.float32(kl_coef))
    step, kl_coef_array = jax.device_put(scalars, sharding.replicated(setup.mesh))
    return TrainState(step, trees, opt_state, kl_coef_array)


def resident_memory(setup: Setup, settings: StageSettings) -> dict[str, float]:
    """Returns the bytes per device of parameters and optimizer."""
    state = abstract_state(setup, settings)
    return {
        "parameters": sharding.bytes_per_device((state.params, setup.frozen_tree)),
        "optimizer": sharding.bytes_per_device(state.opt_state),
    }


def learning_rates(settings: StageSettings) -> np.ndarray:
    """Returns the learning rate of the last update of each step, f32[steps]."""
    per_step = settings.updates_per_step
    schedule = optimizers.schedule(settings.optimizer, settings.steps * per_step)
    return np.asarray(schedule(np.arange(per_step - 1, settings.steps * per_step, per_step)))


def abstract_rows(shape: tuple[int, ...], dtype: DTypeLike, mesh: AnyMesh) -> Any:
    """Returns the abstract array of this shape, sharded along its first axis B."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(mesh))


def abstract_key(mesh: AnyMesh) -> Any:
    """Returns the abstract array of a random key."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(mesh))


def abstract_batch(setup: Setup, questions: int) -> Batch:
    """Returns the abstract arrays of a batch, as the data pipeline stacks it.

    Raises:
      UserError: the mesh does not divide the batch.
    """
    sharding.check_batch_size(setup.mesh, questions, "batch_size (of a program)")
    data = setup.config.data
    side = setup.config.model.image_size
    slots = data.max_boxes

    def rows(*shape: int, dtype: DTypeLike = jnp.int32) -> Any:
        return abstract_rows((questions, *shape), dtype, setup.mesh)

    boxes = Boxes(rows(slots, 4, dtype=jnp.float32), rows(slots), rows(slots, dtype=jnp.bool_))
    points = Points(rows(slots, 2, dtype=jnp.float32), rows(slots), rows(slots, dtype=jnp.bool_))
    masks = rows(slots, data.mask_size, data.mask_size, dtype=jnp.bool_)
    return Batch(
        image=rows(side, side, 3, dtype=jnp.uint8),
        prompt=rows(data.prompt_length),
        prompt_mask=rows(data.prompt_length, dtype=jnp.bool_),
        suffix=rows(data.suffix_length),
        suffix_mask=rows(data.suffix_length, dtype=jnp.bool_),
        gold=Gold(boxes, points, rows(), rows(slots, data.suffix_length), masks),
        size=rows(2),
        source=rows(),
        index=rows(),
    )
