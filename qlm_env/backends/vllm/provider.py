"""Where a backend's servers come from: started on this machine, placed by a launcher, or given as addresses.

A server holds one model for one instance. The backend asks a provider for servers and stops them; it knows of
processes and machines only through this interface.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path


class RunningServer(ABC):
    """One healthy server that holds one model for one instance."""

    url: str
    """Such as ``http://127.0.0.1:8000``."""
    model_name: str
    """The name it serves the model under."""
    api_key: str | None
    """Sent as a bearer token, and never shown."""
    kv_store: Path | None
    """The folder of its KV connector, on this machine; ``None`` without one that keys on tokens alone."""

    @property
    @abstractmethod
    def exit_reason(self) -> str | None:
        """One line once it has died; ``None`` while it runs, or if nobody can know."""

    @abstractmethod
    async def stop(self, kill: bool = False) -> None:
        """End it with everything it started, and wait until it has ended; a second call does nothing.

        Args:
            kill: at once, without asking it to end.
        """


class ServerProvider(ABC):
    """Where servers come from."""

    can_stop: bool
    """Whether a model's weights can leave memory by ending its server. Without it, as for servers given by
    address, a model that is in storage sleeps."""

    @abstractmethod
    async def start(self, instance: int, model: int) -> RunningServer:
        """A server of ``model`` for ``instance``; returns when it is healthy. Cancelling it leaves nothing behind.

        Raises:
            ServerStartFailed: it ended, did not become healthy in time, or cannot be reached.
        """

    @abstractmethod
    def serves(self, instance: int, model: int) -> bool:
        """Whether ``start`` can be asked for this pair."""

    @abstractmethod
    async def close(self) -> None:
        """Stop what was started; it may be called twice."""
