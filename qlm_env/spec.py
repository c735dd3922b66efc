"""Validated configuration: cluster, models, SLO classes, workload, environment.

Every value a user can set passes through one of these models. They are frozen, refuse unknown keys,
and carry their unit in the field name. :func:`parse` turns a failure into a :class:`ConfigError`
whose message is one line naming the key and what is allowed there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from qlm_env.spec_base import ConfigError as ConfigError
from qlm_env.spec_base import NonNegativeFloat as NonNegativeFloat
from qlm_env.spec_base import PositiveFloat as PositiveFloat
from qlm_env.spec_base import PositiveInt as PositiveInt
from qlm_env.spec_base import Share as Share
from qlm_env.spec_base import Spec as Spec
from qlm_env.spec_base import Text, did_you_mean, unique
from qlm_env.spec_base import parse as parse
from qlm_env.vllm_spec import GivenVllm, VllmSpec


# --------------------------------------------------------------------------- service levels
class SloClassSpec(Spec):
    """One latency target. A request of this class is met when its latency is at most ``target_s``."""

    name: str
    target_s: PositiveFloat
    weight: PositiveFloat = 1.0


class SloSpec(Spec):
    """The SLO classes and what their targets are measured on.

    ``metric`` is ``e2e`` (arrival to last token, QLM v1) or ``ttft`` (arrival to first token, QLM v2).
    """

    metric: Literal["e2e", "ttft"] = "e2e"
    classes: tuple[SloClassSpec, ...] = (
        SloClassSpec(name="interactive", target_s=20.0),
        SloClassSpec(name="batch-1", target_s=60.0),
        SloClassSpec(name="batch-2", target_s=3600.0),
    )

    @field_validator("classes")
    @classmethod
    def _named_once(cls, value: tuple[SloClassSpec, ...]) -> tuple[SloClassSpec, ...]:
        unique([c.name for c in value], "SLO class")
        return value


# --------------------------------------------------------------------------- cluster
class ModelSpec(Spec):
    """A served model: its name and the profiled architecture whose cost it shares.

    Fine-tuned models of one architecture are different models (their weights must be swapped) with
    the same latency profile. ``context_tokens`` is the longest prompt + output the model accepts.
    """

    name: str
    architecture: str
    context_tokens: PositiveInt = 4096


class EngineSpec(Spec):
    """Settings of the vLLM engine each instance runs; the names and defaults are vLLM's."""

    max_num_seqs: PositiveInt = 256
    max_num_batched_tokens: PositiveInt = 2048
    block_size: PositiveInt = 16
    num_gpu_blocks: PositiveInt | None = None
    """KV blocks per instance; ``None`` takes the profile's number for the (device, model, tp)."""
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = False
    """Reuse KV blocks of equal content: of prompts that share a prefix, and of a preempted request's own past."""
    async_scheduling: bool = False
    """Schedule each step while the one before it runs, as vLLM has done by default since 0.14."""
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"

    @model_validator(mode="after")
    def _budget_holds_a_decode_of_every_sequence(self) -> EngineSpec:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least "
                f"max_num_seqs ({self.max_num_seqs}), as in vLLM"
            )
        return self


class InstancesSpec(Spec):
    """``count`` identical instances on ``tp`` GPUs of one device type each."""

    device: str
    """The profile's name of it. ``CPU`` is no GPU: a real instance computes on cores."""
    tp: PositiveInt = 1
    count: PositiveInt = 1
    host_memory_gb: NonNegativeFloat = 128.0
    """Host memory for warm (asleep) model weights, per instance, in 1e9 bytes."""
    host_kv_gb: NonNegativeFloat = 32.0
    """Host memory for the KV cache of evicted requests, per instance, in 1e9 bytes."""
    initial_model: str | None = None
    """Model on the GPU at time 0; ``None`` deals the models that fit round-robin over the instances."""
    warm_models: tuple[str, ...] = ()
    """Models staged in host memory at time 0."""

    @property
    def num_gpus(self) -> int:
        return 0 if self.device == "CPU" else self.tp


