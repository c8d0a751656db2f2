#!/usr/bin/env bash
# What the test of the page in a browser needs: Chromium, and Playwright in an environment of its own, .venv-browser.
# Does nothing if both are there. Chromium comes from Debian's packages, which takes root; elsewhere install it yourself
# (any chromium, chromium-browser or google-chrome on the PATH will do).
#   bash scripts/setup_browser.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

playwright=1.65.2
environment=.venv-browser

has_browser() { command -v chromium || command -v chromium-browser || command -v google-chrome; }
if ! has_browser >/dev/null; then
    if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
        echo "error: no chromium on the PATH; install it (apt install chromium)" >&2
        exit 1
    fi
    echo "setup: installing chromium"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null
fi
if [ "$("$environment/bin/python" -c 'from importlib.metadata import version; print(version("playwright"))' 2>/dev/null)" != \
    "$playwright" ]; then
    echo "setup: installing playwright into $environment"
    [ -x "$environment/bin/pip" ] || python3.11 -m venv "$environment"
    "$environment/bin/python" -m pip install --quiet --disable-pip-version-check "playwright==$playwright"
fi
