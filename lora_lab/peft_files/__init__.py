"""Adapter folders in the format of Hugging Face PEFT: the configuration, and what each kind of tensor is called there."""
