"""`qlm profile measure`: the step times of a live vLLM server as a table, and the profile fitted to them."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qlm_env.backends.vllm.client import VllmClient
from qlm_env.backends.vllm.facts import EngineFacts, EngineLimits, read_facts
from qlm_env.backends.vllm.models import read_shape
from qlm_env.backends.vllm.step_grid import StepGrid, default_grid
from qlm_env.backends.vllm.step_times import Measurement, StepMeter, measure_steps, unseen_prompts
from qlm_env.profiles.custom import complete_profile, physical_bounds
from qlm_env.profiles.fitting import SPLIT_SEED, check_errors, fit_table
from qlm_env.profiles.load import ProfileKey, profile_yaml, read_profile
from qlm_env.profiles.schema import BLOCK_TOKENS, UNITS, Quantity
from qlm_env.profiles.step_tables import read_step_table
from qlm_env.spec import ConfigError
from runners.files import write_text
from runners.live_config import MeasureOptions
from runners.profile_commands import errors_table, given_quantities
from runners.progress import CountedProgress
from runners.tables import console

TABLE = "steps.csv"
WRITTEN_BY = "Written by `qlm profile measure`."
BUSY_SPREAD = 0.1
"""Repeats that differ by more than this are worth a word."""

COLUMNS = ("kind", "prefill_tokens", "prefix", "decode_seqs", "context_len", "latency_ms")


def measure(options: MeasureOptions) -> None:
    """Measure the server and write ``steps.csv``, ``measurement.json`` and the profile's YAML file to ``out``.

    Nothing is written before the measurement is complete.

    Raises:
        ConfigError: the server cannot be used, fails on the way, or a setting does not suit it. Also once the steps
            are measured and written, when a number is missing or the fit is worse than ``max_error``; the profile
            is not written then, and `qlm profile fit` can make it from the table.
    """
    key = ProfileKey(options.device, options.architecture, options.tp)
    like = None if options.like is None else read_profile(Path(options.like))
    facts, measured = asyncio.run(_measure(options))
    table, out = steps_csv(measured), Path(options.out)
    write_text(out / TABLE, table)
    write_text(out / "measurement.json", _measurement_json(options, facts, measured))
    print(
        f"{len(measured.steps)} steps are in {out / TABLE}; the server's front end adds "
        f"{1e3 * measured.overhead_s:.1f} ms to a first token",
        file=sys.stderr,
    )
    spread = median_spread(measured)
    if spread > BUSY_SPREAD:
        print(f"repeats of a step differ by {spread:.0%}: the server or this machine is busy", file=sys.stderr)
    steps = read_step_table(out / TABLE, {})
    fitted = fit_table(steps, np.random.default_rng(SPLIT_SEED), physical_bounds(key))
    source = f"fit to {len(measured.steps)} steps measured over HTTP on vLLM {facts.vllm_version}"
    given = engine_quantities(facts) | given_quantities(options, "given to qlm profile measure")
    profile = complete_profile(key, fitted, source, given, like)
    if not options.force:
        check_errors(fitted, options.max_error)
    write_text(out / key.file_name, profile_yaml(profile, WRITTEN_BY))
    console().print(errors_table(fitted, profile))
    print(f"the profile is in {out / key.file_name}", file=sys.stderr)


def engine_quantities(facts: EngineFacts) -> dict[str, Quantity]:
    """What the server tells of a profile's numbers, and the bytes of a model whose folder is on this machine."""
    engine = facts.engine
    source = f"vLLM {facts.vllm_version}, /metrics and /v1/models"
    blocks = facts.num_gpu_blocks * engine.block_size // BLOCK_TOKENS
    values: dict[str, tuple[float, str]] = {
        "num_gpu_blocks": (blocks, source),
        "context_tokens": (facts.max_model_len, source),
    }
    shape = read_shape(Path(facts.model_path))
    if shape is not None:
        values["weight_bytes"] = (shape.weight_bytes, "2 bytes per parameter of the model's config.json")
        values["kv_bytes_per_token"] = (shape.kv_bytes_per_token, "2 bytes per key and value of its config.json")
    return {
        name: Quantity(value=value, unit=UNITS[name], kind="measured" if text == source else "estimated", source=text)
        for name, (value, text) in values.items()
    }


