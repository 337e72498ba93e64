"""How the suite compiles: most of its programs run a few times, so that less work at compile time is less work.

Without LLVM's optimizations (`JAX_DISABLE_MOST_OPTIMIZATIONS`) and with XLA's older code for fusions a train step is
compiled in a fifth of the time. Imports no jax, which reads both when it starts.
"""


def settings(devices: int) -> dict[str, str]:
    """For the environment of a process on so many virtual CPU devices."""
    return {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_cpu_use_fusion_emitters=false",
    }
