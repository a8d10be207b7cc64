# Source this (bash): options that a header declares, and commands that run one after another. Each is printed as it can
# be typed, timed and recorded; a signal that ends the script is handed on to the command, which saves.
# shellcheck disable=SC2015,SC2154

dry_run=""      # print the commands and run nothing
history=""      # file of JSON lines, one for every command that was run
place=""        # folder below $root in which the commands run
verbose=""      # show what the programs print; otherwise it goes to logs/ beside the history
child="" caught=""

fail() {
    echo "error: $*" >&2
    exit 2
}

# ------------------------------------------------------------------------------------------------------------- options

# Set a variable for each option given: --data-dir X sets data_dir=X; an option without a value is set to 1.
read_options() {  # script whose header declares the options, words of the command line
    local _script=$1 _declared _option _value
    _declared=$(sed -n 's/^#   \(-n, \)\{0,1\}\(--[a-z0-9-]*\) \([A-Z"]*\).*/\2 \3/p' "$_script")
    shift
    while [ $# -gt 0 ]; do
        _option=${1%%=*}
        [ "$_option" != -n ] || _option=--dry-run
        if [[ $_option == -h || $_option == --help ]]; then
            sed -n '2,/^$/s/^# \{0,1\}//p' "$_script"
            exit
        elif grep -qx -e "$_option " <<< "$_declared"; then
            [[ $1 != *=* ]] || fail "$_option takes no value"
            _value=1
        elif ! grep -qx -e "$_option [A-Z\"]*" <<< "$_declared"; then
            fail "unknown option $1$(nearest "$_option" "$_declared"); see --help"
        elif [[ $1 == *=* ]]; then
            _value=${1#*=}
        else
            [[ $# -gt 1 && ($2 != --* || $_option == *-args) ]] || fail "$_option: expected a value"
            _value=$2
            shift
        fi
        _option=${_option#--}
        printf -v "${_option//-/_}" %s "$_value"
        shift
    done
}

# ' (did you mean "x"?)' for the declared option closest to a mistyped one; nothing where none is close.
nearest() {  # option, declared ones
    python3 - "$@" 2> /dev/null << 'END' || true
import difflib, sys
found = difflib.get_close_matches(sys.argv[1], [line.split()[0] for line in sys.argv[2].splitlines()], n=1)
print(f' (did you mean "{found[0]}"?)' if found else "", end="")
END
}

# Check that an option was given a whole number, if anything; drop its leading zeros.
whole_number() {  # option, least value
    local _name=${1//-/_}
    [ -n "${!_name}" ] || return 0
    [[ ${!_name} =~ ^[0-9]{1,18}$ ]] && ((10#${!_name} >= $2)) ||
        fail "--$1: expected a whole number of at least $2, got '${!_name}'"
    printf -v "$_name" %d $((10#${!_name}))
}

# Split the value of an option into the array `words`, at the spaces outside of quotes.
split() {  # option, value
    local text word
    words=()
    [[ $2 =~ [^[:space:]] ]] || return 0
    text=$(xargs printf '%s\n' <<< "$2" 2> /dev/null && echo end) || fail "--$1: cannot be split into flags: $2"
    while IFS= read -r word; do words+=("$word"); done <<< "${text%?end}"
}

# The path without links and dots, whether it exists or not.
absolute() { "$fewlabel_python" -c 'import os, sys; print(os.path.realpath(sys.argv[1]))' "$1"; }

# How many GPUs CUDA_VISIBLE_DEVICES or else nvidia-smi lists; at least 1.
visible_gpus() {
    local listed=${CUDA_VISIBLE_DEVICES-$(nvidia-smi --list-gpus 2> /dev/null | sed -n 's/^GPU .*/&,/p')} count
    count=$(tr ',' '\n' <<< "$listed" | grep -Evc '^[[:space:]]*(-1)?[[:space:]]*$') || true
    echo $((count > 0 ? count : 1))
}

# Set `gpus`, the words that start a program on them (`launch`) and those that make its output anew (`anew`).
# shellcheck disable=SC2034  # the chains read both
settle_launch() {
    [[ -n $dry_run || ${gpus:-1} -le $(visible_gpus) ]] ||
        fail "--gpus $gpus: $(visible_gpus) at most on this machine; give fewer, or leave it out"
    gpus=${gpus:-$(visible_gpus)}
    launch=(python)
    [ "$gpus" = 1 ] || launch=(torchrun --standalone "--nproc_per_node=$gpus")
    anew=()
    [ -z "$overwrite" ] || anew=(--overwrite)
}

# ------------------------------------------------------------------------------------------------------------ commands

# Keep others out of the output folder until this script and the command under way have ended: both have the lock open.
hold() {
    mkdir -p "$1" 2> /dev/null && [ -w "$1" ] || fail "cannot create the folder $1 or write into it; choose another"
    exec 9>> "$1/.lock"
    "$fewlabel_python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2> /dev/null ||
        fail "$1 is in use by a run that is still going on; wait for it, or choose another output folder"
    trap 'pass_on TERM' TERM
    trap 'pass_on USR1' USR1
    trap 'pass_on INT' INT
}

# Hand a signal on to the command under way and follow it. Ctrl-C the terminal sends to both.
pass_on() {
    caught=$1
    [ -n "$child" ] || exit $((128 + $(kill -l "$1")))
    [ "$1" = INT ] || kill -s "$1" "$child" 2> /dev/null || true
}

# Announce a command.
step() {  # name in the history, folder below $root, what it does
    name_of_step=$1
    printf '\n# %s\n' "$3"
    if [[ $place != "$2" && $place$2 == *..* ]]; then  # outside of $root
        echo "cd $(quoted "$(absolute "$root/$2")")"
    elif [ "$place" != "$2" ]; then
        echo "cd $(sed -E 's#[^/]+/?#../#g' <<< "$place")$2"
    fi
    place=$2
}

# Print a command and run it; its last two words may be `>> FILE`. If it fails, the script ends with its status. Progress
# bars, warnings and errors stay on the terminal.
run() {
    local text log="" started status=0 took
    text=$(quoted "$@")
    echo "$text"
    [ -z "$dry_run" ] || return 0
    if [ "${*: -2:1}" = '>>' ]; then
        log=${*: -1}
        set -- "${@:1:$#-2}"
    elif [[ -z $verbose && -n $history ]]; then
        log=$(dirname "$history")/logs/${name_of_step//[^a-zA-Z0-9]/_}.log
        mkdir -p "${log%/*}"
        echo "\$ $text" >> "$log"
    fi
    started=$(microseconds) caught=""
    (
        trap - INT
        cd "$root/$place" || exit
        [ -z "$log" ] || exec >> "$log"
        exec "$@"
    ) &
    child=$!
    wait $child || status=$?
    while [ -n "$caught" ] && kill -0 $child 2> /dev/null; do  # a signal ends `wait` before the command
        status=0
        wait $child || status=$?
    done
    child=""
    [[ -z $caught || $status -gt 0 ]] || status=$((128 + $(kill -l "$caught")))
    took=$((($(microseconds) - started) / 1000))
    printf '{"name": "%s", "command": "%s", "status": %d, "started": %d, "seconds": %d.%03d}\n' "$name_of_step" \
        "$(printf %s "$text" | tr '\n\t' '  ' | sed 's/[\\"]/\\&/g')" "$status" "${started%??????}" \
        $((took / 1000)) $((took % 1000)) >> "$history"
    if [ "$status" -gt 0 ]; then
        echo "stopped in \"$name_of_step\" (exit status $status); the same command continues from here${log:+; log: $log}" >&2
        exit "$status"
    fi
    echo "# $((took / 1000)).$((took / 100 % 10)) s"
}

# Run a command whose output is meant to be read.
show() { verbose=1 run "$@"; }

# Print words as they can be typed.
quoted() {
    local word text="" quote="'" escaped="'\"'\"'"
    for word in "$@"; do
        case $word in
            '>>') ;;
            '' | *[!A-Za-z0-9@%+=:,./_-]*) word="'${word//$quote/$escaped}'" ;;
        esac
        text+=" $word"
    done
    echo "${text# }"
}

microseconds() { tr -d ., <<< "${EPOCHREALTIME:-$(date +%s).000000}"; }
