"""Entries of the KV connector's folder, against what vLLM's ``ExampleConnector`` computes."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlm_env.backends.vllm.kv_store import KvStore, remove

STORE = KvStore(Path("store"), block_size=4)


def test_only_whole_blocks_before_the_last_token_are_stored() -> None:
    assert [STORE.whole_blocks(n) for n in (0, 1, 4, 5, 8, 9, 10)] == [0, 0, 0, 4, 4, 8, 8]


@pytest.mark.parametrize("num_tokens", range(1, 20))
def test_what_is_stored_is_found_and_read_when_the_input_comes_back(num_tokens: int, tmp_path: Path) -> None:
    """As the connector looks for ``len - 1`` tokens, reads ``len``, and takes less than that as whole blocks."""
    store = KvStore(tmp_path, 4)
    tokens = list(range(num_tokens))
    keeping = store.keeping(tokens)
    if keeping is None:
        assert num_tokens <= 5
        return
    assert not keeping.complete()
    stored = store.entry(tokens)
    assert stored is not None
    stored.mkdir()
    assert keeping.complete()
    looked_for, read = (num_tokens - 2) // 4 * 4, (num_tokens - 1) // 4 * 4
    assert keeping.num_tokens == read <= num_tokens - 1, "the last token has no KV"
    found = store.entry([*tokens[:looked_for], -1])
    assert found is not None
    assert found.is_dir()
    assert store.entry([*tokens[:read], -1]) == stored
    keeping.remove()
    assert list(tmp_path.iterdir()) == []


def test_an_entry_is_named_as_vllm_names_it() -> None:
    # hashlib.md5(torch.tensor([0, 1, 2, 3]).numpy().tobytes()).hexdigest()
    assert STORE.entry([0, 1, 2, 3, 9]) == Path("store/6708c3818d3340ec4ef4a3c795879ca2")
    assert STORE.entry([0, 1, 2, 3, 9]) == STORE.entry([0, 1, 2, 3, 8])
    assert STORE.entry([0, 1, 2, 3]) is None
    assert STORE.entry([0, 1, 2, 4, 9]) != STORE.entry([0, 1, 2, 3, 9])


def test_removing_what_is_not_there_is_no_error(tmp_path: Path) -> None:
    remove(tmp_path / "nothing")
    (tmp_path / "entry").mkdir()
    (tmp_path / "entry" / "layer").touch()
    remove(tmp_path / "entry")
    assert not (tmp_path / "entry").exists()
