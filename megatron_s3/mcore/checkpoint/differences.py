"""Differences between a checkpoint's run and this one: errors or log lines."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_s3.log import say_once
from megatron_s3.mcore import overrides
from megatron_s3.mcore.arguments.names import flag, flag_named
from megatron_s3.mcore.arguments.readers import (
    MUONS,
    hyperparameters,
    scalar_named,
    state_dtypes,
)
from megatron_s3.mcore.arguments.rules import OVERRIDES
from megatron_s3.optimizers import OPTIMIZERS, ElementwiseOptimizer
from megatron_s3.optimizers.description import FORMAT
from megatron_s3.optimizers.stamp import Stamp, check_parts, settings

__all__ = [
    "compare_experts",
    "compare_optimizers",
    "compare_rates",
    "compare_vocabularies",
    "in_force",
    "refuse_missing",
]

#: The rates of a schedule's state, by their names in Megatron's arguments.
_OF_SCHEDULE = {
    "lr": "max_lr",
    "min_lr": "min_lr",
    "weight_decay": "start_wd",
    "start_weight_decay": "start_wd",
    "end_weight_decay": "end_wd",
}

#: What a run may leave out of its checkpoints, by the ends of Megatron's flags.
_PARTS = {"optim": "optimizer state", "rng": "state of the random number generators"}

_ADVICE = "load the model's weights alone with --no-load-optim"


def refuse_missing(load_dir: str, args: Any, saved: Any) -> None:
    """Raises ValueError if the checkpoint was saved without something that this run would load.

    Megatron ends with a KeyError then, or continues with other random numbers.
    """
    for part, what in _PARTS.items():
        if getattr(saved, f"no_save_{part}", False) and not getattr(args, f"no_load_{part}", False):
            raise ValueError(
                f"{load_dir} was saved with --no-save-{part} and holds no {what}. Nothing was "
                f"loaded. Add --no-load-{part} to start without it, or load another checkpoint."
            )


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


def in_force(saved: Any, schedule: Mapping[str, Any] | None) -> Any:
    """Returns the arguments of a checkpoint with the rates that its run used.

    They are those of the schedule. Megatron saves the arguments as they were given, also where
    ``--use-checkpoint-opt_param-scheduler`` has replaced their rates.

    Args:
        saved: the arguments in the checkpoint.
        schedule: the state of the schedule in the checkpoint, or None.
    """
    names = dict(_OF_SCHEDULE)
    if getattr(saved, "weight_decay_incr_style", "constant") != "constant":
        del names["weight_decay"]
    schedule = schedule or {}
    used = {name: schedule[own] for name, own in names.items() if own in schedule}
    return argparse.Namespace(**vars(saved) | used)


def compare_experts(load_dir: str, args: Any, saved: Any) -> None:
    """Raises ValueError if experts have an optimizer of their own in one of the two runs only.

    Megatron gives them one where they are spread over ranks. It saves that one's states under other
    names, and does not find them (0.19.2, ``torch_dist``, with every optimizer).
    """
    sizes = [
        getattr(each, "expert_model_parallel_size", 1) if getattr(each, "num_experts", None) else 1
        for each in (args, saved)
    ]
    now, then = sizes
    if (now > 1) != (then > 1) and getattr(saved, "ckpt_format", None) == "torch_dist":
        raise ValueError(
            f"{load_dir} was saved with --expert-model-parallel-size {then}, and this run has "
            f"--expert-model-parallel-size {now}: above 1, Megatron gives the experts an optimizer "
            "of their own, and loads its states into no other. Nothing was loaded. Use "
            f"{'a size above 1' if then > 1 else 'the size 1'}, or {_ADVICE}."
        )


def compare_rates(load_dir: str, args: Any, saved: Any) -> None:
    """Compares learning rates and weight decays before loading; Megatron compares them after it.

    With ``--use-checkpoint-opt_param-scheduler`` the arguments receive those of the checkpoint, so
    that the run logs and saves the ones that it uses.

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
    if not differing:
        return
    then = " ".join(f"{flag} {value}" for flag, value, _ in differing)
    now = " ".join(f"{flag} {value}" for flag, _, value in differing)
    if getattr(args, "override_opt_param_scheduler", False):
        say_once(f"{load_dir} was saved with {then}; the run continues with {now}")
    elif getattr(args, "use_checkpoint_opt_param_scheduler", False):
        say_once(f"{load_dir} was saved with {then}; the run uses these values instead of {now}")
        for name in (*names, *_OF_SCHEDULE):
            if None not in (getattr(saved, name, None), getattr(args, name, None)):
                setattr(args, name, getattr(saved, name))
    else:
        raise ValueError(
            f"{load_dir} was saved with {then}, and this run has {now}. Nothing was loaded. Use "
            "the same values, or choose this run's with --override-opt_param-scheduler, or the "
            "checkpoint's with --use-checkpoint-opt_param-scheduler."
        )


