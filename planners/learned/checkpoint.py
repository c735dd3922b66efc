"""A trained policy on disk: ``policy.safetensors`` and ``config.json``. Nothing in them can run code."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from planners.learned.base import Network
from planners.learned.networks import make_network
from planners.learned.spec import PolicySpec
from qlm_env.spec import ConfigError, parse
from qlm_env.workload.atomic import atomic_path

WEIGHTS, CONFIG = "policy.safetensors", "config.json"
ZOO = Path(__file__).parent / "zoo"
"""Checkpoints that come with the package."""


def save_checkpoint(folder: Path, policy: PolicySpec, network: Network, about: dict[str, Any]) -> None:
    """Write a policy, atomically: its weights first, then the configuration, which names their hash.

    Args:
        about: how it was trained; JSON values, kept beside the policy.
    """
    weights = save({name: tensor.detach().contiguous() for name, tensor in network.state_dict().items()})
    values = {"policy": policy.model_dump(mode="json"), "sha256": hashlib.sha256(weights).hexdigest(), "about": about}
    with atomic_path(folder / WEIGHTS) as temporary:
        temporary.write_bytes(weights)
    with atomic_path(folder / CONFIG) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def find_checkpoint(path: str) -> Path:
    """The folder ``path``, or the checkpoint of this name that comes with the package.

    Raises:
        ConfigError: there is neither.
    """
    for folder in (Path(path), ZOO / path):
        if (folder / CONFIG).is_file():
            return folder
    shipped = ", ".join(sorted(file.parent.name for file in ZOO.glob(f"*/{CONFIG}"))) or "none"
    raise ConfigError(f"no checkpoint '{path}': no folder with a {CONFIG}; shipped ones: {shipped}")


def checkpoint_hash(path: str) -> str:
    """The hash of a checkpoint's weights, as its configuration names it.

    Raises:
        ConfigError: there is no such checkpoint, or its configuration cannot be read.
    """
    return str(_read_config(find_checkpoint(path))["sha256"])


def load_checkpoint(path: str) -> tuple[PolicySpec, Network]:
    """A policy and its network.

    Raises:
        ConfigError: a file is missing, cut short, changed since it was written, or does not fit its configuration.
    """
    folder = find_checkpoint(path)
    values = _read_config(folder)
    policy = parse(PolicySpec, values["policy"], prefix=f"{folder / CONFIG}: policy")
    try:
        weights = (folder / WEIGHTS).read_bytes()
    except OSError as error:
        raise ConfigError(f"checkpoint '{folder}': cannot read {WEIGHTS}: {error.strerror}") from None
    if hashlib.sha256(weights).hexdigest() != values["sha256"]:
        raise ConfigError(f"checkpoint '{folder}': {WEIGHTS} is not the file that {CONFIG} names: cut short or changed")
    network = make_network(policy.network, policy.spaces)
    try:
        network.load_state_dict(load(weights))
    except (SafetensorError, RuntimeError) as error:
        line = str(error).split("\n")[0]
        raise ConfigError(f"checkpoint '{folder}': the weights are not those of its network: {line}") from None
    if not all(bool(torch.isfinite(tensor).all()) for tensor in network.state_dict().values()):
        raise ConfigError(f"checkpoint '{folder}': weights that are not numbers")
    return policy, network.requires_grad_(False).eval()


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ConfigError(f"checkpoint '{folder}': {CONFIG} is not valid JSON") from None
    if not isinstance(values, dict) or not isinstance(values.get("policy"), dict) or "sha256" not in values:
        raise ConfigError(f"checkpoint '{folder}': {CONFIG} needs the keys policy and sha256")
    return values
