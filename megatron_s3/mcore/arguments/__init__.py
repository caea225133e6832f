"""The plugin's flags, their validation, and the combinations that are rejected with an error.

``flags`` adds the flags to Megatron's parser.  ``validation`` wraps Megatron's validation and calls
``checks``.  ``readers`` return settings from arguments or an optimizer configuration.  ``mask``
makes Megatron treat the optimizer as Adam.  ``names`` converts between flags, destinations and
dtypes.
"""

from megatron_s3.mcore.arguments.checks import check_config, check_scalar, check_several
from megatron_s3.mcore.arguments.flags import CPU_DEFAULTS, DEVICES, add_megatron_arguments
from megatron_s3.mcore.arguments.mask import as_adam, print_args, replaced
from megatron_s3.mcore.arguments.names import destination, flag
from megatron_s3.mcore.arguments.readers import (
    hyperparameters,
    in_megatron_fsdp,
    needs_grad_norm,
    scalar_optimizer,
    state_dtypes,
    switches,
)
from megatron_s3.mcore.arguments.validation import UNSUPPORTED, validate_args

__all__ = [
    "CPU_DEFAULTS",
    "DEVICES",
    "UNSUPPORTED",
    "add_megatron_arguments",
    "as_adam",
    "check_config",
    "check_scalar",
    "check_several",
    "destination",
    "flag",
    "hyperparameters",
    "in_megatron_fsdp",
    "needs_grad_norm",
    "print_args",
    "replaced",
    "scalar_optimizer",
    "state_dtypes",
    "switches",
    "validate_args",
]
