"""Recipes: reading, checking, completing and writing the YAML that a user gives. Imports no torch."""

from peftcli.recipe.loading import LoadedRecipe, load
from peftcli.recipe.messages import problems_from_pydantic
from peftcli.recipe.paths import resolve_paths
from peftcli.recipe.schema import (
    DataSection,
    DistributedSection,
    EvaluationSection,
    GenerateSection,
    LoggingSection,
    ModelSection,
    QuantizationSection,
    Recipe,
    Source,
    TrainingSection,
)
from peftcli.recipe.shipped import build_schema, json_schema, method_names
from peftcli.recipe.writing import dump

__all__ = [
    "DataSection",
    "DistributedSection",
    "EvaluationSection",
    "GenerateSection",
    "LoadedRecipe",
    "LoggingSection",
    "ModelSection",
    "QuantizationSection",
    "Recipe",
    "Source",
    "TrainingSection",
    "build_schema",
    "dump",
    "json_schema",
    "load",
    "method_names",
    "problems_from_pydantic",
    "resolve_paths",
]
