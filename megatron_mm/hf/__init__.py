"""Files that every exported folder carries; they import nothing of megatron_mm."""
