"""The direction of a conversion, from and to, as the checkpoint says it."""

from collections.abc import Mapping
from typing import Any

from megatron_s3.checkpoints import groups
from megatron_s3.checkpoints.errors import TransferError
from megatron_s3.checkpoints.transfer import ADAM, Settings, convertible, from_adam_of, short
from megatron_s3.optimizers import AdamW
from megatron_s3.optimizers.description import Description

__all__ = ["settings"]


_ADAMS = (ADAM, AdamW.description.name)


def settings(
    objects: list[Any],
    to: str,
    lr_factor: float | None = None,
    hyperparameters: Mapping[str, Any] | None = None,
) -> Settings:
    """Returns what the objects of a checkpoint (param groups, arguments) say about the conversion.

    Args:
        objects: as the checkpoint holds them.
        to: the target, :data:`ADAM` or one of :func:`convertible`.
        lr_factor: the other optimizer's learning rate over AdamW's; its description's if None.
        hyperparameters: of the target, where they are not its defaults.

    Raises:
        TransferError: they are not the other optimizer's; they disagree about steps or betas.
        ValueError: a hyperparameter out of its range.
    """
    found = [group for held in objects for group in groups.find(held)]
    args = next((a for held in objects for a in groups.arguments(held)), None)
    if args is None:
        raise TransferError("it holds no arguments of the run: Megatron's trainer saves them")
    if getattr(args, "no_save_optim", False) or not found:
        raise TransferError(
            "it holds no optimizer's state (--no-save-optim): its weights load into any optimizer "
            "as they are, with --no-load-optim"
        )
    description = _whose(to, getattr(args, "optimizer", ADAM), found)
    steps = {step for held in objects for step in groups.steps(held)}
    if len(steps) != 1:
        raise TransferError(f"its param groups have no one number of steps, but {sorted(steps)}")
    betas = {found_betas for group in found if (found_betas := groups.betas(group))}
    if len(betas) > 1:
        raise TransferError(f"its param groups have different betas: {sorted(betas)}")
    values = {h.name: h.default for h in description.hyperparameters} | dict(hyperparameters or {})
    for h in description.hyperparameters:
        h.check(values[h.name], f"--{description.name}-{h.name}".replace("_", "-"))
    own = from_adam_of(description)
    default = own.lr_factor_back if to == ADAM else own.lr_factor
    return Settings(
        description=description,
        back=to == ADAM,
        step=steps.pop(),
        betas=betas.pop() if betas else (args.adam_beta1, args.adam_beta2),
        eps=args.adam_eps,
        lr_factor=default if lr_factor is None else lr_factor,
        hyperparameters=values,
        sharded=args.use_distributed_optimizer,
    )


def _whose(to: str, written: str, found: list[dict[str, Any]]) -> Description:
    """Returns the description of the optimizer that is not AdamW.

    Raises:
        TransferError: the checkpoint is of another optimizer than the conversion is from.
    """
    known = convertible()
    stamps = {group.get("algorithm", ADAM) for group in found}
    if written == to or to in stamps:
        raise TransferError(f"it is --optimizer {to}'s already: it resumes as it is")
    allowed = _ADAMS if to != ADAM else tuple(known)
    if written not in allowed or not stamps <= ({written} if to == ADAM else set(allowed)):
        labels = " nor ".join(f"{short(d)}'s" for d in (AdamW.description, *known.values()))
        raise TransferError(
            f"it was saved by --optimizer {written}, whose state is neither {labels}. Load its "
            "weights alone, with --no-load-optim"
        )
    if any(group.get("decoupled_weight_decay") is False for group in found):
        raise TransferError(
            "its optimizer is Adam with weight decay in the gradient, not AdamW: no optimizer here "
            "continues that. Load its weights alone, with --no-load-optim"
        )
    return known[written if to == ADAM else to]
