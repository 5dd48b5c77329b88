"""LoRA on weights that no layer calls: a module's own parameters, stacks of experts among them."""
