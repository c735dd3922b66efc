"""Live vLLM servers: start one on this machine, speak to any over HTTP, measure its engine's step times."""
