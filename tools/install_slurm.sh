#!/bin/sh
# Installs Debian's Slurm, for the tests that run real jobs in it (they start their own daemons and end them again).
# For machines that nobody minds, such as those of CI: needs root and apt. Where it cannot, it says why and ends well;
# the tests are then skipped.
set -u

give_up() {
    echo "Slurm is not installed: $1. The tests that need it are skipped."
    exit 0
}

command -v slurmctld > /dev/null && command -v slurmd > /dev/null && command -v munged > /dev/null && exit 0
[ "$(id -u)" = 0 ] || give_up "this user is not root"
command -v apt-get > /dev/null || give_up "there is no apt-get here"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# No daemon is started by the installation, where Debian asks this file.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' > "$policy" && chmod 755 "$policy"
    trap 'rm -f "$log" "$policy"' EXIT
fi
apt() {
    DEBIAN_FRONTEND=noninteractive timeout "$1" apt-get -o DPkg::Lock::Timeout=60 -o Acquire::Retries=1 "$2" $3 > "$log" 2>&1
}
packages="--yes --no-install-recommends slurmctld slurmd slurm-client munge"
# The lists of packages may be there, and be newer than none.
apt 180 install "$packages" || { apt 120 update "" && apt 180 install "$packages"; } || give_up "$(tail -n 1 "$log")"
echo "Slurm is installed: $(slurmctld -V)"
