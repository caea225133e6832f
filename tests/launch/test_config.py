"""Configuration files: merging, origins, derived values, errors."""

from pathlib import Path

import pytest
import yaml

from megatron_s3.checkpoints.rates import over
from megatron_s3.launch.config import COPY, ConfigError, load
from megatron_s3.launch.config_paths import shipped

REPOSITORY = Path(__file__).parents[2]


def write(folder: Path, **files: str) -> list[str]:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return [str(folder / f"{name}.yaml") for name in files]


def refusal(files, *sets: str) -> str:
    with pytest.raises(ConfigError) as error:
        load(files, sets)
    return str(error.value)


def test_later_files_win_key_by_key(tmp_path):
    base, run, overlay = write(
        tmp_path,
        base="arguments: {lr: 1e-3, bf16: true, seed: 1}\nlaunch: {nodes: 2, environment: {A: 1}}",
        run="extends: base.yaml\narguments: {lr: 3e-3}\nlaunch: {environment: {B: 2}}",
        overlay="arguments: {bf16: false, window_size: [128, 0]}",
    )
    config = load([run, overlay], ["seed=7", "launch.environment.A=3"])
    assert config.name == "run"
    assert config.words() == ["--lr", "3e-3", "--seed", "7", "--window-size", "128", "0"]
    assert (config.launch.nodes, config.launch.environment) == (2, {"A": "3", "B": "2"})
    assert config.where("lr") == f"{run}:2"
    assert config.where("seed") == "--set seed=7"
    assert config.where("window_size") == f"{overlay}:1"
    assert base not in config.where("lr")


def test_numbers_are_passed_on_as_written(tmp_path):
    (run,) = write(tmp_path, run="arguments: {lr: 3.0e-3, a: 010, b: 1_000, c: 12:30, d: .5}")
    assert load([run]).arguments == {
        "lr": "3.0e-3",
        "a": "010",
        "b": "1_000",
        "c": "12:30",
        "d": ".5",
    }


def test_the_rule_for_weight_decay_follows_the_rate(tmp_path):
    (run,) = write(
        tmp_path,
        run="arguments: {lr: 3e-4}\nderived: {lr_times_weight_decay: 3e-5, min_lr_over_lr: 0.1}",
    )
    assert load([run]).arguments == {"lr": "3e-4", "weight_decay": "0.1", "min_lr": "3e-05"}
    assert load([run], ["lr=3e-3"]).arguments["weight_decay"] == "0.01"
    # The digits that a converted checkpoint holds, or its resume would be another schedule.
    assert float(load([run], ["lr=9e-4"]).arguments["weight_decay"]) == over(0.1, 3)
    assert load([run], ["weight_decay=0"]).arguments["weight_decay"] == "0"
    assert "weight_decay" not in load([run], ["derived.lr_times_weight_decay=null"]).arguments


