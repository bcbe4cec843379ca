"""Shared by all tests: one thread a process (several processes run on two cores), and the CPU platform."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
