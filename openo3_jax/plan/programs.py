"""The programs of a recipe, compiled from shapes alone: nothing of a weight's size is ever allocated."""

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from openo3_jax import mesh as mesh_lib
from openo3_jax.config import GSPOConfig, ModelConfig, SFTConfig
from openo3_jax.data import packing
from openo3_jax.models import generate, lora, qwen2_5_vl
from openo3_jax.plan import hlo, workload
from openo3_jax.policy import CAPACITY_STEP
from openo3_jax.train import state as state_lib
from openo3_jax.train import steps
from openo3_jax.types import Batch, Rollouts

NO_ROOM = "RESOURCE_EXHAUSTED"  # what a compiler that knows its device's memory says


class Program(NamedTuple):
    """What a compiler says of a program. Bytes are per device."""

    name: str
    compiled_s: float
    arguments: int
    outputs: int  # that do not take the memory of arguments
    temporary: int
    resident: int  # what lies beside the arguments while it runs
    collectives: list[hlo.Collective]
    gathered_outside_loops: int
    most_logits: int  # slots of a device that have logits at a time
    copied_in_loops: int  # large arrays, each time the loop runs
    refused: str | None = None  # by a compiler that does not take what does not fit

    @property
    def peak(self) -> int:
        return self.arguments + self.outputs + self.temporary + self.resident


class Abstract(NamedTuple):
    """Shapes and places of a recipe on a mesh."""

    state: state_lib.TrainState
    weights: Any  # of the policy in the dtype of computation
    mesh: Mesh


def make_abstract(config: SFTConfig | GSPOConfig, model: ModelConfig, mesh: Mesh) -> Abstract:
    graphdef, params = qwen2_5_vl.abstract_params(model, mesh)
    needs_copy = isinstance(config, GSPOConfig) and config.kl_coef > 0 and config.lora is None
    state = state_lib.abstract_state(graphdef, params, config, params if needs_copy else None, mesh=mesh)

    def cast(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, config.compute_dtype, sharding=x.sharding)

    return Abstract(state, lora.join(state.frozen, jax.tree.map(cast, state.params)), mesh)


def compile_all(
    config: SFTConfig | GSPOConfig,
    model: ModelConfig,
    load: workload.Load,
    mesh: Mesh,
    options: Mapping[str, Any] | None = None,
) -> Iterator[Program]:
    """One after the other, as a step runs them. `options`: of the compiler."""
    shapes = make_abstract(config, model, mesh)
    checked = partial(_compile, model=model, mesh=mesh, options=options)
    batch = abstract_batch(load.row, load.rows, model, mesh)
    if isinstance(config, SFTConfig):
        yield checked("update", steps.make_sft_step(config).lower(shapes.state, batch))[0]
        return
    yield from _rollout(config, model, load, shapes, checked)
    rollouts = _abstract_rollouts(batch, config, mesh)
    yield checked("update", steps.make_gspo_step(config).lower(shapes.state, rollouts))[0]


def _rollout(
    config: GSPOConfig, model: ModelConfig, load: workload.Load, shapes: Abstract, checked: Any
) -> Iterator[Program]:
    """Prefill, the weights laid out for decoding, and decoding. The state waits meanwhile, with a cast copy of it."""
    mesh, graphdef = shapes.mesh, shapes.state.graphdef
    fixed = num_bytes(shapes.state)
    cast = num_bytes(shapes.weights) - num_bytes(shapes.state.frozen)  # what is frozen is cast already
    prompts = abstract_batch(load.prompt, load.prompts, model, mesh)
    slots = _described((load.prompts, load.prompt.seq), jnp.int32, mesh, "rows")
    prefill = jax.jit(generate.prefill, static_argnums=0).lower(graphdef, shapes.weights, prompts, slots)
    program, compiled = checked("prefill", prefill, alive=fixed + cast + num_bytes((prompts, slots)))
    yield program
    if compiled is None:
        return
    made = _placed(jax.eval_shape(partial(generate.prefill, graphdef), shapes.weights, prompts, slots), compiled)
    lay_out = jax.jit(generate.sampling_layout, static_argnums=0).lower(graphdef, shapes.weights)
    program, compiled = checked("layout", lay_out, alive=fixed + cast + num_bytes(made))
    yield program
    if compiled is None:
        return
    layout = _placed(jax.eval_shape(partial(generate.sampling_layout, graphdef), shapes.weights), compiled)
    sampling = config.sampling
    capacity = -(-sampling.max_new_tokens // CAPACITY_STEP) * CAPACITY_STEP
    sampling = dataclasses.replace(sampling, max_new_tokens=capacity)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), (load.prompts, sampling.num_samples)))
    keys = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=mesh_lib.sharding(mesh, "rows"))
    vocab = _described((model.text.vocab_size,), jnp.bool_, mesh)
    limit = _described((), jnp.int32, mesh)
    decode = jax.jit(generate.decode, static_argnames="config").lower(
        layout, made, keys, vocab, vocab, limit, config=sampling
    )
    heads = model.text.num_key_value_heads * model.text.head_dim // mesh.shape["tensor"]
    rows = load.prompts // mesh_lib.mesh_size(mesh, mesh_lib.LOGICAL_AXES["rows"])
    cache = rows * sampling.num_samples * capacity * heads * jnp.dtype(config.compute_dtype).itemsize
    alive = fixed + cast + num_bytes((layout, made))
    yield checked("decode", decode, alive=alive, trips=capacity, copies_from=cache)[0]


