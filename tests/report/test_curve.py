"""Curves and figures from TensorBoard files."""

from pathlib import Path

import pytest

from megatron_s3 import report

pytest.importorskip("tensorboard")
pytest.importorskip("matplotlib")


def write(folder: Path, scalars: dict[str, dict[int, float]], seq_length: int | None = 64) -> None:
    """One launch's event file, as Megatron writes it."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(log_dir=str(folder))
    if seq_length is not None:
        writer.add_text("seq_length", str(seq_length), global_step=0)
    for tag, values in scalars.items():
        for iteration, value in values.items():
            writer.add_scalar(tag, value, iteration)
    writer.close()


def losses(*iterations: int) -> dict[int, float]:
    return {i: 4.0 / i for i in iterations}


@pytest.fixture
def resumed(tmp_path: Path) -> Path:
    """A run in two launches; the first one went on to iteration 5 after its checkpoint at 4."""
    first = {"lm loss": {**losses(1, 2, 3, 4), 5: 99.0}, "batch-size": {1: 8.0}}
    first["update/max_abs"] = {2: 0.25, 4: 0.75, 5: 0.5}
    first["learning-rate"] = {1: 0.5, 2: 1.0}
    first["iteration-time"] = {2: 0.5, 4: 0.25}
    first["lm loss validation"] = {4: 2.0}
    write(tmp_path / "run", first)
    second = {"lm loss": losses(5, 6, 7, 8), "batch-size": {5: 8.0}}
    second["update/max_abs"] = {6: 0.5, 8: 0.125}
    second["iteration-time"] = {6: 0.125, 8: 0.25}
    second["lm loss validation"] = {8: 1.5}
    write(tmp_path / "run", second)
    return tmp_path / "run"


def test_launches_are_joined_and_repeated_iterations_count_once(resumed: Path) -> None:
    run = report.read(resumed, "S3")
    loss = run.scalars["lm loss"]
    assert list(loss) == list(range(1, 9))
    assert list(loss.values()) == pytest.approx([4.0 / i for i in range(1, 9)])
    assert run.seq_length == 64


def test_summary(resumed: Path) -> None:
    assert report.summarize(report.read(resumed, "S3")) == report.Summary(
        iterations=8,
        valid_loss=1.5,
        largest_update=0.75,
        tokens_per_second=8 * 64 / 0.25,
    )


def test_summary_of_a_run_that_wrote_little(tmp_path: Path) -> None:
    write(tmp_path, {"lm loss": losses(1, 2)}, seq_length=None)
    assert report.summarize(report.read(tmp_path, "x")) == report.Summary(2, None, None, None)


@pytest.mark.parametrize("there", [False, True])
def test_no_event_files(there: bool, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    if there:
        folder.mkdir()
    with pytest.raises(report.RunError, match=r"run: no TensorBoard files.*--tensorboard-dir"):
        report.read(folder, "x")


def test_no_loss_yet(tmp_path: Path) -> None:
    write(tmp_path, {"batch-size": {1: 1.0}})
    with pytest.raises(report.RunError, match="no 'lm loss'"):
        report.read(tmp_path, "x")


def test_figure_shows_what_was_written(resumed: Path) -> None:
    run = report.read(resumed, "S3")
    drawn = report.figure([run], "a title", unigram_entropy=3.25)
    loss, rate, update = drawn.axes
    assert loss.get_title() == "a title"
    assert loss.get_ylabel() == "loss (nats per byte)"
    assert update.get_xlabel() == "iteration"
    curves = [(list(line.get_xdata()), list(line.get_ydata())) for line in loss.lines]
    assert (list(range(1, 9)), pytest.approx([4.0 / i for i in range(1, 9)])) in curves
    assert ([4, 8], [2.0, 1.5]) in curves
    assert any(y == [3.25, 3.25] for _, y in curves)
    assert [t.get_text() for t in loss.texts] == ["unigram entropy 3.250"]
    assert list(rate.lines[0].get_ydata()) == [0.5, 1.0]
    assert list(update.lines[0].get_ydata()) == [0.25, 0.75, 0.5, 0.125]


def test_runs_differ_in_line_and_marker_not_in_colour_alone(resumed: Path) -> None:
    runs = [report.read(resumed, name) for name in ("S3", "AdamW")]
    loss = report.figure(runs, "t").axes[0]
    for part in ("training", "validation"):
        one, other = [line for line in loss.lines if part in line.get_label()]
        looks = [(line.get_linestyle(), line.get_marker()) for line in (one, other)]
        assert looks[0] != looks[1]


def test_no_panel_for_updates_that_nobody_wrote(tmp_path: Path) -> None:
    write(tmp_path, {"lm loss": losses(1, 2)})
    assert len(report.figure([report.read(tmp_path, "x")], "t").axes) == 2


def test_draw_writes_a_png(resumed: Path, tmp_path: Path) -> None:
    from matplotlib.image import imread

    png = tmp_path / "new" / "loss.png"
    report.draw([report.read(resumed, "S3")], png, "t", unigram_entropy=3.0)
    image = imread(png)
    assert image.shape[:2] == (852, 960)
    assert image.min() < 0.2
