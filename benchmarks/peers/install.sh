# Sourced on the GPU host: installs what pack.sh packed. The peers' packages go into a folder that only $PEERS_PYTHON
# sees, so that our own jobs keep the packages of the host. usage: source benchmarks/peers/install.sh DIR
for part in ours peers; do
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "/tmp/$part-site" "$1/$part"/*.whl
done
cat >/tmp/peers-python <<'RUN'
#!/bin/sh
PYTHONPATH=/tmp/peers-site:$PYTHONPATH exec python3 "$@"
RUN
chmod +x /tmp/peers-python
export PYTHONPATH=platform:/tmp/ours-site:${PYTHONPATH:-} PEERS_PYTHON=/tmp/peers-python
