"""What counts as a credential, and what does not."""

import base64

import pytest

from megatron_s3.launch.redact import (
    HIDDEN,
    environment,
    is_harmless,
    is_secret,
    redact,
    redact_word,
)

#: Made up, in the forms that services give them.
HUSH = "Ab3dEf6hIj9kLm2nOp5qRs8tUv1wXy4z"
SECRETS = [
    f"hf_{HUSH}",
    f"ghp_{HUSH}",
    f"github_pat_{HUSH}",
    f"glpat-{HUSH[:20]}",
    f"sk-proj-{HUSH}",
    f"nvapi-{HUSH}",
    f"pypi-AgE{HUSH}",
    "AKIA" + "A1B2C3D4E5F6G7H8",
    "dapi" + "0123456789abcdef" * 2,
    f"eyJhbGciOiJIUzI1NiJ9.{HUSH}.{HUSH}",
    HUSH,
    base64.b64encode(HUSH.encode()[:31]).decode(),
]


@pytest.mark.parametrize("secret", SECRETS)
def test_a_token_is_known_by_its_looks(secret):
    assert is_secret("NAME", secret)
    for text in ("{}", "see {} here", '"{}"', "a={}", "--flag {}", "x,{},y"):
        shown = redact(text.format(secret))
        assert secret not in shown and shown == text.format(HIDDEN)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:pw@proxy:3128", f"http://{HIDDEN}@proxy:3128"),
        ("me:pw@proxy:3128", f"me:{HIDDEN}@proxy:3128"),
        ("https://tok@host/simple", f"https://{HIDDEN}@host/simple"),
        ("postgresql+psycopg2://u:p@h/db?x=1", f"postgresql+psycopg2://{HIDDEN}@h/db?x=1"),
        ("https://abc123@o1.ingest.sentry.io/2", f"https://{HIDDEN}@o1.ingest.sentry.io/2"),
        ("ssh://git:pw@host/x", f"ssh://git:{HIDDEN}@host/x"),
        ("https://h/x?a=1&token=abc&b=2", f"https://h/x?a=1&token={HIDDEN}&b=2"),
        ("https://h/x?X-Amz-Signature=0f", f"https://h/x?X-Amz-Signature={HIDDEN}"),
        ("AccountName=a;AccountKey=zz;E=1", f"AccountName=a;AccountKey={HIDDEN};E=1"),
        ("host=h password=pw user=u", f"host=h password={HIDDEN} user=u"),
        ("Authorization: Bearer abcdef123456789", f"Authorization: Bearer {HIDDEN}"),
        ('+API_KEY = "abcdefg"', f'+API_KEY = "{HIDDEN}"'),
        ("+    api_token: 'abcdefg',", f"+    api_token: '{HIDDEN}',"),
        ("+export MYSQL_PWD=pw x", f"+export MYSQL_PWD={HIDDEN}"),
        (
            "-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----",
            f"-----BEGIN RSA PRIVATE KEY-----{HIDDEN}-----END RSA PRIVATE KEY-----",
        ),
    ],
)
def test_a_part_that_is_one_is_left_out(text, shown):
    assert redact(text) == shown
    assert redact(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "ssh://git@host/repository.git",
        "git@github.com:owner/name.git",
        "https://host:8080/simple/?page=2",
        "/home/me/runs/GPT2-345M-paper-AdamW-lr-3e-3-seed-1234-batch-512/checkpoints",
        "0123456789abcdef0123456789abcdef01234567",  # a commit
        "GPU-8a9bcdef-0123-4567-89ab-cdef01234567",
        "nvcr.io/nvidia/pytorch:26.06-py3",
        "12:34:56 node[1-8]@partition",
        "B:USR1@600",  # sbatch's --signal
        "--tokenizer-type HuggingFaceTokenizer --eod-mask-loss",
        "/data/a_text_document,/data/b_text_document",
        "disk-cache-directory-name-2026-11-28",
        "+    key = torch.randn(4)",
        "+tokens = tokens[:4]",
    ],
)
def test_what_is_none_stays(text):
    assert redact(text) == text
    assert redact_word(text) == text


@pytest.mark.parametrize(
    "name",
    "SLURM_JWT OPENAI_KEY GITHUB_PAT NGC_KEY SENTRY_DSN MYSQL_PWD SSHPASS AZURE_STORAGE_KEY "
    "WANDB_API_KEY HF_TOKEN AWS_SECRET_ACCESS_KEY DB_PASSWORD CUDA_SECRET NCCL_AUTH "
    "GOOGLE_APPLICATION_CREDENTIALS MYTOKEN apikey".split(),
)
def test_a_name_says_it(name):
    assert is_secret(name, "x") and not is_harmless(name)
    assert redact_word(f"launch.environment.{name}=x y") == f"launch.environment.{name}={HIDDEN}"
    assert redact_word(f"launch.environment.{name}=x=y,z=1").endswith(f".{name}={HIDDEN}")
    assert redact_word(f"--export=ALL,{name}=x,B=2") == f"--export=ALL,{name}={HIDDEN}"
    assert environment({name: "x"}) == f"{name}={HIDDEN}\n"


@pytest.mark.parametrize(
    "name",
    "PATH PWD CUDA_VISIBLE_DEVICES NCCL_SOCKET_IFNAME SLURM_JOB_ID OMP_NUM_THREADS PYTHONPATH "
    "TOKENIZERS_PARALLELISM MASTER_ADDR LOCAL_RANK MEGATRON_S3_REVISION TORCHINDUCTOR_CACHE_DIR "
    "PREFLIGHT_TIMEOUT".split(),
)
def test_a_harmless_variable_is_written_down(name):
    assert environment({name: "/a b"}) == f"{name}=/a b\n"
    assert environment({name: f"http://me:{HUSH}@h"}) == f"{name}=http://{HIDDEN}@h\n"


def test_of_others_the_name_alone():
    given = {"HTTP_PROXY": "p", "PIP_INDEX_URL": "q", "DATABASE_URL": "r", "ANY": "s"}
    assert environment(given) == "".join(f"{name}={HIDDEN}\n" for name in sorted(given))
