"""What can go wrong between a client and a vLLM server; every message is one line that names the server."""

from __future__ import annotations

from qlm_env.spec import ConfigError


class ServerError(ConfigError):
    """A server cannot be used as asked."""


class ServerUnreachable(ServerError):
    """Nothing answers at the address, or the connection broke: the server is not there (any more)."""


class RequestRefused(ServerError):
    """The server answered a request with an error."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status
        """The HTTP status."""


class ServerStartFailed(ServerError):
    """A server process ended, or did not become healthy in time."""
