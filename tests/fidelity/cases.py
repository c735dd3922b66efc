"""Random engines and workloads: what both schedulers are given."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from qlm_env.backends.emulator.reference import StepRequest

OPTIONS = 16
"""Case number modulo this: the combination of the four options, so that each is used equally often."""

STEP_S = 5e-3
TOKEN_S = 5e-5
"""A step of n tokens takes ``STEP_S + TOKEN_S * n`` on the virtual clock."""

MOST_STEPS = 1500
"""Roughly; a workload that would take an engine longer is cut short."""


@dataclass(frozen=True)
class EngineSettings:
    """One engine, in vLLM's terms."""

    num_blocks: int
    """Usable ones, without vLLM's null block."""
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    chunked_prefill: bool
    priority: bool
    async_scheduling: bool
    enable_prefix_caching: bool

    @property
    def options(self) -> str:
        """The combination of options, for tables."""
        return " ".join(
            (
                "priority" if self.priority else "fcfs",
                "chunked" if self.chunked_prefill else "whole",
                "async" if self.async_scheduling else "sync",
                "prefix" if self.enable_prefix_caching else "plain",
            )
        )


def random_case(number: int) -> tuple[EngineSettings, list[StepRequest]]:
    """Case ``number``: always the same engine and requests (in order of arrival)."""
    rng = np.random.default_rng(number)
    settings = _settings(rng, number % OPTIONS)
    return settings, _requests(rng, settings)


def _settings(rng: np.random.Generator, options: int) -> EngineSettings:
    chunked = not options & 1
    block_size = int(rng.choice([1, 4, 16, 32, 64, 128]))
    small = rng.random() < 0.5
    budget = int(rng.integers(16, 257) if small else rng.choice([256, 512, 1024, 2048, 4096, 8192]))
    max_num_seqs = min(budget, 256, int(2 ** rng.uniform(0, 8.01)))
    longest = int(rng.integers(20, 400))
    if rng.random() < 0.2:
        longest = int(rng.integers(400, 6000))
    if chunked and rng.random() < 0.3:
        longest = min(6000, int(budget * rng.uniform(1, 5)) + 2)
    if chunked and rng.random() < 0.2:
        # Decodes take most of the budget, so that prompts take many steps and blocks run out meanwhile.
        budget = max_num_seqs = int(rng.integers(16, 48))
        longest = int(rng.integers(60, 300))
    # vLLM hashes block by block, which takes long where they are tiny.
    longest = min(longest, 200 * block_size)
    if not chunked:
        longest = min(longest, budget)
    # From blocks for one request, where nearly every step preempts, to blocks for all.
    spare = float(rng.choice([0.0, 0.1, 0.5, 2.0, 40.0]))
    num_blocks = math.ceil((longest - 1) / block_size * (1 + spare)) + int(rng.integers(1, 4))
    return EngineSettings(
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=longest,
        chunked_prefill=chunked,
        priority=bool(options & 2),
        async_scheduling=bool(options & 4),
        enable_prefix_caching=bool(options & 8),
    )


def _requests(rng: np.random.Generator, settings: EngineSettings) -> list[StepRequest]:
    n = int(rng.integers(2, 40))
    if settings.max_num_seqs > 64 and settings.max_model_len < 400:
        n = int(rng.integers(64, 300))
    gaps_s = rng.exponential(float(rng.choice([1e-3, 0.02, 0.2])), n)
    arrival_s = np.cumsum(np.where(rng.random(n) < rng.choice([0.0, 0.3, 0.9, 1.0]), 0.0, gaps_s))
    leaving = float(rng.choice([0.0, 0.2, 0.7]))
    patience_s = float(rng.choice([0.02, 0.3, 2.0]))
    families = _Families(rng)
    requests: list[StepRequest] = []
    for row in range(n):
        if sum(request.output for request in requests) > MOST_STEPS * min(settings.max_num_seqs, 8):
            break
        total = int(rng.integers(2, settings.max_model_len + 1))
        output = max(1, int(total * rng.beta(0.8, 1.5)))
        prompt = max(1, total - output)
        prefix = families.draw(prompt // settings.block_size)
        if prefix and rng.random() < 0.3:
            prompt = len(prefix) * settings.block_size
        requests.append(
            StepRequest(
                row=row,
                arrival_s=float(arrival_s[row]),
                prompt=prompt,
                output=output,
                priority=int(rng.integers(0, 3)),
                prefix=prefix,
                abort_s=float(arrival_s[row] + rng.exponential(patience_s)) if rng.random() < leaving else math.inf,
            )
        )
    return requests


class _Families:
    """Prompts with common beginnings: each continues an earlier one from some block on, or is new."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.prefixes: list[tuple[int, ...]] = []
        self.unused = 1
        self.sharing = float(rng.choice([0.0, 0.5, 0.95]))

    def draw(self, most_blocks: int) -> tuple[int, ...]:
        """Contents of the first blocks of the next prompt, at most so many."""
        common: tuple[int, ...] = ()
        if self.prefixes and self.rng.random() < self.sharing:
            common = self.prefixes[int(self.rng.integers(len(self.prefixes)))]
            if self.rng.random() < 0.5:
                common = common[: int(self.rng.integers(len(common) + 1))]
        common = common[:most_blocks]
        new = int(self.rng.integers(most_blocks - len(common) + 1))
        prefix = common + tuple(range(self.unused, self.unused + new))
        self.unused += new
        self.prefixes.append(prefix)
        return prefix
