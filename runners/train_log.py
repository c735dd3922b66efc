"""What a training leaves behind: its curve, its best checkpoint, and a mirror of both in Weights & Biases."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from planners.learned.base import Network
from planners.learned.checkpoint import save_checkpoint
from planners.learned.evaluation import HeldOut
from planners.learned.spec import PolicySpec
from qlm_env.spec import ConfigError
from qlm_env.workload.atomic import atomic_path
from runners import files, results
from runners.config import WandbTracking
from runners.train_config import TrainConfig

CLAIM, CURVE, CHECKPOINT = "training.json", "curve.json", "checkpoint"

Row = dict[str, Any]


def claim(config: TrainConfig) -> str:
    """Make ``out`` the folder of this training, or accept that it already is; returns the configuration's hash.

    Raises:
        ConfigError: it holds a training of other settings.
    """
    out = config.out
    if out.exists() and not out.is_dir():
        raise ConfigError(f"'out': '{out}' is a file; name a folder")
    values = {
        "scenario": config.scenario.model_dump(mode="json"),
        "train": config.options.train.model_dump(mode="json"),
        "seed": config.options.seed,
    }
    path = out / CLAIM
    if path.exists() and (out / CURVE).exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise ConfigError(f"'out': '{path}' is not valid JSON; choose another out=DIR") from None
        difference = results.first_difference(before, values)
        if difference is not None:
            raise ConfigError(
                f"'out': '{out}' holds a training of other settings ({difference}); choose another out=DIR"
            )
    else:
        files.write_text(path, json.dumps(values, indent=2) + "\n")
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


class TrainingLog:
    """The evaluations of a training, and when to stop.

    Args:
        config: the training.
        policy: what is trained.
        held_out: episodes of workloads that are not trained on.
        config_hash: of the training.
    """

    def __init__(self, config: TrainConfig, policy: PolicySpec, held_out: HeldOut, config_hash: str) -> None:
        self._config = config
        self._policy = policy
        self._held_out = held_out
        self._config_hash = config_hash
        self.curve: list[Row] = []
        self._before_s = 0.0
        self._start_s = time.monotonic()
        self._mirror = _Mirror(config, config_hash) if isinstance(config.options.tracking, WandbTracking) else None

    def go_on_from(self, curve: list[Row]) -> None:
        """Take over the evaluations of a run that was killed."""
        self.curve = list(curve)
        self._before_s = float(curve[-1]["wall_s"]) if curve else 0.0

    def evaluate(self, network: Network, steps: int, **more: float) -> str:
        """Evaluate ``network``, keep it if it is the best so far, write the curve; returns a line about it."""
        metrics = self._held_out.metrics(network)
        row: Row = {
            "steps": steps,
            "wall_s": self._before_s + time.monotonic() - self._start_s,
            "slo_attainment": float(np.mean([m["slo_attainment"] for m in metrics])),
            "weighted_attainment": float(np.mean([(1.0 + m["episode_return"]) / 2.0 for m in metrics])),
            **{f"slo_attainment.{name}": value for name, value in _per_class(metrics).items()},
            **more,
        }
        best = max((r["slo_attainment"] for r in self.curve), default=-1.0)
        self.curve.append(row)
        if row["slo_attainment"] > best:
            about = {
                "command_settings": self._config.options.train.model_dump(mode="json"),
                "cluster": self._config.scenario.cluster.name,
                "workload": self._config.scenario.workload.name,
                "seed": self._config.options.seed,
                "config_hash": self._config_hash,
                "steps": steps,
                "wall_s": round(row["wall_s"], 1),
                "evaluation": {"slo_attainment": row["slo_attainment"], "seeds": len(metrics)},
            }
            save_checkpoint(self._config.out / CHECKPOINT, self._policy, network, about)
        files.write_text(self._config.out / CURVE, json.dumps(self.curve, indent=1) + "\n")
        if self._mirror is not None:
            self._mirror.log(row)
        return f"{steps} steps: SLO attainment {100 * row['slo_attainment']:.1f} % on held-out workloads"

    def reason_to_stop(self) -> str | None:
        """Why the training should end before its last step, if it should."""
        train = self._config.options.train
        scores = [row["slo_attainment"] for row in self.curve]
        if train.stop_at is not None and scores[-1] >= train.stop_at:
            return f"reached {100 * train.stop_at:.1f} %"
        if train.patience is not None and len(scores) - 1 - int(np.argmax(scores)) >= train.patience:
            return f"no better in {train.patience} evaluations"
        return None

    def finish(self) -> None:
        """Draw the curve and complete the mirror."""
        figure = self._config.out / "curve.png"
        _draw_curve(figure, self.curve)
        if self._mirror is not None:
            self._mirror.finish(self.curve, figure, self._config.out / CHECKPOINT)


def merge_jobs(out: Path) -> None:
    """List a multirun's trainings, in folders below ``out``, by their best evaluation in ``out/trainings.json``."""
    found = []
    for path in sorted(out.glob(f"*/{CURVE}"), key=lambda path: path.parent.name.zfill(9)):
        best = max(json.loads(path.read_text(encoding="utf-8")), key=lambda row: float(row["slo_attainment"]))
        found.append({"job": path.parent.name, **best})
    found.sort(key=lambda row: -float(row["slo_attainment"]))
    files.write_text(out / "trainings.json", json.dumps(found, indent=1) + "\n")


