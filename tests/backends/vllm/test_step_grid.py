"""Which steps are measured: what the engine can hold, and what exercises it."""

from __future__ import annotations

import pytest

from qlm_env.backends.vllm.step_grid import StepGrid, default_grid
from tests.backends.vllm.virtual_engine import make_facts


def test_the_default_grid_reaches_the_engines_limits() -> None:
    facts = make_facts(max_num_seqs=16, max_num_batched_tokens=512, max_model_len=2048, block_size=128)
    grid = default_grid(facts)
    assert grid.prefill_tokens == (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
    assert grid.prefixes == (0, 768)
    assert grid.decode_seqs == (1, 2, 4, 8, 15, 16)
    assert grid.context_lens == (64, 256, 1024)
    assert grid.batches(facts) == [(seqs, context) for seqs in grid.decode_seqs for context in grid.context_lens]


@pytest.mark.parametrize("max_num_seqs", [1, 2, 5, 256])
@pytest.mark.parametrize("max_model_len", [100, 300, 8192])
@pytest.mark.parametrize("num_gpu_blocks", [30, 400, 100_000])
def test_nothing_in_the_default_grid_is_more_than_the_engine_can_hold(
    max_num_seqs: int, max_model_len: int, num_gpu_blocks: int
) -> None:
    facts = make_facts(
        max_num_seqs=max_num_seqs, max_model_len=max_model_len, num_gpu_blocks=num_gpu_blocks, block_size=16
    )
    grid = default_grid(facts)
    for tokens, prefix in grid.chunks:
        assert tokens <= facts.engine.max_num_batched_tokens
        assert prefix + tokens < max_model_len
        assert prefix % 16 == 0
    for seqs, context in grid.batches(facts):
        assert seqs <= max_num_seqs
        assert context + grid.decode_steps < max_model_len
        assert seqs * (context + grid.decode_steps) <= (num_gpu_blocks - 1) * 16
        for tokens in grid.chunks_beside(seqs, facts.engine):
            assert seqs < max_num_seqs
            assert 1 <= tokens <= facts.engine.max_num_batched_tokens - seqs


def test_the_fullest_step_is_always_measured() -> None:
    facts = make_facts(max_num_seqs=16, max_num_batched_tokens=512)
    assert default_grid(facts).chunks_beside(8, facts.engine) == [16, 64, 256, 504]


def test_no_prefix_without_a_cache_for_it() -> None:
    assert default_grid(make_facts(enable_prefix_caching=False)).prefixes == (0,)


def test_a_batch_that_would_outgrow_the_context_while_it_is_measured_is_left_out() -> None:
    facts = make_facts(max_model_len=128, max_num_seqs=2)
    grid = StepGrid((16,), (0,), (2,), (16, 64, 120))
    assert grid.batches(facts) == [(2, 16), (2, 64)]
