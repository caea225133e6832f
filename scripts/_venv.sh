# shellcheck shell=bash
# The scripts of this folder source this file: ensure_venv EXTRAS sets PYTHON to a Python in which the
# extras are installed. MEGATRON_S3_PYTHON names a Python that is used unchanged (for instance of a
# container); then nothing is installed.

# megatron-core has wheels for these versions of Python only.
_find_python() {
  local candidate
  for candidate in python3.12 python3.13 python3 \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13*/bin/python; do
    # Debian's python3 lacks ensurepip, which `venv` needs.
    if "$candidate" -c 'import ensurepip, sys; sys.exit(sys.version_info[:2] not in ((3, 12), (3, 13)))' \
      >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
  echo "error: no Python 3.12 or 3.13 with venv was found; megatron-core needs one." >&2
  echo "       Install one, for instance with 'pyenv install 3.12' or your distribution's" >&2
  echo "       python3.12 and python3.12-venv, or set MEGATRON_S3_PYTHON to one that has the packages." >&2
  return 1
}

# ensure_venv EXTRAS: a comma-separated list of pyproject.toml's optional dependencies.
ensure_venv() {
  local extras=$1 python stamp want
  if [ -n "${MEGATRON_S3_PYTHON:-}" ]; then
    PYTHON=$MEGATRON_S3_PYTHON
    return
  fi
  PYTHON=$PWD/.venv/bin/python
  # Images and CI systems often ask for no bytecode.  Every start would compile the modules of torch
  # and Megatron again, which takes longer than their import; so they are compiled once, in .venv.
  unset PYTHONDONTWRITEBYTECODE
  stamp=.venv/installed-$extras
  want=$(sha256sum pyproject.toml)
  if [ -x "$PYTHON" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then
    return
  fi
  if [ ! -x "$PYTHON" ]; then
    python=$(_find_python) || return 1
    echo "creating .venv with $("$python" -V)"
    "$python" -m venv .venv
  fi
  echo "installing into .venv: $extras (this takes a few minutes and about 5 GB the first time)"
  # Python compiles a module when it first imports it; most modules are never imported.
  "$PYTHON" -m pip install -qq --disable-pip-version-check --no-compile -e ".[$extras]" || {
    echo "error: pip could not install .[$extras]; its messages are above. Run the script again to retry." >&2
    return 1
  }
  echo "$want" >"$stamp"
}
