#!/usr/bin/env bash
# A virtual environment with the packages that jobs need, as they were tested together. The code itself comes with each job.
#     cluster/deploy/install.sh FOLDER [EXTRA ...]      extras of pyproject.toml: s3, gs, flow, captions
set -euo pipefail
folder=${1:?usage: install.sh FOLDER [EXTRA ...]}
shift
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python3 -c 'import sys
sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, found %d.%d" % sys.version_info[:2])'
[ -x "$folder/bin/python" ] || python3 -m venv "$folder"

# Dependencies without the project, so that nothing but these two files need be here.
requirements=$(mktemp)
trap 'rm -f "$requirements"' EXIT
"$folder/bin/python" - "$@" > "$requirements" <<'PYTHON'
import sys, tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
unknown = sorted(set(sys.argv[1:]) - set(extras))
if unknown:
    sys.exit(f"extras {', '.join(unknown)}: pyproject.toml has {', '.join(extras)}")
print(*project["dependencies"], *(each for name in sys.argv[1:] for each in extras[name]), sep="\n")
PYTHON
# torch==2.13.0 is the CUDA build on PyPI for Linux, with CUDA's libraries as packages: the machine needs the driver only.
"$folder/bin/python" -m pip install --disable-pip-version-check --no-cache-dir ${PIP_OPTIONS:-} \
    -c constraints.txt -r "$requirements"
