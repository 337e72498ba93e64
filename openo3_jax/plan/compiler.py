"""A process that compiles for chips that are not here: requests in, what the compiler says out. One line of JSON each.

A compiler's plugin stays in the process that loads it, and may claim it; so the one that asks never loads it.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any, NamedTuple

from openo3_jax import config_json
from openo3_jax import mesh as mesh_lib
from openo3_jax.config import GSPOConfig, ModelConfig, SFTConfig
from openo3_jax.errors import InputError
from openo3_jax.plan import devices as devices_lib
from openo3_jax.plan import hlo, programs, workload
from openo3_jax.plan.config import Sizes
from openo3_jax.plan.devices import Devices


class Request(NamedTuple):
    """`axes` of the mesh, None for the usual ones."""

    config: SFTConfig | GSPOConfig
    model: ModelConfig
    devices: Devices
    axes: Mapping[str, int] | None
    sizes: Sizes


class Answer(NamedTuple):
    """Bytes are per device: of what is trained, the optimizer, the reference and the frozen weights."""

    axes: Mapping[str, int]
    load: workload.Load
    programs: list[programs.Program]
    trained_bytes: int
    optimizer_bytes: int
    reference_bytes: int
    frozen_bytes: int


class Compiler:
    """Starts the process with the first request. A context manager: leaving it ends the process."""

    def __init__(self, devices: Devices):
        devices_lib.check_extra(devices)
        self._devices = devices
        self._process: subprocess.Popen[str] | None = None
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> "Compiler":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process.stdout.close()
            with contextlib.suppress(BrokenPipeError):  # a request that was not read
                self._process.stdin.close()
        self._errors.close()

    def __call__(self, request: Request) -> Answer:
        """Raises: InputError for a mesh that does not fit the devices or the model, and an unknown shape of a slice."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                env=devices_lib.environment(self._devices),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
            )
        with contextlib.suppress(BrokenPipeError):  # it has ended: there is no line to read then
            self._process.stdin.write(_dump(request) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise RuntimeError(f"the compiler ended with {self._process.wait()}: {self._errors.read()[-2000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise InputError(answer["error"])
        found = [
            programs.Program(**one | {"collectives": [hlo.Collective(**c) for c in one["collectives"]]})
            for one in answer.pop("programs")
        ]
        ways = answer["axes"]["data"] * answer["axes"]["fsdp"]
        load = workload.make_load(request.config, request.model, request.sizes, ways)
        return Answer(**answer, programs=found, load=load)


def _dump(request: Request) -> str:
    return json.dumps(
        {
            "stage": "sft" if isinstance(request.config, SFTConfig) else "gspo",
            "config": config_json.to_json(request.config),
            "model": request.model.to_hf(),
            "devices": str(request.devices),
            "axes": request.axes,
            "sizes": dataclasses.asdict(request.sizes),
        }
    )


def _load(line: str) -> Request:
    values = json.loads(line)
    config = SFTConfig if values["stage"] == "sft" else GSPOConfig
    return Request(
        config_json.from_json(config, values["config"], "plan"),
        ModelConfig.from_hf(values["model"]),
        devices_lib.parse(values["devices"]),
        values["axes"],
        Sizes(**values["sizes"]),
    )


def answer(request: Request, described: list[Any], options: Mapping[str, Any] | None = None) -> Answer:
    """Compile for these devices, in this process. `options`: of the compiler."""
    is_gpu = request.devices.kind.platform == "gpu"  # whose hosts are all described as one slice
    mesh = mesh_lib.make_mesh(request.axes, devices=described, granule="process_index" if is_gpu else None)
    ways = mesh_lib.mesh_size(mesh, mesh_lib.LOGICAL_AXES["rows"])
    load = workload.make_load(request.config, request.model, request.sizes, ways)
    state = programs.make_abstract(request.config, request.model, mesh).state
    return Answer(
        axes={name: int(size) for name, size in mesh.shape.items()},
        load=load,
        programs=list(programs.compile_all(request.config, request.model, load, mesh, options)),
        trained_bytes=programs.num_bytes(state.params),
        optimizer_bytes=programs.num_bytes(state.opt_state),
        reference_bytes=programs.num_bytes(state.reference),
        frozen_bytes=programs.num_bytes(state.frozen),
    )


def serve() -> None:
    """Answer requests until there are no more. Everything else that is written to stdout goes to stderr."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        described: dict[Devices, list[Any]] = {}
        for line in sys.stdin:
            request = _load(line)
            try:
                if request.devices not in described:
                    described[request.devices] = devices_lib.topology(request.devices)
                made = answer(request, described[request.devices])._asdict()
                del made["load"]
                made["programs"] = [
                    one._asdict() | {"collectives": [c._asdict() for c in one.collectives]} for one in made["programs"]
                ]
            except InputError as error:
                made = {"error": str(error)}
            answers.write(json.dumps(made) + "\n")
            answers.flush()


if __name__ == "__main__":
    serve()