def num_bytes(tree: Any) -> int:
    """On one device, of arrays that are only described."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def abstract_batch(bucket: packing.Bucket, rows: int, model: ModelConfig, mesh: Mesh) -> Batch:
    """Shapes and places of a batch, as `mesh.shard_rows` places one."""
    one_row = packing.make_batch([], dataclasses.replace(bucket, rows=1), model)

    def describe(path: tuple, leaf: Any) -> jax.ShapeDtypeStruct:
        logical = ("rows", "patches") if getattr(path[-1], "name", None) == "patches" else ("rows",)
        shape = (rows, *leaf.shape[1:])
        mesh_lib.check_divides(shape, logical, mesh)
        return _described(shape, leaf.dtype, mesh, *logical)

    return jax.tree_util.tree_map_with_path(describe, one_row)


def _described(shape: tuple[int, ...], dtype: Any, mesh: Mesh, *logical: str) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=mesh_lib.sharding(mesh, *logical))


def _abstract_rollouts(batch: Batch, config: GSPOConfig, mesh: Mesh) -> Rollouts:
    of_targets = {name: jnp.float32 for name in ("sampled_logp", "old_logp")} | {"completion": jnp.int32}
    of_groups = {"advantage": jnp.float32, "keep": jnp.bool_}
    group = (batch.targets.shape[0], config.sampling.num_samples)
    return Rollouts(
        batch=batch,
        **{name: _described(batch.targets.shape, dtype, mesh, "rows") for name, dtype in of_targets.items()},
        **{name: _described(group, dtype, mesh, "rows") for name, dtype in of_groups.items()},
    )


def _placed(shapes: Any, compiled: jax.stages.Compiled) -> Any:
    """A program's outputs where it leaves them."""
    return jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, compiled.output_shardings
    )


def _compile(
    name: str,
    lowered: jax.stages.Lowered,
    *,
    model: ModelConfig,
    mesh: Mesh,
    options: Mapping[str, Any] | None,
    alive: int = 0,
    trips: int = 1,
    copies_from: int = 2**62,
) -> tuple[Program, jax.stages.Compiled | None]:
    """`alive`: bytes of a device that are taken while it runs, whether it reads them or not; `trips`: of the loop that
    ends when all are done; `copies_from`: bytes from which on a copy is counted.
    """
    started_s = time.monotonic()
    try:
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if NO_ROOM not in str(error):
            raise
        nothing = {field: 0 for field in Program._fields[1:6]} | {"collectives": []}
        nothing |= {field: 0 for field in Program._fields[7:10]}
        return Program(name, **nothing, refused=str(error).splitlines()[0]), None
    text, memory = compiled.as_text(), compiled.memory_analysis()
    dim, ways = model.text.hidden_size, mesh_lib.mesh_size(mesh, mesh_lib.LOGICAL_AXES["embed"])
    vocab = model.text.vocab_size // mesh.shape["tensor"]
    found = Program(
        name=name,
        compiled_s=time.monotonic() - started_s,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        resident=max(0, alive - memory.argument_size_in_bytes),
        collectives=hlo.collectives(text, unknown_trips=trips),
        gathered_outside_loops=hlo.gathered_outside_loops(text),
        most_logits=hlo.most_logits(text, vocab=vocab, dims={dim, dim // ways}),
        copied_in_loops=hlo.copied_in_loops(text, at_least=copies_from, vocab=vocab),
    )
    return found, compiled
