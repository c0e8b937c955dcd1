"""Progress in a log file as lines, on a terminal as a display."""

import io

import pytest
from rich.console import Console

from peftcli.cli import console, metrics, progress
from peftcli.cli.progress import LiveReporter, PlainReporter, make_reporter
from peftcli.reporting import Silent

LOG = {
    "loss": 2.34567,
    "learning_rate": 1.5e-4,
    "grad_norm": 0.777,
    "tokens_per_second": 12345.6,
    "memory_gb": 3.456,
    "epoch": 0.5,
}
EVALUATION = {"eval_loss": 1.5, "eval_perplexity": 4.4817, "eval_token_accuracy": 0.625, "eval_tokens": 8}


@pytest.fixture
def screen(monkeypatch):
    """What is shown on a terminal, which can redraw its lines unless `kind` is dumb."""

    def make(terminal, kind="xterm-256color"):
        monkeypatch.setenv("TERM", kind)
        file = io.StringIO()
        monkeypatch.setattr(
            progress,
            "stderr",
            Console(file=file, force_terminal=terminal, width=120, color_system=None, soft_wrap=True),
        )
        return file

    return make


def test_metrics_in_one_line():
    assert progress.describe(LOG) == "loss 2.3457  lr 1.50e-04  grad 0.78  12,346 tokens/s  3.46 GB"
    assert progress.describe(EVALUATION) == "eval loss 1.5000  perplexity 4.48  token accuracy 62.5 %"
    assert progress.describe({}) == ""


@pytest.mark.parametrize(("seconds", "shown"), [(0.4, "0:00"), (59.6, "1:00"), (61, "1:01"), (3725, "1:02:05")])
def test_the_clock(seconds, shown):
    assert progress._clock(seconds) == shown


def follow(reporter):
    reporter.stage("loading [x]")
    reporter.note("14 [modules]")
    reporter.begin(4, 1)
    reporter.step(2, LOG)
    reporter.log(2, LOG)
    for done in (3, 8):
        reporter.advance(done, 8)
    reporter.log(2, EVALUATION)
    reporter.step(4, LOG)
    reporter.log(4, LOG)
    reporter.end()


def test_lines(screen, monkeypatch):
    file = screen(False)
    clock = iter([0.0, 100.0, 130.0])  # made, begun, logged
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    assert isinstance(make_reporter(), PlainReporter)
    clock = iter([0.0, 100.0, 130.0])
    follow(PlainReporter())
    loss = "loss 2.3457  lr 1.50e-04  grad 0.78  12,346 tokens/s  3.46 GB"
    assert file.getvalue().splitlines() == [
        "loading [x] …",
        "14 [modules]",
        "training, 3 steps …",
        f"step 2/4  {loss}  1:00 left",  # one step since the resumption took 30 s, two are left
        "step 2/4  eval loss 1.5000  perplexity 4.48  token accuracy 62.5 %",
        f"step 4/4  {loss}",
    ]


def test_a_display(screen):
    file = screen(True)
    reporter = make_reporter()
    assert isinstance(reporter, LiveReporter)
    follow(reporter)
    shown = file.getvalue()
    for text in ("loading [x] …", "14 [modules]", "step 2  loss 2.3457", "step 2  eval loss 1.5000", "step 4  loss"):
        assert text in shown
    assert "training" in shown
    assert reporter._progress is None  # and the terminal's cursor is back


def test_a_terminal_that_cannot_redraw_gets_lines(screen):
    screen(True, kind="dumb")
    assert isinstance(make_reporter(), PlainReporter)


def test_a_display_of_an_evaluation_alone(screen):
    screen(True)
    reporter = LiveReporter()
    reporter.advance(1, 2)
    assert reporter._progress is not None
    reporter.advance(2, 2)
    assert reporter._progress is None
    reporter.end()
    reporter.step(1, LOG)  # before `begin`: nothing to update


def test_a_training_goes_through_a_display(screen, recipe_file, train):
    file = screen(True)
    train(recipe_file(training={"max_steps": 2}), reporter=LiveReporter())
    assert "step 2  eval loss" in file.getvalue()


def test_silence(capsys):
    follow(Silent())
    assert capsys.readouterr() == ("", "")


def test_no_meaning_hangs_on_a_colour(capsys):
    assert not console.stderr.is_terminal
    from peftcli.data.preview import Segment

    console.print_sample([Segment("a", False), Segment("b", True)], "one", to=console.stdout)
    assert capsys.readouterr().out == "one (trained on: ⟦…⟧)\na⟦b⟧\n\n"


@pytest.mark.parametrize(
    ("cell", "right"),
    [("1,234.5", True), ("+3 %", True), ("-1.5", True), ("abc", False), ("", False), ("1.2.3", False)],
)
def test_numbers_are_told_from_words(cell, right):
    assert console._is_number(cell) is right


def test_a_table_of_metrics():
    found = {
        "base": {**EVALUATION, "eval_loss": 2.0},
        "adapter": EVALUATION,
        "merged": {**EVALUATION, "eval_loss": 2.5},
    }
    columns, rows = metrics.metrics_table(found)
    assert [len(row) for row in rows] == [len(columns)] * 3
    assert [row[-1] for row in rows] == ["", "-25.0 %", "+25.0 %"]
    perfect = {"base": {**EVALUATION, "eval_loss": 0.0}, "adapter": EVALUATION}
    assert metrics.metrics_table(perfect)[1][1][-1] == "+0.0 %"
