"""What does not fit: another world size, p, beta, optimizer or version."""

from tests.faults.bench import ADAMW, EVERY_OTHER, S3, SHARDED, Bench
from tests.faults.rows import Row
from tests.harness.tensors import same, tensors

__all__ = ["misfits"]


def misfits(bench: Bench) -> list[Row]:
    """Another world size, p, beta, optimizer or version."""
    whole = [*SHARDED, "--dist-ckpt-optim-fully-reshardable"]
    whole += ["--attention-dropout", "0", "--hidden-dropout", "0"]
    whole += ["--untie-embeddings-and-output-weights"]
    source = bench.reference(*whole)
    rows = []
    row = Row("another world size, --dist-ckpt-optim-fully-reshardable")
    layouts = {
        "2 -> 1": (1, []),
        "2 -> 4": (4, []),
        "2 -> tensor 2": (2, ["--tensor-model-parallel-size", "2"]),
    }
    for name, (ranks, flags) in list(layouts.items())[: bench.args.misfits]:
        save = bench.new("resharded")
        at_once = ["--ckpt-convert-format", "torch_dist", "--ckpt-convert-save", save]
        run = bench.run(
            *S3, *whole, *flags, "--train-iters", 6, "--load", source, "--ckpt-step", 4, *at_once,
            ranks=ranks,
        )  # fmt: skip
        ok = run.returncode == 0 and same(tensors(save / "torch_dist", 4), tensors(source, 4))
        row.add("survived" if ok else "lost", layout=name, error=run.error)
        row.progress()
    rows.append(row)
    rows += _plain_resharding(bench)
    row = Row("another p, optimizer, version")
    adamw, newer, older = (bench.new(name) for name in ("adamw", "newer", "older"))
    made = {newer: (S3, "format=2"), older: (S3, "format=none"), adamw: (ADAMW, "")}
    for folder, (optimizer, hook) in list(made.items())[: bench.args.misfits]:
        flags = [*optimizer, *SHARDED, "--train-iters", 6, *EVERY_OTHER, "--save", folder]
        bench.run(*flags, hook=hook)
    ours = bench.reference(*SHARDED)
    cases = {
        "a newer format": (newer, S3, "format 2: this one knows formats up to 1"),
        "no format, of an older version": (older, S3, None),
        "another p": (ours, [*S3, "--s3-p", "2"], "saved with --s3-p 3.0"),
        "another beta": (ours, [*S3, "--s3-beta", "0.9"], None),
        "AdamW's into S3": (adamw, S3, "saved by --optimizer adamw"),
        "S3's into AdamW": (ours, ["--optimizer", "adamw"], "saved by --optimizer s3"),
        "S3's into Megatron's Adam": (ours, ["--optimizer", "adam"], "saved by --optimizer s3"),
        "a newer format, weights alone": (newer, [*S3, "--no-load-optim"], None),
    }
    for name, (folder, flags, refused) in list(cases.items())[: bench.args.misfits]:
        run = bench.run(*flags, *SHARDED, "--train-iters", 6, "--load", folder, "--ckpt-step", 4)
        said = run.error
        if refused:
            ok = refused in said and str(folder) in said and not run.trained and run.returncode
            outcome = "survived" if ok else "falsely_accepted" if run.trained else "lost"
        else:
            ok = run.returncode == 0 and run.loaded == 4
            ok &= name != "another beta" or any(
                "the run continues with beta=0.9" in s for s in run.said
            )
            outcome = "survived" if ok else "lost"
        row.add(outcome, case=name, said=said)
        row.progress()
    return [*rows, row]


def _plain_resharding(bench: Bench) -> list[Row]:
    """Megatron's default format: the data-parallel size may change, the rest is refused."""
    row = Row("another world size, dp_reshardable")
    dry = ["--attention-dropout", "0", "--hidden-dropout", "0"]
    source = bench.reference(*SHARDED, *dry)
    for name, (ranks, flags, refused) in list(
        {
            "2 -> 1": (1, [], None),
            "2 -> 4": (4, [], None),
            "2 -> tensor 2": (2, ["--tensor-model-parallel-size", "2"], "(TP, PP) mismatch"),
        }.items()
    )[: bench.args.misfits]:
        run = bench.run(
            *S3, *SHARDED, *dry, *flags, "--train-iters", 6, "--load", source, "--ckpt-step", 2,
            ranks=ranks,
        )  # fmt: skip
        if refused:
            ok = refused in run.error and not run.trained
        else:
            apart = abs(float(run.losses.get(6, "inf")) - float((source / "loss").read_text()))
            ok = run.returncode == 0 and run.loaded == 2 and apart < 1e-3
        row.add("survived" if ok else "lost", layout=name, error=run.error)
        row.progress()
    return [row]
