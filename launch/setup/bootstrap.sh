#!/usr/bin/env bash
# Makes the project's environment ready and says nothing when it already is.
#
#   launch/setup/bootstrap.sh           .venv for this host: cuda where nvidia-smi answers, else cpu
#   launch/setup/bootstrap.sh cpu|cuda  .venv for that kind of host
#   launch/setup/bootstrap.sh launch    .venv-launch: the launcher alone, without torch and vLLM
#
# A stamp inside the environment records what it was made from. It is removed before anything
# changes and written last, so an interrupted set-up is begun again from nothing.
set -euo pipefail

readonly UV_MINIMUM=0.9.0 # the oldest uv on the PATH that will do
readonly UV_PINNED=0.13.9 # the one installed under .bootstrap/ otherwise

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
cd "$root"

say() { printf 'setup: %s\n' "$*" >&2; }

die() {
    printf 'setup: %s\n' "$@" >&2
    exit 1
}

detect_host() {
    if timeout 20 nvidia-smi -L >/dev/null 2>&1; then echo cuda; else echo cpu; fi
}

# Python 3.12 ---------------------------------------------------------------------------------

# Prints the interpreter behind "$1" (for a virtual environment, the one it was made from),
# or fails. A shim, a half-removed installation or another version does not get past this.
real_python() {
    timeout 20 "$1" -I -c '
import ctypes, ssl, sys, venv
assert sys.version_info[:2] == (3, 12) and sys.implementation.name == "cpython"
print(getattr(sys, "_base_executable", sys.executable))' 2>/dev/null </dev/null
}

