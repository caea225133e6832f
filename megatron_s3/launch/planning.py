"""The plan of a job: sizes and traffic of a rank, time and checkpoints, from Megatron's code."""

import dataclasses
from typing import TYPE_CHECKING

from megatron_s3.launch.check import arithmetic, check, environment, iterations, schedule
from megatron_s3.launch.config import Config, ConfigError
from megatron_s3.log import tell

if TYPE_CHECKING:
    from argparse import Namespace

    from megatron_s3.mcore.planning.memory import Checkpoint, Rank, Sizes

__all__ = ["SAVING", "Plan", "make", "planned"]


#: Assumed speed of saving, bytes per second.
SAVING = 1e9


#: Seconds before the time limit at which scripts/pretrain.sbatch gets its signal by default.
SIGNAL = 180


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plan of a job, which :func:`text` prints and ``--json`` writes.

    Attributes:
        name: name of the configuration.
        optimizer: name of the optimizer.
        gpus: number of ranks.
        layout: sizes of ``tensor``, ``pipeline``, ``context``, ``expert`` and ``data`` parallelism.
        sharded: whether the distributed optimizer is used.
        vocabulary: size of the padded vocabulary.
        vocabulary_source: where its size comes from.
        sizes: sizes of the ranks.
        activations: bytes by Megatron's formula; 0 if it does not apply.
        formula: name of that formula, or the feature that it does not cover.
        norm: whether the gradient norm is computed in each step.
        batch: sequences per step.
        sequence: tokens per sequence.
        steps: number of steps.
        flops: floating-point operations per step, as Megatron counts them.
        mfu: assumed fraction of the peak.
        peak: peak of a GPU, FLOP/s.
        evaluated: iterations of an evaluation; 0 without evaluations.
        signal: seconds between the signal to save and the time limit.
        saved: the checkpoint of the fullest rank in the format of the run, or None.
        otherwise: the same in the other format.
    """

    name: str
    optimizer: str
    gpus: int
    layout: dict[str, int]
    sharded: bool
    vocabulary: int
    vocabulary_source: str
    sizes: "Sizes"
    activations: int
    formula: str
    norm: bool
    batch: int
    sequence: int
    steps: int
    flops: float
    mfu: float
    peak: float
    evaluated: int = 0
    signal: int = SIGNAL
    saved: "Checkpoint | None" = None
    otherwise: "Checkpoint | None" = None

    @property
    def fullest(self) -> "Rank":
        """The rank that holds most."""
        return max(self.sizes.stages, key=lambda rank: rank.total)

    @property
    def step_seconds(self) -> float:
        """The time of a step."""
        return self.flops / (self.gpus * self.peak * self.mfu)

    @property
    def days(self) -> float:
        """The time of all steps, without evaluations, checkpoints and failures."""
        return self.steps * self.step_seconds / 86400

    @property
    def checkpoint(self) -> float:
        """The bytes of a checkpoint: weights, main parameters and states."""
        rank = self.fullest
        held = (rank.main_parameters + sum(rank.states.values())) / rank.updated
        weight = rank.weights / sum(b.elements for b in rank.buffers)
        return self.sizes.parameters * (held + weight)

    @property
    def notice(self) -> float:
        """The seconds that may pass from a signal to the end of a save.

        Megatron checks for signals between iterations, so a step and an evaluation may come first.
        An iteration of an evaluation is a forward pass, a third of a step.
        """
        evaluation = self.evaluated * self.step_seconds / 3
        return self.step_seconds + evaluation + self.checkpoint / SAVING


def make(config: Config, gpus: int | None, mfu: float, peak: float) -> Plan:
    """Plans a job.

    Args:
        config: the configuration of the job.
        gpus: number of ranks; that of ``config.launch`` if None.
        mfu: fraction of the peak that the GPUs reach, in (0, 1].
        peak: peak of a GPU, FLOP/s.

    Raises:
        ConfigError: the job cannot run or cannot be planned.
    """
    if gpus is not None:
        per_node = config.launch.nproc_per_node
        nodes, rest = divmod(gpus, per_node)
        if rest or not nodes:  # less than a node, or a fraction of one, counts as one node
            nodes, per_node = 1, gpus
        config.launch.nodes, config.launch.nproc_per_node = nodes, per_node
    if "rampup_batch_size" in config.arguments:
        raise ConfigError(
            f"{config.where('rampup_batch_size')}: rampup_batch_size cannot be planned, because a "
            "plan assumes the same batch in all steps; leave it out (--set "
            "rampup_batch_size=null)"
        )
    arithmetic(config)  # before imports that take seconds
    schedule(config)
    steps = iterations(config)
    more, source = _vocabulary(config)
    tell("computing the sizes with Megatron; the import takes a few seconds")
    with environment(config):
        return _make(config, steps, more, source, mfu, peak)


def planned(config: Config, args: "Namespace") -> "tuple[Namespace, Sizes]":
    """Returns Megatron's validated arguments, completed, and the sizes of the job's ranks.

    Raises:
        ConfigError: the job cannot be planned.
    """
    from megatron_s3.mcore.planning import job

    try:
        args = job.completed(args)
        return args, job.plan(args)
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"{config.name}: {error}") from error
    except (TypeError, AttributeError, ImportError, RuntimeError, LookupError) as error:
        # Features that need a GPU or Transformer Engine.
        raise ConfigError(
            f"{config.name}: cannot be planned: Megatron does not build this model without a GPU: "
            f"{type(error).__name__}: {error}"
        ) from error


def _make(
    config: Config, steps: int, more: list[str], source: str, mfu: float, peak: float
) -> Plan:
    from megatron_s3.mcore.planning import job, memory

    args, sizes = planned(config, check(config, more))
    # It imports Megatron, whose warnings the check has kept quiet.
    from megatron_s3.mcore.metrics_log import trainers_flops

    activations, formula = memory.activations(args)
    fullest = max(sizes.stages, key=lambda rank: rank.total)
    saved = memory.checkpoint(args, fullest)
    forms = {"dp_reshardable": "fully_reshardable", "fully_reshardable": "dp_reshardable"}
    return Plan(
        name=config.name,
        optimizer=args.optimizer,
        gpus=config.world_size,
        layout={
            "tensor": args.tensor_model_parallel_size,
            "pipeline": args.pipeline_model_parallel_size,
            "context": args.context_parallel_size,
            "expert": args.expert_model_parallel_size,
            "data": args.data_parallel_size,
        },
        sharded=args.use_distributed_optimizer,
        vocabulary=args.padded_vocab_size,
        vocabulary_source=source,
        sizes=sizes,
        activations=activations,
        formula=formula,
        norm=job.needs_norm(args),
        batch=args.global_batch_size,
        sequence=args.seq_length,
        steps=steps,
        flops=trainers_flops(args),
        mfu=mfu,
        peak=peak,
        evaluated=args.eval_iters or 0,
        signal=_signal(config),
        saved=saved,
        otherwise=saved and memory.checkpoint(args, fullest, forms[saved.form]),
    )


def _signal(config: Config) -> int:
    """Returns the seconds of sbatch's --signal; sbatch's default is 60."""
    given = config.launch.sbatch.get("signal", f"@{SIGNAL}")
    if given is None:  # removed
        return 0
    _, at, seconds = given.partition("@")
    if at and not seconds.isdecimal():
        where = config.where("launch.sbatch.signal")
        raise ConfigError(f"{where}: signal must have the form B:USR1@{SIGNAL}, not {given!r}")
    return int(seconds) if at else 60


def _vocabulary(config: Config) -> tuple[list[str], str]:
    """Returns Megatron's arguments for the dataset's vocabulary, and the source of its size.

    Planning needs no dataset: without it, the configuration's vocab_size is used.
    """
    given = f"vocab_size ({config.where('vocab_size')})"
    if not config.dataset:
        return [], given
    from megatron_s3 import data

    found = data.load(config.dataset)
    if found is None:
        return [], f"{given}; dataset {config.dataset} does not exist here"
    words = data.megatron_arguments(config.dataset)
    if "--vocab-size" not in words:
        words += ["--vocab-size", str(found["tokenizer"]["vocab_size"])]
    return words, f"the dataset {config.dataset}"
