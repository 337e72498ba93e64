"""A model with its processor: conversations in, logits or text out, a Hugging Face directory back."""

import contextlib
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int, UInt32

from openo3_jax import hosts, model_files
from openo3_jax import mesh as mesh_lib
from openo3_jax.config import ModelConfig, SamplingConfig, VideoConfig
from openo3_jax.data import conversations as conversations_lib
from openo3_jax.data import packing, prompt_rows, tokens
from openo3_jax.data import video as video_lib
from openo3_jax.errors import InputError
from openo3_jax.models import generate as generate_lib
from openo3_jax.models import hf_weights, lora, peft_files
from openo3_jax.types import Array, Batch, Sample

Conversation = Sequence[Mapping[str, Any]]
Dtype = Literal["float32", "bfloat16"]

CAPACITY_STEP = 64  # the decode loop is compiled for multiples of this many tokens

# XLA multiplies bfloat16 as float32 on a CPU. By default it converts all weights before the loop that uses them and
# keeps them all: 30 GB for a 7B model. With these it converts one layer, uses it, and goes on.
LEAN = {
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "xla_disable_hlo_passes": "while-loop-invariant-code-motion",
}


class Generations(NamedTuple):
    """Sample g of conversation i at `[i][g]`. `logp`: nats of the raw logits; `finished`: False where the limit cut."""

    texts: list[list[str]]
    tokens: list[list[Int[np.ndarray, " tokens"]]]
    logp: list[list[Float[np.ndarray, " tokens"]]]
    finished: list[list[bool]]


