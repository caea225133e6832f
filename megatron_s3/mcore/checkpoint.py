"""What may be loaded into what, decided before anything is."""

import functools
from collections.abc import Callable
from typing import Any

from megatron_s3.mcore import build, telemetry
from megatron_s3.mcore.arguments import destination, flag, say, state_dtypes
from megatron_s3.optimizers import OPTIMIZERS

__all__ = ["load_base_checkpoint"]


#: Megatron reads a checkpoint's arguments more than once.
_say_once = functools.cache(say)


def load_base_checkpoint(
    original: Callable[..., Any], load_dir: str, args: Any, *rest: Any, **kwargs: Any
) -> Any:
    """Around Megatron's reading of a checkpoint: compares the arguments it was saved with.

    Megatron reads these first, and the optimizer's tensors afterwards.

    Raises:
        ValueError: the optimizer's state in the checkpoint is not that of the running optimizer.
    """
    result = original(load_dir, args, *rest, **kwargs)
    state_dict, _, release, *_ = result
    saved = (state_dict or {}).get("args")
    if saved is not None and not release and not args.finetune:
        telemetry.resume(saved)
        if not args.no_load_optim:
            _compare(load_dir, args, saved)
            if getattr(args, "use_torch_fsdp2", False) and args.ckpt_format == "torch_dist":
                build.restore_step(state_dict)
    return result


def _compare(load_dir: str, args: Any, saved: Any) -> None:
    running, written = args.optimizer, getattr(saved, "optimizer", "adam")
    if running not in OPTIMIZERS and written not in OPTIMIZERS:
        return  # Megatron's own optimizers: Megatron's own checks
    if getattr(saved, "no_save_optim", False):
        return
    advice = "or load the model's weights alone with --no-load-optim"
    if running != written:
        raise ValueError(
            f"{load_dir} was saved by --optimizer {written}, whose state means nothing to "
            f"--optimizer {running}. Nothing was loaded. Resume with --optimizer {written}, "
            f"{advice}."
        )
    description = OPTIMIZERS[running].description
    for h in description.hyperparameters:
        now = getattr(args, destination(description, h), h.default)
        then = getattr(saved, destination(description, h), h.default)
        now, then = (h.default if value is None else value for value in (now, then))
        if now == then:
            continue
        if h.fixes_state:
            raise ValueError(
                f"{load_dir} was saved with {flag(description, h)} {then}; its state means "
                f"nothing with {flag(description, h)} {now}. Nothing was loaded. Resume with "
                f"{flag(description, h)} {then}, {advice}."
            )
        _say_once(f"{load_dir} was saved with {h.name}={then}; from here on it is {h.name}={now}")
    now, then = (state_dtypes(OPTIMIZERS[running], each) for each in (args, saved))
    for name in now:
        if now[name] != then[name]:
            _say_once(f"{load_dir} was saved with {name} in {then[name]}: loaded into {now[name]}")
