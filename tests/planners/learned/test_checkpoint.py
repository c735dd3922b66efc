"""Checkpoints: what is written is read again, and what is wrong with one is said in a line."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")
safetensors = pytest.importorskip("safetensors.torch", reason="needs the train extra")

from planners import make_planner  # noqa: E402
from planners.learned.checkpoint import CONFIG, WEIGHTS, ZOO, load_checkpoint, save_checkpoint  # noqa: E402
from planners.learned.networks import make_network  # noqa: E402
from planners.learned.planner import spaces_of  # noqa: E402
from planners.learned.spec import ActionSet, PolicySpec  # noqa: E402
from planners.spec import LearnedSpec, parse_planner  # noqa: E402
from qlm_env.env import QLMEnv  # noqa: E402
from qlm_env.presets import make_scenario  # noqa: E402
from qlm_env.spec import ConfigError, parse  # noqa: E402

FEW: dict[str, Any] = {"preset": "smoke", "num_requests": 12}


def policy(kind: str, cluster: str | dict[str, Any] = "smoke") -> PolicySpec:
    values = {
        "network": {"kind": kind},
        "actions": ActionSet(moves="new", hold=False, swaps="head", evict=False, warm_start=False),
        "spaces": spaces_of(make_scenario(cluster, FEW)),
    }
    return parse(PolicySpec, values)


def save(folder: Path, spec: PolicySpec, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    save_checkpoint(folder, spec, make_network(spec.network, spec.spaces), {"steps": 3})
    return folder


@pytest.mark.parametrize("kind", ["pointer", "mlp"])
def test_what_is_saved_is_loaded(tmp_path: Path, kind: str) -> None:
    spec = policy(kind)
    torch.manual_seed(1)
    network = make_network(spec.network, spec.spaces)
    save_checkpoint(tmp_path, spec, network, {})
    loaded, again = load_checkpoint(str(tmp_path))
    assert loaded == spec
    for name, tensor in network.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def cut_short(folder: Path) -> None:
    weights = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(weights[: len(weights) // 2])


def tampered(folder: Path) -> None:
    weights = bytearray((folder / WEIGHTS).read_bytes())
    weights[-3] ^= 1
    (folder / WEIGHTS).write_bytes(weights)


def no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def not_json(folder: Path) -> None:
    (folder / CONFIG).write_text("{")


def other_network(folder: Path) -> None:
    values = json.loads((folder / CONFIG).read_text())
    values["policy"]["network"]["hidden"] = 8
    (folder / CONFIG).write_text(json.dumps(values))


def unknown_network(folder: Path) -> None:
    values = json.loads((folder / CONFIG).read_text())
    values["policy"]["network"]["kind"] = "transformer"
    (folder / CONFIG).write_text(json.dumps(values))


def not_numbers(folder: Path) -> None:
    weights = safetensors.load_file(folder / WEIGHTS)
    next(iter(weights.values()))[:] = float("nan")
    replace(folder, safetensors.save(weights))


def a_pickle(folder: Path) -> None:
    torch.save({}, folder / "pickled")
    replace(folder, (folder / "pickled").read_bytes())


def replace(folder: Path, weights: bytes) -> None:
    """Other weights, whose hash the configuration names."""
    (folder / WEIGHTS).write_bytes(weights)
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(values | {"sha256": hashlib.sha256(weights).hexdigest()}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut_short, "cut short or changed"),
        (tampered, "cut short or changed"),
        (no_weights, "cannot read policy.safetensors"),
        (not_json, "not valid JSON"),
        (other_network, "not those of its network"),
        (unknown_network, "policy.network"),
        (not_numbers, "not numbers"),
        (a_pickle, "not those of its network"),
    ],
)
def test_a_spoilt_checkpoint_is_refused_in_one_line(tmp_path: Path, spoil: Any, message: str) -> None:
    spoil(save(tmp_path, policy("pointer")))
    with pytest.raises(ConfigError, match=message) as error:
        load_checkpoint(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_checkpoint_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="no checkpoint 'nowhere'"):
        parse_planner("learned", {"path": "nowhere"})


def test_an_mlp_is_for_one_cluster(tmp_path: Path) -> None:
    save(tmp_path, policy("mlp", "small"))
    planner = make_planner(LearnedSpec(path=str(tmp_path)))
    env = QLMEnv(workload=FEW)
    env.reset(seed=0)
    with pytest.raises(ConfigError, match="made for other spaces: instances is 8 there and 2 here"):
        planner.reset(env.view, np.random.default_rng(0))


def test_a_pointer_needs_the_same_slo_classes(tmp_path: Path) -> None:
    save(tmp_path, policy("pointer", "small"))
    planner = make_planner(LearnedSpec(path=str(tmp_path)))
    slo = {"classes": [{"name": name, "target_s": 20.0} for name in ("interactive", "batch-1", "batch-2", "extra")]}
    env = QLMEnv(workload=FEW, slo=slo)
    env.reset(seed=0)
    with pytest.raises(ConfigError, match="classes is 3 there and 4 here"):
        planner.reset(env.view, np.random.default_rng(0))


def test_settings_name_the_weights(tmp_path: Path) -> None:
    """So that results of one training are not taken for those of another that was written to the same folder."""
    first = LearnedSpec(path=str(save(tmp_path, policy("pointer"), seed=0)))
    second = LearnedSpec(path=str(save(tmp_path, policy("pointer"), seed=1)))
    assert first.sha256 != second.sha256
    with pytest.raises(ConfigError, match="sha256 is"):
        parse_planner("learned", {"path": str(tmp_path), "sha256": first.sha256})


@pytest.mark.parametrize("folder", sorted(ZOO.glob("*")), ids=lambda folder: folder.name)
def test_shipped_checkpoints_load_and_have_a_card(folder: Path) -> None:
    load_checkpoint(folder.name)
    card = (folder / "card.md").read_text()
    about = json.loads((folder / CONFIG).read_text())["about"]
    assert "qlm train" in card
    assert about["config_hash"] in card
