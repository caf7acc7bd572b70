"""The training loop: resumes to the same weights, logs, averages, refuses what does not fit."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from pathsegdiff.diffusion.pretrain.loop import LoopSettings, Part, TrainingLoop, read_ahead
from pathsegdiff.errors import DataError, RunError

CPU = torch.device("cpu")
SETTINGS = LoopSettings(steps=12, batch_size=4, warmup_steps=2, ema_decay=0.9, learning_rate=0.05)


class Line(Part):
    """Fits y = 2 x - 1, with noise that depends on the step."""

    name = "line"

    def __init__(self, broken: bool = False):
        torch.manual_seed(0)
        self.model = nn.Linear(1, 1)
        self.broken = broken
        self.looked: list[int] = []

    @property
    def trained(self):
        return self.model

    def read(self, step, count, crop_px):
        return torch.randn(count, 1, generator=torch.Generator().manual_seed(step))

    def loss(self, batch, step):
        loss = (self.model(batch) - (2 * batch - 1)).square().mean()
        if self.broken:
            loss = loss * float("nan")
        return loss, {"loss": loss.detach()}

    def held_out(self):
        return {"held_out_slope": self.model.weight.item()}

    def pictures(self, folder, step):
        self.looked.append(step)


def loop_of(folder: Path, part: Line | None = None, settings=SETTINGS, **identity) -> TrainingLoop:
    return TrainingLoop(part or Line(), settings, folder, identity, CPU)


def weights(loop):
    with loop.averaged():
        averaged = [p.clone() for p in loop.parameters]
    return [p.clone() for p in loop.parameters] + averaged


def test_a_training_that_was_stopped_ends_with_the_same_weights(tmp_path):
    whole = loop_of(tmp_path / "whole")
    assert whole.run(report_every=4)
    parts = loop_of(tmp_path / "parts")
    stops = 0
    while not parts.run(report_every=4, stop_at=time.monotonic()):  # one step at a time
        parts = loop_of(tmp_path / "parts")
        stops += 1
    assert stops == SETTINGS.steps - 1
    for one, other in zip(weights(whole), weights(parts), strict=True):
        assert torch.equal(one, other)


def test_the_log_holds_averages_and_what_was_looked_at(tmp_path):
    part = Line()
    loop_of(tmp_path, part).run(report_every=4, look_every=8)
    lines = (tmp_path / "log.csv").read_text().splitlines()
    assert lines[0] == "step,seconds,learning_rate,loss,held_out_slope"
    assert [line.split(",")[0] for line in lines[1:]] == ["4", "8", "12"]
    assert part.looked == [8, 12]
    losses = [float(line.split(",")[3]) for line in lines[1:]]
    assert losses[-1] < losses[0]


def test_the_average_lags_behind_and_the_weights_come_back(tmp_path):
    loop = loop_of(tmp_path, settings=replace(SETTINGS, ema_decay=0.5))
    loop.run()
    before = loop.parameters[0].clone()
    with loop.averaged():
        averaged = loop.parameters[0].clone()
    assert torch.equal(loop.parameters[0], before)
    assert not torch.equal(averaged, before)


def test_other_settings_in_the_same_folder_are_refused_by_name(tmp_path):
    loop_of(tmp_path, width=3)
    with pytest.raises(RunError, match="learning_rate 0.05, this run asks for 0.02"):
        loop_of(tmp_path, settings=replace(SETTINGS, learning_rate=0.02), width=3)
    with pytest.raises(RunError, match="width 3, this run asks for 4"):
        loop_of(tmp_path, width=4)


def test_a_damaged_checkpoint_is_one_line(tmp_path):
    loop_of(tmp_path).run()
    file = tmp_path / "checkpoint.pt"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(RunError, match=r"checkpoint\.pt is not a checkpoint") as error:
        loop_of(tmp_path)
    assert "\n" not in str(error.value)


def test_a_loss_without_a_value_stops_the_training_and_spares_the_weights(tmp_path):
    part = Line(broken=True)
    before = part.model.weight.clone()
    with pytest.raises(RunError, match="no finite value"):
        loop_of(tmp_path, part, replace(SETTINGS, steps=100)).run()
    assert torch.equal(part.model.weight, before)


def test_smaller_crops_come_in_larger_batches():
    settings = LoopSettings(steps=10, batch_size=2, crops=((0.5, 128), (0.5, 256)))
    assert settings.batch_at(0) == (8, 128)
    assert settings.batch_at(4) == (8, 128)
    assert settings.batch_at(5) == (2, 256)
    assert settings.batch_at(9) == (2, 256)


def test_the_learning_rate_rises_then_falls_to_a_hundredth():
    rates = [SETTINGS.rate(step) for step in range(SETTINGS.steps + 1)]
    assert rates[0] == pytest.approx(0.025)
    assert max(rates) == pytest.approx(0.05)
    assert rates[-1] == pytest.approx(0.0005)


@pytest.mark.parametrize("processes", [0, 2])
def test_what_a_step_reads_does_not_depend_on_who_reads_it(processes):
    part = Line()
    with read_ahead(part, SETTINGS, 3, processes) as batches:
        found = list(batches)
    wanted = [part.read(step, *SETTINGS.batch_at(step)) for step in range(3, SETTINGS.steps)]
    assert len(found) == len(wanted) == 9
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_an_error_of_a_reading_process_names_its_cause():
    class Broken(Line):
        def read(self, step, count, crop_px):
            raise DataError("image.png is damaged")

    with (
        read_ahead(Broken(), SETTINGS, 0, 2) as batches,
        pytest.raises(DataError, match="image.png is damaged"),
    ):
        next(batches)


def test_a_training_can_end_with_the_steps_that_are_done(tmp_path):
    loop = loop_of(tmp_path / "a")
    with pytest.raises(RunError, match="no step is done"):
        loop.end()
    loop.run(stop_at=0.0)
    part = loop.part
    loop.end()
    assert loop.step == 1 and part.looked == [1]
    assert loop.rows[-1]["step"] == 1 and "held_out_slope" in loop.rows[-1]
