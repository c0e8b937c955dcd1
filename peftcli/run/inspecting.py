"""What can be said about a recipe before it is trained."""

from __future__ import annotations

from typing import Any

from peftcli.data.collation import samples_of
from peftcli.data.preview import Segment, render_sample
from peftcli.recipe import LoadedRecipe
from peftcli.reporting import Reporter
from peftcli.run.opening import check_method, encode_data, find_sites, make_batcher, open_base, read_data


def validate(loaded: LoadedRecipe, reporter: Reporter) -> dict[str, Any]:
    """Checks a recipe as far as that goes without weights, and returns what it would do.

    That is: the method's fields, the model's configuration and tokenizer, the adapted modules and the data.
    """
    method, config = check_method(loaded)
    reporter.stage("reading the data and the model's configuration")
    raw = read_data(loaded.recipe)
    base = open_base(loaded.recipe.model)
    sites = find_sites(loaded, base, method, config)
    prepared = encode_data(loaded.recipe, raw, base)
    return {
        "recipe": str(loaded.path),
        "method": loaded.recipe.method["type"],
        "adapted_modules": len(sites),
        "format": prepared.format,
        "train_samples": len(prepared.train),
        "eval_samples": len(prepared.eval) if prepared.eval is not None else 0,
    }


def preview(loaded: LoadedRecipe, reporter: Reporter, count: int) -> tuple[list[list[Segment]], list[str]]:
    """Returns the first `count` samples that training would see, decoded from its real batches, and the data report."""
    check_method(loaded)
    reporter.stage("reading the data and the tokenizer")
    raw = read_data(loaded.recipe)
    base = open_base(loaded.recipe.model)
    prepared = encode_data(loaded.recipe, raw, base)
    batch = make_batcher(prepared.train, base, joins=True, always=True).batch(range(min(count, len(prepared.train))))
    return [render_sample(sample, base.tokenizer) for sample in samples_of(batch)], prepared.train_report.lines()
