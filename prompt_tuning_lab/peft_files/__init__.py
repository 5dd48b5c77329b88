"""Prompts in the format of Hugging Face PEFT: the configuration, the one tensor, a head that was trained along, and the file PEFT does not have."""
