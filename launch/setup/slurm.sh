#!/usr/bin/env bash
# What `make test-slurm` needs: Slurm's and munge's daemons, sshd and rsync (Debian's), and the
# launcher's own environment. Says why where it cannot have them; what needs them is skipped then, with
# the reason.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

launch/setup/bootstrap.sh launch || echo "setup: no .venv-launch, see above" >&2

PATH=$PATH:/usr/sbin:/sbin
export DEBIAN_FRONTEND=noninteractive

# $1: what they are for; then programs, --, packages
provide() {
    local what=$1 missing=
    shift
    while [[ $1 != -- ]]; do
        command -v "$1" >/dev/null || missing+=" $1"
        shift
    done
    shift
    if [[ -z $missing ]]; then return; fi
    if ((EUID != 0)) || ! command -v apt-get >/dev/null; then
        echo "setup: no$missing for $what, and only root can install that here (apt-get)" >&2
        return
    fi
    local install=(apt-get install --quiet --yes --no-install-recommends "$@")
    if ! "${install[@]}" >/dev/null 2>&1; then
        { apt-get update --quiet && "${install[@]}"; } >/dev/null ||
            echo "setup: $* could not be installed for $what, see above" >&2
    fi
}

provide "a real Slurm" slurmctld slurmd munged sbatch -- slurmctld slurmd slurm-client munge
provide "SSH" ssh rsync -- openssh-client rsync
if [[ -d /run/systemd/system ]]; then # the package would open port 22 for good
    command -v sshd >/dev/null || echo "setup: no sshd; it is not installed beside systemd" >&2
else
    provide "SSH" sshd -- openssh-server
fi
