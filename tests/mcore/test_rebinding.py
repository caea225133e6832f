"""Registration, in parts: the device that is asked for, and names that other modules hold."""

import functools
import os
import sys
from types import ModuleType

import pytest

from tests.mcore.library import on_ranks


def wrapped(function):
    @functools.wraps(function)
    def wrapper():
        return function() + 1

    return wrapper


def failed(function):
    """An error that somebody keeps, whose traceback has the function as a variable."""
    try:
        raise ValueError(f"of {function}")
    except ValueError as error:
        return error


def made():
    return lambda: 3


@on_ranks(1)
def test_each_module_is_given_the_wrapper_and_then_nothing_holds_the_function():
    from megatron_s3.mcore.rebinding import rebind, unreached

    function = made()
    error = failed(function)
    modules = [ModuleType(f"of_a_framework_{i}") for i in range(2)]
    for module in modules:
        module.build, module.again, module.other = function, function, len
        sys.modules[module.__name__] = module
    sys.modules["of_another_kind"] = 3
    pairs = [(function, wrapped(function))]
    rebind(pairs)
    for module in modules:
        assert module.build is module.again is pairs[0][1] and module.other is len
        assert module.build() == 4
    assert unreached(pairs) == []
    assert error.__traceback__.tb_frame.f_locals["function"] is function


@on_ranks(1)
def test_what_still_holds_a_function_is_named_by_its_kind():
    from megatron_s3.mcore.rebinding import unreached

    def around(function):
        def inner():
            return function

        return inner

    def said(holder, function):
        (text,) = unreached([(function, wrapped(function))])
        head = f"{__name__}.made.<locals>.<lambda> is still held by "
        assert holder and text.startswith(head)
        return text.removeprefix(head)

    function = made()
    assert said([function], function) == "a list"
    assert said([[function], [function]], function) == "a list"
    assert said({"one": function, "two": len, "another": function}, function) == (
        "a dict (another, one)"
    )
    users = around(function)
    cell = users.__closure__[0]
    name = "test_what_still_holds_a_function_is_named_by_its_kind.<locals>.around.<locals>.inner"
    assert said(users, function) == f"a variable of {name}"
    del users
    assert said(cell, function) == "a variable of a function"


DEVICES = {
    # argv: environment variable, and what is asked for or the error.
    (): ("", None),
    ("--plugin-device", "cpu"): ("tpu", "cpu"),
    ("--plugin-device=cpu",): ("cuda", "cpu"),
    ("--lr", "1", "--s3-device", "cuda"): ("cpu", "cuda"),
    ("--plugin-device", "cpu", "--plugin-device", "auto"): ("", "auto"),
    ("--plugin-device", "tpu"): ("cpu", "cpu"),  # argparse says so later
    ("--plugin-device",): ("cuda", "cuda"),
    ("--device", "cpu"): ("", None),
    ("--lr", "1"): ("tpu", "MEGATRON_S3_DEVICE=tpu: expected auto, cuda or cpu"),
}


@pytest.mark.parametrize("argv", DEVICES)
@on_ranks(1)
def test_the_device_is_the_arguments_the_flags_or_the_environments(argv):
    from megatron_s3.mcore import cpu_device, registration, seams

    environment, expected = DEVICES[argv]
    sys.argv, os.environ["MEGATRON_S3_DEVICE"] = ["train.py", *argv], environment
    chosen, installed = [], []
    cpu_device.select, seams.install = chosen.append, lambda: installed.append(list(chosen))
    registration.register("cuda")
    assert chosen == ["cuda"]
    chosen.clear()
    if expected not in (None, "auto", "cuda", "cpu"):
        with pytest.raises(ValueError, match=expected):
            registration.register()
        return
    registration.register()
    assert chosen == ([] if expected is None else [expected])
    assert installed == [["cuda"], chosen]  # the device comes first
