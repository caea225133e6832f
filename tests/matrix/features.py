"""The features of Megatron's that touch an optimizer, and how each of them is trained."""

from dataclasses import dataclass

__all__ = ["ROWS", "Row"]

SHARDED = "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"
BF16 = f"--bf16 {SHARDED}"
PP2 = f"{BF16} --pipeline-model-parallel-size 2"
# Untied, because there Megatron saves in this format another main parameter of a tied embedding
# than it has, with Adam as with S3.
PP2_RESHARDABLE = f"{PP2} --untie-embeddings-and-output-weights"
VPP = f"{PP2_RESHARDABLE} --num-layers 4 --num-layers-per-virtual-pipeline-stage 1"
TP2 = f"{BF16} --tensor-model-parallel-size 2"
EP2 = f"{BF16} --num-experts 2 --expert-model-parallel-size 2 --no-bias-gelu-fusion"
AWARE = f"{BF16} --use-precision-aware-optimizer"
OFFLOAD = f"{AWARE} --optimizer-cpu-offload --optimizer-offload-fraction"
FSDP2 = "--bf16 --use-torch-fsdp2 --untie-embeddings-and-output-weights"
ASYNC = "--async-save --use-persistent-ckpt-worker --async-strategy mcore"


def _fsdp(strategy: str) -> str:
    return (
        "--bf16 --use-distributed-optimizer --use-megatron-fsdp --ckpt-format fsdp_dtensor "
        f"--data-parallel-sharding-strategy {strategy}"
    )


@dataclass(frozen=True)
class Row:
    """A feature.

    Attributes:
        group, name: what the table calls it.
        ranks: number of processes.
        flags: Megatron's, beside those of the model.
        like: name of a row whose losses it must have, digit for digit.
        says: regex that the log of S3's training must hold.
        change: of :mod:`tests.matrix.changes`, in every run.
        stand_in: the same, where Megatron's own layers cannot do without Transformer Engine: tried
            when the row has failed without it.
        frozen: regex of what must be in both checkpoints of a run as it was; nothing by default.
        groups: whether S3's param groups must have Adam's rates and weight decay.
        droppable: flags that some releases do not know and do not need.
    """

    group: str
    name: str
    ranks: int
    flags: str
    like: str = ""
    says: str = ""
    change: str = ""
    stand_in: str = ""
    frozen: str = ""
    groups: bool = False
    droppable: str = ""


