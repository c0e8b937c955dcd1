"""The composition root: what each command is made of, a line for each part.

Nothing here computes. Every function opens what it needs in the order in which mistakes are cheapest to find: the
recipe's form, the method's fields, the output folder, the data, the shapes of the model, and its weights last.
"""

RECIPE_FILE = "recipe.yaml"
MERGED_FOLDER = "merged"
EXPORT_FOLDER = "lora"
"""Where an export of a run goes."""
