"""The folder of each model that a server is started for: given by the user, or made here."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from qlm_env.backends.vllm.models import WEIGHTS_FILE, LlamaShape, read_shape, write_random_llama
from qlm_env.spec import ConfigError, ModelSpec
from qlm_env.vllm_spec import StartedServers

MADE = {"tiny": LlamaShape()}
"""Architectures whose models can be made: random weights, nothing to download."""


def model_folders(servers: StartedServers, models: Sequence[ModelSpec]) -> list[Path]:
    """A folder for each of ``models``; what is missing of architecture ``tiny`` is made, each with other weights.

    Raises:
        ConfigError: there is no folder, or its model takes less than ``context_tokens``.
    """
    return [_folder(servers, model, seed) for seed, model in enumerate(models)]


def _folder(servers: StartedServers, model: ModelSpec, seed: int) -> Path:
    given = servers.model_folders.get(model.name)
    if given is None:
        if model.architecture not in MADE:
            raise ConfigError(
                f"'cluster.vllm.model_folders': no folder for model {model.name!r}; only models of architecture "
                f"{', '.join(MADE)} are made here, and this one is {model.architecture}"
            )
        return make_model(Path(servers.out) / "models" / model.name, model.architecture, model.context_tokens, seed)
    folder = Path(given)
    if not folder.is_dir():
        raise ConfigError(f"'cluster.vllm.model_folders.{model.name}': no folder {folder}")
    context = _context_tokens(folder)
    if context is not None and context < model.context_tokens:
        raise ConfigError(
            f"'context_tokens' of model {model.name!r} is {model.context_tokens}, "
            f"but the model in {folder} takes {context}"
        )
    return folder


def made_shape(architecture: str, context_tokens: int) -> LlamaShape:
    """The sizes of a model that is made, with room for ``context_tokens``."""
    shape = MADE[architecture]
    return dataclasses.replace(shape, context_tokens=max(shape.context_tokens, context_tokens))


def make_model(folder: Path, architecture: str, context_tokens: int, seed: int) -> Path:
    """Write a model of random weights, unless ``folder`` has the same one already.

    Raises:
        ConfigError: the folder holds another model.
        OSError: it cannot be written.
    """
    shape = made_shape(architecture, context_tokens)
    if (folder / "config.json").exists():
        if read_shape(folder) != shape:
            raise ConfigError(f"'{folder}' holds another model; remove it, or choose another folder")
        if (folder / WEIGHTS_FILE).exists():
            return folder
    write_random_llama(folder, shape, seed)
    return folder


def _context_tokens(folder: Path) -> int | None:
    """The longest context of a model, if its folder tells."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    tokens = values.get("max_position_embeddings") if isinstance(values, dict) else None
    return tokens if isinstance(tokens, int) else None
