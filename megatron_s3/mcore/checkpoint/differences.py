"""Differences between a checkpoint's run and this one: errors or log lines."""

from collections.abc import Mapping
from typing import Any

from megatron_s3.log import say_once
from megatron_s3.mcore import overrides
from megatron_s3.mcore.arguments import flag, hyperparameters, scalar_optimizer, state_dtypes
from megatron_s3.mcore.arguments.names import flag_named
from megatron_s3.mcore.arguments.rules import OVERRIDES
from megatron_s3.optimizers import OPTIMIZERS
from megatron_s3.optimizers.description import FORMAT
from megatron_s3.optimizers.stamp import Stamp, check_parts, settings

__all__ = ["compare_optimizers", "compare_rates", "compare_vocabularies"]


def compare_vocabularies(load_dir: str, args: Any, saved: Any) -> None:
    """Compares the padded sizes of the vocabulary, which Megatron pads with additional rows.

    Raises:
        ValueError: they differ, so the new rows would be untrained.
    """
    now, then = (getattr(each, "padded_vocab_size", None) for each in (args, saved))
    multiples = [
        getattr(each, "make_vocab_size_divisible_by", 128)
        * getattr(each, "tensor_model_parallel_size", 1)
        for each in (args, saved)
    ]  # if these are equal, the tokenizer differs
    if now and then and now > then and multiples[0] != multiples[1]:
        ranks = args.tensor_model_parallel_size
        advice = f"a --tensor-model-parallel-size that divides {then}"
        if then % ranks == 0:
            advice = f"--make-vocab-size-divisible-by {then // ranks}, which pads to {then}"
        raise ValueError(
            f"{load_dir} holds a vocabulary padded to {then} tokens, and this run pads it to "
            f"{now}: the {now - then} new ones are untrained, and each takes part in the loss. "
            f"Nothing was loaded. Use {advice}."
        )


def compare_rates(load_dir: str, args: Any, saved: Any) -> None:
    """Compares learning rates and weight decays before loading; Megatron compares them after it.

    Raises:
        ValueError: they differ, and no flag says which of them to use.
    """
    names = ["lr", "min_lr", "decoupled_lr", "decoupled_min_lr", "weight_decay"]
    # With a constant weight decay these two have its value.
    if getattr(args, "weight_decay_incr_style", "constant") != "constant":
        names += ["start_weight_decay", "end_weight_decay"]
    differing = [
        (f"--{name.replace('_', '-')}", getattr(saved, name), getattr(args, name))
        for name in names
        if hasattr(saved, name) and getattr(saved, name) != getattr(args, name, None)
    ]
    if not differing or getattr(saved, "no_save_optim", False):
        return
    then = " ".join(f"{flag} {value}" for flag, value, _ in differing)
    now = " ".join(f"{flag} {value}" for flag, _, value in differing)
    if getattr(args, "override_opt_param_scheduler", False):
        say_once(f"{load_dir} was saved with {then}; the run continues with {now}")
    elif getattr(args, "use_checkpoint_opt_param_scheduler", False):
        say_once(f"{load_dir} was saved with {then}; the run uses these values instead of {now}")
    else:
        raise ValueError(
            f"{load_dir} was saved with {then}, and this run has {now}. Nothing was loaded. Use "
            "the same values, or choose this run's with --override-opt_param-scheduler, or the "
            "checkpoint's with --use-checkpoint-opt_param-scheduler."
        )


def compare_optimizers(load_dir: str, args: Any, saved: Any) -> None:
    """Compares the optimizer and its hyperparameters with those of the checkpoint.

    Raises:
        ValueError: the running optimizer cannot use the state.
    """
    running, written = (getattr(each, "optimizer", "adam") for each in (args, saved))
    if running == written and not getattr(saved, "no_save_optim", False):
        _compare_scalars(load_dir, args, saved)
    if running not in OPTIMIZERS and written not in OPTIMIZERS:
        return  # Megatron's own optimizers have Megatron's own checks
    if getattr(saved, "no_save_optim", False):
        return
    advice = "load the model's weights alone with --no-load-optim"
    labels, now, then = {"optimizer": "--optimizer"}, {}, {}
    own, others = {}, {}
    if running == written:
        cls = OPTIMIZERS[running]
        labels |= {h.name: flag(cls.description, h) for h in cls.description.hyperparameters}
        now, then = (hyperparameters(cls, each) for each in (args, saved))
        own, others = (settings(cls.description, values) for values in (now, then))
    Stamp(running, FORMAT, own).check(
        Stamp(written, getattr(saved, "s3_format", 1), others),
        source=load_dir,
        called=lambda name, value: f"{labels[name]} {value}",
        advice=advice,
    )
    check_parts(*map(_parts, (args, saved)), source=load_dir, advice=advice)
    rules, written_rules = (getattr(each, OVERRIDES, None) or [] for each in (args, saved))
    if rules != written_rules:
        say_once(
            f"{load_dir} was saved with {flag_named(OVERRIDES)} {written_rules}; the run continues "
            f"with {rules}"
        )
    _say_changes(load_dir, now, then)
    now, then = (state_dtypes(OPTIMIZERS[running], each) for each in (args, saved))
    for name in now:
        if now[name] != then[name]:
            say_once(
                f"{load_dir} was saved with {name} in {then[name]}; it is loaded as {now[name]}"
            )


def _say_changes(load_dir: str, now: Mapping[str, Any], then: Mapping[str, Any]) -> None:
    for name in now:
        if name in then and now[name] != then[name]:
            was, is_now = f"{name}={then[name]}", f"{name}={now[name]}"
            say_once(f"{load_dir} was saved with {was}; the run continues with {is_now}")


def _compare_scalars(load_dir: str, args: Any, saved: Any) -> None:
    """Compares the optimizers of the parameters that Megatron's Muon leaves to another."""
    now, then = map(scalar_optimizer, (args, saved))
    if now is None and then is None:
        return
    flag_name = "--muon-scalar-optimizer"
    labels = {"optimizer": flag_name}
    names = (getattr(each, "muon_scalar_optimizer", None) for each in (args, saved))
    values, saved_values = (
        {} if cls is None else hyperparameters(cls, each)
        for cls, each in ((now, args), (then, saved))
    )
    own, others = (
        {} if cls is None else settings(cls.description, known)
        for cls, known in ((now, values), (then, saved_values))
    )
    for cls in filter(None, (now, then)):
        labels |= {h.name: flag(cls.description, h) for h in cls.description.hyperparameters}
    (asked, written) = names
    Stamp(str(asked), FORMAT, own).check(
        Stamp(str(written), getattr(saved, "s3_format", 1), others),
        source=load_dir,
        called=lambda name, value: f"{labels[name]} {value}",
        advice="load the model's weights alone with --no-load-optim",
    )
    _say_changes(load_dir, values, saved_values)


def _parts(args: Any) -> list[dict[str, Any]]:
    """Returns param groups of the optimizers of a run, with what a checkpoint knows them by."""
    return [{"algorithm": args.optimizer}, *overrides.parts(args)]