class FailureSpec(Spec):
    """Instance ``instance`` is down from ``at_s`` for ``duration_s`` seconds, then empty and up."""

    instance: Annotated[int, Field(ge=0)]
    at_s: NonNegativeFloat
    duration_s: PositiveFloat


class ClusterSpec(Spec):
    """A cluster: instances by device type, engine settings, injected failures, and where its real servers are."""

    name: str = "custom"
    instances: Annotated[tuple[InstancesSpec, ...], Field(min_length=1)]
    engine: EngineSpec = EngineSpec()
    failures: tuple[FailureSpec, ...] = ()
    profile_folder: Text | None = None
    """Profiles that are looked up before the shipped ones, such as those of ``qlm profile measure``."""
    vllm: VllmSpec | None = None
    """The real servers, for ``backend="vllm"``."""

    @property
    def num_instances(self) -> int:
        return sum(group.count for group in self.instances)

    @property
    def profile_path(self) -> Path | None:
        return None if self.profile_folder is None else Path(self.profile_folder)

    @model_validator(mode="after")
    def _servers_name_instances(self) -> ClusterSpec:
        for server in self.vllm.servers if isinstance(self.vllm, GivenVllm) else ():
            if server.instance >= self.num_instances:
                raise ValueError(
                    f"vllm.servers names instance {server.instance}, but the cluster has instances "
                    f"0..{self.num_instances - 1}"
                )
        return self

    @model_validator(mode="after")
    def _failures_name_instances(self) -> ClusterSpec:
        for failure in self.failures:
            if failure.instance >= self.num_instances:
                raise ValueError(
                    f"failures name instance {failure.instance}, but the cluster has instances "
                    f"0..{self.num_instances - 1}"
                )
        return self


# --------------------------------------------------------------------------- workload
class PoissonArrivals(Spec):
    """Poisson arrivals at ``rate_per_s``, or at ``load`` times the cluster's capacity."""

    kind: Literal["poisson"] = "poisson"
    rate_per_s: PositiveFloat | None = None
    load: PositiveFloat | None = None


class GammaArrivals(Spec):
    """Renewal arrivals with Gamma gaps of coefficient of variation ``cv`` (1 is Poisson)."""

    kind: Literal["gamma"]
    rate_per_s: PositiveFloat | None = None
    load: PositiveFloat | None = None
    cv: PositiveFloat = 2.0


class MarkovArrivals(Spec):
    """Markov-modulated Poisson: a calm and a burst state with exponential stays.

    The rate in the burst state is ``burst_factor`` times the calm one; the long-run mean is ``rate_per_s``.
    """

    kind: Literal["markov"]
    rate_per_s: PositiveFloat | None = None
    load: PositiveFloat | None = None
    burst_factor: Annotated[float, Field(ge=1)] = 5.0
    mean_calm_s: PositiveFloat = 60.0
    mean_burst_s: PositiveFloat = 15.0


class BatchArrivals(Spec):
    """Every request arrives at ``at_s``: a backlog to be drained."""

    kind: Literal["batch"]
    at_s: NonNegativeFloat = 0.0


Arrivals = Annotated[PoissonArrivals | GammaArrivals | MarkovArrivals | BatchArrivals, Field(discriminator="kind")]


class EmpiricalLengths(Spec):
    """(prompt, output) lengths drawn from a shipped joint table: ``sharegpt`` or ``azure_conv``."""

    kind: Literal["empirical"] = "empirical"
    table: Literal["sharegpt", "azure_conv"] = "sharegpt"


class LognormalLengths(Spec):
    """Independent log-normal prompt and output lengths with the given means and coefficients of variation."""

    kind: Literal["lognormal"]
    prompt_mean_tokens: PositiveFloat = 256.0
    prompt_cv: PositiveFloat = 1.0
    output_mean_tokens: PositiveFloat = 256.0
    output_cv: PositiveFloat = 1.0