async def _measure(options: MeasureOptions) -> tuple[EngineFacts, Measurement]:
    limits = EngineLimits(max_num_seqs=options.max_num_seqs, max_num_batched_tokens=options.max_num_batched_tokens)
    async with VllmClient(options.url, options.api_key()) as client:
        facts = await read_facts(client, options.model, limits)
        grid = make_grid(options, facts)
        meter = StepMeter(client, facts, unseen_prompts())
        with CountedProgress("measurements", options.repeats * grid.num_parts(facts)) as progress:
            return facts, await measure_steps(meter, grid, options.repeats, progress.advance)


def make_grid(options: MeasureOptions, facts: EngineFacts) -> StepGrid:
    """The default grid with what the options say instead.

    Raises:
        ConfigError: a value is more than the server can do.
    """
    engine, context = facts.engine, facts.max_model_len
    grid = default_grid(facts)
    prefill_tokens = tuple(sorted(set(options.prefill_tokens or grid.prefill_tokens)))
    prefixes = grid.prefixes if options.prefixes is None else (0, *sorted(set(options.prefixes)))
    decode_seqs = tuple(sorted(set(options.decode_seqs or grid.decode_seqs)))
    context_lens = tuple(sorted(set(options.context_lens or grid.context_lens)))
    if prefill_tokens[-1] > engine.max_num_batched_tokens:
        raise ConfigError(
            f"'prefill_tokens': {prefill_tokens[-1]} tokens take several steps of the server's "
            f"max_num_batched_tokens={engine.max_num_batched_tokens}"
        )
    if prefixes[-1] + prefill_tokens[-1] >= context:
        raise ConfigError(
            f"'prefill_tokens': a prompt of {prefixes[-1] + prefill_tokens[-1]} tokens and one more exceed the "
            f"context of {context} of {facts.model}"
        )
    if decode_seqs[-1] > engine.max_num_seqs:
        raise ConfigError(f"'decode_seqs': {decode_seqs[-1]} exceed the server's max_num_seqs={engine.max_num_seqs}")
    if prefixes[-1] and not engine.enable_prefix_caching:
        raise ConfigError("'prefixes': the server caches no prefixes")
    for prefix in prefixes:
        if prefix % engine.block_size:
            raise ConfigError(f"'prefixes': expected multiples of the server's block size {engine.block_size}")
    grid = StepGrid(prefill_tokens, prefixes, decode_seqs, context_lens)
    if not grid.batches(facts):
        raise ConfigError(
            f"'context_lens': not even {decode_seqs[0]} x {context_lens[0]} tokens fit the context of {context} "
            f"and the {facts.num_gpu_blocks} KV blocks of {facts.model} for as long as they are measured"
        )
    return grid


class TableRow(NamedTuple):
    """One line of the step table."""

    kind: str
    prefill_tokens: int
    prefix: int
    decode_seqs: int
    context_len: float
    latency_ms: float


def table_rows(measured: Measurement) -> list[TableRow]:
    """Every step measured, with the medians over the repeats.

    Raises:
        ConfigError: a time comes out as negative.
    """
    rows = []
    for point, samples in measured.steps.items():
        latency_s = float(np.median([sample.latency_s for sample in samples]))
        if latency_s <= 0:
            raise ConfigError(
                f"the first token of {point.prefill_tokens} tokens came sooner than that of one token: the server or "
                "this machine had something else to do; measure again"
            )
        context_len = float(np.median([sample.context_len for sample in samples]))
        rows.append(TableRow(*point[:4], round(context_len, 1), round(1e3 * latency_s, 4)))
    return sorted(rows)


def steps_csv(measured: Measurement) -> str:
    """The step table as text, in the columns that `qlm profile fit` reads."""
    lines = [",".join(COLUMNS)]
    lines += [f"{','.join(map(str, row[:4]))},{row.context_len:g},{row.latency_ms:g}" for row in table_rows(measured)]
    return "\n".join(lines) + "\n"


def median_spread(measured: Measurement) -> float:
    """By how much the repeats of a step differ, largest less smallest over the median; the median over all steps."""
    latencies_s = [[sample.latency_s for sample in samples] for samples in measured.steps.values()]
    return float(np.median([np.ptp(values) / np.median(values) for values in latencies_s]))


def _measurement_json(options: MeasureOptions, facts: EngineFacts, measured: Measurement) -> str:
    values = {
        "model": facts.model,
        "vllm_version": facts.vllm_version,
        "max_model_len": facts.max_model_len,
        "engine": facts.engine.model_dump(mode="json"),
        "repeats": options.repeats,
        "front_end_overhead_s": measured.overhead_s,
        "median_spread": median_spread(measured),
    }
    return json.dumps(values, indent=2) + "\n"