@dataclasses.dataclass(frozen=True)
class Policy:
    """Weights, definition and processor. `load_pretrained` makes it; nothing here changes it."""

    graphdef: nnx.GraphDef
    params: nnx.State
    mesh: Mesh
    processor: tokens.Processor
    directory: Path  # where tokenizer, template and settings are copied from
    dtypes: Mapping[str, jnp.dtype]  # stored dtype of every HF key
    video: VideoConfig
    video_mode: Literal["frames", "native"]

    @property
    def config(self) -> ModelConfig:
        return self.processor.config

    @functools.cached_property
    def sampling_layout(self) -> generate_lib.SamplingLayout:
        """The decoder's weights as decoding wants them, made on first use and kept: a second copy of them, but on one
        CPU device the same memory.
        """
        if self.mesh.devices.size == 1 and self._is_on_cpu:
            return generate_lib.shared_layout(self.graphdef, self.params)
        return _sampling_layout(self.graphdef, self.params)

    @property
    def _is_on_cpu(self) -> bool:
        return self.mesh.devices.flat[0].platform == "cpu"

    @property
    def _is_converted(self) -> bool:
        """Whether the compiler must convert weights to multiply them."""
        return self._is_on_cpu and any(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(self.params))

    def without_weights(self) -> "Policy":
        """The same with shapes in the place of weights, which may then leave the memory."""
        return dataclasses.replace(self, params=jax.eval_shape(lambda params: params, self.params))

    def encode(self, conversations: Sequence[Conversation]) -> list[Sample]:
        """Read the media and tokenise. Raises InputError naming the conversation's part or the file."""
        if not conversations:
            raise InputError("conversations: got an empty list; expected at least one conversation")
        with video_lib.Decoder() as decoder:
            read = video_lib.make_reader(decoder)
            return [self.processor.encode(self._load(conversation, read)) for conversation in conversations]

    def _load(self, conversation: Conversation, read: video_lib.Reader) -> list[tokens.Message]:
        sizing = self.processor.image_sizing._asdict()
        return conversations_lib.load_conversation(
            conversation, **sizing, config=self.video, video_mode=self.video_mode, read=read
        )

    def batch(self, samples: Sequence[Sample | None], bucket: packing.Bucket | None = None) -> Batch:
        """One row per sample, padded to a bucket (None: the smallest) with the mesh's rows, on the devices.

        None leaves a row empty. Of several processes each gives all rows, but those that others hold may be None.
        """
        shape = bucket or self.bucket([sample for sample in samples if sample is not None])
        rows = [[] if sample is None else [sample] for sample in samples]
        return self._place(rows + [[]] * (shape.rows - len(rows)), shape)

    def _place(self, rows: Sequence[packing.Row], shape: packing.Bucket) -> Batch:
        own = self._own(rows)
        batch = packing.make_batch(
            own, dataclasses.replace(shape, rows=len(own)), self.config, pad_id=self.processor.pad_id
        )
        return mesh_lib.shard_rows(batch, self.mesh)

    def prompt_batch(
        self, samples: Sequence[Sample | None], bucket: packing.Bucket | None = None
    ) -> tuple[Batch, Int[Array, "prompts prefix"]]:
        """What `generate.prefill` wants, on the devices. Short prompts share a row as long as the longest; with a
        bucket each has its own.

        A place that is None gets no tokens. Of several processes each gives all prompts (those that others hold may be
        None) and a bucket.
        """
        num = self.round_rows(len(samples)) if bucket is None else bucket.rows
        size = num // mesh_lib.row_share(self.mesh).parts
        padded = [*samples, *[None] * (num - len(samples))]
        parts = [padded[start : start + size] for start in range(0, num, size)]
        lengths = [[0 if sample is None else len(sample.tokens) for sample in part] for part in parts]
        if bucket is None:
            most = packing.round_up(max(itertools.chain(*lengths)), packing.STEPS["seq"])
            packed = [prompt_rows.share(part, most) for part in lengths]
        else:
            packed = [prompt_rows.alone(size)] * len(parts)
        height = min(size, 1 << (max(map(len, packed)) - 1).bit_length())  # a power of two, for few programs
        rows = [
            [part[prompt] for prompt in row if part[prompt] is not None]
            for part, together in zip(parts, packed, strict=True)
            for row in [*together, *[[]] * (height - len(together))]
        ]
        shape = bucket or packing.bucket_for(rows, self.config.vision, num_rows=len(rows))
        slots = [prompt_rows.slots(row, part, shape.seq) for row, part in zip(packed, lengths, strict=True)]
        own = np.stack(self._own([*itertools.chain(*slots)]))
        return self._place(rows, shape), mesh_lib.shard_rows(own, self.mesh)

    def _own(self, rows: Sequence[Any]) -> list[Any]:
        """Those that lie on this process's devices."""
        return [rows[row] for row in mesh_lib.row_share(self.mesh).rows(len(rows))]

    def bucket(self, samples: Sequence[packing.Placed]) -> packing.Bucket:
        """The smallest bucket with a row for each sample whose rows the mesh divides."""
        return packing.bucket_for(
            [[sample] for sample in samples], self.config.vision, num_rows=self.round_rows(len(samples))
        )

    def round_rows(self, rows: int) -> int:
        """The next number of rows that the mesh's devices share equally."""
        ways = mesh_lib.mesh_size(self.mesh, mesh_lib.LOGICAL_AXES["rows"])
        return -(-rows // ways) * ways

    def logits(self, conversations: Sequence[Conversation]) -> list[Float[np.ndarray, "seq vocab"]]:
        """Scores of the next token at every slot of each conversation, float32, unpadded."""
        samples = self.encode(conversations)
        programs = _programs(self._is_converted)
        hidden = programs.hidden(self.graphdef, self.params, self.batch(samples))
        rows = (programs.logits(self.graphdef, self.params, hidden[i]) for i in range(len(samples)))  # one at a time
        return [hosts.whole(row)[: len(sample.tokens)] for row, sample in zip(rows, samples, strict=True)]

    def generate(
        self,
        conversations: Sequence[Conversation],
        *,
        num_samples: int = 1,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        seed: int | Sequence[int] = 0,
        ban_special: bool = True,
    ) -> Generations:
        """Continue each conversation `num_samples` times; the samples share its prefix.

        Temperature 0 is greedy. Sample g of conversation i draws from `fold_in(key(seed_i), g)`, so it does not
        depend on its place in the batch. `ban_special` bans every special token but the stops, and ids that the
        tokenizer lacks. Raises InputError for settings out of range or a wrong number of seeds.
        """
        config = SamplingConfig(
            num_samples=num_samples,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            repetition_penalty=repetition_penalty,
        )
        seeds = [seed] * len(conversations) if isinstance(seed, int | np.integer) else list(seed)
        if len(seeds) != len(conversations):
            raise InputError(f"generate: {len(seeds)} seeds for {len(conversations)} conversations; give one each")
        return self.continue_samples(self.encode(conversations), config, seeds, ban_special=ban_special)

    def continue_samples(
        self,
        samples: Sequence[Sample | None],
        config: SamplingConfig,
        seeds: Sequence[int],
        *,
        ban_special: bool = True,
        bucket: packing.Bucket | None = None,
    ) -> Generations:
        """`generate` for prompts that are tokenised already, one seed each; one program for each bucket.

        A place that is None gets nothing, unless another process has its prompt: all of them get all completions.
        """
        max_new_tokens = config.max_new_tokens
        batch, slots = self.prompt_batch(samples, bucket)
        own = self._own([*seeds, *[0] * (slots.shape[0] - len(samples))])
        keys = mesh_lib.shard_rows(_keys(own, config.num_samples), self.mesh)
        programs = _programs(self._is_converted)
        prompts = programs.prefill(self.graphdef, self.params, batch, slots)
        out = programs.decode(
            self.sampling_layout,
            prompts,
            keys,
            self._mask(self.processor.stop_ids),
            self._mask(self.processor.banned_ids(self.config.text.vocab_size) if ban_special else ()),
            np.int32(max_new_tokens),
            config=dataclasses.replace(config, max_new_tokens=-(-max_new_tokens // CAPACITY_STEP) * CAPACITY_STEP),
        )
        return self._unpad(hosts.whole(out), len(samples))

    def _mask(self, ids: Sequence[int] | Int[np.ndarray, " ids"]) -> Bool[np.ndarray, " vocab"]:
        return np.isin(np.arange(self.config.text.vocab_size), np.asarray(ids, np.int32))

    def _unpad(self, out: generate_lib.Generated, num: int) -> Generations:
        group = range(out.tokens.shape[1])
        kept = [[out.tokens[i, g, : out.lengths[i, g]] for g in group] for i in range(num)]
        return Generations(
            texts=[[self.processor.decode(sample) for sample in row] for row in kept],
            tokens=kept,
            logp=[[out.logp[i, g, : out.lengths[i, g]] for g in group] for i in range(num)],
            finished=[[bool(out.finished[i, g]) for g in group] for i in range(num)],
        )

    def save_pretrained(self, out: str | os.PathLike, dtype: Dtype | None = None) -> None:
        """Write a Hugging Face directory in the hub's spelling; `dtype` None keeps each tensor's stored one.

        Tokenizer, template and processor files are copied byte for byte. The directory appears whole or not at all.
        Every process must call it; the first one writes. Raises InputError if `out` exists and is not empty, in all of
        them.
        """
        dtypes = self.dtypes if dtype is None else dict.fromkeys(self.dtypes, jnp.dtype(dtype))
        with contextlib.ExitStack() as stack:

            def begin() -> Path | None:
                if not hosts.is_first():
                    return None
                staging = stack.enter_context(model_files.new_directory(Path(out)))
                model_files.copy_model_files(self.directory, staging)
                if dtype is not None:
                    model_files.write_dtype(staging / "config.json", dtype)
                return staging

            staging, _ = hosts.together(begin)
            hf_weights.save(self.params, self.config, dtypes, staging)
            hosts.together(stack.close)  # the directory gets its name before any process goes on

    def save_adapter(self, out: str | os.PathLike) -> None:
        """Write the adapters alone, as `peft` reads them. The directory appears whole or not at all.

        Raises InputError if there are none, or if `out` exists and is not empty.
        """
        if not lora.is_attached(self.params):
            raise InputError(f"{out}: there is no adapter to write: all weights were trained; export them whole")
        with model_files.new_directory(Path(out)) as staging:
            peft_files.save(self.params, self.config, self.directory, staging)


def load_pretrained(
    directory: str | os.PathLike,
    *,
    dtype: Dtype = "float32",
    mesh: Mapping[str, int] | Mesh | None = None,
    video_mode: Literal["frames", "native"] = "frames",
    video: VideoConfig | None = None,
) -> Policy:
    """Load a Qwen2.5-VL directory in Hugging Face layout, weights cast to `dtype` and sharded over the mesh.

    A directory as `peft` writes it is read with the model that it names, the adapter added to the weights.

    `mesh`: axis sizes such as `{"fsdp": 4, "tensor": 2}`, None for all local devices on fsdp, or a mesh.
    `video_mode`: "frames" gives each frame as a picture with its time in text, "native" as temporal patches.
    `video`: how clips become frames, None for the reference's numbers. Raises InputError for anything that is missing
    or does not fit.
    """
    directory = Path(directory)
    for name, value, known in (
        ("dtype", dtype, ("float32", "bfloat16")),
        ("video_mode", video_mode, ("frames", "native")),
    ):
        if value not in known:
            raise InputError(f"load_pretrained: {name}={value!r}; expected one of {', '.join(known)}")
    adapter = directory if peft_files.is_adapter(directory) else None
    if adapter is not None:
        directory = peft_files.base_of(adapter)
    if not (directory / "config.json").is_file():
        raise InputError(f"{directory}: no config.json; expected a Qwen2.5-VL directory in Hugging Face layout")
    processor = tokens.load_processor(directory)
    devices = mesh if isinstance(mesh, Mesh) else mesh_lib.make_mesh(mesh)
    graphdef, params, dtypes = hf_weights.load(directory, processor.config, devices, jnp.dtype(dtype))
    if adapter is not None:
        params = peft_files.merge(params, processor.config, adapter)
    return Policy(
        graphdef=graphdef,
        params=params,
        mesh=devices,
        processor=processor,
        directory=directory,
        dtypes=dtypes,
        video=video or VideoConfig(),
        video_mode=video_mode,
    )


def _keys(seeds: Sequence[int], group: int) -> UInt32[np.ndarray, "seeds group words"]:
    """The random key of each sample, as words."""
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    return np.stack([jax.random.key_data(fold(jax.random.key(seed), jnp.arange(group))) for seed in seeds])


class _Programs(NamedTuple):
    """Jitted: prefill and decode are those of `models/generate.py`."""

    hidden: Callable[..., jax.Array]
    logits: Callable[..., jax.Array]
    prefill: Callable[..., generate_lib.Prompts]
    decode: Callable[..., generate_lib.Generated]


@functools.cache
def _programs(is_lean: bool) -> _Programs:
    """`is_lean`: without a second copy of weights that the compiler must convert, see `LEAN`."""
    jit = functools.partial(jax.jit, compiler_options=LEAN if is_lean else None)

    def hidden(graphdef: nnx.GraphDef, params: nnx.State, batch: Batch) -> jax.Array:
        return nnx.merge(graphdef, params).hidden(batch)[0]

    def logits(graphdef: nnx.GraphDef, params: nnx.State, hidden: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params).logits(hidden)

    def decode(
        layout: generate_lib.SamplingLayout, prompts: generate_lib.Prompts, keys: jax.Array, *limits: Any, config: Any
    ) -> generate_lib.Generated:
        return generate_lib.decode(layout, prompts, jax.random.wrap_key_data(keys), *limits, config=config)

    return _Programs(
        hidden=jit(hidden, static_argnums=0),
        logits=jit(logits, static_argnums=0),
        prefill=jit(generate_lib.prefill, static_argnums=0),
        decode=jit(decode, static_argnames="config"),
    )


_sampling_layout = jax.jit(generate_lib.sampling_layout, static_argnums=0)
