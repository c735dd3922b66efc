"""Runs of a real vLLM server, as folders.

The format is that of LLMServingSim 2.0's ``bench``: ``requests.jsonl`` (:mod:`.recorded_requests`), ``meta.json``
(:mod:`.recorded_engine`) and, where it was kept, ``timeseries.csv`` (:mod:`.recorded_series`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qlm_env.fidelity.recorded_engine import RecordedEngine, read_engine
from qlm_env.fidelity.recorded_requests import RecordedRequests, read_requests
from qlm_env.fidelity.recorded_series import RecordedSeries, read_series
from qlm_env.fidelity.run_error import RunError
from qlm_env.spec import ConfigError


@dataclass(frozen=True)
class RecordedRun:
    """What a real server was asked, when it answered, and how it was set up."""

    folder: Path
    engine: RecordedEngine
    requests: RecordedRequests
    series: RecordedSeries | None
    """``None`` where the folder has no ``timeseries.csv``."""


def read_run(folder: Path) -> RecordedRun:
    """The recorded run in ``folder``.

    Raises:
        ConfigError: the folder or a file in it is missing, malformed or impossible; one line with the file and,
            where there is one, the line and the field.
    """
    if not folder.is_dir():
        raise ConfigError(f"'run': no folder '{folder}'")
    engine = read_engine(folder / "meta.json")
    path = folder / "requests.jsonl"
    requests = read_requests(path)
    if engine.settings.num_gpu_blocks is not None:
        check_requests_fit(requests, path, (engine.settings.num_gpu_blocks - 1) * engine.settings.block_size)
    series_path = folder / "timeseries.csv"
    return RecordedRun(folder, engine, requests, read_series(series_path) if series_path.exists() else None)


def check_requests_fit(requests: RecordedRequests, path: Path, kv_tokens: int) -> None:
    """Refuse a request whose prompt and output exceed ``kv_tokens`` of KV cache: no engine could have served it.

    Raises:
        ConfigError: one line with the file, the line and both numbers.
    """
    # The last token is never fed back, so it needs no place in the cache.
    needed = requests.prompt_tokens + requests.output_tokens - 1
    for row in (needed > kv_tokens).nonzero()[0][:1]:
        raise RunError(
            path,
            f"{requests.prompt_tokens[row]:,} prompt and {requests.output_tokens[row]:,} output tokens are more than "
            f"the {kv_tokens:,} tokens of KV cache",
            int(requests.line[row]),
        )
