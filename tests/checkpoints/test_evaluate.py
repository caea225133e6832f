"""Accuracy on the five tasks, offline: local files, and a GPT-2 made here."""

import io
import json
from pathlib import Path

import pytest

from megatron_s3.checkpoints import evaluate
from megatron_s3.checkpoints.tasks import TASKS, TaskError, load

HAPPENED = {f"input_sentence_{i}": f"This happened {i}." for i in range(1, 5)}
#: Two records of each task, whose right answers differ; 9 of PIQA.
RECORDS = {
    "cb": [
        {"premise": "It rains.", "hypothesis": "It is wet.", "label": 0},
        {"premise": "It rains.", "hypothesis": "It is dry.", "label": 1},
    ],
    "piqa": [
        {"goal": goal, "sol1": f"with a {one}", "sol2": f"with some {other}", "label": i % 2}
        for i, (goal, one, other) in enumerate(
            (goal, one, other)
            for goal in ("cut bread", "eat soup", "paint the old wall")
            for one, other in (("knife", "soap"), ("spoon", "grass"), ("brush", "iron"))
        )
    ],
    "siqa": [
        {
            "context": "Kim fell.",
            "question": "How is Kim?",
            **{"answerA": "hurt", "answerB": "rich", "answerC": "asleep"},
            "label": label,
        }
        for label in ("1", "3")
    ],
    "storycloze": [
        HAPPENED
        | {"sentence_quiz1": "It ended well.", "sentence_quiz2": "It did not."}
        | {"answer_right_ending": label}
        for label in (1, 2)
    ],
    "hellaswag": [
        {
            "activity_label": "Baking",
            "ctx_a": "A man mixes flour.",
            "ctx_b": "he",
            "endings": ["bakes it.", "swims.", "sings.", "flies."],
            "label": label,
        }
        for label in ("0", "2")
    ],
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name, records in RECORDS.items():
        lines = [json.dumps(record) for record in records]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def tiny_gpt2(folder: Path, seed: int) -> Path:
    """A GPT-2 of one layer over bytes, without any training."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<|endoftext|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, bos_token=end
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    size = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 256}
    config = GPT2Config(vocab_size=len(vocabulary), bos_token_id=0, eos_token_id=0, **size)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.mark.slow  # imports lm-evaluation-harness, which takes a while
def test_two_models_on_local_files_make_figure_6(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And that the accuracy of a task is what the model's own likelihoods of the answers say."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folders = {name: tiny_gpt2(tmp_path / name, seed) for seed, name in enumerate(("S3", "AdamW"))}
    words = [f"{name}={folder}" for name, folder in folders.items()]
    output = tmp_path / "figure6"
    arguments = [*words, "--data", str(data), "--output", str(output), "--device", "cpu"]
    assert evaluate.main(arguments) == 0
    results = json.loads((output / "results.json").read_text())
    assert results["versions"]["lm_eval"] and results["fewshot"] == 0
    for name, folder in folders.items():
        measured = results["models"][name]["tasks"]
        assert list(measured) == list(TASKS)
        assert [task["samples"] for task in measured.values()] == [2, 9, 2, 2, 2]
        assert measured["piqa"]["acc"] == _piqa_accuracy(folder)
    printed = capsys.readouterr().out
    assert "| model   | CB" in printed and "| AdamW   | " in printed
    assert (output / "results.png").stat().st_size > 10_000
    assert evaluate.main(arguments) == 2  # never over an earlier result
    assert "exists" in capsys.readouterr().err

    smaller = tiny_gpt2(tmp_path / "smaller", 0)
    config = json.loads((smaller / "config.json").read_text())
    (smaller / "config.json").write_text(json.dumps(config | {"vocab_size": 256}))
    assert evaluate.main([str(smaller), "--output", str(tmp_path / "other")]) == 2
    assert "vocabulary has 256 rows" in capsys.readouterr().err


def _piqa_accuracy(folder: Path) -> float:
    import torch
    from transformers import AutoTokenizer, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = GPT2LMHeadModel.from_pretrained(folder).eval()

    def likelihood(prompt: str, answer: str) -> float:
        before, tokens = tokenizer(prompt)["input_ids"], tokenizer(prompt + answer)["input_ids"]
        with torch.no_grad():
            logp = model(torch.tensor([tokens[:-1]])).logits[0].log_softmax(-1)
        return sum(logp[i - 1, tokens[i]].item() for i in range(len(before), len(tokens)))

    right = []
    for record in RECORDS["piqa"]:
        prompt = f"Question: {record['goal']}\nAnswer:"
        answers = [likelihood(prompt, " " + record[key]) for key in ("sol1", "sol2")]
        right.append(answers.index(max(answers)) == record["label"])
    return sum(right) / len(right)


FAULTS = {
    "no file": ("", "no file"),
    "no JSON": ("{", "piqa.jsonl:1: not JSON"),
    "no UTF-8": (b'\n{"goal": "\xff"}', "piqa.jsonl:2: not JSON"),
    "no object": ("[]", "piqa.jsonl:1: not an object"),
    "a key": ('\n{"goal": "a", "label": 0}', "piqa.jsonl:2: has no sol1, sol2"),
    "no text": ('{"goal": "a", "sol1": 1, "sol2": "b", "label": 0}', "sol1 is not a string"),
    "label": ('{"goal": "a", "sol1": "a", "sol2": "b", "label": 2}', "label is 2, not one of 0, 1"),
    "no index": ('{"goal": "a", "sol1": "a", "sol2": "b", "label": 1.0}', "label is 1.0, not one"),
    "empty": ("\n", "is empty"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_local_data_is_said_with_its_line_and_the_keys(
    fault: str, tmp_path: Path
) -> None:
    content, message = FAULTS[fault]
    if content:
        text = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "piqa.jsonl").write_bytes(text)
    with pytest.raises(TaskError) as error:
        load(["piqa"], tmp_path)
    assert message in str(error.value) and "goal, sol1, sol2 and label (0, 1)" in str(error.value)


def test_every_ending_is_a_string(tmp_path: Path) -> None:
    endings = {"endings": ["a", "b", 3, "d"]}
    lines = [json.dumps(RECORDS["hellaswag"][0] | more) for more in ({}, endings)]
    (tmp_path / "hellaswag.jsonl").write_text("\n".join(lines))
    with pytest.raises(TaskError, match=r"hellaswag\.jsonl:2: endings is not a list of strings"):
        load(["hellaswag"], tmp_path)


def test_unusable_words_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rest = ["--output", str(tmp_path / "out")]
    model = tmp_path / "model"
    for words, message in (
        (["x", "--tasks", "piqa,arc"], "no task 'arc'"),
        (["a/m", "b/m"], "two models are named 'm'"),
        ([str(model)], "model: no such folder"),
    ):
        assert evaluate.main([*words, *rest]) == 2
        assert message in capsys.readouterr().err
    model.mkdir()
    assert evaluate.main([str(model), *rest]) == 2
    assert "not a Hugging Face model" in capsys.readouterr().err
    (model / "config.json").write_text("{}")
    assert evaluate.main([str(model), *rest]) == 2
    assert "no tokenizer" in capsys.readouterr().err
    (model / "tokenizer.json").write_text("{}")
    (model / "export.json").write_text('{"iteration": ')
    assert evaluate.main([str(model), *rest]) == 2
    assert f"{model}/export.json is damaged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_table_and_figure_show_accuracy_error_and_chance() -> None:
    result = {"piqa": {"acc": 0.625, "acc_stderr": 0.0125, "samples": 1838}}
    single = {"piqa": {"acc": 1.0, "acc_stderr": None, "samples": 1838}}
    models = {"S3": result, "A|B": single}
    formulas = {"$lr_$": result, "x$^$": single}  # would be no formula
    evaluate.figure(formulas).savefig(io.BytesIO())
    assert evaluate.table(models).splitlines() == [
        "| model   | PIQA       |",
        "| ---     | --:        |",
        "| S3      | 62.5 ± 1.2 |",
        "| A\\|B    | 100.0      |",
        "| samples | 1838       |",
        "| chance  | 50.0       |",
    ]
    axes = evaluate.figure(models).axes[0]
    assert [bar.get_height() for bar in axes.patches] == [62.5, 100.0]
    assert list(axes.lines[-1].get_ydata()) == [50.0, 50.0]


def test_output_and_device_are_looked_at_before_the_work(tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    monkeypatch.setattr(evaluate, "_check_files", lambda *_: None)
    monkeypatch.setattr(evaluate, "_check_vocabulary", lambda *_: pytest.fail("the work began"))
    model = str(tmp_path / "model")
    for output in (tmp_path / "file", "/proc/none/results", tmp_path / "file/below"):
        assert evaluate.main([model, "--output", str(output)]) == 2
        told = capsys.readouterr()
        assert told.err.startswith(f"error: --output {output}: cannot be written (")
        assert told.err.count("\n") == 1
    out = tmp_path / "out"
    for device in ("gpu", "cuda:77", "cuda:x", "", "mps"):
        assert evaluate.main([model, "--output", str(out), "--device", device]) == 2
        assert f"error: --device {device}: " in capsys.readouterr().err
    assert not out.exists()


def test_the_table_is_printed_before_it_is_written(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(evaluate, "evaluate", lambda *_, **__: {"models": {"a": {"tasks": {}}}})
    monkeypatch.setattr(evaluate, "table", lambda shown: "THE TABLE")

    def full(shown: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluate, "figure", full)
    assert evaluate.main(["model", "--output", str(tmp_path / "out")]) == 2
    told = capsys.readouterr()
    assert told.out == "THE TABLE\n"
    assert "No space left on device" in told.err
