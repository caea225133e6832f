# shellcheck shell=bash
# Sourced by the scripts beside it: ensure_venv EXTRAS sets PYTHON to one that has them installed.
# MEGATRON_S3_PYTHON names a Python to use as it is (a container's, say): then nothing is installed.

# megatron-core's wheels exist for these versions of Python and no others.
_find_python() {
  local candidate
  for candidate in python3.12 python3.13 python3 \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13*/bin/python; do
    # ensurepip is what Debian leaves out of python3 and `venv` cannot do without.
    if "$candidate" -c 'import ensurepip, sys; sys.exit(sys.version_info[:2] not in ((3, 12), (3, 13)))' \
      >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
  echo "error: no Python 3.12 or 3.13 (with venv) found, and megatron-core needs one." >&2
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
  stamp=.venv/installed-$extras
  want=$(sha256sum pyproject.toml)
  if [ -x "$PYTHON" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then
    return
  fi
  if [ ! -x "$PYTHON" ]; then
    python=$(_find_python) || return 1
    echo "making .venv with $("$python" -V)"
    "$python" -m venv .venv
  fi
  echo "installing into .venv: $extras (the first time a few minutes and about 5 GB)"
  "$PYTHON" -m pip install -qq --disable-pip-version-check -e ".[$extras]" || {
    echo "error: pip could not install .[$extras]; what it says is above. Run the script again to retry." >&2
    return 1
  }
  echo "$want" >"$stamp"
}
