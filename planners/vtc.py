"""VTC: fairness by virtual token counters, the client that has been served least goes next.

From Y. Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): each client has a counter of the
service it got, ``w_p`` per prompt token and ``w_q`` per output token (1 and 2 in the paper); the waiting client
with the least counter is admitted next. A client that comes back after a pause has its counter lifted to the least
of those that wait, or if none does to that of the last that did, so that a pause saves up no claims. Two clients
that both always have requests waiting then never differ by more than about ``2 * w_q * M`` of service, ``M`` the
tokens that a batch can hold.

What differs here:

- A client is a population of the workload: a (model, SLO class) pair. Deadlines play no part.
- Counters are read off what an operator sees. Output tokens of finished requests are known exactly; a request in
  the batch is charged its prompt and expected output on admission, which is the paper's variant with predicted
  lengths, and corrected once it has finished. Prompt tokens are those of the mean prompt of the client's groups.
- Admission is by request group: at each epoch groups are put in the order of their clients' counters, oldest first
  within a client.
- Several models share the cluster, so fairness costs swaps. An instance stays with its model while a client of it
  waits that is ahead of the least served one by less than the bound above; then it changes.
- The paper has one instance; a new group goes to the one expected to finish it first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from planners.dispatch import EarliestCompletion, Keys, ListPlanner
from planners.spec import VtcSpec
from qlm_env.lso import Lso
from qlm_env.observation import PRIOR_OUTPUT_TOKENS, PRIOR_REQUESTS
from qlm_env.view import ClusterView, GroupView, InstanceView

Client = tuple[int, int]
"""Model and SLO class."""


class VtcPlanner(ListPlanner):
    """The least served client first."""

    def __init__(self, spec: VtcSpec) -> None:
        super().__init__(self._served, EarliestCompletion(), steal=True)
        self._spec = spec

    def reset(self, view: ClusterView, rng: np.random.Generator) -> None:
        super().reset(view, rng)
        self._counters: dict[Client, float] = {}
        self._lifts: dict[Client, float] = {}
        self._prompts: dict[Client, tuple[int, float]] = {}
        self._waiting: frozenset[Client] = frozenset()
        self._last_waited: frozenset[Client] = frozenset()
        self._newest_group = -1

    def act(self, view: ClusterView) -> Sequence[Lso]:
        self._count(view)
        return super().act(view)

    def arrange(self, view: ClusterView, instance: InstanceView, queue: Sequence[int], keys: Keys) -> list[int]:
        """Least served client first, but groups of the model that is served while they are not too far ahead."""
        ordered = sorted(queue, key=lambda g: (keys[g][0], view.group(g).arrival_s, g))
        model = instance.serving_model
        own = [g for g in ordered if view.group(g).model == model]
        if model is None or not own:
            return ordered
        capacity_tokens = float(instance.placement(model)["num_blocks"]) * view.scenario.cluster.engine.block_size
        if keys[own[0]][0] - keys[ordered[0]][0] > 2.0 * self._spec.output_weight * capacity_tokens:
            return ordered
        return own + [g for g in ordered if view.group(g).model != model]

    def _served(self, view: ClusterView, group: GroupView) -> float:
        return self._counters[group.model, group.slo_class]

    def _count(self, view: ClusterView) -> None:
        """Bring the counters up to date, and lift those of clients that had nothing waiting."""
        groups = view.groups
        for group in groups:
            self._note_prompts(group)
        running = self._running(view)
        counters = {}
        for client in self._prompts.keys() | running.keys():
            counters[client] = self._lifts.get(client, 0.0) + self._service(view, client, running.get(client, 0))
        waiting = frozenset((group.model, group.slo_class) for group in groups)
        if self._waiting - waiting:
            self._last_waited = self._waiting - waiting
        measure = [counters[client] for client in waiting & self._waiting or self._last_waited]
        for client in waiting - self._waiting:
            least = min(measure, default=counters[client])
            if counters[client] < least:
                self._lifts[client] = self._lifts.get(client, 0.0) + least - counters[client]
                counters[client] = least
        self._counters = counters
        self._waiting = waiting

    def _note_prompts(self, group: GroupView) -> None:
        """Each group counts once towards its client's mean prompt, as it is when first seen."""
        if group.id > self._newest_group:
            self._newest_group = group.id
            client = (group.model, group.slo_class)
            requests, tokens = self._prompts.get(client, (0, 0.0))
            self._prompts[client] = (
                requests + group.waiting,
                tokens + group.waiting * group.mean_prompt_tokens,
            )

    def _service(self, view: ClusterView, client: Client, running: int) -> float:
        """Weighted tokens that the client got: finished requests as they were, running ones as expected."""
        output = view.output_statistics(*client)
        requests, tokens = self._prompts.get(client, (1, 0.0))
        prompt_cost = self._spec.prompt_weight * tokens / requests
        output_cost = self._spec.output_weight
        # The mean is shrunk towards the prior.
        finished_tokens = output.mean_tokens * (PRIOR_REQUESTS + output.finished) - PRIOR_REQUESTS * PRIOR_OUTPUT_TOKENS
        return (output.finished + running) * prompt_cost + output_cost * (
            finished_tokens + running * output.mean_tokens
        )

    @staticmethod
    def _running(view: ClusterView) -> dict[Client, int]:
        running: dict[Client, int] = {}
        for instance in view.instances:
            if instance.active_model is not None and instance.num_running:
                for slo_class, count in enumerate(instance.running_per_class()):
                    client = (instance.active_model, slo_class)
                    running[client] = running.get(client, 0) + int(count)
        return running
