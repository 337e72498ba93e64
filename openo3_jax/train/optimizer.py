"""The optax chain: clip by global norm, then AdamW or Muon, with the learning rate's schedule."""

import jax
import optax
from flax import nnx
from optax import contrib

from openo3_jax.config import OptimizerConfig
from openo3_jax.mesh import is_variable

# Muon's updates are orthonormal; this makes their size that of AdamW's (arXiv:2502.16982, section 2.2).
MUON_RMS = 0.2


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate at each of `steps` updates: a linear warm-up, then linear or cosine decay to 0, or constant."""
    return _schedule(config, steps, config.learning_rate)


def _schedule(config: OptimizerConfig, steps: int, peak: float) -> optax.Schedule:
    decay_steps = max(1, steps - config.warmup_steps)
    after = {
        "linear": optax.linear_schedule(peak, 0.0, decay_steps),
        "cosine": optax.cosine_decay_schedule(peak, decay_steps),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    if not config.warmup_steps:
        return after
    warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    schedule = make_schedule(config, steps)
    adam = {"b1": config.beta1, "b2": config.beta2, "eps": config.eps}
    if config.name == "adamw":
        update = optax.adamw(schedule, **adam, weight_decay=config.weight_decay)
    else:
        update = contrib.muon(
            schedule,
            adam_learning_rate=_schedule(config, steps, config.adam_learning_rate or config.learning_rate),
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            adam_weight_decay=config.weight_decay,
            eps=config.eps,
            weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=_matrices,
            consistent_rms=MUON_RMS,
        )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)


def _matrices(params: nnx.State):
    """Kernels are Muon's, one matrix per layer; embeddings, heads, norms and biases are AdamW's.

    optax gives both Nesterov momentum.
    """

    def choose(path: tuple, variable: nnx.Variable):
        is_matrix = path[-1].key == "kernel"
        return variable.replace(contrib.MuonDimensionNumbers(-2, -1) if is_matrix else None)

    return jax.tree_util.tree_map_with_path(choose, params, is_leaf=is_variable)
