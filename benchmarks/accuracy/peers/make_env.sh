#!/usr/bin/env bash
# Makes the environment of a peer from its pinned list, NAME.txt beside this script, whose first line names the Python.
#   make_env.sh NAME FOLDER     makes FOLDER/NAME/bin/python; what went wrong is in FOLDER/NAME.log
set -u
here=$(cd "$(dirname "$0")" && pwd)
name=$1 folder=$2 list="$here/$1.txt"
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
log="$folder/$name.log"
ready="$folder/$name/.ready"
cmp -s "$list" "$ready" && exit 0

version=$(sed -n '1s/^# python //p' "$list")
python=
for candidate in "python$version" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python; do
    "$candidate" -c '' 2>/dev/null && python=$candidate && break
done
if [ -z "$python" ]; then
    echo "there is no Python $version on this machine" | tee "$log"
    exit 1
fi
rm -rf "${folder:?}/$name"
# Every package is pinned, so none is chosen here. rpy2 is wanted by Cellcano's preprocessing alone: it need not find R.
export RPY2_CFFI_MODE=ABI
{ "$python" -m venv "$folder/$name" && "$folder/$name/bin/python" -m pip install --no-deps -r "$list"; } >"$log" 2>&1
status=$?
if [ $status -ne 0 ]; then
    echo "$name could not be made: $(grep -v '^$' "$log" | tail -1)"
    exit 1
fi
cp "$list" "$ready"
