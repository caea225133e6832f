"""Steps replayed from a CUDA graph against eager ones, bit for bit; also in Megatron's trainer."""

from pathlib import Path

import torch
from torch import Tensor

from scripts.acceptance.rows import Writer
from scripts.acceptance.task import Task

__all__ = ["check", "replayed_and_eager"]


def replayed_and_eager(
    state_dtype: torch.dtype, grad_dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters, states and model parameters after steps from a graph, and after eager ones.

    Gradients and learning rate change in place between the steps, as they do in training.

    Args:
        state_dtype: of both states.
        grad_dtype: of the gradients.
    """
    from megatron_s3 import S3

    sizes = (1, 1000, 65_537, 300_000)
    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(n, generator=generator) for n in sizes]
    rounds = [[torch.randn(n, generator=generator) for n in sizes] for _ in range(5)]
    results = []
    for in_graph in (True, False):
        lr = torch.tensor(0.01, device="cuda")
        params = [torch.nn.Parameter(x.cuda()) for x in start]
        grads = [torch.zeros(n, device="cuda", dtype=grad_dtype) for n in sizes]
        models = [torch.zeros(n, device="cuda", dtype=torch.bfloat16) for n in sizes]
        optimizer = S3(params, lr=lr, weight_decay=0.1, fused=True, state_dtype=state_dtype)
        for param, grad, model in zip(params, grads, models, strict=True):
            param.decoupled_grad = grad
            optimizer.host.model_params[param] = model
        graph = None
        for number, values in enumerate(rounds):
            lr.fill_(0.01 / (1 + number))
            for grad, value in zip(grads, values, strict=True):
                grad.copy_(value)
            if in_graph and number == 2:
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):  # recorded, not run
                    optimizer.step()
            if graph is None:
                optimizer.step()
            else:
                graph.replay()
        torch.cuda.synchronize()
        states = [t for p in params for t in map(optimizer.state[p].get, ("exp_avg", "exp_pnorm"))]
        results.append([t.detach().cpu() for t in (*params, *states, *models)])
    return results[0], results[1]


def check(writer: Writer, task: Task) -> None:
    """Rows for the optimizer alone, then for ``--optimizer-cuda-graph``."""
    fp32, bf16 = torch.float32, torch.bfloat16
    for state, grad in ((fp32, fp32), (bf16, bf16)):
        name = f"S3, {str(state)[6:]} states, {str(grad)[6:]} gradients"
        one, other = replayed_and_eager(state, grad)
        if all(map(torch.equal, one, other)):
            writer.passed(name, "2 eager steps and 3 replays = 5 eager steps, bitwise")
        else:
            writer.failed(name, "replays differ from eager steps")
    _trainer(writer, task.device, task.folder)


def _trainer(writer: Writer, device: str, folder: Path) -> None:
    from scripts.acceptance.training import different, missing, train

    what = "--optimizer-cuda-graph"
    if why := missing():
        writer.skipped(what, why)
        return
    for ranks in dict.fromkeys((1, torch.cuda.device_count())):
        eager, graphed = folder / f"eager-{ranks}", folder / f"graphed-{ranks}"
        runs = [
            train(eager.with_suffix(".txt"), device, ranks, "--save", eager),
            train(
                *(graphed.with_suffix(".txt"), device, ranks, "--save", graphed, what),
                *("--cuda-graph-warmup-steps", "2"),
            ),
        ]
        name = f"{what}, {ranks} rank{'s' if ranks > 1 else ''}"
        if "unrecognized arguments: --optimizer-cuda-graph" in runs[1][0].log:
            writer.skipped(name, "the installed Megatron has no such flag")
        elif problem := runs[0][1] or runs[1][1] or different(eager, graphed):
            writer.failed(name, problem)
        else:
            writer.passed(name, "bitwise: all that is saved, eager and captured after 2 steps")
