"""Credentials, which must not be in any file or log of a run.

A value counts as a credential by its name (``WANDB_API_KEY``) or by its form: a URL with a
password, a token of a known service, a long random word. Neither finds every credential, so the
values of environment variables are recorded only if the variable is known to be harmless.
"""

import os
import re
from collections.abc import Mapping

__all__ = ["HIDDEN", "environment", "is_harmless", "is_secret", "redact", "redact_word"]

HIDDEN = "(not written down)"

#: Parts of names, separated by underscores, that mark a credential.
_PARTS = frozenset(
    "APIKEY AUTH AUTHORIZATION COOKIE CRED CREDENTIAL CREDENTIALS CREDS DSN JWT KEY KEYS PASS "
    "PASSPHRASE PASSWD PASSWORD PASSWORDS PAT PRIVATE PW PWD SECRET SECRETS SID TOKEN".split()
)
_ENDS = ("APIKEY", "ACCESSKEY", "CREDENTIALS", "PASSWD", "PASSWORD", "SECRET", "SSHPASS", "TOKEN")

#: The group ``secret`` is replaced.
_SHAPES = [
    re.compile(pattern)
    for pattern in (
        # scheme://user:password@host, scheme://token@host; a user without password (ssh) is no
        # credential.
        r"(?!ssh://|git\+ssh://|sftp://)\b[A-Za-z][\w+.-]*://(?P<secret>[^/\s'\"]+)@",
        r"\b(?:ssh|git\+ssh|sftp)://[^/\s:@]*:(?P<secret>[^/\s]+)@",
        r"(?<![\w/:@.-])[\w.%+-]+:(?P<secret>[^\s/:@'\"]+)@(?=[\w.-]*[A-Za-z.])(?=[\w.-]+(?:[:/\s,;'\"]|$))",
        # ...?token=, ;AccountKey=, password=
        r"(?i)[?&;][\w-]*(?:token|secret|signature|passw(?:or)?d|key|sig|auth|credential)=(?P<secret>[^&;\s'\"]+)",
        r"(?i)\b(?:AccountKey|SharedAccess\w+|passw(?:or)?d|passphrase|pwd)=(?P<secret>[^;&\s'\"]+)",
        # name = "value"
        r"(?i)\b[\w-]*(?:api_?key|access_?key|secret(?:_?key)?|token|passw(?:or)?d)[\"']?\s*[:=]\s*"
        r"([\"'])(?P<secret>[^\"'\s]{6,})\1",
        r"(?i)\b(?:bearer|basic)\s+(?P<secret>(?=[^\s'\"]*\d)[\w.~+/=-]{12,})",
        # Tokens of known services
        r"\b(?P<secret>(?:hf|gh[oprsu]|npm|r8|gsk|sk_live|rk_live|dop_v1|wandb_v1)_[A-Za-z0-9_]{20,})",
        r"\b(?P<secret>(?:github_pat_|glpat-|gldt-|pypi-AgE|nvapi-|dckr_pat_|xox[a-z]-|xapp-|hvs\.|ya29\.|SG\.|AIza)[\w.-]{16,})",
        r"\b(?P<secret>sk-(?=[\w-]*\d)[\w-]{20,})",
        r"\b(?P<secret>dapi[0-9a-f]{32})\b",
        r"\b(?P<secret>(?:AKIA|ASIA)[A-Z0-9]{16})\b",
        r"\b(?P<secret>eyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]*)?)",
        r"(?s)-----BEGIN [A-Z ]*PRIVATE KEY-----(?P<secret>.+?)(?:-----END|\Z)",
        # Random words: base64, and upper-case letters, lower-case letters and digits without a
        # separator.
        r"(?<![A-Za-z0-9+/])(?P<secret>(?=[A-Za-z+/]*\d)[A-Za-z0-9+/]{40,}={1,2})",
        r"(?<![A-Za-z0-9])(?P<secret>(?=[A-Za-z]*\d)(?=[0-9A-Z]*[a-z])(?=[0-9a-z]*[A-Z])"
        r"[A-Za-z0-9]{32,})(?![A-Za-z0-9])",
    )
]
#: Assignments of a variable: a line of a script or of a settings file, or a word of a command.
_SETS = (
    re.compile(r"^([+-]?\s*(?:export\s+|set\s+)?([A-Za-z_]\w*)=)\S.*$", re.MULTILINE),
    re.compile(r"(\b(?!KEYS?=)([A-Z][A-Z0-9_]*)=)(?:\"[^\"\n]*\"|'[^'\n]*'|[^\s\"'(]\S*)"),
)

