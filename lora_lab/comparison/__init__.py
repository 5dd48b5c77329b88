"""Several ways to have a model do a task, side by side: asked, shown examples, prompted, adapted, trained as a whole.

    bench = Workbench(source, material, reader, ...)               what all methods share: the model, the rows, how it is read
    study = Study(bench, METHODS, Results())
    study.run("lora")                                              its learning rate is chosen on the validation rows, then the test is read, once
    print(table(study))

A method is whatever makes a model that can answer (methods.py); those of another lab are handed in, as `python -m lora_lab compare` does.
"""

from .forgetting import ForgettingProbe
from .methods import METHODS, Method, Taught
from .results import Results
from .study import Study
from .table import table
from .workbench import Workbench

__all__ = ["METHODS", "ForgettingProbe", "Method", "Results", "Study", "Taught", "Workbench", "table"]
