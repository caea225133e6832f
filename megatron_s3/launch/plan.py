"""``megatron-s3 plan``: memory, traffic and days of a configuration, for any layout, on no GPU."""

import argparse
import dataclasses
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from megatron_s3.launch.check import arithmetic, check, environment, schedule, tell
from megatron_s3.launch.config import Config, ConfigError, load

__all__ = ["Plan", "main", "make", "text"]

#: bf16 multiply-adds on tensor cores without sparsity, TFLOP/s, of an H100 or H200 SXM.
H100_TFLOPS = 989.0

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
    sizes: Any
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
    saved: Any = None
    otherwise: Any = None

    @property
    def fullest(self) -> Any:
        """The rank that holds most."""
        return max(self.sizes.stages, key=lambda rank: rank.total)

    @property
    def step_seconds(self) -> float:
        """Of a step."""
        return self.flops / (self.gpus * self.peak * self.mfu)

    @property
    def days(self) -> float:
        """Of all steps, without evaluation, checkpoints and failures."""
        return self.steps * self.step_seconds / 86400

    @property
    def checkpoint(self) -> float:
        """Bytes of a checkpoint: the model's weights, main parameters and states, each once."""
        rank = self.fullest
        held = (rank.main_parameters + sum(rank.states.values())) / rank.updated
        weight = rank.weights / sum(b.elements for b in rank.buffers)
        return self.sizes.parameters * (held + weight)

    @property
    def notice(self) -> float:
        """Seconds that may pass from a signal to the end of a save.

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
    """The seconds of sbatch's --signal, whose own default is 60."""
    given = config.launch.sbatch.get("signal", f"@{SIGNAL}")
    if given is None:  # taken away
        return 0
    _, at, seconds = given.partition("@")
    if at and not seconds.isdecimal():
        where = config.origins.get("launch.sbatch.signal", "launch.sbatch.signal")
        raise ConfigError(f"{where}: signal must be as B:USR1@{SIGNAL}, not {given!r}")
    return int(seconds) if at else 60


def _vocabulary(config: Config) -> tuple[list[str], str]:
    """Megatron's words for the dataset's vocabulary, and where its size is taken from.

    The machine that plans needs no dataset: without it the configuration's vocab_size counts.
    """
    given = f"vocab_size ({config.where('vocab_size')})"
    if not config.dataset:
        return [], given
    from megatron_s3 import data

    try:
        words = data.megatron_arguments(config.dataset)
    except data.DataError:
        return [], f"{given}; dataset {config.dataset} is not here"
    if "--vocab-size" not in words:
        found = data.load(config.dataset)
        words += ["--vocab-size", str(found["tokenizer"]["vocab_size"])]
    return words, f"the dataset {config.dataset}"


