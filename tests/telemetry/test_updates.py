"""Names to kinds, rows to sums, and the log's file."""

import json

import pytest

from megatron_s3.telemetry.parameter_kinds import KINDS, Layout, kind_of
from megatron_s3.telemetry.runlog import RunLog, finite, read
from megatron_s3.telemetry.updates import summary, tags


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("embedding.word_embeddings.weight", "embedding"),
        ("embedding.position_embeddings.weight", "position"),
        ("decoder.layers.0.input_layernorm.weight", "norm"),
        ("decoder.layers.0.self_attention.linear_qkv.layer_norm_weight", "norm"),
        ("decoder.layers.0.self_attention.q_layernorm.weight", "norm"),
        ("decoder.final_layernorm.bias", "norm"),
        ("decoder.layers.0.self_attention.linear_qkv.weight", "attention.qkv"),
        ("decoder.layers.0.self_attention.linear_qkv.bias", "bias"),
        ("decoder.layers.0.self_attention.linear_proj.weight", "attention.proj"),
        ("decoder.layers.11.mlp.linear_fc1.weight", "mlp.fc1"),
        ("decoder.layers.11.mlp.linear_fc2.weight", "mlp.fc2"),
        ("decoder.layers.1.mlp.experts.local_experts.0.linear_fc1.weight", "experts"),
        ("decoder.layers.1.mlp.router.weight", "router"),
        ("decoder.layers.1.mlp.experts.linear_fc1.bias3", "bias"),
        ("decoder.layers.0.cross_attention.linear_q.weight", "attention.qkv"),
        ("decoder.layers.0.cross_attention.linear_kv.weight", "attention.qkv"),
        ("language_model.embedding.word_embeddings.weight", "embedding"),
        ("output_layer.weight", "output"),
        ("something.weight", "other"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_rows_are_a_partition() -> None:
    layout = Layout(3)
    kinds = [row for rows in layout.kinds().values() for row in rows]
    assert sorted(kinds) == list(range(layout.uncounted)) and layout.rows == len(kinds) + 1
    layers = [row for rows in layout.by_layer().values() for row in rows]
    assert len(set(layers)) == len(layers) == 3 * len(KINDS)
    row = layout.row("decoder.layers.0.mlp.linear_fc1.weight", 2)
    assert row in layout.kinds()["mlp.fc1"] and row in layout.by_layer()["2"]
    outside = layout.row("decoder.final_layernorm.weight", None)
    assert outside not in layers and outside in layout.kinds()["norm"]
    # Layers for further tokens (MTP) are numbered on, and are none of the model's.
    assert layout.row("mtp.layers.0.final_layernorm.weight", 3) == outside


def test_sums_become_means_per_element_and_step() -> None:
    layout = Layout(1)
    totals, numel = [[0.0] * 9 for _ in range(layout.rows)], [0] * layout.rows
    fc1 = layout.row("layers.0.mlp.linear_fc1.weight", 0)
    norm = layout.row("final_layernorm.weight", None)
    totals[fc1], numel[fc1] = [8.0, 1.0, 16.0, 2.0, 64.0, 4.0, 1.0, 0.0, 0.16], 8
    totals[norm], numel[norm] = [1.0, 0.5, 1.0, 0.0, 0.0, 0.0, 0.0, 3.0, 1.0], 2
    totals[-1] = [9.0] * 9  # another rank's to count
    found = summary(layout, totals, numel, steps=2)
    assert list(found["kinds"]) == ["norm", "mlp.fc1"] and list(found["layers"]) == ["0"]
    assert found["layers"]["0"] == found["kinds"]["mlp.fc1"] == {
        "numel": 8, "mean_abs": 0.5, "max_abs": 1.0, "share_large": 0.125, "rms": 1.0,
        "weight_ratio": 0.05, "grad_rms": 0.5, "zero_grads": 1, "nonfinite_grads": 0,
    }  # fmt: skip
    assert found["kinds"]["norm"]["weight_ratio"] == 0  # of weights that are 0
    assert (found["all"]["numel"], found["all"]["mean_abs"]) == (10, 0.45)
    scalars = tags(found)
    assert scalars["update/max_abs"] == 1.0 and scalars["update/mean_abs/norm"] == 0.25


def test_torn_lines_and_repeated_iterations(tmp_path) -> None:
    for start, iterations in ((0, range(1, 6)), (3, range(4, 7))):
        log = RunLog(tmp_path)
        log.write("start", {"iteration": start})
        for i in iterations:
            log.write("train", {"iteration": i, "loss": finite(i + start)})
        log.write("spike", {"onset": start + 1, "end": start + 1})
        log.close()
        with log.path.open("a") as file:
            file.write('{"kind": "train", "itera')
    found = [(r["kind"], r.get("iteration"), r.get("loss")) for r in read(tmp_path)]
    assert found == [
        ("start", 0, None), ("train", 1, 1), ("train", 2, 2), ("train", 3, 3),
        ("spike", None, None),
        ("start", 3, None), ("train", 4, 7), ("train", 5, 8), ("train", 6, 9),
        ("spike", None, None),
    ]  # fmt: skip


def test_a_line_that_the_disk_damaged_is_left_out(tmp_path) -> None:
    log = RunLog(tmp_path)
    for i in (1, 2, 3):
        log.write("train", {"iteration": i})
    lines = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(lines[0] + lines[1].replace(b"train", b"tr\xff\0n\xfe}") + lines[2])
    assert [r["iteration"] for r in read(tmp_path) if r["kind"] == "train"] == [1, 3]


def test_a_spike_is_one_record(tmp_path) -> None:
    log = RunLog(tmp_path)
    for spike in ({"onset": 2, "end": None}, {"onset": 2, "end": 4}, {"onset": 9, "end": None}):
        log.write("spike", spike)
    assert [(r["onset"], r["end"]) for r in read(tmp_path)] == [(2, 4), (9, None)]


def test_a_spike_that_ends_beyond_the_checkpoint_is_found_again(tmp_path) -> None:
    log = RunLog(tmp_path)
    for spike in ({"onset": 2, "end": 3}, {"onset": 4, "end": 9}, {"onset": 5, "end": None}):
        log.write("spike", spike)
    log.write("start", {"iteration": 5})
    assert [r["onset"] for r in read(tmp_path) if r["kind"] == "spike"] == [2, 5]


def test_what_json_has_no_number_for(tmp_path) -> None:
    log = RunLog(tmp_path / "new")
    log.write("train", {"iteration": 1, "loss": finite(float("nan")), "lr": finite(float("inf"))})
    (record,) = (json.loads(line) for line in log.path.read_text().splitlines())
    assert (record["loss"], record["lr"]) == ("nan", "inf") and float(record["loss"]) != 0
    with pytest.raises(ValueError):
        log.write("train", {"iteration": 2, "loss": float("nan")})  # no program could read it
    assert [r["iteration"] for r in read(tmp_path / "new")] == [1]
