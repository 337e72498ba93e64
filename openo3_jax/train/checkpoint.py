"""Train state <-> disk, through orbax: weights and optimizer as two items, so that export reads the weights alone."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh

from openo3_jax import mesh as mesh_lib
from openo3_jax.errors import InputError
from openo3_jax.train.state import TrainState


def save(directory: Path, state: TrainState) -> None:
    """Write the state as `directory/<step>`; it appears whole or not at all."""
    items = {"params": state.params, "optimizer": state.opt_state}
    with ocp.CheckpointManager(directory.absolute()) as manager:
        arguments = {name: ocp.args.StandardSave(_flatten(tree)) for name, tree in items.items()}
        manager.save(int(state.step), args=ocp.args.Composite(**arguments))
        manager.wait_until_finished()


def load_params(directory: Path, abstract: nnx.State, mesh: Mesh) -> nnx.State:
    """The weights of the newest checkpoint, float32, placed on the mesh. Raises InputError if there is none."""
    if not directory.is_dir():
        raise InputError(f"{directory}: no checkpoints; expected the directory of a training run")
    with ocp.CheckpointManager(directory.absolute()) as manager:
        step = manager.latest_step()
        if step is None:
            raise InputError(f"{directory}: holds no finished checkpoint; was the run stopped before its first one?")
        places = mesh_lib.state_shardings(abstract, mesh)
        wanted = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), abstract, places)
        arguments = ocp.args.Composite(params=ocp.args.StandardRestore(_flatten(wanted)))
        flat = manager.restore(step, args=arguments)["params"]
    paths, treedef = jax.tree_util.tree_flatten_with_path(abstract)
    return jax.tree.unflatten(treedef, [flat[jax.tree_util.keystr(path)] for path, _ in paths])


def _flatten(tree: Any) -> dict[str, Any]:
    """Leaves by their path: a layout on disk that does not depend on container types."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
