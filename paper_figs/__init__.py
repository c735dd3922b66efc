"""The figures of QLM's paper, drawn from rows of this project's own runs; `qlm figures` draws them."""
