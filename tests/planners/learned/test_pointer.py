"""A pointer network does not care how groups, instances and models are numbered, or how many there are."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

from planners.learned.pointer import PointerNetwork  # noqa: E402
from qlm_env.features import GROUP_FEATURES, INSTANCE_FEATURES, columns  # noqa: E402
from qlm_env.lso import ActionCodec  # noqa: E402
from qlm_env.observation import observation_space  # noqa: E402

ROWS, USED, MODELS, CLASSES = 7, 5, 3, 3
GROUP, INSTANCE = columns(GROUP_FEATURES, MODELS, CLASSES), columns(INSTANCE_FEATURES, MODELS, CLASSES)

Observation = dict[str, np.ndarray]


def random_observation(num_instances: int, seed: int) -> Observation:
    """A cluster that could be: every group of one model, some of them in queues."""
    rng = np.random.default_rng(seed)
    space = observation_space(ROWS, num_instances, MODELS, CLASSES)
    found = {name: rng.uniform(0.0, 1.0, box.shape).astype(np.float32) for name, box in space.items()}
    found["groups"][USED:] = 0.0
    found["group_mask"] = (np.arange(ROWS) < USED).astype(np.float32)
    found["instance_mask"][:] = 1.0
    for row in range(USED):
        found["groups"][row, GROUP["model"]] = np.eye(MODELS)[rng.integers(MODELS)]
        queued = rng.random() < 0.6
        found["groups"][row, GROUP["queued"]] = queued
        found["groups"][row, GROUP["queue"]] = queued * (rng.integers(num_instances) + 1) / num_instances
        found["groups"][row, GROUP["position"]] = queued / rng.integers(1, 4)
    for name in ("active_model", "swap_target", "warm", "staging", "fits"):
        found["instances"][:, INSTANCE[name]] = rng.integers(0, 2, (num_instances, MODELS))
    return found


def network(seed: int = 0) -> PointerNetwork:
    """Weights large enough for differences to show."""
    torch.manual_seed(seed)
    made = PointerNetwork(MODELS, CLASSES, 16).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return made


def run(net: PointerNetwork, observation: Observation) -> tuple[np.ndarray, float]:
    batch = {name: torch.from_numpy(array[None]).double() for name, array in observation.items()}
    with torch.no_grad():
        return net.logits(batch)[0].numpy(), float(net.value(batch))


def parts(logits: np.ndarray, num_instances: int, num_models: int = MODELS) -> dict[str, np.ndarray]:
    """The logits by verb, with an axis for each thing named."""
    codec = ActionCodec(ROWS, num_instances, num_models)
    assert logits.shape == (codec.num_actions,)
    shapes = {
        "advance": (1,),
        "balance": (ROWS, num_instances, 2),
        "pull": (num_instances,),
        "evict": (num_instances, 2),
        "swap": (num_instances, num_models),
        "warm": (num_instances, num_models),
    }
    starts = codec.verb_starts
    return {name: logits[starts[v] : starts[v + 1]].reshape(shape) for v, (name, shape) in enumerate(shapes.items())}


def assert_alike(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-9, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("num_instances", [2, 3, 8])
def test_permuted_instances_permute_the_logits(num_instances: int) -> None:
    net, seen = network(), random_observation(num_instances, 1)
    order = np.random.default_rng(2).permutation(num_instances)
    while np.array_equal(order, np.arange(num_instances)):
        order = np.roll(order, 1)
    there = np.argsort(order)  # where each instance has gone
    moved = {name: array.copy() for name, array in seen.items()}
    moved["instances"] = seen["instances"][order]
    queue = seen["groups"][:, GROUP["queue"]]
    index = np.rint(queue * num_instances).astype(int) - 1
    moved["groups"][:, GROUP["queue"]] = np.where(queue > 0, (there[index] + 1) / num_instances, 0.0)
    logits, value = run(net, seen)
    permuted, same_value = run(net, moved)
    before, after = parts(logits, num_instances), parts(permuted, num_instances)
    expected = {
        "advance": before["advance"],
        "balance": before["balance"][:, order],
        **{name: before[name][order] for name in ("pull", "evict", "swap", "warm")},
    }
    assert_alike(after, expected)
    assert value == pytest.approx(same_value, rel=1e-9)
    # The test would say nothing of a network that scores all instances alike.
    assert before["balance"][:USED].std(1).min() > 1e-4


def test_permuted_groups_permute_the_logits() -> None:
    net, seen = network(), random_observation(3, 3)
    order = np.array([3, 0, 4, 1, 2, 5, 6])
    moved = seen | {"groups": seen["groups"][order]}
    (logits, value), (permuted, same_value) = run(net, seen), run(net, moved)
    before, after = parts(logits, 3), parts(permuted, 3)
    assert_alike(after, before | {"balance": before["balance"][order]})
    assert value == pytest.approx(same_value, rel=1e-9)


def test_permuted_models_permute_the_logits() -> None:
    net, seen = network(), random_observation(3, 4)
    order = np.array([2, 0, 1])
    moved = {name: array.copy() for name, array in seen.items()}
    moved["groups"][:, GROUP["model"]] = seen["groups"][:, GROUP["model"]][:, order]
    for name in ("active_model", "swap_target", "warm", "staging", "fits"):
        moved["instances"][:, INSTANCE[name]] = seen["instances"][:, INSTANCE[name]][:, order]
    before, after = parts(run(net, seen)[0], 3), parts(run(net, moved)[0], 3)
    assert_alike(after, before | {name: before[name][:, order] for name in ("swap", "warm")})


@pytest.mark.parametrize(("num_instances", "num_models"), [(1, 1), (2, 3), (16, 5)])
def test_the_same_weights_run_on_clusters_of_other_sizes(num_instances: int, num_models: int) -> None:
    trained = network()
    other = PointerNetwork(num_models, CLASSES, 16)
    other.load_state_dict(trained.state_dict())
    space = observation_space(ROWS, num_instances, num_models, CLASSES)
    space.seed(0)
    batch = {name: torch.from_numpy(np.array([array])) for name, array in space.sample().items()}
    batch["instance_mask"][:] = 1.0
    logits = other.logits(batch)
    assert logits.shape == (1, ActionCodec(ROWS, num_instances, num_models).num_actions)
    assert torch.isfinite(logits).all()


def test_padding_changes_nothing() -> None:
    """Instances that are not there leave the logits of those that are."""
    net, seen = network(), random_observation(3, 5)
    padded = seen | {
        "instances": np.concatenate([seen["instances"], np.zeros((2, seen["instances"].shape[1]), np.float32)]),
        "instance_mask": np.array([1, 1, 1, 0, 0], np.float32),
    }
    (logits, value), (more, same_value) = run(net, seen), run(net, padded)
    before, after = parts(logits, 3), parts(more, 5)
    expected = before | {"balance": before["balance"]}
    assert_alike({name: a[:, :3] if name == "balance" else a[:3] for name, a in after.items()}, expected)
    assert value == pytest.approx(same_value, rel=1e-9)


def test_rows_without_a_group_change_nothing() -> None:
    net, seen = network(), random_observation(3, 6)
    filled = seen | {"groups": seen["groups"].copy()}
    filled["groups"][USED:] = 0.7
    longer = {name: np.stack([a, a]) for name, a in filled.items()}
    longer["group_mask"][1] = 1.0  # another observation of the batch uses all rows
    batch = {name: torch.from_numpy(array).double() for name, array in longer.items()}
    with torch.no_grad():
        both = net.logits(batch)[0].numpy()
    alone, _ = run(net, seen)
    before, after = parts(alone, 3), parts(both, 3)
    assert_alike(
        {name: a[:USED] if name == "balance" else a for name, a in after.items()},
        {name: a[:USED] if name == "balance" else a for name, a in before.items()},
    )
