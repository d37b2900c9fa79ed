#!/usr/bin/env bash
# Makes or completes a virtual environment from requirements-dev.lock. Safe to interrupt and to repeat.
# usage: scripts/venv.sh DIRECTORY [PYTHON]    PYTHON: an interpreter or a version such as 3.13; default: the first >= 3.11
# exit status: 0 done; 2 no suitable Python; 1 the installation failed
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1 wanted=${2:-}
# None of these may turn a plain installation into something else; uv must not fetch interpreters of its own.
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0
export UV_PYTHON_DOWNLOADS=never UV_NO_PROGRESS=1
unset VIRTUAL_ENV CONDA_PREFIX PYTHONHOME PYTHONPATH UV_PROJECT_ENVIRONMENT

# Prints the path of an interpreter >= 3.11, or fails. A shim that is on PATH but cannot run does not count.
interpreter() {
  "$1" -c 'import sys; assert sys.version_info >= (3, 11); print(sys.executable)' 2>/dev/null
}

find_python() {
  local name
  if [[ $wanted =~ ^3\.[0-9]+$ ]]; then
    interpreter "python$wanted" || interpreter "$(pyenv prefix "$wanted" 2>/dev/null)/bin/python"
    return
  elif [ -n "$wanted" ]; then
    interpreter "$wanted"
    return
  fi
  for name in python3 python3.13 python3.12 python3.11; do
    if interpreter "$name"; then return; fi
  done
  for name in 3.13 3.12 3.11; do
    if interpreter "$(pyenv prefix $name 2>/dev/null)/bin/python"; then return; fi
  done
  return 1
}

# Puts the pinned uv into $venv/.uv with whatever pip there is: the interpreter's own, or the one of a scratch environment.
install_uv() {
  local lock=requirements-uv.lock target=$venv/.uv pip scratch=$venv/.pip
  if cmp -s "$lock" "$target/$lock" && "$target/bin/uv" --version >/dev/null 2>&1; then return; fi
  rm -rf "$target"
  if "$python" -m pip --version >/dev/null 2>&1; then
    pip=$python
  elif "$python" -m venv "$scratch" >/dev/null 2>&1; then
    pip=$scratch/bin/python
  else
    rm -rf "$scratch"
    cat >&2 <<MESSAGE
$python has neither pip nor the venv module, so nothing can be installed.
Install one of them (Debian, Ubuntu: apt-get install python3-venv), or name another interpreter: make PYTHON=/path/to/python3
MESSAGE
    return 2
  fi
  "$pip" -m pip install -qq --require-hashes --no-deps --only-binary=:all: --target "$target" -r "$lock"
  rm -rf "$scratch"
  cp "$lock" "$target/$lock"
}

# uv reads no pip configuration: hand over the index and the certificates that pip is set up with.
adopt_pip_configuration() {
  local index cert
  if [ -z "${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-}" ]; then
    index=${PIP_INDEX_URL:-$("$python" -m pip config get global.index-url 2>/dev/null || true)}
    if [ -n "$index" ]; then export UV_DEFAULT_INDEX=$index; fi
  fi
  if [ -z "${SSL_CERT_FILE:-}" ]; then
    cert=${PIP_CERT:-$("$python" -m pip config get global.cert 2>/dev/null || true)}
    if [ -n "$cert" ]; then export SSL_CERT_FILE=$cert; fi
  fi
}

if ! python=$(find_python); then
  echo "No usable Python${wanted:+ \"$wanted\"} was found: it takes 3.11 or newer. Name one: make PYTHON=/path/to/python3" >&2
  exit 2
fi
same_version() { [ "$("$1" -c 'import sys; print(sys.version_info[:2])' 2>/dev/null)" = "$("$2" -c 'import sys; print(sys.version_info[:2])')" ]; }
# A marker stands while packages are written: what an interruption left half written is made anew.
if [ ! -e "$venv/.incomplete" ] && [ -e "$venv/bin/python" ] && interpreter "$venv/bin/python" >/dev/null \
  && { [ -z "$wanted" ] || same_version "$venv/bin/python" "$python"; }; then
  echo "Bringing $venv up to date with requirements-dev.lock"
else
  echo "Downloading the packages of requirements-dev.lock (about 200 MB, once) into $venv for $("$python" --version)"
  rm -rf "$venv"
  mkdir -p "$venv"
fi
touch "$venv/.incomplete"
install_uv
adopt_pip_configuration
uv=$venv/.uv/bin/uv
[ -x "$venv/bin/python" ] || "$uv" venv --quiet --no-project --allow-existing --python "$python" "$venv"
"$uv" pip sync --quiet --compile-bytecode --require-hashes --python "$venv/bin/python" requirements-dev.lock
rm "$venv/.incomplete"
