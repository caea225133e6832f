"""Adds the plugin's flags to Megatron's parser, and changes some of its defaults."""

import argparse
from collections.abc import Callable
from typing import Any

from megatron_s3.log import say_once
from megatron_s3.mcore import cpu_device
from megatron_s3.mcore.arguments.names import destination, flag, flag_named
from megatron_s3.mcore.arguments.rules import ABOUT_OVERRIDES, rule_text
from megatron_s3.optimizers import OPTIMIZERS
from megatron_s3.renamed import RENAMED, renamed

__all__ = ["CPU_DEFAULTS", "DEVICES", "FOR_ALL", "SWITCHES", "Default", "add_megatron_arguments"]
__all__ += ["without_effect"]

#: Values of ``--plugin-device``.
DEVICES = ("auto", "cuda", "cpu")


#: Defaults of Megatron's flags for training on the CPU; Megatron's own select GPU kernels.
CPU_DEFAULTS = {
    "distributed_backend": "gloo",
    "transformer_impl": "local",
    "gradient_accumulation_fusion": False,
    "gradient_reduce_div_fusion": False,  # gloo can only sum
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "no_persist_layer_norm": True,
}


#: Switches of all the plugin's optimizers: destination and help text.
SWITCHES = (
    (
        "plugin_log_grad_norm",
        "compute and log the gradient norm even if nothing else needs it; this costs a pass over "
        "the gradients, an all-reduce and a host synchronization in each step (without it, the "
        "step returns 0.0 as the norm)",
    ),
    (
        "plugin_log_updates",
        "log the sizes of each logging interval's updates, by parameter type and layer, to "
        "TensorBoard, Weights & Biases and metrics.jsonl: mean, largest, fraction of large ones, "
        "and ratio to the weights",
    ),
    (
        "plugin_metrics",
        "write losses, learning rates and loss spikes to metrics.jsonl in --tensorboard-dir (or "
        "in --save, where that is not given), with any --optimizer; --plugin-log-updates implies "
        "it",
    ),
    (
        "plugin_no_verify_checkpoint",
        "load a checkpoint without comparing its data with its checksums first, with any "
        "--optimizer",
    ),
    (
        "plugin_no_fused",
        "use the unfused PyTorch implementation of the step instead of a fused kernel: slower, "
        "because Megatron also copies gradients and parameters, with the same result",
    ),
    (
        "plugin_no_param_remainders",
        "with --use-precision-aware-optimizer and --bf16, keep main parameters in fp32 (4 bytes) "
        "instead of what bf16 parameters lack of them (2 bytes): the losses are then those without "
        "--use-precision-aware-optimizer to the last digit",
    ),
)


#: Switches that also have an effect with Megatron's own optimizers.
FOR_ALL = ("plugin_metrics", "plugin_no_verify_checkpoint")


#: Flags of Megatron's own optimizers that have no effect with the plugin's.
_OF_OTHER_OPTIMIZERS = (
    *("adam_beta1", "adam_beta2", "adam_eps", "sgd_momentum"),
    "use_torch_optimizer_for_cpu_offload",
)


class _Renamed(argparse.Action):
    """Accepts a flag by its old name, and logs the new name once."""

    def __init__(self, option_strings: list[str], dest: str, **others: Any) -> None:
        others |= {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        super().__init__(option_strings, dest, **others)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        say_once(renamed(self.option_strings[0], flag_named(self.dest)))
        setattr(namespace, self.dest, True if self.nargs == 0 else values)


def without_effect(scalar: Any) -> list[str]:
    """Returns the switches that do nothing with an optimizer of Megatron.

    Args:
        scalar: the plugin's optimizer for what Megatron's Muon leaves, or None.
    """
    heeded = {*FOR_ALL, *(["plugin_no_fused"] if scalar is not None else [])}
    return [name for name, _ in SWITCHES if name not in heeded]


class Default(float):
    """A default value that can be distinguished from the same number given by the user."""


def add_megatron_arguments(
    original: Callable[..., Any], parser: argparse.ArgumentParser
) -> argparse.ArgumentParser:
    """Wraps the making of Megatron's parser: adds the plugin's optimizers and flags."""
    parser = original(parser)
    known = parser._option_string_actions
    # If both have an optimizer of one name (lion), the plugin's is used, and this is logged.
    choices = known["--optimizer"].choices or ()
    known["--optimizer"].choices = list(dict.fromkeys((*choices, *OPTIMIZERS)))
    for scalar in filter(None, [known.get("--muon-scalar-optimizer")]):
        scalar.choices = list(dict.fromkeys((*(scalar.choices or ()), *OPTIMIZERS)))
    known["--clip-grad"].default = Default(known["--clip-grad"].default)
    if cpu_device.active():
        here = {action.dest for action in known.values()}
        parser.set_defaults(**{k: v for k, v in CPU_DEFAULTS.items() if k in here})

    group = parser.add_argument_group("megatron_s3")
    group.add_argument(
        "--plugin-device",
        choices=DEVICES,
        default="auto",
        help="device to train on; auto selects the GPU if there is one, and otherwise the CPU with "
        "gloo (default: auto)",
    )
    for name, meaning in SWITCHES:
        group.add_argument(flag_named(name), action="store_true", help=meaning)
    group.add_argument(
        "--plugin-overrides",
        nargs="+",
        type=rule_text,
        default=None,
        metavar="RULE",
        help=ABOUT_OVERRIDES,
    )
    for old, new in RENAMED.items():
        action = parser._option_string_actions[flag_named(new)]
        group.add_argument(
            flag_named(old), dest=new, action=_Renamed, nargs=action.nargs, choices=action.choices
        )
    upstream = list(_OF_OTHER_OPTIMIZERS)
    for cls in OPTIMIZERS.values():
        description = cls.description
        group = parser.add_argument_group(description.label)
        for h in description.hyperparameters:
            if flag(description, h) in known:  # Megatron's own flag has the same meaning
                upstream.append(destination(description, h))
                continue
            kind: dict[str, Any] = (
                {"action": "store_const", "const": not h.default}
                if h.is_switch
                else {"type": float, "metavar": "X"}
            )
            # None until validation, to distinguish flags that were given from defaults.
            group.add_argument(
                flag(description, h),
                dest=destination(description, h),
                default=None,
                help=f"{'do not ' if h.default is True else ''}{h.help} (default {h.default})",
                **kind,
            )
    parser.set_defaults(_s3_upstream_defaults={name: parser.get_default(name) for name in upstream})
    return parser
