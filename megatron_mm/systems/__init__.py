"""One folder a system: section.py, what its recipe says; graph.py, its nodes and losses; export.py, its export.

config/systems.py lists them.
"""
