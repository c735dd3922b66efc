"""The oracle knows output lengths; nobody else reads them."""

from __future__ import annotations

from pathlib import Path

import pytest

import planners
from planners.oracle import OraclePlanner, true_outputs
from planners.spec import OracleSpec, QlmSpec, parse_planner
from qlm_env.requests import RUNNING
from qlm_env.spec import ConfigError
from tests.planners.crafted import PATIENT, URGENT, begin, crafted_env, requests_of, serve


def test_it_knows_the_lengths_of_what_waits() -> None:
    env = crafted_env(max_num_seqs=2)
    planner = OraclePlanner(OracleSpec())
    begin(env, planner, requests_of((0.0, 0, PATIENT, 300), (0.0, 0, PATIENT, 900), (0.0, 0, PATIENT, 700)))
    pair, single = env.view.groups
    outputs = true_outputs(env.view, pair)
    assert (outputs.finished, outputs.mean_tokens, outputs.variance_tokens2) == (2, 500.0, 200.0**2)
    assert true_outputs(env.view, single).mean_tokens == 900.0
    # What runs is no longer of concern.
    env.view._world.requests["state"][0] = RUNNING
    assert true_outputs(env.view, pair).mean_tokens == 700.0


def test_it_serves_everything() -> None:
    env = crafted_env(["llama-2-7b", "llama-2-13b"])
    rows = [(0.5 * k, k % 2, (URGENT, PATIENT)[k % 3 == 0], 40 + 11 * (k % 7)) for k in range(30)]
    metrics = serve(env, OraclePlanner(OracleSpec()), requests_of(*rows))
    assert metrics["finished"] == 30


def test_its_settings_are_those_of_qlm() -> None:
    assert parse_planner("oracle", {"qlm": {"node_limit": 7}}) == OracleSpec(qlm=QlmSpec(node_limit=7))
    with pytest.raises(ConfigError, match=r"unknown key 'planner.oracle.qlm.node_limt'"):
        parse_planner("oracle", {"qlm": {"node_limt": 7}})


def test_no_other_planner_looks_behind_the_view() -> None:
    root = Path(planners.__file__).parent
    readers = {path.name for path in root.rglob("*.py") if "._world" in path.read_text(encoding="utf-8")}
    assert readers == {"oracle.py"}
