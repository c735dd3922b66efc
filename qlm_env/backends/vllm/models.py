"""Small Llama models with random weights, made locally so that a real server can run anywhere.

A folder holds the configuration and a byte-level tokenizer. The weights come from the server's own
``--load-format dummy``, or are written too, by a seed, so that every server that loads them says the same.
Nothing is downloaded and nothing the model says means anything: latencies depend on its shape alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qlm_env.workload.atomic import atomic_path

BYTES_PER_PARAMETER = 2
"""bfloat16, for weights and KV cache alike."""

END_OF_TEXT = "<|end_of_text|>"
NUM_BYTE_TOKENS = 256
WEIGHTS_FILE = "model.safetensors"

_ATTENTION_GAIN = 1.5
_ALIGNMENT = 8

Weights: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True)
class LlamaShape:
    """The sizes of a Llama model; the default has about 9 million parameters."""

    hidden_size: int = 384
    num_layers: int = 6
    num_heads: int = 6
    num_kv_heads: int = 2
    intermediate_size: int = 1024
    vocab_size: int = 512
    context_tokens: int = 4096

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def num_parameters(self) -> int:
        """Embedding, transformer layers, final norm and output layer (not tied to the embedding)."""
        attention = 2 * self.hidden_size * self.head_size * (self.num_heads + self.num_kv_heads)
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        return self.num_layers * layer + 2 * self.vocab_size * self.hidden_size + self.hidden_size

    @property
    def weight_bytes(self) -> int:
        return BYTES_PER_PARAMETER * self.num_parameters

    @property
    def kv_bytes_per_token(self) -> int:
        """Key and value, over all layers and KV heads."""
        return 2 * BYTES_PER_PARAMETER * self.num_layers * self.num_kv_heads * self.head_size


def write_random_llama(folder: Path, shape: LlamaShape | None = None, seed: int | None = None) -> None:
    """Write a model folder; files there are replaced.

    Args:
        seed: of weights to write; without it there are none, and vLLM has to make them (``--load-format dummy``).

    Raises:
        OSError: the folder cannot be written.
    """
    shape = LlamaShape() if shape is None else shape
    if seed is not None:
        weights = _random_weights(shape, np.random.default_rng(seed))
        with atomic_path(folder / WEIGHTS_FILE) as temporary:
            _write_safetensors(temporary, weights)
    files = {
        "config.json": _model_config(shape),
        "tokenizer.json": _byte_tokenizer(),
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT},
        "generation_config.json": {"eos_token_id": NUM_BYTE_TOKENS},
    }
    for name, values in files.items():
        with atomic_path(folder / name) as temporary:
            temporary.write_text(json.dumps(values, indent=1), encoding="utf-8")


def read_shape(folder: Path) -> LlamaShape | None:
    """The sizes of a Llama model whose folder is on this machine; ``None`` for what :class:`LlamaShape` cannot say."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if values.get("model_type") != "llama" or values.get("tie_word_embeddings", True):
        return None
    num_heads = values["num_attention_heads"]
    shape = LlamaShape(
        hidden_size=values["hidden_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=values.get("num_key_value_heads", num_heads),
        intermediate_size=values["intermediate_size"],
        vocab_size=values["vocab_size"],
        context_tokens=values["max_position_embeddings"],
    )
    return shape if values.get("head_dim", shape.head_size) == shape.head_size else None


def _random_weights(shape: LlamaShape, rng: np.random.Generator) -> dict[str, Weights]:
    """Zero-mean weights that keep the scale of what they act on.

    Every layer then adds as much to a token's state as the token itself brought, and the next token depends on the
    whole context. The small weights of a model before its training let the last token alone decide, so
    that the answer soon goes in a circle.
    """

    def matrix(outputs: int, inputs: int, gain: float = 1.0) -> Weights:
        weights: Weights = (rng.standard_normal((outputs, inputs)) * gain / np.sqrt(inputs)).astype(np.float32)
        return weights

    hidden, kv = shape.hidden_size, shape.num_kv_heads * shape.head_size
    ones = np.ones(hidden, np.float32)
    weights = {
        "model.embed_tokens.weight": rng.standard_normal((shape.vocab_size, hidden)).astype(np.float32),
        "model.norm.weight": ones,
        "lm_head.weight": matrix(shape.vocab_size, hidden),
    }
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}."
        weights |= {
            # Sharp attention: a mean over the whole context would hardly change from token to token.
            f"{prefix}self_attn.q_proj.weight": matrix(hidden, hidden, _ATTENTION_GAIN),
            f"{prefix}self_attn.k_proj.weight": matrix(kv, hidden, _ATTENTION_GAIN),
            f"{prefix}self_attn.v_proj.weight": matrix(kv, hidden),
            f"{prefix}self_attn.o_proj.weight": matrix(hidden, hidden),
            f"{prefix}mlp.gate_proj.weight": matrix(shape.intermediate_size, hidden),
            f"{prefix}mlp.up_proj.weight": matrix(shape.intermediate_size, hidden),
            f"{prefix}mlp.down_proj.weight": matrix(hidden, shape.intermediate_size),
            f"{prefix}input_layernorm.weight": ones,
            f"{prefix}post_attention_layernorm.weight": ones,
        }
    return weights


def _write_safetensors(path: Path, tensors: Mapping[str, Weights]) -> None:
    """The safetensors format: the length of a JSON header (8 bytes, little-endian), the header, the numbers."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.astype("<f4").tobytes())


def _model_config(shape: LlamaShape) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_size,
        "intermediate_size": shape.intermediate_size,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.context_tokens,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": NUM_BYTE_TOKENS,
        "eos_token_id": NUM_BYTE_TOKENS,
        "torch_dtype": "bfloat16",
    }


def _byte_tokenizer() -> dict[str, Any]:
    """A byte-level BPE tokenizer without merges: one token per byte, and one for the end of a text."""
    vocabulary = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    end = {
        "id": NUM_BYTE_TOKENS,
        "content": END_OF_TEXT,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "unk_token": None, "vocab": vocabulary, "merges": []},
    }


def _byte_symbols() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary.

    Printable Latin-1 bytes stand for themselves; the others follow in order from code point 256.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    symbols, following = [], 256
    for byte in range(NUM_BYTE_TOKENS):
        if byte in printable:
            symbols.append(chr(byte))
        else:
            symbols.append(chr(following))
            following += 1
    return symbols