class UniformLengths(Spec):
    """Integer lengths uniform on closed ranges."""

    kind: Literal["uniform"]
    prompt_min_tokens: PositiveInt
    prompt_max_tokens: PositiveInt
    output_min_tokens: PositiveInt
    output_max_tokens: PositiveInt

    @model_validator(mode="after")
    def _ordered(self) -> UniformLengths:
        if self.prompt_min_tokens > self.prompt_max_tokens:
            raise ValueError("prompt_min_tokens must not exceed prompt_max_tokens")
        if self.output_min_tokens > self.output_max_tokens:
            raise ValueError("output_min_tokens must not exceed output_max_tokens")
        return self


Lengths = Annotated[EmpiricalLengths | LognormalLengths | UniformLengths, Field(discriminator="kind")]


class MegaPromptSpec(Spec):
    """A ``share`` of requests whose prompt is uniform on ``[min_tokens, max_tokens]``."""

    share: Share = 0.0
    min_tokens: PositiveInt = 3000
    max_tokens: PositiveInt = 4000

    @model_validator(mode="after")
    def _ordered(self) -> MegaPromptSpec:
        if self.min_tokens > self.max_tokens:
            raise ValueError("min_tokens must not exceed max_tokens")
        return self


class MixSpec(Spec):
    """One (model, SLO class) population and its weight in the mix."""

    model: str
    slo_class: str
    weight: PositiveFloat = 1.0


class WorkloadBase(Spec):
    """What synthetic and trace workloads share: models, mix, length limits, service noise."""

    name: str = "custom"
    models: Annotated[tuple[ModelSpec, ...], Field(min_length=1)]
    mix: Annotated[tuple[MixSpec, ...], Field(min_length=1)]
    mega_prompts: MegaPromptSpec = MegaPromptSpec()
    service_noise_cv: NonNegativeFloat = 0.0
    """Coefficient of variation of each request's log-normal service-time factor (mean 1); 0 is none."""

    @model_validator(mode="after")
    def _mix_names_models(self) -> WorkloadBase:
        names = [model.name for model in self.models]
        unique(names, "model")
        for entry in self.mix:
            if entry.model not in names:
                raise ValueError(
                    f"mix names model {entry.model!r}; allowed: {', '.join(names)}" + did_you_mean(entry.model, names)
                )
        return self


class SyntheticWorkload(WorkloadBase):
    """Requests drawn from an arrival process, a length distribution and a mix."""

    kind: Literal["synthetic"] = "synthetic"
    num_requests: PositiveInt = 3500
    arrivals: Arrivals = PoissonArrivals(load=0.9)
    lengths: Lengths = EmpiricalLengths()

    @model_validator(mode="after")
    def _one_rate(self) -> SyntheticWorkload:
        arrivals = self.arrivals
        if not isinstance(arrivals, BatchArrivals) and ((arrivals.rate_per_s is None) == (arrivals.load is None)):
            raise ValueError("arrivals needs exactly one of rate_per_s and load")
        return self


class TraceWorkload(WorkloadBase):
    """Requests replayed from a trace file in a published format.

    The trace gives arrival times and lengths; models and classes are dealt from ``mix`` by the seed
    (``assign: random``) or in turn (``assign: cycle``). ``start_s``/``duration_s`` cut a slice of the
    trace's own time, which then starts at 0; ``time_scale`` multiplies the gaps (0.5 doubles the rate);
    ``max_requests`` keeps the first so many.
    """

    kind: Literal["trace"]
    format: Literal["azure", "mooncake", "burstgpt"]
    path: str
    assign: Literal["random", "cycle"] = "random"
    time_scale: PositiveFloat = 1.0
    start_s: NonNegativeFloat = 0.0
    duration_s: PositiveFloat | None = None
    max_requests: PositiveInt | None = None
    max_total_tokens: PositiveInt | None = None
    """Longer requests are cut to this many prompt + output tokens (``None``: left as they are)."""


