"""The state of a cluster that outlives the command that started it: a folder that its keeper writes and others read.

``cluster.json`` says which servers there are and how each is; it is only readable by its owner, as it may hold an API
key. ``lock`` is held by the keeper for as long as it lives, so that a state left behind by one that was killed is
known for what it is, whatever process has its number today.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from qlm_env.spec import ConfigError, Spec
from qlm_env.workload.atomic import atomic_path

STATE_FILE = "cluster.json"
LOCK_FILE = "lock"
OWNER_ONLY = 0o600

_LOCK_ATTEMPTS = 10
_LOCK_INTERVAL_S = 0.05


class ServerState(Spec):
    """One server of the cluster."""

    instance: int
    instance_name: str
    model: str
    """The workload's name of the model, under which it is served."""
    phase: Literal["waiting", "starting", "up", "restarting"] = "waiting"
    url: str | None = None
    kv_store: str | None = None
    """The folder of its KV connector."""
    healthy_since_s: float | None = None
    """Unix time."""
    error: str | None = None
    """Why it was started again, or could not be."""
    api_key: str | None = Field(default=None, repr=False)


class ClusterState(Spec):
    """A cluster as its keeper sees it."""

    cluster: str
    """Its name."""
    keeper_pid: int
    started_s: float
    """Unix time."""
    phase: Literal["starting", "up", "failed"]
    error: str | None = None
    """Why it failed; one line."""
    servers: tuple[ServerState, ...]


def write_state(folder: Path, state: ClusterState) -> None:
    """Replace the state in ``folder``."""
    with atomic_path(folder / STATE_FILE) as temporary:
        temporary.touch(OWNER_ONLY)  # before anything is in it
        temporary.write_text(state.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read_state(folder: Path) -> ClusterState | None:
    """The state in ``folder``; ``None`` if there is none.

    Raises:
        ConfigError: the file is not what a keeper writes, or cannot be read.
    """
    path = folder / STATE_FILE
    try:
        return ClusterState.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"cannot use '{path}': {error.strerror}") from None
    except ValidationError:
        raise ConfigError(f"'{path}' is not the state of a cluster") from None


def read_running(folder: Path) -> ClusterState:
    """The state of the cluster that runs in ``folder``.

    Raises:
        ConfigError: none does.
    """
    state = read_state(folder)
    if state is None or not is_kept(folder):
        raise ConfigError(f"no cluster is up in '{folder}'; `qlm cluster up out={folder}` starts one")
    return state


def is_kept(folder: Path) -> bool:
    """Whether a keeper lives."""
    try:
        with open(folder / LOCK_FILE) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    except FileNotFoundError:
        pass
    return False


@contextmanager
def kept(folder: Path) -> Iterator[None]:
    """Be the keeper of ``folder`` in this block.

    Raises:
        ConfigError: another one is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK_FILE, "w") as file:
        # Those who only look whether there is a keeper hold the lock for a moment.
        for attempt in range(_LOCK_ATTEMPTS):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt == _LOCK_ATTEMPTS - 1:
                    raise ConfigError(already_up(folder)) from None
                time.sleep(_LOCK_INTERVAL_S)
        yield


def already_up(folder: Path) -> str:
    """What to tell whoever wants to start a cluster where one runs."""
    return f"a cluster is up in '{folder}'; `qlm cluster down out={folder}` stops it"
