"""AdamW launches as S3 launches: what changes, what stays, what is said."""

import io
import sys

import pytest

from megatron_s3.launch import args as module
from megatron_s3.launch.args import LaunchError, translate

SCRIPT = """\
#!/bin/bash
# --lr 1 in a comment stays
export NAME="a  name"   # and so does this
GPT_ARGS=(
    --num-layers 12
    --hidden-size "512"
)
TRAINING_ARGS="
    --lr 6.0e-5 \\
    --min-lr=6.0e-6 \\
    --adam-beta1 0.9 \\
    --adam-beta2 0.95 \\
    --weight-decay 0.1   --clip-grad 1.0 \\
    --lr-warmup-iters 500 \\
"
torchrun --nproc-per-node 8 'Megatron LM/pretrain_gpt.py' ${GPT_ARGS[@]} \\
    $TRAINING_ARGS \\
    --optimizer adam --data-path 'my data' --adam-eps 1e-8 \\
    --use-distributed-optimizer
"""
S3 = """\
#!/bin/bash
# --lr 1 in a comment stays
export NAME="a  name"   # and so does this
GPT_ARGS=(
    --num-layers 12
    --hidden-size "512"
)
TRAINING_ARGS="
    --lr 6e-4 \\
    --min-lr=6e-5 \\
    --weight-decay 0.01   --clip-grad 0 \\
    --lr-warmup-iters 500 \\
"
torchrun --nproc-per-node 8 -m megatron_s3 'Megatron LM/pretrain_gpt.py' ${GPT_ARGS[@]} \\
    $TRAINING_ARGS \\
    --optimizer s3 --data-path 'my data' \\
    --use-distributed-optimizer
"""


def test_a_script_changes_where_it_must_and_nowhere_else() -> None:
    found = translate(SCRIPT)
    assert found.text == S3
    assert not found.warnings
    assert len(found.changes) == 9
    assert all(": " in change for change in found.changes)  # a reason each


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("--lr 3e-4", "--lr 3e-3 --optimizer s3 --weight-decay 0.001"),
        ("--lr 0.00015 --weight-decay 0.1", "--lr 0.0015 --optimizer s3 --weight-decay 0.01"),
        (
            "--optimizer adam --lr=3e-4 --min-lr 0 --weight-decay 1e-1",
            "--optimizer s3 --lr=3e-3 --min-lr 0 --weight-decay 1e-2",
        ),
        (
            "--lr '3e-4' --optimizer=adam --start-weight-decay 0.1 --end-weight-decay 0.2",
            "--lr 3e-3 --optimizer=s3 --start-weight-decay 0.01 --end-weight-decay 0.02",
        ),
        (
            "--optimizer adam --weight-decay 0 --lr 1 --decoupled-lr 2.5e-4 --decoupled-min-lr 0.1",
            "--optimizer s3 --weight-decay 0 --lr 10 --decoupled-lr 2.5e-3 --decoupled-min-lr 1",
        ),
        (
            "--adam-beta1 0.9 --optimizer adam --lr 1e-3 --weight-decay 0.1 --adam-beta2 0.99",
            " --optimizer s3 --lr 1e-2 --weight-decay 0.01",
        ),
    ],
)
def test_arguments_alone(old: str, new: str) -> None:
    found = translate(old)
    assert found.text == new
    assert "the text starts no script" in found.warnings[0]


def test_rates_are_those_of_a_converted_checkpoint() -> None:
    """Megatron compares them exactly."""
    from megatron_s3.checkpoints import rates

    for lr, decay in (("3e-4", "0.1"), ("0.00017", "0.033"), ("6.0e-5", "1e-1")):
        words = translate(f"--optimizer adam --lr {lr} --weight-decay {decay}").text.split()
        assert float(words[3]) == rates.scaled(float(lr), 10.0)
        assert float(words[5]) == rates.over(float(decay), 10.0)
    words = translate("--optimizer adam --lr 3e-4 --weight-decay 0.1", "3").text.split()
    assert float(words[5]) == rates.over(0.1, 3.0)


def test_a_registered_launch_is_not_registered_twice() -> None:
    text = "torchrun -m megatron_s3 pretrain_gpt.py --optimizer {} --lr {} --weight-decay {}\n"
    assert translate(text.format("adam", "3e-4", 0.1)).text == text.format("s3", "3e-3", 0.01)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("--lr 1 --exp-avg-dtype fp16", "fp16: S3 (SoftSignSGD) cannot keep exp_avg in"),
        ("--lr 1 --exp-avg-sq-dtype fp8", "fp8: S3 (SoftSignSGD) cannot keep exp_pnorm in"),
        ("--lr 1 --main-params-dtype fp16", "--main-params-dtype fp16 is not supported with S3"),
        ("--lr 1 --yaml-cfg a.yaml", "--yaml-cfg is not supported with S3"),
        ("--lr 1 --load old", "megatron-s3 convert old NEW --to s3"),
        ("--optimizer adam", "the text has no --lr"),
        ("ray job submit --address=a -- python3 train.py --lr 1", "into the env_vars of Ray's"),
    ],
)
def test_what_needs_a_hand_is_said(text: str, said: str) -> None:
    assert any(said in warning for warning in translate(text).warnings)


@pytest.mark.parametrize(
    "text",
    [
        "--exp-avg-dtype fp8 --exp-avg-sq-dtype bf16 --lr 1",
        "--exp-avg-dtype bf16 --exp-avg-sq-dtype $DTYPE --lr 1",
        "torchrun train.py ray --lr 1",
        "--use-precision-aware-optimizer --lr 1",  # the program may shard on its own, as slime does
        "ray job submit --runtime-env-json={env_vars:{MEGATRON_S3:1}} -- python train.py --lr 1",
    ],
)
def test_nothing_is_said_of_what_works(text: str) -> None:
    found = translate(text)
    assert not found.refused
    assert not [warning for warning in found.warnings if "starts no script" not in warning]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("--optimizer s3 --lr 1", "the launch uses S3 already"),
        ("--optimizer muon --lr 1", "--optimizer muon: only launches with AdamW"),
        ("--optimizer adam --lr $LR", r"--lr \$LR is not a number in this text"),
        ("ls -l", "no arguments of Megatron"),
    ],
)
def test_other_launches_are_refused(text: str, said: str) -> None:
    with pytest.raises(LaunchError, match=said):
        translate(text)


def test_the_command_reads_files_stdin_and_words(tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / "run.sh").write_text(SCRIPT)
    assert module.main([str(tmp_path / "run.sh")]) == 0
    told = capsys.readouterr()
    assert told.out == S3
    assert "[args] --lr 6.0e-5 -> 6e-4: multiplied by 10" in told.err
    monkeypatch.setattr(sys, "stdin", io.StringIO("--lr 1e-3 --weight-decay 0.1"))
    assert module.main(["-"]) == 0
    assert capsys.readouterr().out == "--lr 1e-2 --optimizer s3 --weight-decay 0.01\n"
    words = ["python", "pretrain_gpt.py", "--lr", "1e-3", "--weight-decay", "0.1", "--name", "a b"]
    assert module.main(["--lr-factor", "2", "--", *words]) == 0
    assert capsys.readouterr().out == (
        "python -m megatron_s3 pretrain_gpt.py --lr 2e-3 --optimizer s3 --weight-decay 0.05 "
        "--name 'a b'\n"
    )
    assert module.main([str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
