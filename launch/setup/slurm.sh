#!/usr/bin/env bash
# What `make test-slurm` needs: Slurm's and munge's daemons, sshd and rsync (Debian's), and the
# launcher's own environment. Says why where it cannot have them; the tests are skipped then, with the
# reason.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

launch/setup/bootstrap.sh launch || echo "setup: no .venv-launch, see above" >&2

PATH=$PATH:/usr/sbin:/sbin
missing=
for name in slurmctld slurmd munged sbatch sshd rsync; do command -v "$name" >/dev/null || missing=$name; done
if [[ -z $missing ]]; then exit; fi
if ((EUID != 0)) || ! command -v apt-get >/dev/null; then
    echo "setup: Slurm is not installed, and only root can install it here (apt-get)" >&2
    exit
fi
packages=(slurmctld slurmd slurm-client munge openssh-server openssh-client rsync)
install=(apt-get install --quiet --yes --no-install-recommends "${packages[@]}")
export DEBIAN_FRONTEND=noninteractive
if ! "${install[@]}" >/dev/null 2>&1; then
    { apt-get update --quiet && "${install[@]}"; } >/dev/null ||
        echo "setup: Slurm could not be installed, see above" >&2
fi
