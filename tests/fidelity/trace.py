"""What a run of either scheduler is compared by."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class ScheduledStep(NamedTuple):
    """One call of the scheduler that ran or preempted something."""

    decided_s: float
    scheduled: tuple[tuple[int, int, int], ...]
    """(row, new tokens, tokens cached before), in order."""
    preempted: tuple[int, ...]
    """Rows, in order."""
    free_blocks: tuple[int, ...]
    """Afterwards: the free queue from its front on, or only its length, where it is long, as a negative number."""


WRITTEN_OUT_BLOCKS = 40
"""Free queues up to this long are compared block by block after every step, longer ones by their length."""


@dataclass
class Run:
    """A whole run."""

    steps: list[ScheduledStep] = field(default_factory=list)
    first_token_s: dict[int, float] = field(default_factory=dict)
    finish_s: dict[int, float] = field(default_factory=dict)
    aborted: set[int] = field(default_factory=set)
    final_free_blocks: list[int] = field(default_factory=list)
