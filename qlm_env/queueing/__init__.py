"""Request groups and virtual queues: what waits, and in which order it will run."""
