"""Users' files as tables: what is in them, which column is what, which rows are for training and which for a test.

    parts = read_parts("reviews.csv")                    a file, a folder, a hub data set, or what is bundled; {"train": ..., "test": ...}
    columns = columns_of(parts["all"], shapes)           "text" and "label" are called "Review Text" and "Rating" there
    classes = classes_of(cells)                          0 and 1, or "pos" and "neg", are negative and positive
    parts = divided(parts, ...)                          train, validation and test, no text in two of them
"""

from .columns import Columns, Role, Shape, columns_of
from .files import Table, read_table
from .folders import read_parts
from .labels import Classes, classes_of
from .parts import divided, some_of

__all__ = ["Classes", "Columns", "Role", "Shape", "Table", "classes_of", "columns_of", "divided", "read_parts", "read_table", "some_of"]
