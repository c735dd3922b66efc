"""`qlm vllm make-model`: a model folder for a server, without a download."""

from __future__ import annotations

import sys
from pathlib import Path

from qlm_env.backends.vllm.model_folders import made_shape
from qlm_env.backends.vllm.models import write_random_llama
from runners.cluster_config import MakeModelOptions


def make_model(options: MakeModelOptions) -> None:
    """Write the model; files in the folder are replaced.

    Raises:
        OSError: the folder cannot be written.
    """
    shape = made_shape(options.architecture, options.context_tokens)
    write_random_llama(Path(options.out), shape, options.seed)
    print(
        f"a Llama model of {shape.num_parameters / 1e6:.1f} million random weights is in {options.out}", file=sys.stderr
    )
