"""`qlm train` and `qlm record` on a workload of a few requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")
pytest.importorskip("sb3_contrib", reason="needs the train extra")
pytest.importorskip("safetensors", reason="needs the train extra")

from planners.learned.checkpoint import load_checkpoint  # noqa: E402
from runners import train as train_module  # noqa: E402
from runners.cli import main  # noqa: E402
from runners.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE  # noqa: E402

SCENARIO = ("cluster=smoke", "workload=smoke", "workload.num_requests=12", "environment.max_drain_s=60")
SMALL = ("train.network.hidden=[8]", "train.total_steps=64", "train.evaluate_steps=16", "train.evaluation_seeds=2")
PPO = ("train=ppo_mlp", *SMALL, "train.num_envs=2", "train.n_steps=8", "train.batch_size=8", "train.n_epochs=1")


def run(*overrides: str) -> int:
    return main(["train", *SCENARIO, "tensorboard=false", *overrides])


def weights(folder: Path) -> dict[str, Any]:
    return dict(torch.load(folder / "state.pt", weights_only=True)["policy"])


def curve(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "curve.json").read_text())
    return found


def test_a_training_leaves_a_policy_that_can_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(*PPO, "train.variants.count=2", "train.variants.loads=[0.5,1.5]", f"out={out}") == 0
    assert [row["steps"] for row in curve(out)] == [0, 16, 32, 48, 64]
    assert (out / "curve.png").stat().st_size > 1000
    best = max(row["slo_attainment"] for row in curve(out))
    about = json.loads((out / "checkpoint" / "config.json").read_text())["about"]
    assert about["evaluation"]["slo_attainment"] == best
    load_checkpoint(str(out / "checkpoint"))
    assert "use it as planner=learned" in capsys.readouterr().err
    arguments = [*SCENARIO, "planner=[learned]", f"planner.learned.path={out / 'checkpoint'}", "seeds=1", "jobs=1"]
    assert main(["evaluate", *arguments, "timeline=false", f"out={tmp_path / 'evaluation'}"]) == 0
    assert run(*PPO, "train.variants.count=2", "train.variants.loads=[0.5,1.5]", f"out={out}") == 0
    assert "this training is over" in capsys.readouterr().err


@pytest.mark.parametrize("network", ["train.network.hidden=[8]", "train=ppo_pointer"])
def test_a_killed_training_ends_as_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: str
) -> None:
    settings = [*PPO, "train.network.hidden=8"] if network == "train=ppo_pointer" else list(PPO)
    settings[0] = network if network.startswith("train=") else settings[0]
    assert run(*settings, f"out={tmp_path / 'whole'}") == 0
    learn = train_module._Checkpoints._on_rollout_start

    def killed(self: Any) -> None:
        learn(self)
        if self.num_timesteps >= 32:
            raise KeyboardInterrupt

    monkeypatch.setattr(train_module._Checkpoints, "_on_rollout_start", killed)
    assert run(*settings, f"out={tmp_path / 'killed'}") == EXIT_INTERRUPTED
    monkeypatch.undo()
    assert [row["steps"] for row in curve(tmp_path / "killed")] == [0, 16, 32]
    assert run(*settings, f"out={tmp_path / 'killed'}") == 0
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
    assert [row["slo_attainment"] for row in curve(tmp_path / "whole")] == [
        row["slo_attainment"] for row in curve(tmp_path / "killed")
    ]


def test_a_resume_with_other_settings_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = f"out={tmp_path / 'out'}"
    assert run(*PPO, out) == 0
    assert run(*PPO, "train.gamma=0.5", out) == EXIT_USAGE
    assert "train.gamma: 0.97 there, 0.5 here" in capsys.readouterr().err


def test_a_state_cut_short_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(*PPO, f"out={out}") == 0
    (out / "state.pt").write_bytes((out / "state.pt").read_bytes()[:500])
    assert run(*PPO, f"out={out}") == EXIT_USAGE
    assert "cut short or not a training's state" in capsys.readouterr().err


def test_weights_that_are_no_numbers_stop_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    keep = train_module._Checkpoints.keep

    def spoilt(self: Any) -> None:
        keep(self)
        if self.num_timesteps >= 16:
            with torch.no_grad():
                next(train_module.network_of(self.model).parameters()).fill_(float("nan"))

    monkeypatch.setattr(train_module._Checkpoints, "keep", spoilt)
    assert run(*PPO, f"out={out}") == EXIT_FAILED
    assert "the training has diverged" in capsys.readouterr().err
    load_checkpoint(str(out / "checkpoint"))
    for tensor in weights(out).values():
        assert torch.isfinite(tensor).all()


def test_it_stops_early(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*PPO, "train.stop_at=0.0", f"out={tmp_path / 'reached'}") == 0
    assert [row["steps"] for row in curve(tmp_path / "reached")] == [0, 2]
    assert "reached 0.0 %" in capsys.readouterr().err


@pytest.mark.parametrize("algorithm", ["a2c", "dqn"])
def test_other_algorithms(tmp_path: Path, algorithm: str) -> None:
    more = ["train.n_steps=8"] if algorithm == "a2c" else ["train.buffer_size=100", "train.batch_size=8"]
    assert run(f"train={algorithm}", *SMALL, "train.num_envs=2", *more, f"out={tmp_path / 'out'}") == 0
    assert curve(tmp_path / "out")[-1]["steps"] >= 64


def test_imitation_of_a_recorded_planner_and_then_ppo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded, imitation = tmp_path / "recorded", tmp_path / "imitation"
    assert main(["record", *SCENARIO, "planner=edf", "seeds=3", f"out={recorded}"]) == 0
    assert len(list((recorded / "episodes").glob("*.npz"))) == 3
    settings = ["train=imitation", f"train.dataset={recorded}", "train.network.hidden=8", "train.evaluation_seeds=2"]
    settings += ["train.total_steps=60", "train.evaluate_steps=30", "train.batch_size=32"]
    assert run(*settings, f"out={imitation}") == 0
    rows = curve(imitation)
    assert [row["steps"] for row in rows] == [30, 60]
    assert rows[1]["validation_loss"] < rows[0]["validation_loss"]
    ppo = [*PPO[1:], "train=ppo_pointer", "train.network.hidden=8", f"train.initial={imitation / 'checkpoint'}"]
    assert run(*ppo, f"out={tmp_path / 'ppo'}") == 0
    first = curve(tmp_path / "ppo")[0]
    assert first["steps"] == 0
    assert first["slo_attainment"] == max(row["slo_attainment"] for row in rows)
    wrong = [*PPO, f"train.initial={imitation / 'checkpoint'}", f"out={tmp_path / 'wrong'}"]
    assert run(*wrong) == EXIT_USAGE
    assert "'train.initial'" in capsys.readouterr().err


def test_an_interrupted_imitation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = tmp_path / "recorded"
    assert main(["record", *SCENARIO, "planner=edf", "seeds=2", f"out={recorded}"]) == 0
    settings = ["train=imitation", f"train.dataset={recorded}", "train.network.hidden=8", "train.evaluation_seeds=1"]
    settings += ["train.total_steps=40", "train.evaluate_steps=20", "train.batch_size=16"]
    assert run(*settings, f"out={tmp_path / 'whole'}") == 0
    from runners import train_imitation

    write = train_imitation.write_state

    def killed(path: Path, state: Any) -> None:
        write(path, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(train_imitation, "write_state", killed)
    assert run(*settings, f"out={tmp_path / 'killed'}") == EXIT_INTERRUPTED
    monkeypatch.undo()
    assert run(*settings, f"out={tmp_path / 'killed'}") == 0
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_mistakes_in_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for overrides, message in (
        ([*PPO, "train.gamma=1.5"], "'train.gamma': input should be less than 1"),
        ([*PPO, "train.network.kind=lstm"], "'train.network'"),
        ([*PPO, "train.variants.count=5"], "'train.num_envs': 2 environments for 5 scenarios"),
        ([*PPO, "train.initial=nowhere"], "no checkpoint 'nowhere'"),
        ([*PPO, "train.n_step=7"], "unknown key 'train.n_step'"),
        (["train=imitation", "train.dataset=nowhere"], "no recorded episodes in 'nowhere'"),
    ):
        # The folder belongs to no training before there is something in it.
        assert run(*overrides, f"out={tmp_path / 'out'}") == EXIT_USAGE
        assert message in capsys.readouterr().err
