"""What the commands that use a live vLLM server accept."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from qlm_env.spec import ConfigError, NonNegativeFloat, PositiveFloat, PositiveInt, SloSpec, Spec, WorkloadSpec, parse
from runners.config import OutPath, Seed
from runners.profile_config import OtherNumbers, Text

TokenCounts = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
Share = Annotated[float, Field(gt=0, le=1)]


class ServerOptions(Spec):
    """Where a running server is, and what it does not tell itself."""

    url: Text
    model: Text | None = None
    """The name it must serve; ``None`` takes the one it serves."""
    api_key_env: Text | None = None
    """The environment variable that holds its API key."""
    max_num_seqs: PositiveInt | None = None
    max_num_batched_tokens: PositiveInt | None = None

    def api_key(self) -> str | None:
        """The key, if one is named.

        Raises:
            ConfigError: the variable is not set.
        """
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env)
        if not key:
            raise ConfigError(f"'api_key_env': the environment variable {self.api_key_env} is not set")
        return key


class MeasureOptions(ServerOptions, OtherNumbers):
    """The settings of `qlm profile measure`."""

    device: Text
    architecture: Text
    tp: PositiveInt = 1
    out: OutPath
    repeats: PositiveInt = 3
    prefill_tokens: TokenCounts | None = None
    prefixes: TokenCounts | None = None
    decode_seqs: TokenCounts | None = None
    context_lens: TokenCounts | None = None
    like: Text | None = None
    """A profile file that gives the numbers that are not measured."""
    max_error: PositiveFloat = 0.08
    force: bool = False


class RecordOptions(ServerOptions):
    """The settings of `qlm profile record` beside workload and SLO classes."""

    out: OutPath
    seed: Seed = 0
    profile: Text | None = None
    """A profile file, for a workload whose rate is a share of the server's capacity."""
    tick_s: PositiveFloat = 1.0


class _Recorded(Spec):
    workload: WorkloadSpec
    slo: SloSpec = SloSpec()


@dataclass(frozen=True)
class RecordConfig:
    """A workload and the server it is recorded on."""

    workload: WorkloadSpec
    slo: SloSpec
    options: RecordOptions


class ServeOptions(Spec):
    """The settings of `qlm vllm serve`."""

    python: Text
    model_folder: Text | None = None
    """A model; ``None`` makes a small one with random weights."""
    name: Text
    port: Annotated[int, Field(gt=0, lt=65536)]
    out: OutPath
    max_model_len: PositiveInt
    max_num_seqs: PositiveInt
    max_num_batched_tokens: PositiveInt
    num_gpu_blocks: PositiveInt | None = None
    kv_cache_gib: PositiveInt
    dtype: Text
    scheduling_policy: Text
    cpus: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None = None
    """Cores that a CPU engine computes on."""
    arguments: tuple[str, ...] = ()
    start_timeout_s: NonNegativeFloat


def parse_measure(values: Mapping[str, Any]) -> MeasureOptions:
    """The configuration of `qlm profile measure`.

    Raises:
        ConfigError: one line naming the first key that is wrong and what is allowed there.
    """
    return parse(MeasureOptions, _given(values))


def parse_record(values: Mapping[str, Any]) -> RecordConfig:
    """The configuration of `qlm profile record`.

    Raises:
        ConfigError: one line naming the first key that is wrong and what is allowed there.
    """
    groups = _Recorded.model_fields
    recorded = parse(_Recorded, {key: value for key, value in values.items() if key in groups})
    options = parse(RecordOptions, _given({key: value for key, value in values.items() if key not in groups}))
    return RecordConfig(recorded.workload, recorded.slo, options)


def parse_serve(values: Mapping[str, Any]) -> ServeOptions:
    """The configuration of `qlm vllm serve`.

    Raises:
        ConfigError: one line naming the first key that is wrong and what is allowed there.
    """
    return parse(ServeOptions, values)


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` without empty settings, so that a missing one is told as such."""
    return {key: value for key, value in values.items() if value is not None}
