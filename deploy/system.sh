#!/bin/sh
# What the project needs from the system: installs what is missing where it can, else fails with the command to run.
#
#   deploy/system.sh setup    a Python with venv, for `make setup`; prints the interpreter's path as the only line of stdout
#   deploy/system.sh test     what the checks need besides
set -eu

OLDEST_MINOR=11 # Python 3.11
NEWEST_MINOR=14

say() { echo "system: $*" >&2; }

# The package manager's install command, or nothing where none is known.
install_command() {
    if command -v apt-get >/dev/null 2>&1; then echo "apt-get install -y --no-install-recommends"
    elif command -v dnf >/dev/null 2>&1; then echo "dnf install -y"
    elif command -v zypper >/dev/null 2>&1; then echo "zypper --non-interactive install"
    elif command -v pacman >/dev/null 2>&1; then echo "pacman -S --noconfirm"
    elif command -v brew >/dev/null 2>&1; then echo "brew install"
    fi
}

# "" as root or with brew, "sudo -n" where sudo asks for no password; fails otherwise.
privilege() {
    if [ "$(id -u)" = 0 ] || [ "$1" = "brew" ]; then echo ""
    elif command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then echo "sudo -n"
    else return 1
    fi
}

# need WHAT PACKAGE...: installs the first package that the manager knows, or ends with the command to run.
need() {
    what=$1
    shift
    command=$(install_command)
    if [ -z "$command" ]; then
        say "$what is missing and no known package manager was found; install it, then run this again"
        exit 1
    fi
    if prefix=$(privilege "${command%% *}"); then
        for package in "$@"; do
            say "$what is missing; running: $prefix $command $package"
            # shellcheck disable=SC2086  # the words of both commands are meant to split
            if $prefix env DEBIAN_FRONTEND=noninteractive $command "$package" >&2; then return 0; fi
        done
        say "$what could not be installed; see the message above"
    else
        say "$what is missing and installing it needs root"
    fi
    say "run one of these, then run this again:"
    for package in "$@"; do say "    sudo $command $package"; done
    exit 1
}

# The first Python that is new enough: the one named by PYTHON, then python3, then the versioned names.
find_python() {
    minor=$NEWEST_MINOR
    candidates="${PYTHON:-} python3"
    while [ "$minor" -ge "$OLDEST_MINOR" ]; do
        candidates="$candidates python3.$minor"
        minor=$((minor - 1))
    done
    for candidate in $candidates; do
        path=$(command -v "$candidate" 2>/dev/null) || continue
        if "$path" -c "import sys; sys.exit(sys.version_info < (3, $OLDEST_MINOR))" 2>/dev/null; then
            echo "$path"
            return 0
        fi
    done
    return 1
}

check_python() {
    if ! python=$(find_python); then
        say "found $(python3 --version 2>&1 || true); Python 3.$OLDEST_MINOR or newer is needed"
        need "Python 3.$OLDEST_MINOR or newer" python3.13 python3.12 python3.11 python3
        python=$(find_python) || { say "still no Python 3.$OLDEST_MINOR; set PYTHON=/path/to/python3"; exit 1; }
    fi
    if ! "$python" -c "import ensurepip, venv" 2>/dev/null; then # Debian ships these two apart
        version=$("$python" -c "import sys; print('%d.%d' % sys.version_info[:2])")
        need "the venv module of Python $version" "python$version-venv" python3-venv
        "$python" -c "import ensurepip, venv" || { say "$python still has no venv module; set PYTHON to another one"; exit 1; }
    fi
    echo "$python"
}

# need_program PROGRAM PACKAGE...
need_program() {
    program=$1
    shift
    command -v "$program" >/dev/null 2>&1 || need "the program '$program'" "$@"
}

case "${1:-}" in
setup) check_python ;;
test)
    need_program git git
    need_program curl curl # the pages of the documentation ask the service with it
    need_program redis-server redis-server redis # the event stores' contract runs against a real one
    need_program prometheus prometheus golang-github-prometheus # every query of the dashboard is evaluated
    need_program promtool prometheus golang-github-prometheus
    need_program chromium chromium chromium-browser # the console is used in it
    if [ "$(id -u)" = 0 ]; then # `ray up` is run on machines in namespaces
        need_program ssh openssh-client openssh
        if [ -d /run/systemd/system ] && ! command -v sshd >/dev/null 2>&1; then # installing it would start it
            say "sshd is missing, so the test of 'ray up' is left out; openssh-server has it, and listens on port 22"
        else
            need_program sshd openssh-server openssh
        fi
        need_program rsync rsync
        need_program ip iproute2 iproute
    fi
    ;;
*)
    say "usage: deploy/system.sh setup|test"
    exit 2
    ;;
esac