def _per_class(metrics: list[dict[str, Any]]) -> dict[str, float]:
    """Mean attainment of each class over the episodes that had requests of it."""
    names = list(metrics[0]["slo_attainment_per_class"])
    values = {name: [m["slo_attainment_per_class"][name] for m in metrics] for name in names}
    return {
        name: float(np.mean([v for v in found if v is not None]))
        for name, found in values.items()
        if any(v is not None for v in found)
    }


def _draw_curve(path: Path, curve: list[Row]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot()
    steps = [row["steps"] for row in curve]
    axes.plot(steps, [100 * row["slo_attainment"] for row in curve], label="all", color="black")
    for name in [name for name in curve[0] if name.startswith("slo_attainment.")]:
        axes.plot(steps, [100 * row.get(name, np.nan) for row in curve], label=name.partition(".")[2], linewidth=1)
    axes.set(xlabel="steps", ylabel="SLO attainment on held-out workloads (%)")
    axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


class _Mirror:
    """The training in Weights & Biases."""

    def __init__(self, config: TrainConfig, config_hash: str) -> None:
        import wandb

        tracking = config.options.tracking
        assert isinstance(tracking, WandbTracking)
        config.out.mkdir(parents=True, exist_ok=True)
        self._config = config
        self._run = wandb.init(
            project=tracking.project,
            entity=tracking.entity,
            mode=tracking.mode,
            dir=config.out,
            id=f"train-{config_hash}",
            resume="allow",
            name=config.out.name,
            job_type="train",
            config={
                **config.scenario.model_dump(mode="json"),
                "train": config.options.train.model_dump(mode="json"),
                "seed": config.options.seed,
                "config_hash": config_hash,
            },
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, row: Row) -> None:
        self._run.log(row, step=int(row["steps"]))

    def finish(self, curve: list[Row], figure: Path, checkpoint: Path) -> None:
        import wandb

        names = [name for name in curve[0] if name.startswith("slo_attainment")]
        table = wandb.Table(columns=["steps", *names], data=[[row[n] for n in ("steps", *names)] for row in curve])
        frame = _frame(self._config, checkpoint)
        self._run.log({"slo": table, "curve": wandb.Image(str(figure)), "timeline": wandb.Image(frame)})
        artifact = wandb.Artifact(f"{self._config.out.name}-checkpoint", type="policy")
        artifact.add_dir(str(checkpoint))
        self._run.log_artifact(artifact)
        self._run.finish()


def _frame(config: TrainConfig, checkpoint: Path) -> Any:
    """A picture of the cluster after the policy's first episode on a held-out workload, (H, W, 3)."""
    from planners import make_planner
    from planners.learned.evaluation import FIRST_SEED
    from planners.spec import LearnedSpec
    from qlm_env.env import QLMEnv

    scenario = config.scenario
    env = QLMEnv(
        scenario.cluster.model_dump(),
        scenario.workload.model_dump(),
        scenario.slo.model_dump(),
        scenario.environment.model_dump(),
        render_mode="rgb_array",
    )
    planner = make_planner(LearnedSpec(path=str(checkpoint)))
    _, info = env.reset(seed=FIRST_SEED)
    planner.reset(env.view, np.random.default_rng(0))
    while "metrics" not in info:
        info = env.step_plan(planner.act(env.view))[-1]
    return env.render()
