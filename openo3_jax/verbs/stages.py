"""Verbs of training: both stages, the plan for devices that are not here, and a bad batch run again."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from openo3_jax.config import GSPOConfig, HostsConfig, SFTConfig
from openo3_jax.plan.config import Rates, Sizes
from openo3_jax.verbs import shared
from openo3_jax.verbs.shared import Flat


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What both stages are told about a run besides its settings."""

    model: Path  # the Qwen2.5-VL directory to start from; for stage two, such as the export of a run of stage one
    data: Path  # the data root in the released layout
    out: Path  # a new directory for the run
    resume: bool = False  # go on with the run in OUT where it was stopped; without a checkpoint there it starts anew
    profile: str | None = None  # steps to trace into OUT/profile for XProf or Perfetto, such as 10:15
    mesh: str | None = None  # sizes of its axes, such as fsdp=4,tensor=2; without it fsdp in a host, data over hosts
    prompts: Path | None = None  # other wordings, a JSON file

    def arguments(self) -> dict[str, Any]:
        """As `run_sft` and `run_gspo` take them. Raises: InputError for a mesh or steps that cannot be read."""
        from openo3_jax.train import profiling

        return {
            "model": self.model,
            "data": self.data,
            "out": self.out,
            "resume": self.resume,
            "profile": None if self.profile is None else profiling.parse_steps(self.profile),
            "mesh": shared.mesh_axes(self.mesh),
            "prompts_file": self.prompts,
        }


def sft_of(recipe: SFTConfig) -> Callable[..., None]:
    def sft(
        *,
        run: Annotated[Run, Flat],
        processes: Annotated[HostsConfig, Flat] = HostsConfig(),  # noqa: B008 (frozen)
        config: Annotated[SFTConfig, Flat] = recipe,
    ) -> None:
        """Stage one: train on the records of STGR-SFT.json.

        Args:
            processes: of a run over several hosts; each of them is started with the same command.
        """
        _start(processes, config)
        from openo3_jax.train import sft as stage

        how = run.arguments()
        with _several(processes):
            stage.run_sft(**how, config=config)

    return sft


def gspo_of(recipe: GSPOConfig) -> Callable[..., None]:
    def gspo(
        *,
        run: Annotated[Run, Flat],
        reference: Path | None = None,
        reward: str | None = None,
        processes: Annotated[HostsConfig, Flat] = HostsConfig(),  # noqa: B008 (frozen)
        config: Annotated[GSPOConfig, Flat] = recipe,
    ) -> None:
        """Stage two: sample groups of answers to the records of STGR-RL.json, reward them, learn from the difference.

        Args:
            reference: the model not to leave too far behind, if it is not the one to start from.
            reward: a reward of one's own, module:function, of records, completions and, if it likes, progress.
            processes: of a run over several hosts; each of them is started with the same command.
        """
        _start(processes, config)
        from openo3_jax.rewards import own
        from openo3_jax.train import gspo as stage

        how = run.arguments()
        user = None if reward is None else own.load(reward)
        with _several(processes):
            stage.run_gspo(**how, config=config, reference=reference, reward=user)

    return gspo


def _start(processes: HostsConfig, config: SFTConfig | GSPOConfig) -> None:
    """Join the other processes of the run, before anything else imports or asks jax."""
    if processes.is_distributed:
        from openo3_jax import hosts

        hosts.start(processes, heartbeat_timeout_seconds=config.run.heartbeat_timeout_seconds)


def _several(processes: HostsConfig) -> contextlib.AbstractContextManager[None]:
    """What is done with other processes ends with them."""
    if not processes.is_distributed:
        return contextlib.nullcontext()
    from openo3_jax import hosts

    return hosts.until_lost()


def plan_of(recipe: SFTConfig | GSPOConfig) -> Callable[..., int]:
    def plan(
        *,
        devices: str,
        model: str = "7b",
        mesh: str | None = None,
        sizes: Annotated[Sizes, Flat] = Sizes(),  # noqa: B008 (frozen)
        rates: Annotated[Rates, Flat] = Rates(),  # noqa: B008 (frozen)
        search: bool = False,
        json: Path | None = None,
        config: Annotated[type(recipe), Flat] = recipe,
    ) -> int:
        """Compile the recipe for devices that need not be here: memory, communication, time. Exit code 3: too large.

        Args:
            devices: KIND:SHAPE, such as h100:8 or v5p:4x4x4.
            model: 3b, 7b, 32b, 72b, or a directory with a config.json.
            mesh: sizes of its axes, such as fsdp=4,tensor=2; without it fsdp in a host or slice, data over them.
            search: try meshes, remat policies and batches; rank what fits; find the most that a device holds.
            json: where to write all figures.
        """
        shared.check_place("--json", json)
        from openo3_jax.plan import command

        text, fits = command.run(
            config,
            devices=devices,
            model=model,
            axes=shared.mesh_axes(mesh),
            sizes=sizes,
            rates=rates,
            wants_search=search,
            json_out=json,
            say=lambda tried: print(f"plan: {tried}", file=sys.stderr),
        )
        return shared.claim(text, fits)

    return plan


def replay(dump: Positional[Annotated[Path, arg(metavar="DUMP")]], *, mesh: str | None = None) -> None:
    """Run a batch again whose loss or gradient was not finite, and say which numbers are not.

    Args:
        dump: a directory that a run has written, such as RUN/dumps/step-12-0.
        mesh: sizes of its axes, such as fsdp=4,tensor=2; without it fsdp in a host or slice, data over them.
    """
    from openo3_jax.train import replay as replay_lib

    print(replay_lib.replay(dump, mesh=shared.mesh_axes(mesh)))
