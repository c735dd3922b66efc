"""The small random-weight models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from qlm_env.backends.vllm.models import END_OF_TEXT, WEIGHTS_FILE, LlamaShape, read_shape, write_random_llama


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_random_llama(tmp_path / "model")
    return tmp_path / "model"


def test_every_byte_has_a_token_of_its_own(folder: Path) -> None:
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(256))
    assert vocabulary["A"] == ord("A")
    assert vocabulary["Ġ"] == ord(" ")  # as every byte-level vocabulary writes a space
    assert vocabulary["Ċ"] == ord("\n")


def test_the_end_of_text_has_the_id_that_the_model_ends_with(folder: Path) -> None:
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    config = json.loads((folder / "config.json").read_text())
    assert [(token["content"], token["id"]) for token in added] == [(END_OF_TEXT, config["eos_token_id"])]
    assert config["eos_token_id"] < config["vocab_size"]


def test_parameters_are_counted_matrix_by_matrix() -> None:
    shape = LlamaShape(hidden_size=8, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=16, vocab_size=300)
    query_and_output, key_and_value = 2 * 8 * 8, 2 * 8 * 4
    gate_up_and_down, two_norms = 3 * 8 * 16, 2 * 8
    layer = query_and_output + key_and_value + gate_up_and_down + two_norms
    assert shape.num_parameters == 2 * layer + 2 * 300 * 8 + 8
    assert shape.weight_bytes == 2 * shape.num_parameters
    assert shape.kv_bytes_per_token == 2 * 2 * 2 * 4


def test_the_sizes_are_read_from_a_folder(folder: Path, tmp_path: Path) -> None:
    assert read_shape(folder) == LlamaShape()
    assert read_shape(tmp_path / "nope") is None
    config = json.loads((folder / "config.json").read_text())
    for other in ({"model_type": "bert"}, {"tie_word_embeddings": True}, {"head_dim": 128}):
        (tmp_path / "config.json").write_text(json.dumps(config | other))
        assert read_shape(tmp_path) is None


def test_the_default_is_small() -> None:
    assert 5e6 < LlamaShape().num_parameters < 2e7


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """As the format's description says: header length, header, numbers."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            assert entry["dtype"] == "F32"
            begin, end = entry["data_offsets"]
            numbers = np.frombuffer(data[8 + length + begin : 8 + length + end], "<f4")
            tensors[name] = numbers.reshape(entry["shape"])
    assert sum(tensor.nbytes for tensor in tensors.values()) == len(data) - 8 - length
    return tensors


def test_weights_are_written_by_seed_and_are_all_there(tmp_path: Path) -> None:
    shape = LlamaShape(hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=96)
    for folder, seed in (("a", 1), ("again", 1), ("b", 2)):
        write_random_llama(tmp_path / folder, shape, seed=seed)
    a, again, b = (read_safetensors(tmp_path / folder / WEIGHTS_FILE) for folder in ("a", "again", "b"))
    assert sum(tensor.size for tensor in a.values()) == shape.num_parameters
    assert all((a[name] == again[name]).all() for name in a)
    assert (a["lm_head.weight"] != b["lm_head.weight"]).all()
    assert a["model.layers.1.self_attn.k_proj.weight"].shape == (32, 64)
    assert a["model.layers.1.mlp.down_proj.weight"].shape == (64, 96)


def test_without_a_seed_there_are_no_weights(folder: Path) -> None:
    assert not (folder / WEIGHTS_FILE).exists()
