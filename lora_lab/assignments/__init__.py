"""What a user wants a model to learn, `--task` of the commands: one file each.

    material = gather("sentiment", "reviews.csv")                   a user's rows: which column is what, three parts, what was dropped and why
    reader = material.reader(model, tokenizer)                      how this kind of model is asked, taught and judged
    fit(model, reader.examples(material.train), config)
    reader.scores(model, material.test)                             {"accuracy": ..., "AUC": ...}

Not to be mixed up with data/tasks.py, which is what a row is to each kind of model, nor with models/tasks.py, the heads of encoders.
"""

from .base import Assignment, Reader, Reading, Way, kind_of
from .material import ASSIGNMENTS, Material, gather
from .preview import preview

__all__ = ["ASSIGNMENTS", "Assignment", "Material", "Reader", "Reading", "Way", "gather", "kind_of", "preview"]
