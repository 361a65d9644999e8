#!/usr/bin/env bash
# debian_packages.sh PROGRAM=PACKAGE...: installs the Debian packages whose programs are missing, as root or by sudo; a
# package that cannot be installed then is a failure. Who may not install anything is told what to ask for.
set -euo pipefail
missing=()
for each in "$@"; do
  command -v "${each%%=*}" > /dev/null || missing+=("${each#*=}")
done
[ ${#missing[@]} -eq 0 ] && exit 0
if [ "$(id -u)" -eq 0 ]; then
  as_root=()
elif sudo -n true 2> /dev/null; then
  as_root=(sudo -n)
else
  echo "NOT INSTALLED, for want of root: ${missing[*]}. The worlds that need them cannot be used, and their tests are" >&2
  echo "skipped, until somebody runs: apt-get install ${missing[*]}" >&2
  exit 0
fi
"${as_root[@]}" apt-get update
"${as_root[@]}" apt-get install -y --no-install-recommends "${missing[@]}"
