"""What the compilers say -> does it fit, how long must a step take, how long will it, what does it cost."""

from collections.abc import Sequence
from typing import NamedTuple

from openo3_jax.config import GSPOConfig, ModelConfig, SFTConfig
from openo3_jax.data import workers
from openo3_jax.plan import programs, workload
from openo3_jax.plan.config import Rates, Sizes
from openo3_jax.plan.devices import GIB, PER_HOST, Devices

RUNTIME_BYTES = 4 * GIB  # of a host: Python, the compiler, buffers of the drivers
WORKER_BYTES = GIB // 2  # of a decoding process
READ_AHEAD = 3  # batches on a host at a time
CACHE_ITEM = 2  # bytes, bfloat16


class Floor(NamedTuple):
    """What a program cannot do without in a step: operations over all devices, with what is computed twice; seconds of
    arithmetic, of reading memory, of sending to other devices.
    """

    name: str
    runs: int  # of the program in a step
    flops: float
    compute_s: float
    memory_s: float
    links_s: float


class Estimate(NamedTuple):
    """Bytes are per device, times of a step, unless the name says otherwise."""

    fits: bool
    peak_bytes: int  # of the hungriest program, with the workspace
    available_bytes: int  # less the headroom
    cache_bytes: int  # keys and values of prompts and completions, while they are sampled
    workspace_bytes: int  # of cuDNN in attention's backward pass, which no compiler counts
    host_bytes: int  # of each host
    floors: list[Floor]
    floor_s: float
    rates: Rates
    expected_s: float
    model_flops: int  # over all devices, without what is computed twice
    mfu: float  # of the expected time, in [0, 1]
    run_hours: float
    run_cost: float | None


def make_estimate(
    config: SFTConfig | GSPOConfig,
    model: ModelConfig,
    sizes: Sizes,
    load: workload.Load,
    devices: Devices,
    found: Sequence[programs.Program],
    saved_bytes: int,
    rates: Rates,
) -> Estimate:
    """`saved_bytes`: per device, of what a checkpoint holds. A run is `config.steps` steps: in the recipes an epoch."""
    kind = devices.kind
    work = workload.work(config, model, sizes, load)
    floors = [_floor(program, config, work, load, devices) for program in found]
    expected_s = sum(
        max(one.compute_s / rates.compute_efficiency, max(one.memory_s, one.links_s) / rates.bandwidth_efficiency)
        for one in floors
    )
    workspace = _workspace(model, load, devices)
    peak = max((program.peak for program in found), default=0) + workspace
    hours = config.steps * expected_s / 3600
    return Estimate(
        fits=peak <= kind.memory_bytes - kind.headroom_bytes and not any(program.refused for program in found),
        peak_bytes=peak,
        available_bytes=kind.memory_bytes - kind.headroom_bytes,
        cache_bytes=_cache_bytes(config, model, load, devices),
        workspace_bytes=workspace,
        host_bytes=_host_bytes(config, load, model, devices, saved_bytes),
        floors=floors,
        floor_s=sum(max(one.compute_s, one.memory_s, one.links_s) for one in floors),
        rates=rates,
        expected_s=expected_s,
        model_flops=work.model,
        mfu=work.model / (expected_s * kind.flops_per_s * devices.number),
        run_hours=hours,
        run_cost=None if rates.price is None else hours * devices.number * rates.price,
    )


def _floor(
    program: programs.Program,
    config: SFTConfig | GSPOConfig,
    work: workload.Work,
    load: workload.Load,
    devices: Devices,
) -> Floor:
    """Rows of padding take the time of others; of a loop that ends early all runs are counted."""
    kind = devices.kind
    operations = {"prefill": work.prefill, "layout": 0, "decode": work.decode, "update": work.update}[program.name]
    flops = operations * load.padding
    runs = config.minibatches if isinstance(config, GSPOConfig) and program.name == "update" else 1
    read = program.arguments + program.outputs
    if isinstance(config, GSPOConfig) and program.name == "decode":  # each token reads the weights and the caches
        read = program.arguments * config.sampling.max_new_tokens
    is_far = kind.platform == "gpu" and devices.number > PER_HOST
    return Floor(
        program.name,
        runs,
        flops,
        compute_s=flops / (devices.number * kind.flops_per_s),
        memory_s=runs * read / kind.hbm_bytes_per_s,
        links_s=runs
        * sum(one.sent_bytes for one in program.collectives)
        / (kind.far_bytes_per_s if is_far else kind.link_bytes_per_s),
    )


def _workspace(model: ModelConfig, load: workload.Load, devices: Devices) -> int:
    """The gradient of the queries in float32, which cuDNN sums up in memory of its own: rows x slots x heads x size."""
    if devices.kind.platform != "gpu":
        return 0
    rows = -(-load.rows // devices.number)
    return 4 * rows * load.row.seq * model.text.hidden_size


def _cache_bytes(config: SFTConfig | GSPOConfig, model: ModelConfig, load: workload.Load, devices: Devices) -> int:
    if load.prompt is None or not isinstance(config, GSPOConfig):
        return 0
    text = model.text
    slot = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * CACHE_ITEM
    slots = load.prompt.seq + config.sampling.num_samples * config.sampling.max_new_tokens
    return load.prompts * slots * slot // devices.number


def _host_bytes(
    config: SFTConfig | GSPOConfig, load: workload.Load, model: ModelConfig, devices: Devices, saved_bytes: int
) -> int:
    """A checkpoint's copy while it is written, batches that are read ahead, decoding processes, and the rest."""
    on_host = devices.number / devices.hosts
    batch = load.rows * load.row.patches * model.vision.patch_dim
    decoding = (config.workers or workers.MOST) * WORKER_BYTES
    return int(saved_bytes * on_host + READ_AHEAD * batch / devices.hosts + decoding + RUNTIME_BYTES)
