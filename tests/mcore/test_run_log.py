"""What the log of a run holds of each interval, on the library: exact, by a clock of the test's."""

import contextlib
import io
from argparse import Namespace

import pytest
import torch

from megatron_s3.telemetry.runlog import read
from tests.mcore.library import globally, on_ranks


class Run:
    """A trainer's calls of telemetry; each iteration takes a second, each evaluation a hundred."""

    def __init__(self, folder, **flags):
        from megatron_s3.mcore import metrics_log, state, telemetry

        values = {"optimizer": "s3", "clip_grad": 1.0, "log_interval": 2, "plugin_metrics": True}
        values |= {"tensorboard_dir": str(folder), "consumed_train_samples": 0, "seq_length": 8}
        self.args, self.telemetry, self.now = Namespace(**values | flags), telemetry, 0.0
        self.begin = lambda: state.start(state.Training())
        # In a forked rank:
        telemetry.time = Namespace(perf_counter=lambda: self.now, time=lambda: 0.0)
        metrics_log.time = telemetry.time
        metrics_log._start = lambda args, iteration, *others: {"iteration": iteration}

    def iterate(self, iteration, loss, skipped=0):
        self.now += 1
        self.args.consumed_train_samples += 4
        last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
        losses = {"lm loss": torch.tensor([loss])} if last else {}  # as of pipeline stages
        with globally(self.args):
            self.telemetry.training_log(
                *(lambda *args: None, losses, {}, 0.1, iteration, 1.0, False, skipped, 2.5)
            )

    def evaluate(self, iteration, prefix="iteration"):
        def evaluated():
            self.now += 100
            return ({"lm loss": torch.tensor(4.0)},)

        def original(*args):
            self.telemetry.evaluate(evaluated)

        self.telemetry.evaluate_and_print_results(original, prefix, None, None, None, iteration)


def rows(folder, kind, *names):
    return [tuple(r.get(name) for name in names) for r in read(folder) if r["kind"] == kind]


@on_ranks(1)
def test_each_interval_is_of_its_own_iterations(tmp_path):
    run = Run(tmp_path)
    for iteration, loss in enumerate((3.0, 5.0, 7.0, 9.0), 1):
        run.iterate(iteration, loss)
        if iteration == 3:
            run.evaluate(3)
            run.evaluate(3, "iteration 3 on test set")
            run.telemetry.evaluate(lambda: ({"lm loss": torch.tensor(1.0)},))  # of the user's own
    run.iterate(5, 1.0, skipped=1)
    run.iterate(6, 11.0)
    for iteration in (7, 8):
        run.iterate(iteration, 2.0, skipped=1)
    run.iterate(9, 3.0)
    run.iterate(10, 3.0)
    assert rows(tmp_path, "start", "iteration") == [(0,)]
    assert rows(tmp_path, "train", "iteration", "loss", "skipped", "tokens") == [
        (2, 4.0, 0, 64), (4, 8.0, 0, 128), (6, 11.0, 1, 192), (8, None, 2, 256), (10, 3.0, 0, 320),
    ]  # fmt: skip
    # The first iteration has begun before its log; evaluations are no time of training.
    assert rows(tmp_path, "train", "seconds") == [(1.0,)] * 5
    assert rows(tmp_path, "valid", "iteration", "loss") == [(3, 4.0)]
    assert rows(tmp_path, "test", "iteration", "loss") == [(3, 4.0)]
    run.begin()  # another optimizer: another log
    run.iterate(11, 3.0)
    assert rows(tmp_path, "start", "iteration") == [(0,), (10,)]


@on_ranks(2)
def test_a_checkpoint_holds_what_the_rank_that_writes_knows(tmp_path):
    from megatron.training import checkpointing

    run = Run(tmp_path, log_interval=1)
    for iteration in range(1, 4):
        run.iterate(iteration, 3.0)
    checkpointing.get_args = lambda: run.args
    run.telemetry.save_checkpoint(lambda iteration: None, 3)
    accepted = run.args.s3_spikes["detector"]["accepted"]
    assert [iteration for iteration, _ in accepted] == [1, 2, 3]
    # A run that goes on from it, another optimizer in between.
    run.begin()
    run.telemetry.resume(run.args)
    run.args.s3_spikes = None
    run.telemetry.save_checkpoint(lambda iteration: None, 3)
    assert run.args.s3_spikes["detector"]["accepted"] == accepted
    run.iterate(4, 3.0)
    run.telemetry.save_checkpoint(lambda iteration: None, 4)
    assert len(run.args.s3_spikes["detector"]["accepted"]) == 4
    run.begin()
    run.telemetry.save_checkpoint(lambda iteration: None, 4)
    assert run.args.s3_spikes is None


@pytest.mark.parametrize("skipped", [0, 1])
@on_ranks(1)
def test_a_loss_that_is_not_finite_is_said_where_it_was_stepped(skipped, tmp_path):
    run = Run(tmp_path, plugin_metrics=False)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        run.iterate(1, float("nan"), skipped)
        assert not said.getvalue()
        run.iterate(2, float("nan"), skipped)
    assert ("lm loss of iteration 2 is not finite" in said.getvalue()) is (not skipped)
