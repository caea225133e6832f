"""Returns the shards that one rank's optimizer updates, without running the job.

Megatron builds the model, the buffers and the distributed optimizer for a rank of a
:mod:`megatron_s3.mcore.planning.fake_world`, and this module reads the place of each shard from
them.  A process that has done this can only use the CPU afterwards, so the module is also a program
that prints the shards::

    python -m scripts.bench.shards configs/layouts/gpt2-345m/8gpu.yaml [--gpus 8] [--rank 0]
"""

import argparse
import dataclasses
import json
import os
import sys

__all__ = ["Shard", "main", "rank_shards", "read"]


@dataclasses.dataclass(frozen=True)
class Shard:
    """A rank's shard of a parameter.

    Attributes:
        numel: number of elements.
        offset: index of the first element in its gradient buffer, and in the parameter buffer,
            which has the same layout.
        buffer: number of the buffer on this rank.
        group: number of the param group; empty groups are not counted.
    """

    numel: int
    offset: int
    buffer: int
    group: int


def rank_shards(args: argparse.Namespace, rank: int = 0) -> list[Shard]:
    """Returns the shards of a rank in the order of its optimizer.

    The process can only use the CPU afterwards, as after
    :func:`megatron_s3.mcore.planning.job.plan`.

    Args:
        args: Megatron's arguments, validated and completed by
            :func:`megatron_s3.mcore.planning.job.completed`.
        rank: number of the rank.

    Raises:
        ValueError: the optimizer is not sharded, or it does not keep the main parameters.
        RuntimeError: a process group exists already.
    """
    from megatron_s3.mcore.planning import fake_world, job

    if not args.use_distributed_optimizer:
        raise ValueError("without --use-distributed-optimizer there are no shards")
    if getattr(args, "use_precision_aware_optimizer", False):
        raise ValueError("shards are not known here under --use-precision-aware-optimizer")
    found: list[Shard] = []
    with fake_world.rank_of(args, rank):
        _, optimizer = job.build()
        buffers = groups = 0
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            if part.optimizer is None:
                continue
            model_of = {}
            for models, mains in (
                (part.model_float16_groups, part.shard_fp32_from_float16_groups),
                (part.model_fp32_groups, part.shard_fp32_groups),
            ):
                for of_models, of_mains in zip(models, mains, strict=True):
                    model_of.update(zip(of_mains, of_models, strict=True))
            for group in part.optimizer.param_groups:
                for main in group["params"]:
                    model = model_of[main]
                    place = part._get_model_param_range_map(model)["gbuf_world"]
                    buffer = part.model_param_gbuf_map[model][0]
                    found.append(Shard(main.numel(), place.start, buffers + buffer, groups))
                groups += bool(group["params"])
            buffers += len(part.buffers)
    return found


def read(config: str, gpus: int | None = None, rank: int = 0) -> list[Shard]:
    """Returns :func:`rank_shards` of a configuration.

    Args:
        config: the file, or the name of a configuration of the package.
        gpus: number of ranks; that of the configuration if None.
        rank: number of the rank.

    Raises:
        ConfigError: the configuration is not valid.
        ImportError: megatron-core is not installed.
        ValueError: see :func:`rank_shards`.
    """
    from megatron_s3.launch.check import check
    from megatron_s3.launch.config import load
    from megatron_s3.mcore.planning import job

    loaded = load([config])
    if gpus is not None:
        loaded.launch.nodes, loaded.launch.nproc_per_node = 1, gpus
    return rank_shards(job.completed(check(loaded)), rank)


def main(argv: list[str]) -> int:
    """Prints a rank's shards as one line of JSON: ``[[numel, offset, buffer, group], ...]``.

    Returns:
        The exit status: 0, or 2 after an error, with the reason on stderr.
    """
    parser = argparse.ArgumentParser(prog="scripts.bench.shards", description=__doc__)
    parser.add_argument("config")
    parser.add_argument("--gpus", type=int)
    parser.add_argument("--rank", type=int, default=0)
    options = parser.parse_args(argv)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the layout does not depend on this machine
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from megatron_s3.launch.config import ConfigError

    try:
        shards = read(options.config, options.gpus, options.rank)
    except ImportError as error:
        print(f"error: {error}; the layout of shards needs megatron-core", file=sys.stderr)
        return 2
    except (ConfigError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps([dataclasses.astuple(shard) for shard in shards]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