ROWS = (
    Row("Layout", "one process", 1, "--bf16"),
    Row("Layout", "data parallel, state whole", 2, "--bf16"),
    Row("Layout", "distributed optimizer", 2, BF16,
        like="data parallel, state whole", says="sharded over 2"),
    Row("Layout", "+ `--overlap-grad-reduce`", 2, f"{BF16} --overlap-grad-reduce",
        like="distributed optimizer"),
    Row("Layout", "+ `--overlap-param-gather`", 2,
        f"{BF16} --overlap-grad-reduce --overlap-param-gather", like="distributed optimizer"),
    Row("Layout", "`--num-distributed-optimizer-instances 2`", 4,
        f"{BF16} --num-distributed-optimizer-instances 2", says="sharded over 2"),
    Row("Layout", "tensor parallel 2", 2, TP2),
    Row("Layout", "+ sequence parallel", 2, f"{TP2} --sequence-parallel", stand_in="norms"),
    Row("Layout", "pipeline parallel 2", 2, PP2_RESHARDABLE),
    Row("Layout", "pipeline 2, virtual stages", 2, VPP),
    Row("Layout", "+ `--overlap-param-gather-with-optimizer-step`", 4,
        "--bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather "
        "--pipeline-model-parallel-size 2 --num-layers 4 --num-layers-per-virtual-pipeline-stage 1 "
        "--untie-embeddings-and-output-weights --overlap-param-gather-with-optimizer-step "
        "--ckpt-format torch"),
    Row("Layout", "data 2 x tensor 2", 4, TP2, says="sharded over 2"),
    Row("Layout", "data 2 x pipeline 2", 4, PP2_RESHARDABLE, says="sharded over 2"),
    Row("Layout", "tensor 2 x pipeline 2", 4,
        f"{PP2_RESHARDABLE} --tensor-model-parallel-size 2"),
    Row("Layout", "context parallel 2", 2, f"{BF16} --context-parallel-size 2",
        says="sharded over 2", stand_in="attention"),
    Row("Layout", "experts 2", 2, EP2),
    Row("Layout", "data 2 x experts 2 (buffers of experts sharded)", 4, EP2),
    Row("Layout", "tensor 2, experts' tensor 1 x experts 2", 4,
        f"{EP2} --tensor-model-parallel-size 2 --expert-tensor-parallel-size 1 "
        "--sequence-parallel", stand_in="norms"),
    Row("Precision", "fp32", 2, SHARDED),
    Row("Precision", "fp16, loss scale", 2, f"--fp16 {SHARDED} --initial-loss-scale 65536"),
    Row("Precision", "`--grad-reduce-in-bf16`", 2, f"{BF16} --grad-reduce-in-bf16"),
    Row("Precision", "`--use-precision-aware-optimizer`", 2, AWARE),
    Row("Precision", "+ bf16 gradients and states", 2,
        f"{AWARE} --main-grads-dtype bf16 --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16"),
    Row("FSDP", "Megatron-FSDP, no_shard", 2, _fsdp("no_shard")),
    Row("FSDP", "Megatron-FSDP, optim", 2, _fsdp("optim")),
    Row("FSDP", "Megatron-FSDP, optim_grads", 2, _fsdp("optim_grads")),
    Row("FSDP", "Megatron-FSDP, optim_grads_params", 2, _fsdp("optim_grads_params")),
    Row("FSDP", "torch FSDP2, torch_dist", 2, f"{FSDP2} --ckpt-format torch_dist"),
    Row("FSDP", "torch FSDP2, torch_dcp", 2, f"{FSDP2} --ckpt-format torch_dcp"),
    Row("Offload", "`--optimizer-cpu-offload`, half", 2, f"{OFFLOAD} 0.5"),
    Row("Offload", "`--optimizer-cpu-offload`, all", 2, f"{OFFLOAD} 1.0"),
    Row("Offload", "+ `--overlap-cpu-optimizer-d2h-h2d`, all", 2,
        f"{OFFLOAD} 1.0 --overlap-cpu-optimizer-d2h-h2d"),
    Row("Offload", "+ `--overlap-cpu-optimizer-d2h-h2d`, half", 2,
        f"{OFFLOAD} 0.5 --overlap-cpu-optimizer-d2h-h2d"),
    Row("Groups", "`--decoupled-lr`", 2,
        f"{BF16} --decoupled-lr 1e-3 --decoupled-min-lr 1e-4 "
        "--untie-embeddings-and-output-weights", groups=True),
    Row("Groups", "`--apply-wd-to-qk-layernorm`", 2,
        f"{BF16} --qk-layernorm --apply-wd-to-qk-layernorm", groups=True),
    Row("Groups", "`--no-weight-decay-cond-type`", 2,
        f"{BF16} --qk-layernorm --no-weight-decay-cond-type apply_wd_to_qk_layernorm",
        groups=True),
    Row("Groups", "`--no-weight-decay-cond-type qwen3_next`", 2,
        f"{BF16} --qk-layernorm --no-weight-decay-cond-type qwen3_next", groups=True),
    Row("Groups", "`--weight-decay-incr-style linear`", 2,
        f"{BF16} --weight-decay-incr-style linear --start-weight-decay 0.01 "
        "--end-weight-decay 0.1", groups=True),
    Row("Groups", "`--use-mup`", 2, f"{BF16} --use-mup --mup-base-hidden-size 32", groups=True),
    Row("Groups", "frozen embeddings", 2, BF16, change="freeze=embedding",
        frozen="embedding.*weight"),
    # Not reshardable: there Megatron misses the frozen layer's state.
    Row("Groups", "a rank without parameters to train", 2,
        "--bf16 --use-distributed-optimizer --pipeline-model-parallel-size 2 "
        "--untie-embeddings-and-output-weights",
        change="freeze=^stage1", frozen="output_layer.weight"),
    Row("Groups", "`--freeze-all-layers`", 2, f"{BF16} --freeze-all-layers"),
    Row("Watching", "`--log-num-zeros-in-grad`", 2, f"{BF16} --log-num-zeros-in-grad",
        says="num zeros: "),
    Row("Watching", "`--log-params-norm`", 2, f"{BF16} --log-params-norm", says="params norm: "),
    Row("Watching", "`--clip-grad 1.0`", 2, f"{BF16} --clip-grad 1.0", says="grad norm: "),
    # Megatron has no flag for it.
    Row("Watching", "`grad_norm_skip_threshold`, not reached", 2, BF16, says="grad norm: ",
        change="config=grad_norm_skip_threshold:1e6", like="distributed optimizer"),
    Row("Watching", "`--rerun-mode validate_results`", 2, f"{BF16} --rerun-mode validate_results"),
    Row("Watching", "`--rerun-mode report_stats`", 2, f"{BF16} --rerun-mode report_stats"),
    Row("Watching", "`--rerun-mode disabled`", 2, f"{BF16} --rerun-mode disabled"),
    Row("Watching", "`--check-weight-hash-across-dp-replicas-interval`", 2,
        f"{BF16} --check-weight-hash-across-dp-replicas-interval 1"),
    Row("Checkpoints", "torch", 2, "--bf16 --use-distributed-optimizer --ckpt-format torch"),
    Row("Checkpoints", "torch, state whole", 2, "--bf16 --ckpt-format torch"),
    Row("Checkpoints", "torch_dist, dp_reshardable", 2, "--bf16 --use-distributed-optimizer"),
    Row("Checkpoints", "torch_dist, fully_reshardable, memory-efficient", 2,
        f"{BF16} --distrib-optim-fully-reshardable-mem-efficient"),
    Row("Checkpoints", "`--async-save`, fully_reshardable", 2, f"{BF16} {ASYNC}",
        droppable="--async-strategy mcore --use-persistent-ckpt-worker"),
    Row("Checkpoints", "`--async-save`, dp_reshardable", 2,
        f"--bf16 --use-distributed-optimizer {ASYNC}",
        droppable="--async-strategy mcore --use-persistent-ckpt-worker"),
)  # fmt: skip
