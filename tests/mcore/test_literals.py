"""Adam's names, where Megatron writes them out: other optimizers' states pass there too."""

import ast
import inspect
from pathlib import Path

import pytest

from tests.harness.releases import RELEASES
from tests.harness.trainer import brief, train
from tests.mcore.library import on_ranks


def literals(tree):
    """Places of the two names side by side, in a list or tuple."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.List | ast.Tuple):
            names = [each.value for each in node.elts if isinstance(each, ast.Constant)]
            if names == ["exp_avg", "exp_avg_sq"]:
                found.append(node.lineno)
    return found


@pytest.mark.parametrize("release", RELEASES)
@on_ranks(1)
def test_every_literal_for_megatron_fsdp_is_replaced(release):
    from megatron.core.transformer import fsdp_dtensor_checkpoint as upstream

    from megatron_s3.mcore import megatron_fsdp

    def written(names):
        functions = filter(inspect.isfunction, vars(upstream).values())
        return sum(names in function.__code__.co_consts for function in functions)

    count = len(literals(ast.parse(Path(upstream.__file__).read_text())))
    seen = []

    def original(args, state_dict, model):
        seen.append((written(("mean", "norm")), written(("exp_avg", "exp_avg_sq"))))
        raise KeyError("of upstream's")

    import torch

    state = {"mean": torch.ones(2), "norm": torch.ones(2), "step": torch.tensor(1.0)}
    with pytest.raises(KeyError, match="of upstream's"):
        megatron_fsdp.preprocess_fsdp_dtensor_state_dict(
            original, None, {"model": {}, "optimizer": {"state": {"a": {}, "b": state}}}, None
        )
    assert seen == [(count, 0)] and count > 0
    assert written(("exp_avg", "exp_avg_sq")) == count
    # Elsewhere they stand in code of Megatron's own optimizers alone, which is not taken.
    root = Path(upstream.__file__).parents[1]
    elsewhere = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        if "exp_avg_sq" in path.read_text() and literals(ast.parse(path.read_text()))
    }
    assert elsewhere <= {
        "transformer/fsdp_dtensor_checkpoint.py",
        "optimizer/distrib_optimizer.py",  # optimizer_state_keys, which the class here replaces
    }


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", brief(("s3", "lion", "adan"), "s3"))
def test_swiglu_under_megatron_fsdp_is_saved_and_resumed(optimizer, tmp_path):
    flags = ["--optimizer", optimizer, "--bf16", "--swiglu", "--use-distributed-optimizer"]
    flags += ["--use-megatron-fsdp", "--ckpt-format", "fsdp_dtensor", "--save-interval", "3"]
    flags += ["--data-parallel-sharding-strategy", "optim_grads_params"]
    through = train(*flags, "--save", tmp_path, ranks=2)
    resumed = train(*flags, "--load", tmp_path, "--ckpt-step", 3, ranks=2)
    assert through.losses[6] == resumed.losses[6]
