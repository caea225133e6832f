"""How far a run is, wherever it saves and however its length is given; what a start means."""

from pathlib import Path

import pytest

from megatron_s3.launch import commands, launch, progress, provenance
from megatron_s3.launch.config import ConfigError, load
from megatron_s3.launch.progress import Progress
from megatron_s3.storage.layout import TRACKER


def saved(folder: Path, iteration: int | str) -> Path:
    """A folder with a checkpoint, as far as its names go."""
    (folder / f"iter_{int(iteration):07d}").mkdir(parents=True)
    (folder / TRACKER).write_text(str(iteration))
    return folder


def refused(function, *args) -> str:
    with pytest.raises(ConfigError) as error:
        function(*args)
    return str(error.value)


@pytest.mark.parametrize(
    ("sets", "last"),
    [
        ([], 30),
        (["train_iters=null", "train_samples=4000"], 500),  # of batches of 8
        (["train_iters=null", "train_samples=4007"], 500),  # Megatron leaves the rest out
        (["train_iters=null", "train_samples=320", "global_batch_size=16"], 20),
        (["skip_train=true"], None),
    ],
)
def test_the_end(sets, last, tmp_path):
    found = progress.progress(load(["tiny-s3"], sets), tmp_path)
    assert found == Progress(tmp_path / "checkpoints", None, last)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["train_iters=null"], "no file sets train_iters or train_samples"),
        (
            ["train_iters=abc"],
            "--set train_iters=abc: train_iters must be a whole number of at least 1",
        ),
        (
            ["train_iters=null", "train_samples=80", "rampup_batch_size=[2, 2, 8]"],
            "with rampup_batch_size, train_samples does not determine the last iteration",
        ),
        (
            ["save=msc://bucket/run"],
            "save is msc://bucket/run, and the launcher can read only folders",
        ),
    ],
)
def test_what_cannot_be_known_is_refused(sets, message, tmp_path):
    assert message in refused(progress.progress, load(["tiny-s3"], sets), tmp_path)


@pytest.mark.parametrize("sets", [[], ["save={elsewhere}"], ["save={elsewhere}", "load={other}"]])
@pytest.mark.parametrize("iteration", [20, 30])
def test_the_newest_is_where_the_run_saves(sets, iteration, tmp_path, capsys):
    places = {"elsewhere": str(tmp_path / "there"), "other": str(tmp_path / "other")}
    sets = [word.format(**places) for word in sets]
    folder = saved(tmp_path / ("there" if sets else "run/checkpoints"), iteration)
    saved(tmp_path / "other", 99)
    config, run_dir = load(["tiny-s3"], sets), tmp_path / "run"
    assert progress.progress(config, run_dir) == Progress(folder, iteration, 30)
    words = ["tiny-s3", "--run-dir", str(run_dir), *(f"--set={word}" for word in sets)]
    assert launch.main([*words, "--print-checkpoint"]) == 0
    assert capsys.readouterr().out == f"{iteration}\n"
    assert progress.progress(config, run_dir).finished is (iteration == 30)


def test_what_a_save_left(tmp_path):
    config, folder = load(["tiny-s3"]), tmp_path / "checkpoints"

    def newest() -> int | None:
        return progress.progress(config, tmp_path).saved

    (folder / "iter_0000010").mkdir(parents=True)
    assert newest() is None  # killed within the first save
    (folder / "iter_0000010/metadata.json").write_text("{}")
    assert newest() == 10  # or before the file that names it
    tracker = folder / TRACKER
    tracker.write_text("release")
    assert newest() is None
    tracker.write_text("20")
    assert f"{tracker} names iteration 20, and there is no" in refused(newest)
    assert refused(newest).endswith("write the number of one of these iterations into it: 10")
    tracker.write_text("1\x000")
    assert f"{tracker} names '1\\x000' instead of an iteration" in refused(newest)
    tracker.unlink()
    (folder / "iter_0000015").mkdir()
    (folder / "iter_0000015/metadata.json").write_text("{}")
    # What the ranks would refuse is refused before they are started.
    assert refused(newest) == (
        f"{tracker} is missing, and there are complete checkpoints beside it; write the "
        "number of one of these iterations into it: 10, 15"
    )
    config = load(["tiny-s3"], ["non_persistent_ckpt_type=global"])
    tracker.write_text("10")
    saved(folder / "non_persistent", 17)
    assert newest() == 17


