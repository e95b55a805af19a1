# Sourced by ./reproduce.sh and ./dev: the one place that makes or checks the Python environment.
#
# The environment is .venv with exactly the versions of requirements/cpu.txt (no GPU; no CUDA package is installed) or
# requirements/cuda.txt. .venv/.complete is written last, so a set-up that was killed goes on where it was.
# Needs ROOT (the repository). Sets PYTHON. CPDLM_PYTHON=PATH: use that interpreter and install nothing.

VENV="$ROOT/.venv"
LOCKS="$ROOT/requirements"
PYTHON="$VENV/bin/python"
if [[ ${CPDLM_PYTHON:-} == */* && $CPDLM_PYTHON != /* ]]; then CPDLM_PYTHON=$PWD/$CPDLM_PYTHON; fi
# PyTorch's own index has the CPU builds; every other package comes from the index that pip is configured for.
CPU_INDEX="https://download.pytorch.org/whl/cpu"
# What `--python` must have, with the tested versions. No more is needed to train and decode on a bundle of tokens.
NEEDED=(python:3.11:3.11 torch:2.11:2.13.0 transformers:5.17:5.23.0 lightning:2.6:2.6.6 torchmetrics:1.8:1.9.0 numpy:2.0:2.4.6
        omegaconf:2.3:2.4.0)

say() { printf '%s\n' "$*"; }
# The user's mistake: exit 2.
usage_error() { printf 'error: %s\n' "$*" >&2; exit 2; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

sane_environment() {
    export PYTHONUNBUFFERED=1 PYTHONNOUSERSITE=1 PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1
    export HF_HUB_DISABLE_TELEMETRY=1 MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=1 TOKENIZERS_PARALLELISM=false
    unset PYTHONHOME
}

# nearest WORD CANDIDATE...: prints the candidate with the smallest edit distance, if that is small enough to be meant.
nearest() {
    local word=$1 best="" least candidate i j cost up left across
    least=$(((${#word} + 2) / 2))
    shift
    for candidate in "$@"; do
        local -a row=()
        for ((j = 0; j <= ${#candidate}; j++)); do row[j]=$j; done
        for ((i = 1; i <= ${#word}; i++)); do
            across=${row[0]}
            row[0]=$i
            for ((j = 1; j <= ${#candidate}; j++)); do
                cost=1
                [[ ${word:i-1:1} == "${candidate:j-1:1}" ]] && cost=0
                up=${row[j]} left=${row[j - 1]}
                row[j]=$((across + cost))
                ((up + 1 < row[j])) && row[j]=$((up + 1))
                ((left + 1 < row[j])) && row[j]=$((left + 1))
                across=$up
            done
        done
        if ((row[${#candidate}] < least)); then
            least=${row[${#candidate}]} best=$candidate
        fi
    done
    printf '%s' "$best"
}

# one_of WHAT WORD CANDIDATE...: exits 2 unless WORD is a candidate, naming the nearest.
one_of() {
    local what=$1 word=$2 candidate near
    shift 2
    for candidate in "$@"; do [[ $word == "$candidate" ]] && return 0; done
    near=$(nearest "$word" "$@")
    usage_error "$what '$word' is not one of: $*${near:+; did you mean $near?}"
}

# version_at_least VERSION LEAST: compares the leading numbers of each dotted part ("2.11.0a0+cu130" is 2.11.0).
version_at_least() {
    local -a have need
    local i a b
    IFS=. read -ra have <<<"${1%%+*}"
    IFS=. read -ra need <<<"$2"
    for ((i = 0; i < ${#need[@]}; i++)); do
        a=${have[i]:-0} b=${need[i]}
        a=${a%%[!0-9]*}
        ((10#${a:-0} > 10#$b)) && return 0
        ((10#${a:-0} < 10#$b)) && return 1
    done
    return 0
}

have_cuda() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }

lock_variant() { if have_cuda; then say cuda; else say cpu; fi; }

# --- a given interpreter ---------------------------------------------------------------------------------------------

# check_python PATH: exits 2 unless that interpreter has what NEEDED lists. Installs nothing.
check_python() {
    local path=$1 found entry name least tested version wrong=""
    command -v "$path" >/dev/null 2>&1 || usage_error "--python $path: there is no such program"
    found=$("$path" -c '
import platform, sys
from importlib import metadata
print("python", platform.python_version())
for name in sys.argv[1:]:
    try:
        print(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        pass
' torch transformers lightning torchmetrics numpy omegaconf 2>&1) ||
        usage_error "--python $path: it does not run as Python: ${found##*$'\n'}"
    for entry in "${NEEDED[@]}"; do
        IFS=: read -r name least tested <<<"$entry"
        version=$(awk -v name="$name" '$1 == name { print $2; exit }' <<<"$found")
        if [[ -z $version ]]; then
            wrong+=" $name is missing (needs $least or later);"
        elif ! version_at_least "$version" "$least"; then
            wrong+=" $name is $version (needs $least or later);"
        elif [[ $version != "$tested"* ]]; then
            say "      note: $name $version; tested with $tested"
        fi
    done
    [[ -z $wrong ]] || usage_error "--python $path:${wrong%;}. Install them there, or leave out --python and this script makes its own environment"
}

# --- our own environment ---------------------------------------------------------------------------------------------

# find_python: prints a Python >= 3.11 that can make environments; exits 1 saying what to install.
find_python() {
    local candidate path old="" bare=""
    for candidate in python3.11 python3.12 python3.13 python3; do
        path=$(command -v "$candidate" 2>/dev/null) || continue
        "$path" -c 'pass' >/dev/null 2>&1 || continue
        if ! "$path" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            old="$candidate is $("$path" -c 'import platform; print(platform.python_version())')"
        elif ! "$path" -c 'import ensurepip, venv' 2>/dev/null; then
            bare=$candidate
        else
            say "$path"
            return 0
        fi
    done
    if [[ -n $bare ]]; then
        local name
        name=$("$bare" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
        fail "$bare cannot make an environment (no ensurepip); on Debian and Ubuntu: apt install $name-venv. Or give an interpreter that has the packages: ./reproduce.sh --python PATH"
    fi
    fail "no Python 3.11 or later was found${old:+ ($old)}; install python3.11 (on Debian and Ubuntu with python3.11-venv), or give one with --python PATH"
}

# environment_key VARIANT: what .complete holds when the environment is whole; fails if .venv has no working Python.
environment_key() {
    "$PYTHON" -c '
import hashlib, pathlib, platform, sys
print(sys.argv[1], platform.python_version(), hashlib.sha256(pathlib.Path(sys.argv[2]).read_bytes()).hexdigest())
' "$1" "$LOCKS/$1.txt" 2>/dev/null
}

is_complete() {
    local key
    key=$(environment_key "$1") && [[ -f $VENV/.complete && $(<"$VENV/.complete") == "$key" ]]
}

# retry COMMAND...: three tries with growing waits, for hiccups of a package registry.
retry() {
    local try wait=${CPDLM_RETRY_WAIT:-5}
    for try in 1 2 3; do
        "$@" && return 0
        ((try == 3)) && return 1
        say "      try $try of 3 failed; again in $((wait * try * try)) s"
        sleep $((wait * try * try))
    done
}

pip_install() { "$PYTHON" -m pip install --no-deps --progress-bar off "$@" >>"$VENV/setup.log" 2>&1; }

# install_torch VARIANT: torch alone and first, so that nothing later can pull in another build of it.
install_torch() {
    grep '^torch==' "$LOCKS/$1.txt" >"$VENV/torch.txt"
    if [[ $1 == cpu ]]; then
        # One try with pip as it is configured (a mirror, a local wheel), then with the index of the CPU builds.
        pip_install -r "$VENV/torch.txt" || retry pip_install --extra-index-url "$CPU_INDEX" -r "$VENV/torch.txt"
    else
        retry pip_install -r "$VENV/torch.txt"
    fi
}

cuda_packages() { "$PYTHON" -m pip list --format=freeze 2>/dev/null | grep -E '^(nvidia-|cuda-|triton)' || true; }

install_failed() {
    tail -n 15 "$VENV/setup.log" >&2
    fail "$1; the whole log is $VENV/setup.log. The same command goes on where this one stopped"
}

# make_environment VARIANT: fills .venv. A half-made one of the same kind is continued, another kind is replaced.
make_environment() {
    local variant=$1 base found
    mkdir -p "$ROOT/.cache"
    if command -v flock >/dev/null 2>&1; then
        exec 9>"$ROOT/.cache/setup.lock"
        flock -n 9 || { say "      waiting for another set-up in this folder"; flock 9; }
        if is_complete "$variant"; then exec 9>&-; return 0; fi
    fi
    rm -f "$VENV/.complete"
    if [[ -f $VENV/.variant && $(<"$VENV/.variant") != "$variant" ]] || { [[ -e $VENV ]] && ! "$PYTHON" -m pip --version >/dev/null 2>&1; }; then
        say "      .venv is of another kind or broken: made again"
        rm -rf "$VENV"
    fi
    if [[ ! -x $PYTHON ]]; then
        base=$(find_python) || exit 1
        say "      $("$base" --version) -> .venv"
        "$base" -m venv "$VENV" || fail "$base -m venv $VENV failed (see above)"
    fi
    say "$variant" >"$VENV/.variant"
    : >"$VENV/setup.log"
    say "      $(grep -m1 -o '^torch==[^ ;]*' "$LOCKS/$variant.txt")"
    install_torch "$variant" || install_failed "torch could not be installed"
    say "      the other packages of requirements/$variant.txt"
    retry pip_install -r "$LOCKS/$variant.txt" || install_failed "the packages could not be installed"
    if [[ $variant == cpu ]]; then
        found=$(cuda_packages)
        [[ -z $found ]] || fail "CUDA packages came into the CPU environment (${found//$'\n'/, }); remove .venv and run the same command again"
    fi
    "$PYTHON" -m pip check >>"$VENV/setup.log" 2>&1 || say "      note: pip check has something to say, at the end of $VENV/setup.log"
    environment_key "$variant" >"$VENV/.complete.new" || fail ".venv has no working Python; remove it and run the same command again"
    mv "$VENV/.complete.new" "$VENV/.complete"
    if command -v flock >/dev/null 2>&1; then exec 9>&-; fi
}

# prepare LABEL [PATH]: sets PYTHON to a checked interpreter (PATH, or CPDLM_PYTHON) or to .venv, made where needed.
prepare() {
    local label=$1 given=${2:-${CPDLM_PYTHON:-}} variant began=$SECONDS
    sane_environment
    if [[ -n $given ]]; then
        check_python "$given"
        PYTHON=$given
        say "$label: skipped: $given is used, nothing is installed"
        return 0
    fi
    variant=$(lock_variant)
    unset PYTHONPATH
    if is_complete "$variant"; then
        say "$label: skipped: .venv is complete ($variant)"
        return 0
    fi
    say "$label ..."
    make_environment "$variant"
    say "$label: done ($((SECONDS - began)) s)"
}
