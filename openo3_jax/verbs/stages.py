"""Verbs of training: both stages, the plan for devices that are not here, and a bad batch run again."""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from openo3_jax.config import GSPOConfig, HostsConfig, SFTConfig
from openo3_jax.plan.config import Rates, Sizes
from openo3_jax.verbs import shared
from openo3_jax.verbs.shared import Flat


def sft_of(recipe: SFTConfig) -> Callable[..., None]:
    def sft(
        *,
        model: Path,
        data: Path,
        out: Path,
        resume: bool = False,
        profile: str | None = None,
        mesh: str | None = None,
        prompts: Path | None = None,
        processes: Annotated[HostsConfig, Flat] = HostsConfig(),  # noqa: B008 (frozen)
        config: Annotated[SFTConfig, Flat] = recipe,
    ) -> None:
        """Stage one: train on the records of STGR-SFT.json.

        Args:
            model: the Qwen2.5-VL directory to start from.
            data: the data root in the released layout.
            out: a new directory for the run.
            resume: go on with the run in OUT where it was stopped; without a checkpoint there it starts anew.
            profile: steps to trace into OUT/profile for XProf or Perfetto, such as 10:15.
            mesh: sizes of its axes, such as fsdp=4,tensor=2; without it all devices are on fsdp.
            prompts: other wordings, a JSON file.
            processes: of a run over several hosts; each of them is started with the same command.
        """
        _start(processes, config)
        from openo3_jax.train import profiling
        from openo3_jax.train import sft as stage

        places = {"model": model, "data": data, "out": out, "prompts_file": prompts}
        traced = None if profile is None else profiling.parse_steps(profile)
        with _several(processes):
            stage.run_sft(**places, config=config, mesh=shared.mesh_axes(mesh), resume=resume, profile=traced)

    return sft


def gspo_of(recipe: GSPOConfig) -> Callable[..., None]:
    def gspo(
        *,
        model: Path,
        data: Path,
        out: Path,
        resume: bool = False,
        profile: str | None = None,
        mesh: str | None = None,
        prompts: Path | None = None,
        reference: Path | None = None,
        reward: str | None = None,
        processes: Annotated[HostsConfig, Flat] = HostsConfig(),  # noqa: B008 (frozen)
        config: Annotated[GSPOConfig, Flat] = recipe,
    ) -> None:
        """Stage two: sample groups of answers to the records of STGR-RL.json, reward them, learn from the difference.

        Args:
            model: the Qwen2.5-VL directory to start from, such as the export of a run of stage one.
            data: the data root in the released layout.
            out: a new directory for the run.
            resume: go on with the run in OUT where it was stopped; without a checkpoint there it starts anew.
            profile: steps to trace into OUT/profile for XProf or Perfetto, such as 10:15.
            mesh: sizes of its axes, such as fsdp=4,tensor=2; without it all devices are on fsdp.
            prompts: other wordings, a JSON file.
            reference: the model not to leave too far behind, if it is not the one to start from.
            reward: a reward of one's own, module:function, called with records and completions.
            processes: of a run over several hosts; each of them is started with the same command.
        """
        _start(processes, config)
        from openo3_jax.rewards import redteam
        from openo3_jax.train import gspo as stage
        from openo3_jax.train import profiling, rollout

        own = None if reward is None else rollout.own_reward(redteam.load_reward(reward))
        with _several(processes):
            stage.run_gspo(
                model=model,
                data=data,
                out=out,
                config=config,
                mesh=shared.mesh_axes(mesh),
                resume=resume,
                profile=None if profile is None else profiling.parse_steps(profile),
                prompts_file=prompts,
                reference=reference,
                reward=own,
            )

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
            mesh: sizes of its axes, such as fsdp=4,tensor=2; without it all devices are on fsdp.
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
        mesh: sizes of its axes, such as fsdp=4,tensor=2; without it all devices are on fsdp.
    """
    from openo3_jax.train import replay as replay_lib

    print(replay_lib.replay(dump, mesh=shared.mesh_axes(mesh)))