#: Variables that describe how a run was made and hold no credential.
_HARMLESS = re.compile(
    r"PATH|PWD|HOME|USER|LOGNAME|HOSTNAME|SHELL|LANG|TZ|TMPDIR|TERM|DISPLAY|EDITOR|CC|CXX"
    r"|LC_\w+|LD_\w+|LIBRARY_PATH|CPATH|PYTHON\w+|VIRTUAL_ENV|VENV|CONDA_(PREFIX|DEFAULT_ENV)"
    r"|(CUDA|NVIDIA|CUBLAS|CUDNN|NCCL|NVTE|NVSHMEM|NVLINK|TORCH\w*|PYTORCH|TRITON|GLOO|UCX|UCC|FI"
    r"|OMP|MKL|KMP|GOMP|OPENBLAS|NUMEXPR|MALLOC|XLA|MEGATRON)_\w+"
    r"|XDG_CACHE_HOME|HF_(HOME|HUB_CACHE|HUB_OFFLINE|DATASETS_CACHE|DATASETS_OFFLINE)"
    r"|TRANSFORMERS_(CACHE|OFFLINE)|TOKENIZERS_PARALLELISM"
    r"|WANDB_(MODE|PROJECT|ENTITY|NAME|DIR|RUN_ID|DISABLED)"
    r"|MASTER_(ADDR|PORT)|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)"
    r"|RUN_DIR|CONTAINER|MOUNTS|MAX_REQUEUES|PREFLIGHT|PREFLIGHT_TIMEOUT|MIN_FREE_GIB"
    r"|SLURM_(?!SPANK)\w+|SLURMD_NODENAME|PBS_(JOBID|JOBNAME|QUEUE|NODEFILE|O_WORKDIR)|LSB_\w+"
    r"|LOADEDMODULES|APPTAINER_(NAME|CONTAINER)|SINGULARITY_(NAME|CONTAINER)"
)


def is_harmless(name: str) -> bool:
    """Returns whether an environment variable is known to hold no credential."""
    if not _HARMLESS.fullmatch(name):
        return False
    return name == "PWD" or not _is_secret_name(name)


def is_secret(name: str, value: str) -> bool:
    """Returns whether a value counts as a credential, by its name or its form."""
    return bool(value) and (_is_secret_name(name) or redact(value) != value)


def redact(text: str) -> str:
    """Returns a text in which everything that looks like a credential is replaced."""

    def without(found: re.Match[str]) -> str:
        start, end = (at - found.start() for at in found.span("secret"))
        if found["secret"].startswith(HIDDEN.split()[0]):
            return found[0]
        return found[0][:start] + HIDDEN + found[0][end:]

    for shape in _SHAPES:
        text = shape.sub(without, text)
    for sets in _SETS:
        text = sets.sub(
            lambda found: found[1] + HIDDEN if _is_secret_name(found[2]) else found[0], text
        )
    return text


def redact_word(word: str) -> str:
    """Returns a word of a command line without credentials.

    Args:
        word: any word. If it sets a name that marks a credential (also with ``--set`` or
            ``--export``), everything after the name is replaced.
    """
    for found in re.finditer(r"([\w-]+)=(?=.)", word):
        if _is_secret_name(found[1].lstrip("-")):
            return word[: found.end()] + HIDDEN
    return redact(word)


def environment(variables: Mapping[str, str] = os.environ) -> str:
    """Returns the environment as lines NAME=VALUE; only harmless variables have their values."""
    return "".join(
        f"{name}={redact(value) if is_harmless(name) else HIDDEN}\n".replace("\0", "")
        for name, value in sorted(variables.items())
    )


def _is_secret_name(name: str) -> bool:
    name = name.upper()
    return name.endswith(_ENDS) or not _PARTS.isdisjoint(re.split(r"[^A-Z0-9]+", name))
