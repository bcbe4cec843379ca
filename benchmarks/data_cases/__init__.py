"""Cases of benchmarks/data.py: each module's `run(arguments)` yields figures."""
