"""LoRA for single projections of a layer that holds several in one matrix."""
