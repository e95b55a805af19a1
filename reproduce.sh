#!/usr/bin/env bash
# From nothing to the claims table: environment, data, training, decoding, report.
set -euo pipefail
FROM=$PWD
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$ROOT/requirements/environment.sh"

PROFILES=(smoke cpu cpu-full retrofit-screen retrofit gpu retrofit-gpu paper)
STAGES=(set-up data train decode report)
OPTIONS=(--profile --only --data --python --out --results --jobs --mix --help)

usage() {
    cat <<'HELP'
usage: ./reproduce.sh [OPTIONS]

Sets up an environment of its own (.venv, exact versions, no root), gets the data, trains, decodes and prints the table of
the claims. Every stage skips what is complete, so the same command continues a run that was stopped.

  --profile NAME   smoke     everything once, too small to mean anything      2 cores, 3 min
                   cpu       C1 to C4 on code, two ranks on text              2 cores, 40 min
                   cpu-full  every claim but C6, 3 seeds (experiments/README.md)  2 cores, 4 h
                   retrofit-screen  heads on a pretrained model: which objective   2 cores, 1 h
                   retrofit  the same: ranks, anchors, code and text          2 cores, 4 h
                   gpu       a 56.3M-parameter trunk                          one GPU
                   retrofit-gpu  heads on a pretrained model: the whole grid   one GPU
                   paper     from scratch on TinyStories                      one large GPU, a hub
                   (default: gpu where CUDA is present, else cpu)
  --only STAGES    comma list of set-up, data, train, decode, report (default: all; the set-up always comes first)
  --data DIR       a bundle of tokens made by `./dev bundle DIR`: nothing is downloaded
  --python PATH    use this interpreter, install nothing: only its versions are checked (Python 3.11, torch 2.11,
                   transformers 5.17, lightning 2.6, torchmetrics, numpy, omegaconf, or later; tested: Python 3.11,
                   torch 2.13.0, transformers 5.23.0, lightning 2.6.6)
  --out DIR        folder of the runs (default: runs/PROFILE in this repository)
  --results DIR    folder of the records (default: OUT/results); with it figures and README are redrawn from there
  --jobs N         cells trained at once (default: one per core, 8 at most; one per GPU)
  --mix yes        add to records of other code or data, which is refused otherwise
  --help           this page
HELP
}

# place PATH: as the sweep must write it, relative to the repository where it lies inside, so that records name no machine.
place() {
    local path=$1
    [[ $path == /* ]] || path=$FROM/$path
    [[ $path != "$ROOT"/* ]] || path=${path#"$ROOT"/}
    printf '%s' "$path"
}

main() {
    local profile="" only="" data="" python="" out="" results="" jobs="" mix="" option value stage
    local -a wanted=() arguments=()
    while (($#)); do
        option=$1
        shift
        case $option in
            -h | --help) usage; exit 0 ;;
            --*=*) value=${option#*=} option=${option%%=*} ;;
            --*)
                one_of option "$option" "${OPTIONS[@]}"
                (($#)) || usage_error "$option needs a value (./reproduce.sh --help)"
                value=$1
                shift
                ;;
            *) usage_error "'$option' is not an option; ./reproduce.sh --help lists them" ;;
        esac
        one_of option "$option" "${OPTIONS[@]}"
        [[ -n $value ]] || usage_error "$option needs a value (./reproduce.sh --help)"
        case $option in
            --profile) one_of --profile "$value" "${PROFILES[@]}"; profile=$value ;;
            --only) only=$value ;;
            --data) data=$value ;;
            --python) python=$value ;;
            --out) out=$value ;;
            --results) results=$value ;;
            --jobs) [[ $value =~ ^[1-9][0-9]*$ ]] || usage_error "--jobs $value: write a number of at least 1"; jobs=$value ;;
            --mix) one_of --mix "$value" yes no; mix=$value ;;
            *) usage_error "$option takes no value" ;;
        esac
    done
    IFS=, read -ra wanted <<<"${only//setup/set-up}"
    only=""
    for stage in ${wanted[@]+"${wanted[@]}"}; do
        [[ -n $stage ]] || continue
        one_of --only "$stage" "${STAGES[@]}"
        [[ $stage == set-up ]] || only+=${only:+,}$stage
    done
    [[ -z $data || -d $(cd "$FROM" && cd "$data" 2>/dev/null && pwd) ]] ||
        usage_error "--data $data: there is no such folder; ./dev bundle DIR makes one"
    if [[ -z $profile ]]; then
        profile=cpu
        ! have_cuda || profile=gpu
    elif [[ $profile == gpu || $profile == retrofit-gpu || $profile == paper ]] && ! have_cuda; then
        say "note: no CUDA device was found; profile $profile would take days on a processor (--profile cpu takes 40 min)"
    fi
    [[ $python != */* || $python == /* ]] || python=$FROM/$python

    cd "$ROOT"
    say "profile: $profile"
    trap 'printf "\nstopped during the set-up; the same command goes on where it was\n" >&2; exit 130' INT
    prepare "[1/5] set-up" "$python"
    trap - INT
    if ((${#wanted[@]})) && [[ -z $only ]]; then return 0; fi

    arguments=("profile=$profile" "out=$(if [[ -n $out ]]; then place "$out"; else say "runs/$profile"; fi)")
    [[ -z $only ]] || arguments+=("only=$only")
    [[ -z $data ]] || arguments+=("data=$(place "$data")")
    [[ -z $results ]] || arguments+=("results=$(place "$results")")
    [[ -z $jobs ]] || arguments+=("jobs=$jobs")
    [[ -z $mix ]] || arguments+=("mix=$mix")
    # The sweep prints stages 2 to 5 and says how to continue when it is stopped.
    exec "$PYTHON" -m experiments.sweep "${arguments[@]}"
}

main "$@"