WorkloadSpec = Annotated[SyntheticWorkload | TraceWorkload, Field(discriminator="kind")]


# --------------------------------------------------------------------------- environment
class GroupingSpec(Spec):
    """How waiting requests form request groups: by model, SLO class and length, first come first served inside.

    A group is closed when it holds ``delta`` x the average batch size of its model, or when its first
    request enters an engine. The average batch is ``min(max_num_seqs, KV tokens / typical_request_tokens)``
    averaged over the instances the model fits.

    Requests of a model and class are told apart by length with k-means, on prompt and expected output length, where
    that cuts the variance within groups by a share of at least ``min_variance_cut``.
    """

    delta: PositiveFloat = 1.0
    typical_request_tokens: PositiveInt = 1024
    max_clusters: Annotated[int, Field(ge=1, le=16)] = 1
    """Length clusters of a model and class; 1 keeps all lengths together."""
    min_variance_cut: Annotated[float, Field(gt=0, lt=1)] = 0.8
    recluster_requests: PositiveInt = 200
    """Arrivals after which the clusters are found anew."""


class DecisionTimeSpec(Spec):
    """How long a decision takes in emulated time: nothing, ``fixed_s``, or as measured by the clock."""

    mode: Literal["zero", "fixed", "measured"] = "zero"
    fixed_s: NonNegativeFloat = 0.0


class CostsSpec(Spec):
    """Optional reward costs per operation, in the reward's unit (an episode's return spans [-1, 1])."""

    swap: NonNegativeFloat = 0.0
    eviction: NonNegativeFloat = 0.0


class EnvironmentSpec(Spec):
    """What the Gymnasium environment adds to the cluster: spaces, epochs, decision time, costs."""

    max_groups: Annotated[int, Field(ge=2, le=4096)] = 32
    """Rows of the ``groups`` observation and groups an action can name."""
    decision_interval_s: PositiveFloat = 1.0
    auto_pull: bool = True
    strict: bool = False
    grouping: GroupingSpec = GroupingSpec()
    decision_time: DecisionTimeSpec = DecisionTimeSpec()
    costs: CostsSpec = CostsSpec()
    max_actions_per_epoch: PositiveInt = 64
    """After so many actions without time passing only ``advance`` is legal."""
    max_drain_s: PositiveFloat = 36000.0
    """The episode is truncated this long after the last arrival; what is unfinished then has missed."""


class ScenarioSpec(Spec):
    """Everything that defines an episode apart from its seed and the policy."""

    cluster: ClusterSpec
    workload: WorkloadSpec
    slo: SloSpec = SloSpec()
    environment: EnvironmentSpec = EnvironmentSpec()

    @model_validator(mode="after")
    def _mix_names_classes(self) -> ScenarioSpec:
        names = [c.name for c in self.slo.classes]
        for entry in self.workload.mix:
            if entry.slo_class not in names:
                raise ValueError(
                    f"workload.mix names slo_class {entry.slo_class!r}; allowed: {', '.join(names)}"
                    + did_you_mean(entry.slo_class, names)
                )
        models = [m.name for m in self.workload.models]
        for group in self.cluster.instances:
            for name in (*group.warm_models, *filter(None, [group.initial_model])):
                if name not in models:
                    raise ValueError(
                        f"cluster.instances names model {name!r}; allowed: {', '.join(models)}"
                        + did_you_mean(name, models)
                    )
        for server in self.cluster.vllm.servers if isinstance(self.cluster.vllm, GivenVllm) else ():
            if server.model not in models:
                raise ValueError(
                    f"cluster.vllm.servers names model {server.model!r}; allowed: {', '.join(models)}"
                    + did_you_mean(server.model, models)
                )
        return self