def compare_optimizers(load_dir: str, args: Any, saved: Any) -> None:
    """Compares the optimizer and its hyperparameters with those of the checkpoint.

    Names are compared for all optimizers. Megatron would load whatever has the names of its own
    states, such as those of an optimizer whose package is no longer installed.

    Raises:
        ValueError: the running optimizer cannot use the state.
    """
    names = [_name(each) for each in (args, saved)]
    running = names[0]
    _compare(load_dir, args, saved, names, "--optimizer", OPTIMIZERS.get(running))
    if running in MUONS:
        names = [getattr(each, "muon_scalar_optimizer", "adam") for each in (args, saved)]
        _compare(load_dir, args, saved, names, "--muon-scalar-optimizer", scalar_named(names[0]))
    if running not in OPTIMIZERS:
        return
    check_parts(*map(_parts, (args, saved)), source=load_dir, advice=_ADVICE)
    rules, written_rules = (getattr(each, OVERRIDES, None) or [] for each in (args, saved))
    if rules != written_rules:
        say_once(
            f"{load_dir} was saved with {flag_named(OVERRIDES)} {written_rules}; the run continues "
            f"with {rules}"
        )
    now, then = (state_dtypes(OPTIMIZERS[running], each) for each in (args, saved))
    for name in now:
        if now[name] != then[name]:
            say_once(
                f"{load_dir} was saved with {name} in {then[name]}; it is loaded as {now[name]}"
            )


def _name(args: Any) -> str:
    """Returns the name of a run's optimizer, the same whether Megatron's is distributed or not."""
    return str(getattr(args, "optimizer", "adam")).removeprefix("dist_")


def _compare(
    load_dir: str,
    args: Any,
    saved: Any,
    names: Sequence[str],
    flag_name: str,
    cls: type[ElementwiseOptimizer] | None,
) -> None:
    """Compares this run's optimizer with the saved one's, which one flag names.

    Args:
        load_dir: the checkpoint, for messages.
        args: Megatron's arguments of this run.
        saved: those of the saved run.
        names: the names of the two optimizers.
        flag_name: the flag.
        cls: the plugin's optimizer of the first name; None if it is Megatron's own.

    Raises:
        ValueError: the optimizers differ, or a hyperparameter that fixes the state's meaning.
    """
    (running, written), labels = names, {"optimizer": flag_name}
    now, then, fixed, saved_fixed, newest = {}, {}, {}, {}, 1
    if running == written and cls is not None:
        labels |= {h.name: flag(cls.description, h) for h in cls.description.hyperparameters}
        now, then = (hyperparameters(cls, each) for each in (args, saved))
        fixed, saved_fixed = (settings(cls.description, values) for values in (now, then))
        newest = getattr(saved, "s3_format", 1)
    Stamp(running, FORMAT, fixed).check(
        Stamp(written, newest, saved_fixed),
        source=load_dir,
        called=lambda name, value: f"{labels[name]} {value}",
        advice=_ADVICE,
    )
    for name in now:
        if now[name] != then[name]:
            was, is_now = f"{name}={then[name]}", f"{name}={now[name]}"
            say_once(f"{load_dir} was saved with {was}; the run continues with {is_now}")


def _parts(args: Any) -> list[dict[str, Any]]:
    """Returns param groups of the optimizers of a run, with what a checkpoint knows them by."""
    return [{"algorithm": args.optimizer}, *overrides.parts(args)]
