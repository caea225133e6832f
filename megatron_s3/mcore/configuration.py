"""The plugin's fields of Megatron's OptimizerConfig: their definition, defaults and checks."""

import copy
import dataclasses
import difflib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Optional

import torch

from megatron_s3.mcore.arguments.checks import check_clip_grad
from megatron_s3.mcore.arguments.flags import SWITCHES, Default, without_effect
from megatron_s3.mcore.arguments.mask import as_adam, replaced
from megatron_s3.mcore.arguments.names import destination
from megatron_s3.mcore.arguments.readers import hyperparameters, scalar_optimizer, switches
from megatron_s3.mcore.arguments.rules import OVERRIDES, rules
from megatron_s3.optimizers import OPTIMIZERS, ElementwiseOptimizer
from megatron_s3.renamed import RENAMED

__all__ = [
    "WITHOUT_FUSED_ADAM",
    "Field",
    "add_fields",
    "hyperparameter_fields",
    "plugin_fields",
    "post_init",
    "settle",
    "settle_precision",
]

#: The name, type and default of a field of a configuration.
Field = tuple[str, Any, Any]

#: Fields that Megatron rejects without Transformer Engine's FusedAdam, and the values it accepts.
WITHOUT_FUSED_ADAM = {
    "use_precision_aware_optimizer": False,
    "main_grads_dtype": torch.float32,
    "main_params_dtype": torch.float32,
    "exp_avg_dtype": torch.float32,
    "exp_avg_sq_dtype": torch.float32,
}

#: Switches that only the trainer reads, from its arguments: a field would have no effect.
_OF_THE_TRAINER = ("plugin_metrics",)

#: Switches that are on unless a program turns them off; the trainer's flags turn them off.
_ON = ("plugin_log_grad_norm",)