python_candidates() {
    type -aP python3.12 python3 python || true
    local prefix
    for prefix in "${PYENV_ROOT:-}" "${HOME:-}/.pyenv"; do
        printf '%s\n' "$prefix"/versions/3.12.*/bin/python | sort -rV
    done
    if type -P uv >/dev/null; then
        timeout 20 uv python find --system --no-python-downloads 3.12 2>/dev/null || true
    fi
    for prefix in /usr /usr/local /opt/python/* /opt/conda /opt/homebrew "${HOME:-}/.local" \
        "${HOME:-}"/{mini,}conda3 "${HOME:-}"/miniforge3; do
        printf '%s\n' "$prefix/bin/python3.12"
    done
}

find_python() {
    local candidate found
    while IFS= read -r candidate; do
        [[ -x $candidate ]] || continue
        if found=$(real_python "$candidate") && [[ -x $found ]]; then
            printf '%s\n' "$found"
            return
        fi
    done < <(python_candidates)
    die "no working CPython 3.12 found. Install one, for example with" \
        "    apt-get install python3.12 python3.12-dev python3.12-venv    (Ubuntu 24.04)" \
        "    pyenv install 3.12                                           (Debian and others)" \
        "    uv python install 3.12                                       (Debian and others)" \
        "and run this again."
}

# uv ------------------------------------------------------------------------------------------

uv_version() { timeout 20 "$1" --version 2>/dev/null | awk '{ print $2 }'; }

at_least() { [[ $(printf '%s\n' "$1" "$2" | sort -V | head -n 1) == "$1" ]]; }

find_uv() { # $1: a Python that can make a virtual environment
    local uv version
    if uv=$(type -P uv) && version=$(uv_version "$uv") && [[ -n $version ]] &&
        at_least "$UV_MINIMUM" "$version"; then
        printf '%s\n' "$uv"
        return
    fi
    uv=$root/.bootstrap/uv/bin/uv
    if [[ $(uv_version "$uv" || true) != "$UV_PINNED" ]]; then
        say "installing uv $UV_PINNED under .bootstrap/"
        rm -rf .bootstrap/uv
        "$1" -m venv .bootstrap/uv >&2 ||
            die "$1 cannot make a virtual environment." \
                "Install its venv module (Debian: apt-get install python3.12-venv), or uv >= $UV_MINIMUM."
        .bootstrap/uv/bin/python -m pip install --quiet "uv==$UV_PINNED" >&2 ||
            die "pip could not install uv; see above."
    fi
    printf '%s\n' "$uv"
}

# Settings meant for pip, said to uv.
translate_pip_settings() {
    local link links=()
    for link in ${PIP_FIND_LINKS:-}; do
        if [[ $link == *://* || -d $link ]]; then links+=("$link"); fi # uv refuses a missing folder
    done
    if ((${#links[@]})) && [[ -z ${UV_FIND_LINKS:-} ]]; then
        UV_FIND_LINKS=$(IFS=,; echo "${links[*]}")
        export UV_FIND_LINKS
    fi
    if [[ -n ${PIP_INDEX_URL:-} && -z ${UV_DEFAULT_INDEX:-} ]]; then
        export UV_DEFAULT_INDEX=$PIP_INDEX_URL
    fi
    export UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-${PIP_DEFAULT_TIMEOUT:-120}} # s; wheels reach 500 MB
    export UV_PYTHON_DOWNLOADS=never
}

# The environment -----------------------------------------------------------------------------

modules() { # what must be importable
    if [[ $host == launch ]]; then
        echo megatron_nft nemo_run
    else
        echo megatron_nft torch vllm megatron.core transformers math_verify pytest xdist ruff
    fi
}

healthy() {
    local names
    read -ra names < <(modules)
    "$venv/bin/python" -c '
import sys
from importlib.util import find_spec
sys.exit(not all(find_spec(name) for name in sys.argv[1:]))' "${names[@]}" >/dev/null 2>&1
}

ready() { [[ -f $stamp && $(<"$stamp") == "$wanted" ]] && healthy; }

# Whether uv can fetch torch's CPU build, which spares gigabytes of CUDA libraries.
cpu_torch_in_reach() {
    UV_HTTP_TIMEOUT=3 UV_HTTP_RETRIES=0 timeout 10 "$uv" pip install --python "$venv/bin/python" \
        --dry-run --no-deps --torch-backend cpu --constraints "$constraints" torch triton 2>&1 |
        grep -q 'torch==.*+cpu'
}

install() { # $@: what to install, and options for it
    "$uv" pip install --python "$venv/bin/python" --compile-bytecode \
        --build-constraints launch/setup/constraints-cpu.txt "$@"
}

install_host() { # host: cpu or cuda
    local options=(--constraints "$constraints" --overrides "launch/setup/overrides-$host.txt")
    if [[ $host == cpu ]] && cpu_torch_in_reach; then options+=(--torch-backend cpu); fi
    install "${options[@]}" --editable ".[$host,dev]"
    if [[ $host == cuda ]]; then install_transformer_engine; fi
}

# Transformer Engine's torch extension is a source package that compiles against the torch and the
# CUDA headers just installed; it needs a C++ compiler, but no CUDA toolkit.
install_transformer_engine() {
    PATH=$root/$venv/bin:$PATH NVTE_BUILD_USE_NVIDIA_WHEELS=${NVTE_BUILD_USE_NVIDIA_WHEELS:-1} \
        install --constraints "$constraints" \
        --no-build-isolation-package transformer-engine-torch transformer-engine-torch ||
        die "Transformer Engine's torch extension did not build; see above." \
            "It needs g++ with C++17 and the headers of Python 3.12."
}

install_launcher() { # the constraints are the whole environment
    install --no-deps --requirements "$constraints" --editable .
}

lock() { # held until this process ends, so that two set-ups never write at once
    mkdir -p .bootstrap
    exec 9>.bootstrap/lock
    if ! command -v flock >/dev/null || flock --nonblock 9; then return; fi
    say "waiting for another set-up of this checkout"
    flock 9
}

make_environment() {
    local python previous=
    python=$(find_python)
    translate_pip_settings
    uv=$(find_uv "$python")
    if [[ -f $stamp ]]; then previous=$(<"$stamp"); fi
    rm -f "$stamp"
    if [[ ${previous%% *} == "$host" ]] && healthy; then
        say "updating $venv ($host)"
    else
        say "making $venv ($host) with $("$python" -V); the first time takes minutes"
        rm -rf "$venv"
        "$uv" venv --quiet --no-project --prompt megatron-nft --python "$python" "$venv"
    fi
    if [[ $host == launch ]]; then install_launcher; else install_host; fi
    healthy || die "$venv was installed, but not all of these can be found in it: $(modules)"
    printf '%s\n' "$wanted" >"$stamp.new"
    mv "$stamp.new" "$stamp"
}

host=${1:-$(detect_host)}
case $host in
cpu | cuda) venv=.venv ;;
launch) venv=.venv-launch ;;
*) die "unknown host '$host'; choose cpu, cuda or launch" ;;
esac
[[ $(uname -s) == Linux ]] || die "only Linux is supported, this is $(uname -s)"

constraints=launch/setup/constraints-$host.txt
stamp=$venv/.megatron-nft-setup
sources=(pyproject.toml launch/setup/bootstrap.sh launch/setup/*-"$host".txt)
wanted="$host $({ echo "$root" && cat "${sources[@]}"; } | sha256sum | cut -d ' ' -f 1)"

ready && exit
lock
ready && exit
make_environment
say "$venv is ready"
