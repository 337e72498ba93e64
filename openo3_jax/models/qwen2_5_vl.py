"""The whole model: embed, put visual tokens into their slots, decode, logits."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float

from openo3_jax import mesh as mesh_lib
from openo3_jax.config import ModelConfig, Remat
from openo3_jax.models import attention, layers, moves, text, vision
from openo3_jax.types import Array, Batch


class Qwen2_5_VL(nnx.Module):
    """Vision tower, decoder and head. `mesh` is static: it travels with the graph definition into `jit`."""

    def __init__(self, config: ModelConfig, *, mesh: Mesh, rngs: nnx.Rngs):
        self.visual = vision.VisionTower(config.vision, mesh=mesh, rngs=rngs)
        self.text = text.TextDecoder(config.text, mesh=mesh, rngs=rngs)
        if not config.text.tie_word_embeddings:
            self.lm_head = layers.Embedding(config.text.vocab_size, config.text.hidden_size, rngs=rngs)
        self.config = config
        self.mesh = mesh

    @property
    def head_module(self) -> layers.Embedding:
        return self.text.embed_tokens if self.config.text.tie_word_embeddings else self.lm_head

    @property
    def head(self) -> Float[Array, "vocab dim"]:
        """The output table: its own, or the embedding's where they are tied."""
        return self.head_module.weight[...]

    def embed(self, batch: Batch, *, remat: bool | Remat = False) -> Float[Array, "rows seq dim"]:
        """Token embeddings with the visual tokens of the row in their slots."""
        mesh_lib.check_divides(batch.tokens.shape, ("rows", "seq"), self.mesh)
        x = self.text.embed_tokens(batch.tokens, mesh=self.mesh)
        if batch.vision.patches.shape[1]:
            visual = self.visual(batch.vision, remat=remat)
            placed = moves.rearrange(visual, batch.visual_tokens, batch.visual_slots, self.mesh, "patches", "seq")
            x = jnp.where((batch.visual_tokens >= 0)[..., None], placed.astype(x.dtype), x)
        return x

    def hidden(
        self,
        batch: Batch,
        *,
        remat: bool | Remat = False,
        keep_cache: bool = False,
        backend: attention.Backend = "auto",
        group: attention.Group | None = None,
    ) -> tuple[Float[Array, "rows seq dim"], text.KeyValue | None]:
        """Hidden states after the last norm; see `TextDecoder.__call__` for the options."""
        slots = attention.Slots(batch.segments, batch.branches)
        x = self.embed(batch, remat=remat)
        return self.text(x, batch.positions, slots, remat=remat, keep_cache=keep_cache, backend=backend, group=group)

    def logits(self, hidden: Float[Array, "*batch dim"]) -> Float[Array, "*batch vocab"]:
        """Scores of the next token in float32. Training never calls it on a whole row (see train/losses.py)."""
        head = layers.gathered(self.head_module, self.mesh)
        return jnp.einsum("...d,vd->...v", hidden, head.weight[...], preferred_element_type=jnp.float32)


def init_params(config: ModelConfig, mesh: Mesh, seed: int) -> tuple[nnx.GraphDef, nnx.State]:
    """A randomly initialised model in float32, each weight made where the mesh wants it."""
    graphdef, abstract = abstract_params(config, mesh)

    def make():
        return nnx.state(Qwen2_5_VL(config, mesh=mesh, rngs=nnx.Rngs(seed)))

    return graphdef, jax.jit(make, out_shardings=mesh_lib.state_shardings(abstract, mesh))()


def abstract_params(config: ModelConfig, mesh: Mesh) -> tuple[nnx.GraphDef, nnx.State]:
    """Shapes and logical axes of every weight, without memory."""
    model = nnx.eval_shape(lambda: Qwen2_5_VL(config, mesh=mesh, rngs=nnx.Rngs(0)))
    return nnx.split(model)
