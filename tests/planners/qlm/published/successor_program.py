"""The second version's program in another form, for scipy's HiGHS: who directly follows whom, instead of positions."""

from __future__ import annotations

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from planners.qlm.published.slot_problem import COMPLETION_WEIGHT, Goal, SlotProblem, latest_end_s


def best_by_successors(slots: SlotProblem, goal: Goal) -> float | None:
    """The optimum, or None where there is none.

    Binary ``y[h,g,i]``: ``g`` directly follows ``h`` on ``i``; ``h = G`` stands for the queue's start, ``g = G`` for
    its end. ``e[g]`` is the end of service, ``t[g]`` the lateness. With a large constant ``M``,
    ``e[g] >= e[h] + swap + service - M (1 - y[h,g,i])``, which also rules out cycles.
    """
    num_groups, num_instances = (int(size) for size in slots.allowed.shape)
    nodes = num_groups + 1
    arcs = nodes * nodes * num_instances
    size = arcs + 2 * num_groups
    big = max(float(latest_end_s(slots, i)[-1]) for i in range(num_instances))

    def arc(h: int, g: int, i: int) -> int:
        return (h * nodes + g) * num_instances + i

    def end(g: int) -> int:
        return arcs + g

    def late(g: int) -> int:
        return arcs + num_groups + g

    rows: list[tuple[dict[int, float], float, float]] = []
    upper = np.ones(size)
    upper[arcs:] = np.inf
    for i in range(num_instances):
        upper[[arc(g, g, i) for g in range(num_groups)]] = 0.0
        for g in np.flatnonzero(~slots.allowed[:, i]).tolist():
            upper[[arc(h, g, i) for h in range(nodes)] + [arc(g, h, i) for h in range(nodes)]] = 0.0
        rows.append(({arc(num_groups, g, i): 1.0 for g in range(nodes)}, 1.0, 1.0))
        for g in range(num_groups):
            balance = {arc(h, g, i): 1.0 for h in range(nodes) if h != g}
            balance |= {arc(g, h, i): -1.0 for h in range(nodes) if h != g}
            rows.append((balance, 0.0, 0.0))
    for g in range(num_groups):
        into = [(h, i) for h in range(nodes) for i in range(num_instances)]
        rows.append(({arc(h, g, i): 1.0 for h, i in into}, 1.0, 1.0))
        for i in np.flatnonzero(slots.allowed[g]).tolist():
            for h in range(nodes):
                if h == g:
                    continue
                swap_s = (
                    slots.begin_s[i, slots.model[g]]
                    if h == num_groups
                    else slots.swap_s[i, slots.model[h], slots.model[g]]
                )
                least_s = swap_s + slots.service_s[g, i] + (slots.release_s[i] if h == num_groups else 0.0)
                row = {end(g): 1.0, arc(h, g, i): -big}
                if h < num_groups:
                    row[end(h)] = -1.0
                rows.append((row, least_s - big, np.inf))
        latency = {arc(h, g, i): float(slots.latency_s[g, i]) for h, i in into}
        if goal is Goal.PENALTY:
            rows.append(({end(g): 1.0, **latency}, -np.inf, float(slots.deadline_s[g])))
        else:
            rows.append(
                (
                    {late(g): 1.0, end(g): -1.0, **{k: -v for k, v in latency.items()}},
                    -float(slots.deadline_s[g]),
                    np.inf,
                )
            )
    objective = np.zeros(size)
    for g in range(num_groups):
        unit = 1.0 if goal is Goal.PENALTY else COMPLETION_WEIGHT
        objective[end(g)] = unit
        for h in range(nodes):
            for i in range(num_instances):
                objective[arc(h, g, i)] += unit * slots.latency_s[g, i]
        if goal is Goal.TARDINESS:
            objective[late(g)] = slots.weight[g]
    matrix = np.zeros((len(rows), size))
    for r, (row, _, _) in enumerate(rows):
        for k, value in row.items():
            matrix[r, k] += value
    integer = np.zeros(size)
    integer[:arcs] = 1
    result = milp(
        objective,
        integrality=integer,
        bounds=Bounds(np.zeros(size), upper),
        constraints=LinearConstraint(matrix, [low for _, low, _ in rows], [high for _, _, high in rows]),
        options={"mip_rel_gap": 0.0},
    )
    if result.x is None:
        return None
    return float(result.fun) - (float(slots.deadline_s.sum()) if goal is Goal.PENALTY else 0.0)
