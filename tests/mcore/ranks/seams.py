"""One process: registration is idempotent and whole, and stops where a seam has moved."""

import builtins

import pytest

import megatron_s3

megatron_s3.register()

import megatron.core.msc_utils as msc_utils  # noqa: E402
import megatron.training.arguments as arguments  # noqa: E402
import megatron.training.checkpointing as checkpointing  # noqa: E402
from megatron.core.optimizer import optimizer  # noqa: E402

from megatron_s3.mcore import seam, seams  # noqa: E402
from tests.harness.trainer import REPOSITORY  # noqa: E402

wrapped = [each for each in seams.SEAMS if isinstance(each, seam.Wrapped)]
first = [each.found() for each in wrapped]
assert all(hasattr(function, seam.MARK) for function in first)
megatron_s3.register()
assert all(a is b.found() for a, b in zip(first, wrapped, strict=True)), "wrapped twice"

assert seams.table() in (REPOSITORY / "README.md").read_text(), (
    "see python -m megatron_s3.mcore.seams"
)


def validate_args(parsed, preset):
    raise AssertionError


# A function that takes other parameters, one that is gone, a builtin that is not used any more, a
# class without a method that the plugin overrides, a value of another kind, a constant elsewhere.
for move, name in (
    (lambda patch: patch.setattr(arguments, "validate_args", validate_args), "validate_args"),
    (lambda patch: patch.delattr(checkpointing, "_load_base_checkpoint"), "_load_base_checkpoint"),
    (lambda patch: patch.setattr(seam.inspect, "getsource", lambda module: ""), "open"),
    (
        lambda patch: patch.delattr(optimizer.ChainedOptimizer, "_synchronize_steps"),
        "ChainedOptimizer",
    ),
    (
        lambda patch: patch.setattr(optimizer, "param_group_identifier_keys", ("a",)),
        "param_group_identifier_keys",
    ),
    (
        lambda patch: patch.setattr(optimizer.MegatronOptimizer, "__init__", lambda self: None),
        "MegatronOptimizer.__init__",
    ),
):
    with pytest.MonkeyPatch.context() as patch:
        move(patch)
        with pytest.raises(seams.SeamMoved, match=rf"{name} .* in megatron-core .* 0\.19\.2"):
            megatron_s3.register()
megatron_s3.register()
assert msc_utils.open is not builtins.open

# A seam of older releases is looked at where it is needed alone.
(named,) = [each for each in seams.SEAMS if getattr(each, "by", "").startswith("compat_")]
assert not named.is_here(True)
with pytest.raises(seams.SeamMoved, match="DistributedOptimizer is another in megatron-core"):
    named.check()
print("seams: ok")
