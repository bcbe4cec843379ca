"""Scripts that train each system, and the preparation of their data (examples/data); run from the repository's root."""
