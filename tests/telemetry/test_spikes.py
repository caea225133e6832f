"""The detector on curves whose spikes are known."""

import json
import math
import random

import pytest

from megatron_s3.telemetry.spike_log import SpikeLog
from megatron_s3.telemetry.spikes import SpikeDetector
from megatron_s3.telemetry.updates import rising
from scripts.bench import spikes as confusion
from scripts.bench.spikes import DETECTORS, Score, curve, score


def decaying(count: int = 600, noise: float = 0.01, seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    return [(2 + 6 * (1 + i / 20) ** -0.5) * (1 + noise * draw.gauss(0, 1)) for i in range(count)]


def feed(losses: list[float], every: int = 1, **options: float) -> SpikeDetector:
    detector = SpikeDetector(**options)
    for i, loss in enumerate(losses, start=1):
        detector.add(i * every, loss)
    return detector


@pytest.mark.parametrize("every", [1, 10])
def test_a_spike_is_measured(every: int) -> None:
    """Onset, peak and end exact; height and area to the noise, 3 % of the loss."""
    losses = decaying()
    for k, height in enumerate((0.5, 2.0, 1.0)):
        losses[399 + k] += height
    (spike,) = feed(losses, every).spikes
    assert (spike.onset, spike.peak, spike.end) == (400 * every, 401 * every, 402 * every)
    assert spike.height == pytest.approx(2.0, abs=0.1)
    assert spike.area == pytest.approx(3.5 * every, abs=0.3 * every) and spike.recovered


def test_the_trend_hides_no_excursion() -> None:
    """A nat above a loss that falls by one in 100 iterations: in raw losses that is usual."""
    losses = [9 - 0.01 * i + 0.01 * random.Random(i).gauss(0, 1) for i in range(400)]
    for i in range(300, 340):
        losses[i] += 1.03
    (spike,) = feed(losses).spikes
    assert spike.onset == 301 and spike.end == 340


def test_decay_without_spikes_is_quiet() -> None:
    """No alarm in 20 curves of normal noise, from before the warmup's end to the last."""
    for seed in range(20):
        detector = feed(decaying(seed=seed, noise=10 ** random.Random(seed).uniform(-3, -1.5)))
        assert not detector.spikes and detector.open is None


def test_spikes_do_not_hide_one_another() -> None:
    losses = decaying(500)
    for start in (300, 330, 360):
        for i in range(start, start + 20):
            losses[i] += 1.5
    assert [s.onset for s in feed(losses).spikes] == [301, 331, 361]


def test_what_is_not_finite_is_a_spike_under_way() -> None:
    losses = decaying(300)
    losses[200], losses[201] = math.nan, math.inf
    (spike,) = feed(losses).spikes
    assert (spike.onset, spike.end) == (201, 202)
    assert spike.height == math.inf and spike.area == 0
    assert not feed([math.nan] * 10).spikes  # nothing is known yet


def test_a_loss_of_zero_is_no_spike() -> None:
    """A batch without targets has it; its logarithm is on no line, and it ends a spike."""
    losses = decaying(300)
    losses[5], losses[200], losses[202] = 0.0, 0.0, -1.0
    detector = feed(losses)
    assert not detector.spikes and detector.open is None
    losses[250] += 1.5
    losses[251] = 0.0
    (spike,) = feed(losses).spikes
    assert (spike.onset, spike.end) == (251, 251)


def test_a_new_level_is_learned() -> None:
    losses = [*decaying(300), *(x + 1 for x in decaying(400, seed=1)[-300:])]
    detector = feed(losses, patience=100)
    (spike,) = detector.spikes
    assert (spike.onset, spike.recovered, detector.open) == (301, False, None)
    assert spike.end == 401  # 100 losses after the first


def test_a_spike_lasts_until_the_loss_is_well_below_where_it_began() -> None:
    """Five deviations begin none, and end none; nor do three fifths of the floor."""
    for noise, above in ((0.01, 4 * math.expm1(0.05)), (1e-4, 0.03)):
        losses = [4 * (1 + noise * random.Random(i).gauss(0, 1)) for i in range(300)]
        assert not feed([*losses, *[4 + above] * 5, *losses]).spikes
        (spike,) = feed([*losses, 6.0, *[4 + above] * 5, *losses]).spikes
        assert (spike.onset, spike.end) == (301, 306)


def test_patience_is_with_each_spike() -> None:
    """Two that are shorter have recovered, also where a run was resumed in the middle of one."""
    losses = decaying(400)
    for start in (200, 300):
        losses[start : start + 8] = [x + 1 for x in losses[start : start + 8]]
    detector = feed(losses, patience=10)
    assert [(s.end - s.onset, s.recovered) for s in detector.spikes] == [(7, True)] * 2
    shifted = [*decaying(300), *(x + 1 for x in decaying(340, seed=1)[-40:])]
    first, second = SpikeDetector(patience=20), SpikeDetector(patience=20)
    for i, loss in enumerate(losses[:205]):
        second.add(i, loss)  # of another run, in a spike
    for i, loss in enumerate(shifted):
        (first if i < 310 else second).add(i, loss)
        if i == 309:
            second.load_state_dict(first.state_dict())
    assert [(s.onset, s.end, s.recovered) for s in second.spikes] == [(300, 320, False)]


def test_a_detector_that_was_used_goes_on_as_a_new_one() -> None:
    state = feed(decaying(300)).state_dict()
    used, fresh = feed([0.1] * 300), SpikeDetector()
    used._fit = used._line()  # as after a loss that stood out
    for detector in (used, fresh):
        detector.load_state_dict(state)
        detector.add(301, 20.0)
    assert used.open == fresh.open


@pytest.mark.parametrize("cut", [50, 399, 401, 450])
def test_a_resumed_detector_is_the_same(cut: int) -> None:
    """Exact, through JSON, also in the middle of a spike and with a loss that was infinite."""
    losses = decaying()
    losses[398:403] = [x + 1 for x in losses[398:403]]
    losses[399] = math.inf
    whole, first, second = SpikeDetector(), SpikeDetector(), SpikeDetector()
    for i, loss in enumerate(losses):
        whole.add(i, loss)
        (first if i < cut else second).add(i, loss)
        if i == cut - 1:
            second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert second.spikes == whole.spikes and len(whole.spikes) == 1
    assert second.state_dict() == whole.state_dict()


def test_options_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="leave <= enter"):
        SpikeDetector(enter=2, leave=3)
    with pytest.raises(ValueError, match="the state was not made by"):
        SpikeDetector().load_state_dict({})


