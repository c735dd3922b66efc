"""The `qlm` command: compare and evaluate planners, inspect workloads, measure speed."""
