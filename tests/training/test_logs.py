"""What stays of a run's metrics, and what they are averages of."""

import json
import subprocess
import sys

import pytest

from peftcli.errors import HostError
from peftcli.training import logs
from peftcli.training.logs import MetricsLog, TensorBoardLog
from peftcli.training.meter import Meter, peak_memory_gb


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_line_for_each_log(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.write(1, {"loss": 2.5})
    log.write(2, {"eval_loss": 1.5, "eval_tokens": 3})
    assert lines(tmp_path) == [{"step": 1, "loss": 2.5}, {"step": 2, "eval_loss": 1.5, "eval_tokens": 3}]
    assert logs.read(tmp_path, 1) == [(1, {"loss": 2.5})]


@pytest.mark.parametrize(("first_step", "kept"), [(0, []), (2, [1, 2]), (9, [1, 2, 3])])
def test_resuming_drops_what_will_be_done_again(tmp_path, first_step, kept):
    log = MetricsLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.write(step, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # the power went
    MetricsLog(tmp_path, first_step)
    assert [line["step"] for line in lines(tmp_path)] == kept


def test_no_run_has_no_log(tmp_path):
    assert logs.read(tmp_path, 5) == []


def test_tensorboard(tmp_path, recipe_file, train):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(recipe_file(logging={"report_to": ["tensorboard"]}))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"train/loss", "train/learning_rate", "train/grad_norm", "eval/loss", "eval/perplexity"} <= set(tags)
    written = [(event.step, event.value) for event in events.Scalars("train/loss")]
    expected = [(line["step"], line["loss"]) for line in lines(tmp_path / "run") if "loss" in line]
    assert [step for step, _ in written] == [step for step, _ in expected] == [1, 2, 3, 4]
    assert [value for _, value in written] == pytest.approx([value for _, value in expected])


def test_tensorboard_shows_a_step_once_after_resuming(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = TensorBoardLog(tmp_path, 0)
    for step in (1, 2, 3):
        first.write(step, {"loss": 1.0})
    TensorBoardLog(tmp_path, 2).write(3, {"loss": 7.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 1.0), (3, 7.0)]


def test_without_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(HostError, match=r"logging\.report_to: tensorboard is not installed") as caught:
        TensorBoardLog(tmp_path, 0)
    assert "pip install" in caught.value.problems[0].hint


def test_a_log_that_cannot_be_written(tmp_path):
    log = MetricsLog(tmp_path, 0)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(HostError, match=r"cannot write .*metrics\.jsonl"):
        log.write(1, {"loss": 1.0})


def test_the_meter_averages_the_loss_by_token_and_the_norm_by_step(monkeypatch):
    now = iter([100.0, 104.0, 110.0, 110.0])
    monkeypatch.setattr("peftcli.training.meter.time.monotonic", lambda: next(now))
    meter = Meter()
    meter.add(summed_loss=30.0, supervised=10, tokens=40, norm=1.0, learning_rate=0.1)
    assert (meter.latest["loss"], meter.latest["tokens_per_second"]) == (3.0, 10.0)
    meter.add(summed_loss=10.0, supervised=30, tokens=60, norm=2.0, learning_rate=0.2)
    averaged = meter.flush()
    assert averaged["memory_gb"] > 0
    assert {name: averaged[name] for name in ("loss", "grad_norm", "learning_rate", "tokens_per_second")} == {
        "loss": 1.0,
        "grad_norm": 1.5,
        "learning_rate": 0.2,
        "tokens_per_second": 10.0,
    }


def test_time_that_was_not_training_is_left_out_of_the_speed(monkeypatch):
    now = iter([0.0, 1000.0, 1002.0])
    monkeypatch.setattr("peftcli.training.meter.time.monotonic", lambda: next(now))
    meter = Meter()
    meter.restart_clock()
    meter.add(1.0, 1, 50, 1.0, 0.1)
    assert meter.latest["tokens_per_second"] == 25.0


def test_memory_is_measured_in_gigabytes():
    held = bytearray(300_000_000)
    held[::4096] = b"x" * len(held[::4096])
    assert 0.3 < peak_memory_gb() < 50


def test_what_started_a_process_is_not_in_its_peak():
    """A notebook with a gigabyte in it starts a small run."""
    child = "from peftcli.training.meter import peak_host_bytes; print(peak_host_bytes())"
    parent = (
        "import subprocess, sys\nheld = b'1' * 1_500_000_000\n"
        f"print(subprocess.run([sys.executable, '-c', {child!r}], capture_output=True, text=True, check=True).stdout)"
    )
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True)
    assert 50e6 < int(done.stdout) < 1.2e9
