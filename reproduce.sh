#!/usr/bin/env bash
# From nothing to the verdicts: environment, data, training, decoding, report.
set -euo pipefail
FROM=$PWD
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$ROOT/requirements/environment.sh"

usage() {
    cat <<'HELP'
usage: ./reproduce.sh [OPTIONS]

Makes its own environment (.venv, exact versions, no root), gets the data, trains, decodes, and prints the verdicts.
Every stage skips what is complete, so the same command continues a run that was stopped.

  --profile NAME   smoke            everything once, too small to mean anything   2 cores, 3 min
                   cpu              C1 to C4 on code, two ranks on prose          2 cores, 40 min
                   cpu-full         every claim but C6, three seeds               2 cores, 4 h
                   scratch-long     C1 and C2, trained ten times as long          2 cores, 3 h
                   seeds            C3 and C4 with eight seeds                    2 cores, 2 h
                   retrofit-screen  heads on a pretrained model: which objective  2 cores, 1 h
                   retrofit         heads on a pretrained model: ranks and text   2 cores, 4 h
                   retrofit-own     the same on text that the model writes        2 cores, 2 h
                   joints           what rank is worth by kind of joint           2 cores, 30 min
                   gpu              a 56.3M-parameter model                       one GPU
                   retrofit-gpu     heads on a pretrained model, the whole grid   one GPU
                   paper            from scratch on TinyStories                   one large GPU, a hub
                   (default: gpu where CUDA is present, else cpu)
  --only STAGES    comma list of data, train, decode, report (default: all); set-up: only the environment
  --data DIR       tokens made by `./dev bundle DIR`: nothing is downloaded
  --python PATH    use this interpreter and install nothing
  --out DIR        folder of the runs (default: runs/PROFILE)
  --results DIR    folder of the records (default: OUT/results); figures and README are redrawn from there
  --jobs N         cells trained at once (default: one per core, 8 at most; one per GPU)
HELP
}

# place PATH: as seen from ROOT, where the sweep runs; inside ROOT it stays relative, so that records name no machine.
place() {
    local path=$1
    [[ $path == /* ]] || path=$FROM/$path
    printf '%s' "${path#"$ROOT"/}"
}

words=() profile="" only=""
while (($#)); do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --*=*) key=${1%%=*} value=${1#*=} ;;
        --*)
            (($# > 1)) || usage_error "$1 needs a value (./reproduce.sh --help)"
            key=$1 value=$2
            shift
            ;;
        *) usage_error "'$1' is not an option; write --profile $1, or ./reproduce.sh --help" ;;
    esac
    shift
    case $key in
        --python) CPDLM_PYTHON=$value; [[ $value != */* || $value == /* ]] || CPDLM_PYTHON=$FROM/$value ;;
        --profile) profile=$value ;;
        --only) only=$value ;;
        --data | --out | --results) words+=("${key#--}=$(place "$value")") ;;
        *) words+=("${key#--}=$value") ;; # the sweep knows the rest, and names the nearest where it does not
    esac
done
if [[ -z $profile ]]; then
    profile=cpu
    ! have_cuda || profile=gpu
elif [[ $profile == *gpu || $profile == paper ]] && ! have_cuda; then
    say "note: no CUDA device was found; profile $profile would take days on a processor (--profile cpu takes 40 min)"
fi
cd "$ROOT"
say "profile: $profile"
trap 'printf "\nstopped during the set-up; the same command goes on where it was\n" >&2; exit 130' INT
prepare "[1/5] set-up"
trap - INT
[[ $only != set-up ]] || exit 0
[[ -z $only ]] || words+=("only=$only")
exec "$PYTHON" -m experiments.sweep "profile=$profile" ${words[@]+"${words[@]}"}
