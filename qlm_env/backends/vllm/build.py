"""From a scenario to its real cluster."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qlm_env.backends.base import Backend
from qlm_env.backends.emulator.state import Fleet
from qlm_env.backends.vllm.backend import VllmBackend
from qlm_env.backends.vllm.configured import make_provider
from qlm_env.backends.vllm.instance import Patience
from qlm_env.backends.vllm.provider import ServerProvider
from qlm_env.spec import ConfigError, ModelSpec, ScenarioSpec


def make_backend(scenario: ScenarioSpec, new_fleet: Callable[[], Fleet]) -> Backend:
    """The vLLM cluster of ``scenario``; nothing is started before its first ``reset``.

    Args:
        new_fleet: the cluster's engines as arrays, fresh at every call, with the initial models in place.

    Raises:
        ConfigError: ``cluster.vllm`` is missing, or asks for what is not there.
    """
    cluster, models, fleet = scenario.cluster, scenario.workload.models, new_fleet()
    provider = make_provider(cluster, models, fleet)
    assert cluster.vllm is not None
    _check_initial(provider, fleet, models)
    return VllmBackend(provider, new_fleet, Patience(hang_s=cluster.vllm.silence_s))


def _check_initial(provider: ServerProvider, fleet: Fleet, models: Sequence[ModelSpec]) -> None:
    for i, model in enumerate(fleet.engine["active_model"].tolist()):
        if model >= 0 and not provider.serves(i, model):
            raise ConfigError(
                f"'cluster.vllm': instance {i} begins with model {models[model].name!r}, of which it has no server; "
                "give it one, or another initial_model"
            )
