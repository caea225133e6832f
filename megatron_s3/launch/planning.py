"""Makes the plan of a job: a rank's sizes and traffic, time and checkpoints, by Megatron's code."""

import dataclasses
from typing import TYPE_CHECKING

from megatron_s3.launch.check import arithmetic, check, environment, schedule
from megatron_s3.launch.config import Config, ConfigError
from megatron_s3.log import tell

if TYPE_CHECKING:
    from megatron_s3.mcore.planning.memory import Checkpoint, Rank, Sizes

__all__ = ["SAVING", "Plan", "make"]


#: What is assumed of saving, bytes a second.
SAVING = 1e9


#: Seconds before the time limit at which scripts/pretrain.sbatch is signalled by default.
SIGNAL = 180


@dataclasses.dataclass(frozen=True)
class Plan:
    """A job's, as :func:`text` prints and ``--json`` writes it.

    Attributes:
        name: the configuration's.
        optimizer: its name.
        gpus: number of ranks.
        layout: sizes of ``tensor``, ``pipeline``, ``context``, ``expert`` and ``data`` parallelism.
        sharded: whether the distributed optimizer is used.
        vocabulary: its size, padded.
        vocabulary_source: where its size was taken from.
        sizes: a :class:`megatron_s3.mcore.planning.memory.Sizes`.
        activations: bytes by Megatron's formula; 0 where it has none.
        formula: its name, or what it does not know.
        norm: whether the norm of the gradients is computed in each step.
        batch: sequences of a step.
        sequence: tokens of a sequence.
        steps: number of steps.
        flops: floating-point operations of a step, as Megatron counts them.
        mfu: share of the peak that is assumed.
        peak: of a GPU, FLOP/s.
        evaluated: iterations of an evaluation; 0 for none.
        signal: how long before its time limit the job is asked to save, seconds.
        saved: a :class:`megatron_s3.mcore.planning.memory.Checkpoint` of the fullest rank, of the
            format that is saved in, or None.
        otherwise: the same of the other format.
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
        """Returns the rank that holds most."""
        return max(self.sizes.stages, key=lambda rank: rank.total)

    @property
    def step_seconds(self) -> float:
        """Returns the time of a step."""
        return self.flops / (self.gpus * self.peak * self.mfu)

    @property
    def days(self) -> float:
        """Returns the time of all steps, without evaluation, checkpoints and failures."""
        return self.steps * self.step_seconds / 86400

    @property
    def checkpoint(self) -> float:
        """Returns the bytes of a checkpoint: weights, main parameters and states, each once."""
        rank = self.fullest
        held = (rank.main_parameters + sum(rank.states.values())) / rank.updated
        weight = rank.weights / sum(b.elements for b in rank.buffers)
        return self.sizes.parameters * (held + weight)

    @property
    def notice(self) -> float:
        """Returns the seconds that may pass from a signal to the end of a save.

        Megatron looks for signals between iterations, so that a step and an evaluation may come
        first. An evaluation's iteration is a forward pass, a third of a step.
        """
        evaluation = self.evaluated * self.step_seconds / 3
        return self.step_seconds + evaluation + self.checkpoint / SAVING


def make(config: Config, gpus: int | None, mfu: float, peak: float) -> Plan:
    """Plans a job.

    Args:
        config: the job's.
        gpus: number of ranks; those of ``config.launch`` if None.
        mfu: share of the peak that the GPUs reach, in (0, 1].
        peak: of a GPU, FLOP/s.

    Raises:
        ConfigError: it cannot run, or cannot be planned.
    """
    if gpus is not None:
        per_node = config.launch.nproc_per_node
        nodes, rest = divmod(gpus, per_node)
        if rest or not nodes:  # less than a node, or not whole ones: counted as one
            nodes, per_node = 1, gpus
        config.launch.nodes, config.launch.nproc_per_node = nodes, per_node
    if "rampup_batch_size" in config.arguments:
        raise ConfigError(
            f"{config.where('rampup_batch_size')}: rampup_batch_size cannot be planned: every step "
            "is counted alike. Leave it out (--set rampup_batch_size=null)"
        )
    arithmetic(config)  # before the imports that take seconds
    schedule(config)
    more, source = _vocabulary(config)
    tell("asking Megatron for the sizes; importing it takes a while")
    with environment(config):
        return _make(config, more, source, mfu, peak)


def _make(config: Config, more: list[str], source: str, mfu: float, peak: float) -> Plan:
    from megatron_s3.mcore.planning import job, memory

    args = check(config, more)
    batch = args.global_batch_size
    steps = args.train_iters or -(-(args.train_samples or 0) // batch)
    if not steps:
        raise ConfigError(f"{config.name}: neither train_iters nor train_samples is given")
    try:
        args = job.completed(args)
        planned = job.plan(args)
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"{config.name}: {error}") from error
    except (TypeError, AttributeError, ImportError, RuntimeError, LookupError) as error:
        # What a model needs beyond the layers that are built without a GPU.
        raise ConfigError(
            f"{config.name}: cannot be planned: Megatron does not build this model without a GPU: "
            f"{type(error).__name__}: {error}"
        ) from error
    activations, formula = memory.activations(args)
    fullest = max(planned.stages, key=lambda rank: rank.total)
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
        sizes=planned,
        activations=activations,
        formula=formula,
        norm=job.needs_norm(args),
        batch=batch,
        sequence=args.seq_length,
        steps=steps,
        flops=job.flops(args),
        mfu=mfu,
        peak=peak,
        evaluated=args.eval_iters or 0,
        signal=_signal(config),
        saved=saved,
        otherwise=saved and memory.checkpoint(args, fullest, forms[saved.form]),
    )


def _signal(config: Config) -> int:
    """Returns the seconds of sbatch's --signal, whose own default is 60."""
    given = config.launch.sbatch.get("signal", f"@{SIGNAL}")
    if given is None:  # taken away
        return 0
    _, at, seconds = given.partition("@")
    if at and not seconds.isdecimal():
        where = config.origins.get("launch.sbatch.signal", "launch.sbatch.signal")
        raise ConfigError(f"{where}: signal must be as B:USR1@{SIGNAL}, not {given!r}")
    return int(seconds) if at else 60


def _vocabulary(config: Config) -> tuple[list[str], str]:
    """Returns Megatron's words for the dataset's vocabulary, and where its size comes from.

    The machine that plans needs no dataset: without it the configuration's vocab_size counts.
    """
    given = f"vocab_size ({config.where('vocab_size')})"
    if not config.dataset:
        return [], given
    from megatron_s3 import data

    found = data.load(config.dataset)
    if found is None:
        return [], f"{given}; dataset {config.dataset} is not here"
    words = data.megatron_arguments(config.dataset)
    if "--vocab-size" not in words:
        words += ["--vocab-size", str(found["tokenizer"]["vocab_size"])]
    return words, f"the dataset {config.dataset}"