def text(plan: Plan) -> str:
    """The plan as lines for people; bytes in powers of ten."""
    rank, sizes = plan.fullest, plan.sizes
    used = " x ".join(f"{kind} {n:,}" for kind, n in plan.layout.items() if kind != "expert")
    if plan.layout["expert"] > 1:
        used += f", expert {plan.layout['expert']}"
    how = "sharded over" if plan.sharded else "whole on all"
    padding = sum(b.elements - b.unpadded for b in rank.buffers)
    buckets = sum(b.buckets for b in rank.buffers)
    reduced, gathered = rank.reduced_and_gathered()
    read, written = rank.traffic()
    reduction = "reduce-scatter" if plan.sharded else "all-reduce"
    tokens = plan.batch * plan.sequence
    rows: list[tuple[str, str, str]] = [
        (f"{plan.name} on {plan.gpus:,} GPUs", "", ""),
        ("layout", used, f"{plan.optimizer}, its state {how} data-parallel ranks"),
        ("parameters", f"{sizes.parameters:,}", ""),
        (
            "  without embeddings",
            f"{sizes.parameters - sizes.embeddings:,}",
            f"vocabulary padded to {plan.vocabulary:,}, from {plan.vocabulary_source}",
        ),
        ("", "", ""),
        (_title(plan), "", ""),
        ("  parameters", f"{rank.parameters:,}", f"{rank.updated:,} updated by its optimizer"),
        ("  weights", _bytes(rank.weights), ""),
        (
            "  gradients",
            _bytes(rank.gradients),
            f"{padding:,} elements of padding; communicated in {buckets} "
            + ("bucket" if buckets == 1 else "buckets"),
        ),
        ("  main parameters", _bytes(rank.main_parameters), ""),
        *((f"  state {name}", _bytes(size), "") for name, size in rank.states.items()),
        ("  main gradients", _bytes(rank.main_gradients), "") if rank.main_gradients else None,
        ("  total", _bytes(rank.total), f"{rank.total:,} bytes"),
        *_other_stages(plan),
        ("  not counted", *_activations(plan)),
        ("", "", "workspaces, fragmentation, NCCL's buffers"),
        ("", "", ""),
        ("each step, that rank", "", ""),
        (
            "  optimizer reads",
            _bytes(read),
            "gradients, main parameters, state: each once, as a fused step",
        ),
        ("  optimizer writes", _bytes(written), "main parameters, state, weights"),
        (
            "  gradient norm reads",
            _bytes(rank.norm_traffic()),
            "in each step" if plan.norm else "only with --clip-grad; off here",
        ),
        (f"  {reduction} sends", _bytes(reduced), f"gradients, in a ring of {_ring(rank)} ranks"),
        ("  all-gather sends", _bytes(gathered), "updated weights") if plan.sharded else None,
        (
            "  link",
            f"{(reduced + gathered) / plan.step_seconds / 1e9:,.1f} GB/s",
            "to send that within the step below; other parallelism's traffic is not counted",
        ),
        *_checkpoint(plan),
        ("", "", ""),
        ("FLOPs of a step", f"{plan.flops:.4g}", "whole job, as Megatron counts them"),
        ("tokens of a step", f"{tokens:,}", f"{plan.batch:,} sequences of {plan.sequence:,}"),
        ("steps", f"{plan.steps:,}", ""),
        ("tokens", f"{tokens * plan.steps:.4g}", ""),
        (
            "a step",
            f"{plan.step_seconds:.3g} s",
            f"at --mfu {plan.mfu:g} of --peak-tflops {plan.peak / 1e12:g} (H100, bf16, dense: 989)",
        ),
        (
            "all steps",
            f"{plan.days:.3g} days",
            f"{plan.days * 24:.3g} hours; without evaluation, checkpoints and failures",
        ),
        (
            "from signal to saved",
            f"{plan.notice:,.0f} s",
            f"a step, an evaluation, and {_bytes(plan.checkpoint)} at {_bytes(SAVING)}/s",
        ),
        *_too_late(plan),
    ]
    return "\n".join(
        f"{label:<24}{value:>18}  {note}".rstrip() if value or note else label
        for label, value, note in filter(None, rows)
    )


def _too_late(plan: Plan) -> list[tuple[str, str, str]]:
    if plan.notice <= plan.signal:
        return []
    minutes = math.ceil(plan.notice / 60)
    return [
        (
            "  WARNING",
            f"{plan.signal:,} s",
            "is all that the job has from the signal to its time limit; --set "
            f"launch.sbatch.signal=B:USR1@{minutes * 60}",
        )
    ]


def _title(plan: Plan) -> str:
    stages = len(plan.sizes.stages)
    which = f"of pipeline stage {plan.fullest.stage} of 0-{stages - 1}, the fullest"
    return f"a rank {which}" if stages > 1 else "a rank"


def _other_stages(plan: Plan) -> list[tuple[str, str, str]]:
    rows = []
    for rank in plan.sizes.stages:
        if rank is not plan.fullest and (not rows or rows[-1][1] != _bytes(rank.total)):
            rows.append((f"  total, stage {rank.stage}", _bytes(rank.total), ""))
        elif rank is not plan.fullest:
            first = rows[-1][0].split("-")[0]
            rows[-1] = (f"{first}-{rank.stage}", rows[-1][1], "")
    return rows