def test_load_of_another_folder_is_for_the_start(tmp_path):
    other = saved(tmp_path / "other", 99)
    config = load(["tiny-s3"], [f"load={other}", "finetune=true", "ckpt_step=99"])
    assert progress.continued(config, tmp_path) == (config, [])
    saved(tmp_path / "checkpoints", 10)
    told, left_out = progress.continued(config, tmp_path)
    assert left_out == ["load", "finetune", "ckpt_step"]
    words = commands.megatron_words(told, tmp_path)
    assert words[words.index("--load") + 1] == str(tmp_path / "checkpoints")
    assert not {"--finetune", "--ckpt-step"} & set(words)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["finetune=true"], "pretrained_checkpoint=DIR and leave finetune out"),
        (["finetune=true", "load={run}/checkpoints"], "--set finetune=true: finetune would apply"),
        (["ckpt_step=20"], "write the iteration into {run}/checkpoints/latest_checkpointed"),
        (["no_load_optim=true"], "start once from there in another folder: --run-dir NEW, load="),
        (["no_load_rng=true"], "start once from there in another folder"),
    ],
)
def test_no_start_is_done_again(sets, message, tmp_path):
    sets = [word.format(run=tmp_path) for word in sets]
    said = refused(progress.continued, load(["tiny-s3"], sets), tmp_path)
    assert message.format(run=tmp_path) in said


def test_what_is_not_saved_need_not_be_loaded(tmp_path):
    config = load(["tiny-s3"], ["no_load_optim=true", "no_save_optim=true"])
    assert progress.continued(config, tmp_path) == (config, [])


def test_a_finished_run_of_another_configuration_is_not_this_one(tmp_path, capsys):
    saved(tmp_path / "checkpoints", 30)
    provenance.record(tmp_path, load(["tiny-s3"]), [])
    words = ["tiny-s3", "--run-dir", str(tmp_path)]
    assert launch.main([*words, "--set", "lr=0.003", "--set", "launch.time=1:00"]) == 0
    assert "training is already finished: iteration 30 of 30" in capsys.readouterr().out
    assert launch.main([*words, "--set", "train_iters=20", "--set", "s3_grad_bound=10"]) == 2
    assert capsys.readouterr().err == (
        f"error: training in {tmp_path} is finished, with another configuration: "
        "train_iters: 30 -> 20, s3_grad_bound: not given -> 10; use another --run-dir for another "
        "run\n"
    )
    (tmp_path / "config.yaml").write_text("arguments:\n  lr: [")
    assert launch.main(words) == 2
    assert "its configuration cannot be read" in capsys.readouterr().err
    (tmp_path / "config.yaml").unlink()
    assert launch.main(words) == 0
    assert f"({tmp_path} does not record with which configuration)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("status", "after", "asked_by", "ended"),
    [
        (0, 30, None, 0),
        (0, 30, "SIGTERM", 0),
        (0, 20, None, 75),
        (0, 20, "SIGUSR1", 75),
        (1, 20, "SIGTERM", 75),  # torchrun had the signal too
        (-10, 30, "SIGUSR1", 0),
        (1, 20, None, 1),
        (1, 10, "SIGTERM", 1),
        (0, 10, "SIGTERM", 1),
        (0, 10, None, 1),
        (1, 30, None, 1),
    ],
)
def test_status(status, after, asked_by, ended):
    folder = Path("checkpoints")
    assert launch._ended(
        Path("run"), status, Progress(folder, 10, 30), Progress(folder, after, 30), asked_by
    ) == (ended)