def test_a_variable_is_passed_on_as_written(tmp_path):
    """YAML takes yes and off for booleans, and a program may not."""
    (run,) = write(tmp_path, run="launch: {environment: {A: yes, B: off, C: True, D: '', E: null}}")
    given = {"A": "yes", "B": "off", "C": "True", "D": "", "F": "no"}
    assert load([run], ["launch.environment.F=no"]).launch.environment == given


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arguments: {lr: 1\n", "not valid YAML"),
        ("- lr", "run.yaml:1: the file must be a mapping"),
        ("arguments:\n  lr: 1\n  lr: 2\n", "run.yaml:3: lr is already set in line 2"),
        ("argument:\n  lr: 1\n", "run.yaml:1: unknown key 'argument'; did you mean arguments?"),
        ("arguments:\n  lr: {a: 1}\n", "run.yaml:2: lr must be a value or a list, not a mapping"),
        ("launch:\n  node: 2\n", "run.yaml:2: unknown launch setting 'node'; did you mean nodes?"),
        ("launch:\n  script: true\n", "run.yaml:2: script must be one value"),
        ("launch:\n  time: [1, 2]\n", "run.yaml:2: time must be one value"),
        ("launch:\n  nodes: 0\n", "run.yaml:2: launch.nodes must be a whole number of at least 1"),
        ("derived:\n  min_lr_over_lr: 0.1\n", "run.yaml:2: min_lr_over_lr needs arguments.lr"),
        ("arguments: {lr: x}\nderived: {min_lr_over_lr: 1}", "run.yaml:1: lr must be a number"),
        ("extends: nowhere.yaml\n", "run.yaml:1: extends: nowhere.yaml: no such file"),
        ("extends: run.yaml\n", "extends itself through run.yaml"),
        (
            "arguments:\n  min-lr: 1\n  min_lr: 2\n",
            "run.yaml:3: min_lr is already set in line 2, as min-lr; remove one of them",
        ),
        (
            "arguments:\n  plugin_metrics: true\n  s3_metrics: false\n",
            "run.yaml:3: s3_metrics is already set in line 2, as plugin_metrics",
        ),
        ("array:\n  seed: [1]\n  min-lr: [1]\n  min_lr: [2]\n", "run.yaml:4: min_lr is already"),
        ("launch:\n  environment: {'A=B': 1}\n", "run.yaml:2: 'A=B' cannot be the name of a"),
        ("launch:\n  environment: {'': 1}\n", "run.yaml:2: '' cannot be the name of a variable"),
        ('launch:\n  environment: {A: "a\\0b"}\n', "run.yaml:2: A holds the character NUL"),
        ('arguments:\n  data_path: [a, "\\0"]\n', "run.yaml:2: data_path holds the character NUL"),
        ("dataset: ''\n", "run.yaml:1: dataset must be a prefix"),
        ("launch:\n  script: ''\n", "run.yaml:2: script must be one value"),
        ("arguments:\n  data_path: [[a, b]]\n", "run.yaml:2: data_path must be a value or a list"),
        ("arguments:\n  lr: &a [*a]\n", "run.yaml:2: lr must be a value or a list"),
        ("array:\n  lr: &a [*a]\n", "run.yaml:2: lr must be a value or a list"),
        (f"arguments: {'[' * 999}", "run.yaml: a list is nested too deeply, or holds itself"),
    ],
)
def test_errors_name_file_line_and_reason(tmp_path, text, message):
    assert message in refusal(write(tmp_path, run=text))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("lr", "--set lr: must have the form KEY=VALUE"),
        ("lanch.nodes=2", "unknown section 'lanch'"),
        ("launch.nodes=two", "--set launch.nodes=two: launch.nodes must be a whole number"),
        ("launch.sbatch=x", "must have the form launch.sbatch.NAME=VALUE"),
        ("lr={a: 1}", "lr must be a value or a list"),
        ("lr=[1", "not a valid YAML value"),
        ("lr=", "--set lr=: no value is given; lr=null takes one away, and lr='' is an empty one"),
        ("dataset=", "--set dataset=: no value is given"),
        ("wandb_exp_name=#5", "--set wandb_exp_name=#5: no value is given"),
    ],
)
def test_overrides_are_checked_too(word, message):
    assert message in refusal(["tiny-s3"], word)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_what_cannot_be_the_name_of_a_file_is_answered_too(name):
    assert "no such file or shipped configuration" in refusal([name])


def test_an_unknown_name_is_answered_with_the_nearest():
    assert "similar names: gpt2-7b-s3" in refusal(["gpt2-7b-s4"])


SHIPPED = sorted(
    str(path.relative_to(shipped()))
    for path in shipped().glob("*.yaml")
    if path.name != "base.yaml"
)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_resolved_configuration_reads_back_as_itself(name, tmp_path):
    config = load([name])
    (again,) = write(tmp_path, again=config.yaml())
    read = load([again])
    assert (read.arguments, read.launch) == (config.arguments, config.launch)


def test_two_optimizers_differ_only_in_the_optimizers_lines():
    for model in ("gpt2-345m-paper", "gpt2-345m", "gpt2-7b", "tiny"):
        s3, adamw = load([f"{model}-s3"]).arguments, load([f"{model}-adamw"]).arguments
        different = {k for k in s3.keys() | adamw.keys() if s3.get(k) != adamw.get(k)}
        assert different == {
            "optimizer", "lr", "min_lr", "weight_decay", "clip_grad", "s3_beta", "s3_p",
            "plugin_log_updates", "adam_beta1", "adam_beta2", "adam_eps",
        }  # fmt: skip


