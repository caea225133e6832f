"""One process: registration is idempotent and whole, and stops where a seam has moved."""

import pytest

import megatron_s3

megatron_s3.register()

import megatron.training.arguments as arguments  # noqa: E402
import megatron.training.checkpointing as checkpointing  # noqa: E402

from megatron_s3.mcore import seams  # noqa: E402
from tests.harness.trainer import REPOSITORY  # noqa: E402


def resolved():
    return [seams._resolve(seam)[1] for seam in seams.SEAMS]


first = resolved()
assert all(hasattr(function, seams._MARK) for function in first)
megatron_s3.register()
assert all(a is b for a, b in zip(first, resolved(), strict=True)), "wrapped twice"

assert seams.table() in (REPOSITORY / "README.md").read_text(), (
    "see python -m megatron_s3.mcore.seams"
)

# A seam that takes other parameters, and one that is gone.
original_validate = arguments.validate_args


def validate_args(parsed, preset):
    raise AssertionError


for move, name in (
    (lambda: setattr(arguments, "validate_args", validate_args), "validate_args"),
    (lambda: delattr(checkpointing, "_load_base_checkpoint"), "_load_base_checkpoint"),
):
    move()
    with pytest.raises(seams.SeamMoved, match=rf"{name} .* in megatron-core .* 0\.19\.2"):
        megatron_s3.register()
    arguments.validate_args = original_validate
print("seams: ok")
