"""The one error of this room."""


class MemoryMathError(ValueError):
    """A request that memory_math refuses; the message names the value, what is supported and the likely fix."""