def add_fields(cls: type) -> None:
    """Adds a keyword-only field to a dataclass for each hyperparameter and switch of the plugin.

    Existing and later subclasses get the fields too.  The default of ``clip_grad`` is replaced by
    an equal one that :func:`settle` can distinguish from a value given by the user.

    Args:
        cls: Megatron's OptimizerConfig.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    added = [(name, *rest) for name, *rest in _fields() if name not in known]
    if not added:
        return
    own = dict(inspect.get_annotations(cls))
    _restore_fields(cls)
    for name, kind, default in added:
        own[name] = kind
        setattr(cls, name, dataclasses.field(default=default, kw_only=True))
    cls.clip_grad.default = Default(cls.clip_grad.default)  # type: ignore[attr-defined]
    cls.__annotations__ = own
    _decorate(cls)
    for each in _subclasses(cls):
        _restore_fields(each)
        _decorate(each)


def hyperparameter_fields(cls: type[ElementwiseOptimizer]) -> Iterator[Field]:
    """Yields the field of each hyperparameter of an optimizer."""
    for h in cls.description.hyperparameters:
        kind = bool if h.is_switch else Optional[float] if h.default is None else float  # noqa: UP045  # read by frameworks
        yield destination(cls.description, h), kind, h.default


def plugin_fields() -> Iterator[Field]:
    """Yields the field of each flag for all optimizers that an optimizer or checkpoint reads."""
    for name, _ in SWITCHES:
        if name not in _OF_THE_TRAINER:
            yield name, bool, name in _ON
    yield OVERRIDES, Optional[list[str]], None  # noqa: UP045  # read by frameworks


def _fields() -> Iterator[Field]:
    for cls in OPTIMIZERS.values():
        yield from hyperparameter_fields(cls)
    yield from plugin_fields()


def _subclasses(cls: type[Any]) -> list[type[Any]]:
    found: dict[type[Any], None] = {}
    for each in cls.__subclasses__():
        if "__dataclass_fields__" in vars(each):
            found[each] = None
        found |= dict.fromkeys(_subclasses(each))
    return list(found)


def _restore_fields(cls: Any) -> None:
    """Restores the field objects, which ``dataclass`` has replaced by their defaults."""
    for name in inspect.get_annotations(cls):
        field = cls.__dataclass_fields__.get(name)
        if field is not None:
            setattr(cls, name, copy.copy(field))


def _decorate(cls: Any) -> None:
    """Applies ``dataclass`` again with the same options.

    The methods it generated before are deleted first, because it would not replace them.
    """
    for name, value in list(vars(cls).items()):
        code = getattr(inspect.unwrap(value) if callable(value) else None, "__code__", None)
        if code is not None and code.co_filename == "<string>":
            delattr(cls, name)
    asked = {name: getattr(cls.__dataclass_params__, name) for name in ("eq", "order", "frozen")}
    dataclasses.dataclass(**asked)(cls)


def post_init(original: Callable[..., Any], config: Any) -> Any:
    """Wraps the configuration's checks: the plugin's run first, then Megatron's as for adam.

    Raises:
        ValueError: a value is not allowed, or a hyperparameter belongs to another optimizer.
    """
    settle(config)
    if config.optimizer not in OPTIMIZERS:
        return original(config)
    with as_adam(config), replaced(config, WITHOUT_FUSED_ADAM):
        result = original(config)
    settle_precision(config)
    return result


def settle(config: Any) -> None:
    """Sets fields that were not given to the optimizer's defaults, and checks the plugin's fields.

    Raises:
        ValueError: a value is not allowed, a hyperparameter belongs to another optimizer than the
            configuration's, or an attribute has the prefix of a hyperparameter but is not one.
    """
    # The trainer makes the configuration while ``args.optimizer`` reads "adam".
    name = getattr(config.optimizer, "asked", config.optimizer)
    chosen = OPTIMIZERS.get(name)
    scalar = scalar_optimizer(config)
    asked = [OVERRIDES] if rules(getattr(config, OVERRIDES, None)) else []
    asked += [each for each in without_effect(scalar) if each not in _ON and switches(config)[each]]
    if asked and chosen is None:
        raise ValueError(
            f"{asked[0]} does nothing with optimizer={str(name)!r}: it is for the plugin's "
            f"optimizers ({', '.join(OPTIMIZERS)}). Leave it out, or choose one of these."
        )
    if isinstance(config.clip_grad, Default):
        default = config.clip_grad if chosen is None else chosen.description.clip_grad
        config.clip_grad = float(default)
    if chosen is not None:
        check_clip_grad(config.clip_grad, "clip_grad")
    for name, _, default in _fields():
        if getattr(config, name, None) is None:
            setattr(config, name, default)
    for cls in OPTIMIZERS.values():
        _check_own(config, cls, cls in (chosen, scalar))
    # --use-mup derives the eps of hidden layers from this field.
    own = {} if chosen is None else hyperparameters(chosen, config)
    if "eps" in own and config.adam_eps == type(config).adam_eps:
        config.adam_eps = own["eps"]


def _check_own(config: Any, cls: Any, is_chosen: bool) -> None:
    description = cls.description
    own = {destination(description, h): h for h in description.hyperparameters}
    for name, h in own.items():
        value = getattr(config, name)
        if is_chosen:
            h.check(value, name)
        elif value != h.default and not _is_megatrons(config, name):
            raise ValueError(
                f"{name}={value!r} is a hyperparameter of the optimizer {description.name}, and "
                f"the configuration has optimizer={str(config.optimizer)!r}. Leave it out, or set "
                f"optimizer={description.name!r}."
            )
    prefix = f"{description.name}_"
    for name in vars(config):
        if not name.startswith(prefix) or name in own or name in RENAMED:
            continue
        if not _is_megatrons(config, name):
            near = difflib.get_close_matches(name, own, 1)
            raise ValueError(
                f"the optimizer's configuration has {name}={getattr(config, name)!r}, which is no "
                f"hyperparameter of {description.label}. "
                + (f"Did you mean {near[0]}? " if near else "")
                + f"It has {', '.join(own) or 'none'}."
            )


def _is_megatrons(config: Any, name: str) -> bool:
    """Returns whether a field is Megatron's own; only the plugin's fields are keyword-only."""
    field = type(config).__dataclass_fields__.get(name)
    return field is not None and not field.kw_only


def settle_precision(config: Any) -> None:
    """Sets the fields that Megatron derives for a precision-aware optimizer, as for FusedAdam."""
    aware = getattr(config, "use_precision_aware_optimizer", False)
    # With other fp8 recipes Megatron keeps the main parameters itself.
    config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = aware and (
        getattr(config, "fp8_recipe", None) in (None, "delayed")
        or getattr(config, "optimizer_cpu_offload", False)
    )
    if switches(config)["plugin_no_param_remainders"]:
        config.store_param_remainders = False
