"""Checkpoints of Megatron's real trainer as Hugging Face models, and what is refused."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint

from megatron_s3.checkpoints import export, gpt2
from megatron_s3.mcore.checkpoint import forward, read

#: Of a GPT-2 with 2 layers, 2 heads of 3 and a padded vocabulary of 16.
ARGUMENTS = {
    "num_layers": 2,
    "hidden_size": 6,
    "ffn_hidden_size": 8,
    "num_attention_heads": 2,
    "kv_channels": 3,
    "max_position_embeddings": 5,
    "padded_vocab_size": 16,
    "tokenizer_type": "NullTokenizer",
    "tokenizer_model": None,
    "untie_embeddings_and_output_weights": False,
    "group_query_attention": False,
    "num_query_groups": 2,
    "bias_gelu_fusion": True,
    "position_embedding_type": "learned_absolute",
    "normalization": "LayerNorm",
    "hidden_dropout": 0.1,
    "attention_dropout": 0.0,
    "layernorm_epsilon": 1e-5,
    "init_method_std": 0.02,
}
# The names of Megatron's GPTModel with Transformer Engine's layers, layers stacked, as a checkpoint
# has them.  Made here: its kernels need a GPU.  Layers without it are saved under the same names.
SHAPES = {
    "embedding.word_embeddings.weight": (16, 6),
    "embedding.position_embeddings.weight": (5, 6),
    "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (2, 6),
    "decoder.layers.self_attention.linear_qkv.layer_norm_bias": (2, 6),
    "decoder.layers.self_attention.linear_qkv.weight": (2, 18, 6),
    "decoder.layers.self_attention.linear_qkv.bias": (2, 18),
    "decoder.layers.self_attention.linear_proj.weight": (2, 6, 6),
    "decoder.layers.self_attention.linear_proj.bias": (2, 6),
    "decoder.layers.mlp.linear_fc1.layer_norm_weight": (2, 6),
    "decoder.layers.mlp.linear_fc1.layer_norm_bias": (2, 6),
    "decoder.layers.mlp.linear_fc1.weight": (2, 8, 6),
    "decoder.layers.mlp.linear_fc1.bias": (2, 8),
    "decoder.layers.mlp.linear_fc2.weight": (2, 6, 8),
    "decoder.layers.mlp.linear_fc2.bias": (2, 6),
    "decoder.final_layernorm.weight": (6,),
    "decoder.final_layernorm.bias": (6,),
}


def arguments(**other: object) -> Namespace:
    return Namespace(**{**ARGUMENTS, **other})


def model_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def test_tensors_are_renamed_turned_and_cut() -> None:
    tensors = model_tensors()
    state = gpt2.state_dict(arguments(), tensors, vocab_size=11)
    assert torch.equal(
        state["transformer.wte.weight"], tensors["embedding.word_embeddings.weight"][:11]
    )
    ours = state["transformer.h.1.attn.c_attn.weight"]
    theirs = tensors["decoder.layers.self_attention.linear_qkv.weight"][1]
    # Megatron's rows are q k v of one head and then of the next; GPT-2's columns all q, k, then v.
    order = [
        3 * (3 * head + part) + row for part in range(3) for head in range(2) for row in (0, 1, 2)
    ]
    assert torch.equal(ours, theirs[order].T)
    norm = tensors["decoder.layers.mlp.linear_fc1.layer_norm_weight"][0]
    assert torch.equal(state["transformer.h.0.ln_2.weight"], norm)
    assert "lm_head.weight" not in state


def test_numbered_layers_and_separate_norms_are_the_same_model() -> None:
    tensors = model_tensors()
    numbered = {}
    for name, tensor in tensors.items():
        inside = name.removeprefix("decoder.layers.")
        inside = inside.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
        inside = inside.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
        if name.startswith("decoder.layers."):
            numbered |= {f"decoder.layers.{i}.{inside}": part for i, part in enumerate(tensor)}
        else:
            numbered[name] = tensor
    one, other = (gpt2.state_dict(arguments(), t, vocab_size=16) for t in (tensors, numbered))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_untied_output_layer_is_written_and_said() -> None:
    untied = arguments(untie_embeddings_and_output_weights=True)
    tensors = model_tensors()
    with pytest.raises(gpt2.NotGPT2, match=r"lacks lm_head\.weight"):
        gpt2.state_dict(untied, tensors, vocab_size=11)
    tensors["output_layer.weight"] = torch.ones(16, 6)
    assert gpt2.state_dict(untied, tensors, vocab_size=11)["lm_head.weight"].shape == (11, 6)
    assert gpt2.config(untied, 11, torch.bfloat16)["tie_word_embeddings"] is False


def test_gelu_is_the_one_that_megatron_ran() -> None:
    for fused, name in ((True, "gelu_new"), (False, "gelu")):
        config = gpt2.config(arguments(bias_gelu_fusion=fused), 16, torch.float32)
        assert config["activation_function"] == name


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"position_embedding_type": "rope"}, "--position-embedding-type rope"),
        ({"normalization": "RMSNorm"}, "--normalization RMSNorm"),
        ({"group_query_attention": True, "num_query_groups": 1}, "--num-query-groups 1"),
        ({"num_experts": 8}, "--num-experts 8"),
        ({"swiglu": True}, "--swiglu"),
        ({"add_bias_linear": False}, "--disable-bias-linear"),
        ({"kv_channels": 4}, "--kv-channels 4"),
        ({"mtp_num_layers": 1}, "--mtp-num-layers 1"),
    ],
)
def test_what_is_no_gpt2_is_refused_by_name_before_anything_is_written(
    other: dict,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("transformers")
    gpt2.check(arguments())
    monkeypatch.setattr(read, "find", lambda folder, iteration: Path(folder))
    monkeypatch.setattr(read, "arguments", lambda found: arguments(**other))
    assert export.main(["checkpoint", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert said in error and "Nothing was written" in error
    assert not list(tmp_path.iterdir())


def test_a_tensor_without_a_place_is_refused() -> None:
    tensors = model_tensors() | {"decoder.layers.mlp.router.weight": torch.ones(2, 4, 6)}
    with pytest.raises(gpt2.NotGPT2, match=r"holds decoder\.layers\.mlp\.router\.weight"):
        gpt2.state_dict(arguments(), tensors, vocab_size=16)


#: As Megatron writes it when a save has ended.
CONFIG = json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})


def test_folders_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    def error(folder: Path, iteration: int | None = None) -> str:
        with pytest.raises(read.CheckpointError) as raised:
            read.find(folder, iteration)
        return str(raised.value)

    assert "no such folder" in error(tmp_path / "none")
    iteration = tmp_path / "iter_0000006"
    iteration.mkdir()
    assert "no save has finished; there are: iter_0000006" in error(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("6\n")
    assert "not a complete checkpoint" in error(tmp_path)
    assert "no iteration 5; there are: iter_0000006" in error(tmp_path, 5)
    assert "another iteration than --iteration 5" in error(iteration, 5)
    (iteration / "mp_rank_00").mkdir()
    assert "--ckpt-convert-format torch_dist" in error(tmp_path)
    (iteration / "mp_rank_00").rmdir()
    torch.distributed.checkpoint.save({"a": torch.ones(100)}, checkpoint_id=iteration, no_dist=True)
    (iteration / "metadata.json").write_text(CONFIG)
    assert read.find(tmp_path) == read.find(tmp_path, 6) == read.find(iteration)


def test_a_damaged_checkpoint_is_refused_by_the_name_of_the_file(tmp_path: Path) -> None:
    iteration = tmp_path / "iter_0000006"
    torch.distributed.checkpoint.save(
        {"a": torch.ones(100), "b": 1}, checkpoint_id=iteration, no_dist=True
    )
    (iteration / "metadata.json").write_text(CONFIG)
    shard = iteration / "__0_0.distcp"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    cut = rf"{shard} is truncated: .* at least {len(whole):,}"
    with pytest.raises(read.CheckpointError, match=cut):
        read.find(iteration)
    shard.rename(iteration / "__1_0.distcp")
    with pytest.raises(read.CheckpointError, match=f"{shard} is missing"):
        read.find(iteration)
    index = iteration / ".metadata"
    index.write_bytes(index.read_bytes()[:10])
    with pytest.raises(read.CheckpointError, match=f"{index} cannot be read"):
        read.find(iteration)


def test_the_output_is_never_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export.main(["checkpoint", str(tmp_path)]) == 2
    assert "exists: choose another folder" in capsys.readouterr().err
    (tmp_path / "link").symlink_to("nowhere")
    assert export.main(["checkpoint", str(tmp_path / "link")]) == 2
    assert "exists: choose another folder" in capsys.readouterr().err
    assert export.main(["checkpoint", str(tmp_path / "a" / "b")]) == 2
    assert "no such folder; make it first" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusing(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(read, "find", lambda *_: pytest.fail("the work began"))
    monkeypatch.setattr("megatron_s3.storage.writable.tempfile.TemporaryFile", refusing)
    output = tmp_path / "model"
    assert export.main([str(tmp_path), str(output)]) == 2
    assert capsys.readouterr().err == (
        f"error: OUTPUT {output}: cannot be written (Permission denied)\n"
    )
    assert not list(tmp_path.iterdir())


def test_rows_of_the_vocabulary_are_never_guessed() -> None:
    named = arguments(tokenizer_type="HuggingFaceTokenizer", tokenizer_model="gpt2")
    with pytest.raises(export.ExportError, match="--tokenizer, or the number with --vocab-size"):
        export._vocab_size(named, None, None)
    with pytest.raises(export.ExportError, match=r"--vocab-size 17, but the model .* with 16"):
        export._vocab_size(named, None, 17)
    assert export._vocab_size(named, None, 11) == 11


def test_a_tokenizer_that_leaves_out_numbers_keeps_its_last_row(tmp_path: Path) -> None:
    """Its tokens are fewer than the rows that they name."""
    pytest.importorskip("transformers")
    file = _tokenizer(tmp_path) / "tokenizer.json"
    found = json.loads(file.read_text())
    last = max(found["model"]["vocab"], key=found["model"]["vocab"].get)
    found["model"]["vocab"][last] = 230
    file.write_text(json.dumps(found))
    named = arguments(padded_vocab_size=256)
    assert export._vocab_size(named, tmp_path, None) == 231
    named.padded_vocab_size = 230
    with pytest.raises(export.ExportError, match=r"up to 230, but the model was .* with 230 rows"):
        export._vocab_size(named, tmp_path, None)


def _tokenizer(folder: Path) -> Path:
    """Of 200 tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())[:199]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=tokens[0])
    fast.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_logits_of_trained_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor parallel, tied, bf16; and pipeline parallel, untied, exact gelu, fp32, a release.

    Then that an export with a fault in it fails for its logits, and leaves nothing behind.
    """
    from transformers import GPT2LMHeadModel

    from tests.harness.trainer import train

    one = ["--train-iters", "3", "--optimizer", "s3", "--save-interval", "3"]
    sharded = ["--bf16", "--use-distributed-optimizer", "--tensor-model-parallel-size", "2"]
    staged = ["--pipeline-model-parallel-size", "2", "--untie-embeddings-and-output-weights"]
    train(*one, *sharded, "--save", tmp_path / "tp2", ranks=2)
    train(*one, *staged, "--no-bias-gelu-fusion", "--save", tmp_path / "pp2", ranks=2)

    megatrons = {}
    compute = forward.logits
    monkeypatch.setattr(
        forward,
        "logits",
        lambda found, tokens: megatrons.setdefault(found.parent.name, compute(found, tokens)),
    )
    tokenizer = _tokenizer(tmp_path / "tokenizer")
    output = tmp_path / "models" / "tp2"
    output.parent.mkdir()
    assert export.main([str(tmp_path / "tp2"), str(output), "--tokenizer", str(tokenizer)]) == 0
    assert (output / "tokenizer.json").is_file()
    config = json.loads((output / "config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"]) == (200, 0)
    assert config["tie_word_embeddings"] and config["activation_function"] == "gelu_new"
    assert GPT2LMHeadModel.from_pretrained(output).dtype is torch.bfloat16

    output = output.with_name("pp2")
    (tmp_path / "pp2/iter_0000003").rename(tmp_path / "pp2/release")
    (tmp_path / "pp2/latest_checkpointed_iteration.txt").write_text("release")
    assert export.main([str(tmp_path / "pp2"), str(output)]) == 0
    assert json.loads((output / "export.json").read_text())["iteration"] is None
    config = json.loads((output / "config.json").read_text())
    assert (config["vocab_size"], config["activation_function"]) == (256, "gelu")
    assert not config["tie_word_embeddings"]

    monkeypatch.setattr(forward, "logits", lambda found, tokens: megatrons["pp2"])
    right = gpt2.config
    tanh = {"activation_function": "gelu_new"}
    faults = {
        "config": lambda *args: right(*args) | tanh,
        "_converted": lambda args, name, tensor: tensor.T,
    }
    for name, fault in faults.items():
        with monkeypatch.context() as broken:
            broken.setattr(gpt2, name, fault)
            assert export.main([str(tmp_path / "pp2"), str(output.with_name("wrong"))]) == 1
    assert sorted(path.name for path in output.parent.iterdir()) == ["pp2", "tp2"]