def test_the_papers_settings():
    s3 = load(["gpt2-345m-paper-s3"]).arguments
    wanted = {
        "num_layers": 12, "hidden_size": 512, "num_attention_heads": 8, "seq_length": 1024,
        "global_batch_size": 512, "train_iters": 50000, "lr_warmup_iters": 5000, "lr": 3e-3,
        "min_lr": 3e-4, "weight_decay": 0.01, "s3_beta": 0.95, "s3_p": 3, "clip_grad": 0,
    }  # fmt: skip
    assert {name: float(s3[name]) for name in wanted} == wanted
    adamw = load(["gpt2-7b-adamw", "overlays/100k-steps"]).arguments
    wanted = {
        "num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "seq_length": 4096,
        "global_batch_size": 1024, "train_iters": 100000, "lr": 3e-4, "weight_decay": 0.1,
        "adam_beta1": 0.9, "adam_beta2": 0.95, "clip_grad": 1,
    }  # fmt: skip
    assert {name: float(adamw[name]) for name in wanted} == wanted


@pytest.mark.parametrize(
    "value",
    ["a\nb", "a\n  # b", "\u2028", "\x85", "\U0001f600", "'", '"', "null", "a  # b:3", "- a", ""],
)
def test_what_is_written_reads_as_the_same(tmp_path, value):
    """Whatever a value holds, and the word or file that it came by."""
    quoted = yaml.safe_dump(value, default_style='"', width=1000).strip()
    before = load(
        ["tiny-s3"], [f"{key}={quoted}" for key in ("wandb_exp_name", "launch.environment.A")]
    )
    assert before.arguments["wandb_exp_name"] == value
    path = tmp_path / "tiny-s3.yaml"
    path.write_text(before.yaml())
    after = load([str(path)])
    assert (after.arguments, after.launch) == (before.arguments, before.launch)
    path.write_text(f"{COPY}\n{before.yaml(whole=True)}")
    assert load([str(path)]) == before


def test_an_error_shows_no_credential():
    for word in (
        "launch.environment.WANDB_API_KEY=[hush]",
        "launch.environment.WANDB_API_KEY='hush",
        "launch.nodes=https://me:hush@host",
        "nothing.WANDB_API_KEY=hush",
    ):
        with pytest.raises(ConfigError) as refused:
            load(["tiny-s3"], [word])
        assert "hush" not in str(refused.value)


def test_another_optimizer_leaves_out_what_was_the_other_ones(tmp_path, capsys):
    """What is set for the new one stays, in whatever order."""
    config = load(["tiny-s3"], ["ademamix_alpha=2", "optimizer=ademamix", "ademamix_beta1=0.8"])
    assert not [name for name in config.arguments if name.startswith("s3_")]
    assert config.arguments["ademamix_alpha"] == "2"
    assert config.arguments["ademamix_beta1"] == "0.8"
    said = capsys.readouterr().err
    assert "--set optimizer=ademamix: optimizer ademamix replaces s3" in said
    assert "s3_beta (configs/tiny-s3.yaml:7)" in said
    both = load(["tiny-s3"], ["s3_p=2", "optimizer=ademamix"])  # which the check refuses
    assert both.arguments["s3_p"] == "2" and "s3_beta" not in both.arguments
    same = load(["tiny-s3"], ["optimizer=s3", "s3_beta=0.9"])
    assert same.arguments["s3_beta"] == "0.9" and same.arguments["s3_p"] == "3"
    (tmp_path / "mine.yaml").write_text(
        "extends: tiny-s3.yaml\narguments:\n  optimizer: lion\n  lion_beta1: 0.9\n".replace(
            "tiny-s3.yaml", str(REPOSITORY / "configs/tiny-s3.yaml")
        )
    )
    mine = load([str(tmp_path / "mine.yaml")])
    assert mine.arguments["lion_beta1"] == "0.9" and "s3_p" not in mine.arguments


def test_switches_under_their_old_names_are_taken_and_said_once(tmp_path, capsys):
    (tmp_path / "old.yaml").write_text("arguments:\n  s3_device: cpu\n  s3-metrics: true\n")
    for _ in range(2):
        config = load([str(tmp_path / "old.yaml")], ["s3_log_updates=true"])
    assert config.arguments["plugin_device"] == "cpu"
    assert config.arguments["plugin_metrics"] is config.arguments["plugin_log_updates"] is True
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3
    assert said[0].endswith(
        "old.yaml:2: s3_device is called plugin_device now, since it is not S3's alone; the old "
        "name goes on working"
    )
