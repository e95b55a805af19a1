# Sourced by ./reproduce.sh and ./dev: makes or checks the Python environment, which pip alone cannot.
#
# .venv holds exactly the versions of requirements/cpu.txt (no GPU) or requirements/cuda.txt. .venv/.complete is written
# last, so the same command goes on where a killed set-up was. Needs ROOT; sets PYTHON.
# CPDLM_PYTHON=PATH uses that interpreter and installs nothing.

VENV="$ROOT/.venv"
PYTHON="$VENV/bin/python"
CPU_INDEX="https://download.pytorch.org/whl/cpu" # has the CPU builds of torch; all else comes from pip's own index
if [[ ${CPDLM_PYTHON:-} == */* && $CPDLM_PYTHON != /* ]]; then CPDLM_PYTHON=$PWD/$CPDLM_PYTHON; fi

say() { printf '%s\n' "$*"; }
usage_error() { printf 'error: %s\n' "$*" >&2; exit 2; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

have_cuda() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }

# find_python: prints a Python of at least 3.11 that can make environments.
find_python() {
    local candidate
    for candidate in python3.11 python3.12 python3.13 python3; do
        if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            say "$candidate"
            return 0
        fi
    done
    fail "no Python 3.11 or later that can make environments was found; on Debian and Ubuntu: apt install python3.11-venv." \
        "Or give one that has the packages: ./reproduce.sh --python PATH"
}

# environment_key VARIANT: what .complete holds when the environment is whole.
environment_key() {
    "$PYTHON" -c 'import platform; print(platform.python_version())' && cksum <"$ROOT/requirements/$1.txt" && say "$1"
}

is_complete() { [[ -f $VENV/.complete && "$(environment_key "$1" 2>/dev/null)" == "$(<"$VENV/.complete")" ]]; }

# install WHAT PIP_ARGUMENTS...
install() {
    local what=$1
    shift
    say "      $what"
    "$PYTHON" -m pip install --no-deps --no-input --progress-bar off "$@" >>"$VENV/setup.log" 2>&1 </dev/null && return 0
    tail -n 15 "$VENV/setup.log" >&2
    fail "$what could not be installed; the log is $VENV/setup.log. The same command goes on where this one stopped"
}

make_environment() {
    local variant=$1 base
    rm -f "$VENV/.complete"
    if ! "$PYTHON" -m pip --version >/dev/null 2>&1 || [[ "$(cat "$VENV/.variant" 2>/dev/null)" != "$variant" ]]; then
        rm -rf "$VENV"
        base=$(find_python) || exit 1
        "$base" -m venv "$VENV" || fail "$base -m venv $VENV failed (see above)"
        say "$variant" >"$VENV/.variant"
    fi
    : >"$VENV/setup.log"
    # torch comes alone and first, so that nothing later can bring another build of it.
    grep '^torch==' "$ROOT/requirements/$variant.txt" >"$VENV/torch.txt"
    if [[ $variant == cuda ]]; then
        install torch -r "$VENV/torch.txt"
    else
        (install torch -r "$VENV/torch.txt") 2>/dev/null ||
            install "torch, from its own index" --extra-index-url "$CPU_INDEX" -r "$VENV/torch.txt"
    fi
    install "the other packages of requirements/$variant.txt" -r "$ROOT/requirements/$variant.txt"
    install "the command cpdlm" --editable "$ROOT"
    environment_key "$variant" >"$VENV/.complete"
}

# prepare LABEL: PYTHON is CPDLM_PYTHON, checked, or .venv, made where it is not complete.
prepare() {
    local label=$1 variant=cpu began=$SECONDS
    export PYTHONUNBUFFERED=1 PYTHONNOUSERSITE=1 PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1
    export HF_HUB_DISABLE_TELEMETRY=1 MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=1
    unset PYTHONHOME
    if [[ -n ${CPDLM_PYTHON:-} ]]; then
        PYTHON=$CPDLM_PYTHON
        "$PYTHON" "$ROOT/requirements/check.py" || exit 2
        say "$label: skipped: $PYTHON is used, nothing is installed"
        return 0
    fi
    unset PYTHONPATH
    ! have_cuda || variant=cuda
    if is_complete "$variant"; then
        say "$label: skipped: .venv is complete ($variant)"
        return 0
    fi
    mkdir -p "$ROOT/.cache"
    say "$label ..."
    (
        if command -v flock >/dev/null 2>&1; then
            flock -n 9 || { say "      waiting for another set-up in this folder (30 min at most)"; flock -w 1800 9; } ||
                fail "another set-up has held $ROOT/.cache/setup.lock for 30 minutes; stop it, then type the same command"
        fi
        is_complete "$variant" || make_environment "$variant"
    ) 9>"$ROOT/.cache/setup.lock" || exit 1
    say "$label: done ($((SECONDS - began)) s)"
}