def test_confusion_is_counted() -> None:
    """On one made-up curve each, exactly."""
    of = curve(3)
    inside = [any(a <= i <= b for a, b, _ in of.spikes) for i in range(len(of.losses))]
    perfect, blind = Score(), Score()
    score(inside, of, perfect)
    score([i == 5 for i in range(len(of.losses))], of, blind)
    count = len(of.spikes)
    assert (perfect.found, perfect.missed, perfect.false, set(perfect.delays)) == (count, 0, 0, {0})
    assert (blind.found, blind.missed, blind.false, blind.delays) == (0, count, 1, [])
    for detect in DETECTORS.values():
        assert len(list(detect(of.losses))) == len(of.losses)


def test_what_rose_first_is_named() -> None:
    def sizes(a: float, b: float) -> dict:
        return {"layers": {"0": a}, "kinds": {"norm": b}}

    history = [sizes(0.1, 0.2)] * 5
    assert rising(history, sizes(0.3, 0.8)) == ["norm x4.0", "layer 0 x3.0"]
    assert rising(history, sizes(0.12, 0.1)) == []
    assert rising([], sizes(1, 1)) == []


def test_published_scores() -> None:
    """Mean 3 and standard deviation 0.1: 6 and 7 of them, and what is no number."""
    losses = [2.9, 3.1] * 100 + [3.65, 3.55, math.nan]
    core, olmo2 = (list(DETECTORS[name](losses)) for name in DETECTORS if "sigma" in name)
    assert [i for i, flag in enumerate(core) if flag] == [200, 202]
    assert [i for i, flag in enumerate(olmo2) if flag] == [202]
    assert [i for i, flag in enumerate(DETECTORS["mean + 7 sigma of 1,000 (OLMo 2)"](
        [2.9, 3.1] * 20 + [3.75])) if flag] == [40]  # fmt: skip


