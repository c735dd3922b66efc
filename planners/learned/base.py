"""What every network of a learned policy can do."""

from __future__ import annotations

from torch import Tensor, nn


class Network(nn.Module):
    """Scores the actions of an observation, and its value. B observations, n actions."""

    def logits(self, observation: dict[str, Tensor]) -> Tensor:
        """(B, n) in the layout of :class:`qlm_env.lso.ActionCodec`, of actions legal or not."""
        raise NotImplementedError

    def value(self, observation: dict[str, Tensor]) -> Tensor:
        """(B, 1) the expected return."""
        raise NotImplementedError
