"""How evaluation metrics are called and written for people."""

from __future__ import annotations

from collections.abc import Mapping

SHOWN = {
    "eval_loss": ("loss", "{:.4f}"),
    "eval_perplexity": ("perplexity", "{:,.2f}"),
    "eval_token_accuracy": ("token accuracy", "{:.1%}"),
    "eval_accuracy": ("accuracy", "{:.1%}"),
    "eval_micro_f1": ("micro F1", "{:.3f}"),
    "eval_macro_f1": ("macro F1", "{:.3f}"),
    "eval_mse": ("mean squared error", "{:.4g}"),
    "eval_pearson": ("Pearson", "{:.3f}"),
    "eval_spearman": ("Spearman", "{:.3f}"),
}
"""The name and form of each metric, in the order in which they are shown."""
COUNTED = {"eval_tokens": "supervised tokens", "eval_samples": "samples"}
"""What the metrics are over."""


def written(name: str, value: float) -> str:
    """Returns a metric's value as people read it."""
    return SHOWN[name][1].format(value).replace("%", " %")


def metrics_line(metrics: Mapping[str, float]) -> str:
    """Returns an evaluation's metrics in one line."""
    parts = [f"{SHOWN[name][0]} {written(name, metrics[name])}" for name in SHOWN if name in metrics]
    return "  ".join(f"eval {part}" if part.startswith("loss ") else part for part in parts)


def metrics_title(metrics: Mapping[str, float]) -> str:
    """Returns what the metrics are over, such as `200 samples`."""
    return ", ".join(f"{metrics[name]:,} {what}" for name, what in COUNTED.items() if name in metrics)


def metrics_table(results: Mapping[str, Mapping[str, float]]) -> tuple[list[str], list[list[str]]]:
    """Returns the columns and rows that set models side by side, with the change in loss from the first."""
    names = [name for name in SHOWN if any(name in metrics for metrics in results.values())]
    first = next(iter(results))
    before = results[first]["eval_loss"]
    rows = []
    for model, metrics in results.items():
        change = 100 * (metrics["eval_loss"] - before) / before if before else 0.0
        cells = [written(name, metrics[name]) if name in metrics else "–" for name in names]
        rows.append([model, *cells, "" if model == first else f"{change:+.1f} %"])
    return ["model", *(SHOWN[name][0] for name in names), "change in loss"], rows
