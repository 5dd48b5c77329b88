"""What a user wants a model to learn, `--task` of the commands: one file each.

    material = gather("sentiment", "reviews.csv")                   a user's rows: which column is what, three parts, what was dropped and why
    reader = material.reader(model, tokenizer)                      how this kind of model is asked, taught and judged
    fit(model, reader.examples(material.train), config)
    reader.scores(model, material.test)                             {"accuracy": ..., "AUC": ...}

What a row is to each kind of model says data/objectives.py.
"""

from .base import Reader, Reading, Task, Way, model_kind
from .material import TASKS, Material, gather
from .preview import preview

__all__ = ["TASKS", "Material", "Reader", "Reading", "Task", "Way", "gather", "model_kind", "preview"]
