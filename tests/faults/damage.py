"""Files that are missing, cut short or changed, and what the trainer says of them."""

import shutil

from megatron_s3.storage.layout import INDEX, TRACKER
from tests.faults.bench import EVERY_OTHER, FORMATS, S3, SHARDED, Bench
from tests.faults.rows import Row
from tests.harness.forks import TIMED_OUT

__all__ = ["damage"]


def damage(bench: Bench) -> list[Row]:
    """Each file missing, cut short, or with a bit flipped: the trainer says one thing, and ends."""
    rows = []
    cases = {
        "torch_dist": [INDEX, "metadata.json", "__0_0.distcp", "__1_0.distcp", TRACKER],
        "torch": ["mp_rank_00/model_optim_rng.pt", "mp_rank_00/distrib_optim.pt"],
        "fsdp_dtensor": [INDEX, "__0_0.distcp", "__1_0.distcp", TRACKER],
        "torch_dcp": [INDEX, "__0_0.distcp", "__1_0.distcp", TRACKER],
    }
    files = [(format, name) for format, names in cases.items() for name in names]
    for how in ("missing", "bits flipped", "cut short", "empty")[: bench.args.files]:
        row = Row(f"file {how}: the trainer")
        for format, name in files[: bench.args.files]:
            saving = FORMATS.get(format, [*SHARDED, "--ckpt-format", "torch"])
            work = bench.new("damaged") / "run"
            shutil.copytree(bench.reference(*saving), work)
            path = work / name if name == TRACKER else work / "iter_0000006" / name
            data = path.read_bytes()
            if how == "missing":
                path.unlink()
            else:
                new = bytearray(data)
                for at in range(len(new) // 2, min(len(new) // 2 + 128, len(new))):
                    new[at] ^= 16  # padding, between tensors, has up to 63 bytes
                cut = {"cut short": data[: len(data) * 2 // 3], "empty": b"", "bits flipped": new}
                path.write_bytes(cut[how])
            before = {f: f.stat().st_mtime_ns for f in work.rglob("*")}
            flags = [*saving, "--train-iters", 8, *EVERY_OTHER]
            run = bench.run(*S3, *flags, "--load", work, "--save", work)
            said = run.error
            untouched = before == {f: f.stat().st_mtime_ns for f in work.rglob("*")}
            named = path.name in said and run.returncode not in (0, TIMED_OUT)
            outcome = "survived" if named and untouched and not run.trained else "lost"
            if run.trained:
                outcome = "falsely_accepted"
            if outcome != "survived":
                (bench.args.out / f"damage-{how}-{format}.txt").write_text(run.log)
            row.add(outcome, file=f"{format}: {name}", said=said, status=run.returncode)
            row.progress()
            shutil.rmtree(work)
        rows.append(row)
    return rows
