"""Files that every exported folder carries; of megatron_mm they import `media` alone, whose files go with them."""
