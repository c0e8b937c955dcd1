"""What can be said about a recipe before it is trained."""

from __future__ import annotations

from typing import Any

from peftcli.data.collation import samples_of
from peftcli.data.preview import Segment, render, render_sample
from peftcli.recipe import LoadedRecipe
from peftcli.reporting import Reporter
from peftcli.run.batches import check_packing
from peftcli.run.fitting import check_checkpointing, check_method, find_sites, settle
from peftcli.run.opening import encode_data, make_batcher, open_base, read_data
from peftcli.run.prepacked import note_stored
from peftcli.training import zero_settings


def validate(loaded: LoadedRecipe, reporter: Reporter) -> dict[str, Any]:
    """Checks a recipe as far as that goes without weights, and returns what it would do.

    That is: the method's fields, the model's configuration and tokenizer, the adapted modules and the data.
    """
    method, config = check_method(loaded)
    zero_settings.read(loaded)
    reporter.stage("reading the data and the model's configuration")
    raw = read_data(loaded.recipe)
    base = open_base(loaded.recipe.model, meaning=raw.meaning, packed=loaded.recipe.quantization)
    note_stored(base.config, base.section.name, reporter)
    fit = find_sites(loaded, base, method, config)
    check_checkpointing(loaded, method, config)
    check_packing(loaded, method, config)
    prepared = encode_data(loaded.recipe, raw, base)
    settle(loaded, method, config, base, prepared)
    return {
        "recipe": str(loaded.path),
        "method": loaded.recipe.method["type"],
        "adapted_modules": len(fit.sites),
        "format": prepared.format,
        **({"labels": len(prepared.labels)} if prepared.labels is not None else {}),
        "train_samples": len(prepared.train),
        "eval_samples": len(prepared.eval) if prepared.eval is not None else 0,
    }


def preview(loaded: LoadedRecipe, reporter: Reporter, count: int) -> tuple[list[list[Segment]], list[str]]:
    """Returns the first `count` samples that training would see, decoded from its real batches, and the data report."""
    check_method(loaded)
    reporter.stage("reading the data and the tokenizer")
    raw = read_data(loaded.recipe)
    base = open_base(loaded.recipe.model, meaning=raw.meaning)
    prepared = encode_data(loaded.recipe, raw, base)
    shown, labels, lines = (
        range(min(count, len(prepared.train))),
        prepared.meaning.labels,
        prepared.train_report.lines(),
    )
    if base.reads_images:
        return [render(prepared.train, index, base.processor, labels) for index in shown], lines
    joins = prepared.meaning.goal == "next-token"
    batch = make_batcher(prepared.train, base, joins=joins, always=joins).batch(shown)
    return [render_sample(sample, base.tokenizer, batch.goal, labels) for sample in samples_of(batch)], lines
