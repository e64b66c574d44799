"""Benchmarks: `python -m bench [word ...]`, one module `bench_<name>.py` with a function `run()` for each subject."""
