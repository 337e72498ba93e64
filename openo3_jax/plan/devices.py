"""Accelerators: what their makers state, and descriptions of them for which a compiler compiles."""

import importlib.util
import math
import os
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

from openo3_jax.errors import InputError

GIB = 2**30
PER_HOST = 8  # GPUs that share NVLink


class Kind(NamedTuple):
    """One device. `link_*`: bytes per second that leave it in one direction, within a host (a slice) and beyond."""

    platform: Literal["gpu", "tpu"]
    memory_bytes: int  # that a program may use
    headroom_bytes: int  # of it, for what no compiler counts: libraries' workspaces, communication, fragmentation
    flops_per_s: float  # dense bfloat16
    hbm_bytes_per_s: float
    link_bytes_per_s: float
    far_bytes_per_s: float
    dims: int  # of a shape
    shapes: tuple[str, ...]  # that are known to compile; others may
    source: str


# GPUs: NVLink 4, 900 GB/s both ways; one 400 Gb/s network card for each GPU. TPUs: all inter-chip links together.
KINDS: Mapping[str, Kind] = {
    "h100": Kind("gpu", 84_942_979_072, 8 * GIB, 989e12, 3.35e12, 450e9, 50e9, 1, ("1", "8", "16"), "H100 SXM"),
    "h200": Kind("gpu", 150_754_820_096, 8 * GIB, 989e12, 4.8e12, 450e9, 50e9, 1, ("1", "8", "16"), "H200 SXM"),
    "v4": Kind("tpu", 32 * GIB, GIB, 275e12, 1.228e12, 150e9, 6e9, 3, ("2x2x2",), "docs.cloud.google.com/tpu/docs/v4"),
    "v5e": Kind(
        "tpu",
        int(15.75 * GIB),
        GIB // 4,
        197e12,
        0.819e12,
        200e9,
        6e9,
        2,
        ("2x4", "4x4", "16x16"),
        "docs.cloud.google.com/tpu/docs/v5e",
    ),
    "v5p": Kind(
        "tpu",
        95_000_000_000,
        GIB,
        459e12,
        2.765e12,
        600e9,
        6e9,
        3,
        ("2x2x1", "2x2x2", "2x4x4", "4x4x4", "4x4x8", "8x8x8"),
        "docs.cloud.google.com/tpu/docs/v5p",
    ),
    "v6e": Kind(
        "tpu",
        int(31.25 * GIB),
        GIB // 4,
        918e12,
        1.64e12,
        400e9,
        6e9,
        2,
        ("2x2", "2x4", "4x4", "8x16", "16x16"),
        "docs.cloud.google.com/tpu/docs/v6e",
    ),
}
EXTRAS = {"gpu": ("jax_plugins.xla_cuda12", "plan-gpu"), "tpu": ("libtpu", "plan-tpu")}


class Devices(NamedTuple):
    """So many devices of a kind; `shape` of a TPU slice, the number of GPUs."""

    name: str
    shape: str

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]

    @property
    def number(self) -> int:
        return math.prod(map(int, self.shape.split("x")))

    @property
    def hosts(self) -> int:
        return -(-self.number // (PER_HOST if self.kind.platform == "gpu" else 4))

    def __str__(self) -> str:
        return f"{self.name}:{self.shape}"


def parse(text: str) -> Devices:
    """`h100:8`, `v5p:4x4x4` -> the devices. Raises: InputError for another kind, or a shape that it does not have."""
    name, _, shape = text.partition(":")
    if name not in KINDS:
        raise InputError(f"--devices {text}: {name!r} is no kind of device; expected one of {', '.join(KINDS)}")
    kind = KINDS[name]
    if not re.fullmatch(r"[1-9]\d*" + r"x[1-9]\d*" * (kind.dims - 1), shape):
        raise InputError(f"--devices {text}: expected {name}:SHAPE, such as {name}:{kind.shapes[-1]}")
    devices = Devices(name, shape)
    if kind.platform == "gpu" and devices.number > PER_HOST and devices.number % PER_HOST:
        raise InputError(f"--devices {text}: beyond {PER_HOST} GPUs a multiple of {PER_HOST}, the GPUs of a host")
    return devices


def check_extra(devices: Devices) -> None:
    """Raises: InputError if the compiler for these devices is not installed."""
    package, extra = EXTRAS[devices.kind.platform]
    try:
        is_here = importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        is_here = False
    if not is_here:
        raise InputError(
            f'plan: no compiler for {devices.name} is installed; in the checkout: pip install -e ".[{extra}]"'
        )


def environment(devices: Devices) -> dict[str, str]:
    """Variables of the process that compiles: the plugin compiles, the CPU is what runs."""
    flags = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    flags |= {"JAX_ENABLE_COMPILATION_CACHE": "false", "TF_CPP_MIN_LOG_LEVEL": "3", "XLA_FLAGS": ""}
    nvidia = importlib.util.find_spec("nvidia")
    if devices.kind.platform == "gpu" and nvidia is not None:
        tools = [Path(at) / "cuda_nvcc" for at in nvidia.submodule_search_locations]
        found = next((at for at in tools if at.is_dir()), tools[0])
        flags["XLA_FLAGS"] = f"--xla_gpu_cuda_data_dir={found}"
    return os.environ | flags


def topology(devices: Devices) -> list[Any]:
    """Their descriptions. Loads the compiler's plugin, so call it in a process of its own.

    Raises: InputError for a shape that the compiler does not know.
    """
    import jax
    from jax.experimental import topologies

    if devices.kind.platform == "gpu":
        target = resources.files(__package__) / "targets" / f"{devices.name}.txtpb"
        hosts = max(1, devices.number // PER_HOST)
        wanted = {
            "target_config": target.read_text(),
            "topology": f"1x{hosts}x{devices.number // hosts}",
        }
        return list(topologies.get_topology_desc(platform="cuda", topology_name=devices.name, **wanted).devices)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=str(devices)).devices)
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        known = ", ".join(f"{devices.name}:{shape}" for shape in devices.kind.shapes)
        raise InputError(f"--devices {devices}: {str(error).splitlines()[0]}; shapes that work: {known}") from None