@pytest.mark.parametrize("cut", [60, 80, 81])
def test_a_resumed_watch_is_the_same(cut: int) -> None:
    """Exact, through JSON: before, at and in a spike whose updates rose an interval before it."""
    losses = decaying(90)
    losses[80] = losses[81] = 9.0
    whole, first, second = SpikeLog(), SpikeLog(), SpikeLog()
    records: list[list[dict]] = [[], []]
    for i, loss in enumerate(losses):
        updates = {
            "layers": {
                "0": {"mean_abs": 0.1, "rms": 1.0},
                "1": {"mean_abs": 0.4 if i == 79 else 0.1},
            },
            "kinds": {},
        }
        records[0] += whole.add(i, loss, updates)
        records[1] += (first if i < cut else second).add(i, loss, updates)
        if i == cut - 1:
            second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    began, ended = records[0]
    assert records[1] == records[0] and second.state_dict() == whole.state_dict()
    assert (began["onset"], began["first"]) == (80, ["layer 1 x4.0"])
    assert (ended["onset"], ended["end"], ended["first"]) == (80, 81, ["layer 1 x4.0"])
    assert second.count == whole.count == 1
    whole.add(90, 9.0, None)
    assert whole.count == 2  # under way
    with pytest.raises(ValueError, match="the state was not made by"):
        second.load_state_dict({"detector": {}})


def test_a_beginning_that_flattens_is_no_spike() -> None:
    """The line through a steep decline goes on below what follows."""
    draw = random.Random(3)
    losses = [max(4 - 0.02 * i, 3.0) + draw.gauss(0, 0.01) for i in range(100)]
    detector = SpikeDetector()
    for i, loss in enumerate(losses):
        detector.add(i, loss)
    assert not detector.spikes and detector.open is None
    detector.add(100, 6.0)
    assert detector.open is not None


def test_recorded_curves_know_their_spikes(tmp_path, capsys) -> None:
    """Two runs as `megatron-s3 report` writes them; a gradient of the second was too large."""
    draw = random.Random(4)
    noise = [3 + draw.gauss(0, 0.01) for _ in range(120)]
    runs = [
        {"experiment": "burst", "label": "S3", "lr": 0.006, "seed": 1, "tags": {"burst": burst},
         "loss": [[i, y + (burst > 1 and i >= 90) * 0.5] for i, y in enumerate(noise)]}
        for burst in (1.0, 1000.0)
    ]  # fmt: skip
    report = tmp_path / "report.json"
    report.write_text(json.dumps([{"suite": "reproduce", "runs": runs}]))
    without, burst = confusion.recorded(report)
    assert without.spikes == [] and burst.spikes == [(90, 119, pytest.approx(0.5))]
    assert confusion.main([str(report)]) == 0
    row = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("megatron_s3"))
    assert row.split()[1:] == ["1", "0", "0.00", "0"]


def test_a_spike_is_measured_against_what_was_before_it() -> None:
    """Neither against updates inside of an earlier spike, nor against those that led it."""
    watch = SpikeLog()
    losses = [*[4.0 + 0.01 * (i % 2) for i in range(60)], *[9.0] * 70, *[4.0] * 5, 9.0]

    def updates(i: int) -> dict | None:
        size = 0.1 if i < 60 else 0.4 if i < 130 else 0.1 if i < 134 else 0.3
        return {"layers": {}, "kinds": {"norm": {"mean_abs": size}}} if i >= 58 else None

    records = [r for i, loss in enumerate(losses) for r in watch.add(i, loss, updates(i))]
    assert [(r["onset"], r["end"], r["first"]) for r in records] == [
        (60, None, []), (60, 129, []), (135, None, ["norm x3.0"]),
    ]  # fmt: skip
    short = SpikeLog()
    for i in range(60):
        short.add(i, 4.0 + 0.01 * (i % 2), None)
    for i, size in enumerate((0.1, 0.4), 60):
        short.add(i, 4.0, {"layers": {}, "kinds": {"norm": {"mean_abs": size}}})
    (record,) = short.add(62, 9.0, {"layers": {}, "kinds": {"norm": {"mean_abs": 0.4}}})
    assert record["first"] == ["norm x4.0"]