def _checkpoint(plan: Plan) -> list[tuple[str, str, str]]:
    """Returns what a save and a resume take beside the step."""
    now, other = plan.saved, plan.otherwise
    if now is None:
        return []
    flag = "--dist-ckpt-optim-fully-reshardable"
    if now.form == "fully_reshardable":
        switch = (
            f"without {flag} {_bytes(other.saving)}, read {_bytes(other.reading)}: "
            "enough until tensor or pipeline parallelism changes"
        )
    else:
        switch = (
            "another tensor or pipeline parallelism cannot resume; where it is to change, save "
            f"once with {flag}: {_bytes(other.saving)} in each rank"
        )
    return [
        ("", "", ""),
        ("checkpoints", now.form, switch),
        ("  a save takes", _bytes(now.saving), "host memory in each rank, of the optimizer's part"),
        (
            "  a resume reads",
            _bytes(now.reading),
            f"in each rank, of the optimizer's part; {_bytes(now.reading * plan.gpus)} in all",
        ),
    ]


def _activations(plan: Plan) -> tuple[str, str]:
    if not plan.activations:
        return "", f"activations (Megatron's formula knows no {plan.formula})"
    return _bytes(plan.activations), f"activations: an estimate, Megatron's {plan.formula}"


def _ring(rank: Any) -> str:
    return " and ".join(f"{n:,}" for n in sorted({b.ranks for b in rank.buffers}, reverse=True))


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.3f} {unit}"
    return f"{count:,.0f} B"


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything, bytes and elements as whole numbers."""
    fullest = plan.fullest
    read, written = fullest.traffic()
    reduced, gathered = fullest.reduced_and_gathered()
    return dataclasses.asdict(plan) | {
        "fullest_stage": fullest.stage,
        "bytes_a_rank": fullest.total,
        "optimizer_reads": round(read),
        "optimizer_writes": round(written),
        "gradient_norm_reads": round(fullest.norm_traffic()),
        "gradient_reduction_sends": round(reduced),
        "weight_gathering_sends": round(gathered),
        "tokens": plan.batch * plan.sequence * plan.steps,
        "step_seconds": plan.step_seconds,
        "days": plan.days,
        "checkpoint_bytes": round(plan.checkpoint),
        "notice_seconds": plan.notice,
    }


def main(argv: list[str]) -> int:
    """The command; see ``--help``.

    Returns:
        The exit status: 2 where the configuration cannot run or be planned.
    """
    parser = argparse.ArgumentParser(prog="megatron-s3 plan", description=__doc__)
    parser.add_argument("config", nargs="+", help="a configuration, then overlays")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override an argument of Megatron's, or launch.NAME; may be repeated",
    )
    parser.add_argument("--gpus", type=_positive(int), help="default: nodes x nproc_per_node")
    parser.add_argument(
        "--mfu", type=_positive(float, 1), default=0.4, help="share of the peak (default 0.4)"
    )
    parser.add_argument(
        "--peak-tflops",
        type=_positive(float),
        default=H100_TFLOPS,
        metavar="X",
        help="of a GPU, in the precision trained in (default 989: H100 or H200 SXM, bf16, dense)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all of it there too")
    options = parser.parse_args(argv)
    if options.json and not options.json.absolute().parent.is_dir():
        return _refuse(f"--json {options.json}: there is no folder {options.json.parent}")
    # A plan is the same wherever it is made: no GPU of this machine is looked at.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        config = load(options.config, options.set)
        plan = make(config, options.gpus, options.mfu, options.peak_tflops * 1e12)
    except ConfigError as error:
        return _refuse(str(error))
    except ImportError as error:
        return _refuse(f"{error}; a plan needs torch and megatron-core")
    print(text(plan))
    if options.json:
        options.json.write_text(json.dumps(as_json(plan), indent=2) + "\n", encoding="utf-8")
    return 0


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _positive(kind: type, most: float = float("inf")) -> Any:
    def value(word: str) -> Any:
        number = kind(word)
        if not 0 < number <= most:
            limit = "" if most == float("inf") else f" and at most {most:g}"
            raise argparse.ArgumentTypeError(f"must be above 0{limit}, not {word}")
        return number

    value.__name__ = kind.__name__
    return value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
