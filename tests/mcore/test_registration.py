"""What `register` changes in a process: the device if it is asked for, and who holds names."""

import os
import textwrap

import pytest

from tests.harness import fresh

HEAD = """
import warnings; warnings.simplefilter("ignore")
import torch, megatron_s3
had = torch.cuda.is_available()
"""


def run(code: str, *argv: str, **environment: str) -> str:
    done = fresh.run(
        *("-c", HEAD + textwrap.dedent(code), *argv),
        env={k: v for k, v in os.environ.items() if k != "MEGATRON_S3_DEVICE"} | environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


NOTHING = """
    from megatron_s3.mcore import cpu_device
    assert torch.cuda.is_available() is had and not cpu_device.active()
"""


def test_no_device_is_chosen_unless_one_is_asked_for():
    """A login node that registers goes on saying that it has no GPU."""
    assert run("megatron_s3.register()\n" + textwrap.dedent(NOTHING)) == ""


@pytest.mark.parametrize(
    ("call", "argv", "environment"),
    [
        ('megatron_s3.register(device="cpu")', [], {}),
        ("megatron_s3.register()", ["--plugin-device", "cpu"], {"MEGATRON_S3_DEVICE": "cuda"}),
        ("megatron_s3.register()", [], {"MEGATRON_S3_DEVICE": "cpu"}),
    ],
    ids=["argument", "flag", "environment"],
)
def test_the_cpu_is_taken_where_it_is_asked_for(call, argv, environment):
    said = run(f"{call}\nassert torch.cuda.is_available()", *argv, **environment)
    assert said.startswith("[megatron_s3] training on the CPU with gloo")


def test_an_unknown_device_is_refused_before_anything_is_patched():
    code = """
        import sys
        try:
            megatron_s3.register()
        except ValueError as error:
            print(error)
        assert "megatron.core" not in sys.modules
    """
    said = run(code, MEGATRON_S3_DEVICE="tpu")
    assert said == "MEGATRON_S3_DEVICE=tpu: expected auto, cuda or cpu; change or unset it\n"


def test_every_module_that_holds_a_name_is_given_the_wrapper(tmp_path):
    """The running script, another framework's module; what cannot be reached is named."""
    (tmp_path / "framework.py").write_text(
        "from megatron.core.optimizer import get_megatron_optimizer as build\n"
        "from megatron.core.dist_checkpointing import load\n"
        "TABLE = {'megatron': build}\n"
        "def around(function):\n"
        "    def inner(): return function\n"
        "    return inner\n"
        "kept = around(build)\n"
    )
    code = """
        import framework
        from megatron.core.optimizer import get_megatron_optimizer
        megatron_s3.register()
        from megatron_s3.mcore.seam import MARK
        wrapped = get_megatron_optimizer, framework.build, framework.load
        assert all(hasattr(function, MARK) for function in wrapped)
        assert not hasattr(framework.kept(), MARK)
        megatron_s3.register()  # says nothing again
    """
    (said,) = run(code, PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}").splitlines()
    assert said == (
        "[megatron_s3] megatron.core.optimizer.get_megatron_optimizer is still held by a dict "
        "(megatron), a variable of around.<locals>.inner, which imported it before "
        "megatron_s3.register() and calls Megatron's own. Call register() before that."
    )
