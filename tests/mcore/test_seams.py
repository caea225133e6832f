"""Registration is idempotent and whole, and stops where a seam has moved."""

import builtins

import pytest

from megatron_s3.mcore import seam, seams
from tests.mcore.library import on_ranks


def register():
    import megatron_s3

    megatron_s3.register()


@on_ranks()
def test_what_is_registered_twice_is_wrapped_once():
    wrapped = [each for each in seams.SEAMS if isinstance(each, seam.Wrapped)]
    first = [each.found() for each in wrapped]
    assert first and all(hasattr(function, seam.MARK) for function in first)
    register()
    assert all(a is b.found() for a, b in zip(first, wrapped, strict=True))


def validate_args(parsed, preset):
    raise AssertionError


#: How each is moved: the owner, its attribute, and what takes its place (None: nothing).
MOVED = {
    "validate_args": ("megatron.training.arguments", "validate_args", validate_args),
    "_load_base_checkpoint": ("megatron.training.checkpointing", "_load_base_checkpoint", None),
    "open": ("megatron_s3.mcore.seam.inspect", "getsource", lambda module: ""),
    "ChainedOptimizer": (
        "megatron.core.optimizer.optimizer.ChainedOptimizer", "_synchronize_steps", None
    ),
    "param_group_identifier_keys": (
        "megatron.core.optimizer.optimizer", "param_group_identifier_keys", ("a",)
    ),
    "MegatronOptimizer.__init__": (
        "megatron.core.optimizer.optimizer.MegatronOptimizer", "__init__", lambda self: None
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MOVED)
@on_ranks()
def test_one_that_has_moved_is_named(name):
    """Other parameters, gone, not used any more, without a method, of another kind, elsewhere."""
    import megatron.core.msc_utils as msc_utils

    owner, attribute, instead = MOVED[name]
    with pytest.MonkeyPatch.context() as patch:
        if instead is None:
            patch.delattr(f"{owner}.{attribute}")
        else:
            patch.setattr(f"{owner}.{attribute}", instead)
        with pytest.raises(seams.SeamMoved, match=rf"{name} .* in megatron-core .* 0\.19\.2"):
            register()
    register()
    assert msc_utils.open is not builtins.open


@on_ranks()
def test_what_another_program_has_replaced_is_wrapped_under_megatrons_name():
    from megatron.training import arguments

    def replacement(args, defaults=None):
        return args

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arguments, "validate_args", replacement)
        register()
        assert hasattr(arguments.validate_args, seam.MARK)
        assert not hasattr(arguments, "replacement")


@on_ranks()
def test_one_of_older_releases_is_looked_at_where_it_is_needed_alone():
    older = [each for each in seams.SEAMS if getattr(each, "by", "").startswith("compat_")]
    assert len(older) == 2 and not any(each.is_here(True) for each in older)
    named = older[0]
    with pytest.raises(seams.SeamMoved, match="DistributedOptimizer is not as expected"):
        named.check()
