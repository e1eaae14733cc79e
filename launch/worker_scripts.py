"""Scripts that run on the workers of a TPU VM; they are idempotent, because a lost connection repeats them.

The code is in ~/uae_jax, its packages in ~/uae_venv, and a run's pid, log and exit code in ~/uae_run.
"""

IS_RUNNING = """is_running() {
  [ -f ~/uae_run/pid ] && [ ! -f ~/uae_run/exit_code ] && kill -0 "$(cat ~/uae_run/pid)" 2>/dev/null
}
"""

ARCHIVE = "uae_jax.tar.gz"
UNPACK = """rm -rf ~/uae_jax
mkdir ~/uae_jax
tar -xzf ~/uae_jax.tar.gz -C ~/uae_jax
"""

CLONE = """git init --quiet ~/uae_jax
git -C ~/uae_jax fetch --quiet --depth=1 -- {repository} {ref}
git -C ~/uae_jax checkout --quiet --force --detach FETCH_HEAD
"""

# The image's Python is too old for the package; uv installs its own.
INSTALL = """export PATH="$HOME/.local/bin:$PATH"
command -v uv > /dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
[ -x ~/uae_venv/bin/python ] || uv venv --quiet --python=3.12 ~/uae_venv
uv pip install --quiet --python="$HOME/uae_venv/bin/python" --editable="$HOME/uae_jax[tpu]"
"""

MOUNT = """if ! mountpoint -q {folder}; then
  if ! command -v gcsfuse > /dev/null; then
    key=/usr/share/keyrings/cloud.google.asc
    curl -LsSf https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee $key > /dev/null
    echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" \\
      | sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
    sudo apt-get -o DPkg::Lock::Timeout=300 -qq update
    sudo apt-get -o DPkg::Lock::Timeout=300 -qq install -y gcsfuse
  fi
  sudo mkdir -p {folder}
  sudo chown "$USER" {folder}
  gcsfuse --implicit-dirs {bucket} {folder}
fi
"""

# Variables of the run arrive in a file, so that no process list shows them.
ENVIRONMENT = ".uae_env"

# Runs in its own session, so that it outlives ssh and signals also reach its data workers. The surrounding shell
# ignores SIGTERM, in order to write the exit code. The file of variables is removed last, because a lost connection
# repeats the script.
START = """if is_running; then rm -f ~/.uae_env; echo "$(hostname): already running"; exit 0; fi
# shellcheck disable=SC1090
if [ -f ~/.uae_env ]; then . ~/.uae_env; fi
{secrets}
mkdir -p ~/uae_run
rm -f ~/uae_run/exit_code
if [ -f ~/uae_run/log ]; then mv ~/uae_run/log ~/uae_run/log."$(date +%Y%m%d-%H%M%S)"; fi
cd ~/uae_jax
nohup setsid bash -c 'trap : TERM; "$@"; echo $? > ~/uae_run/exit_code' run \\
  ~/uae_venv/bin/uae-jax train {flags} > ~/uae_run/log 2>&1 < /dev/null &
echo $! > ~/uae_run/pid
rm -f ~/.uae_env
echo "$(hostname): started"
"""

STOP = """if ! is_running; then echo "$(hostname): nothing is running"; exit 0; fi
kill -TERM -- "-$(cat ~/uae_run/pid)"
for _ in $(seq {seconds}); do
  if ! is_running; then echo "$(hostname): stopped"; exit 0; fi
  sleep 1
done
kill -KILL -- "-$(cat ~/uae_run/pid)"
echo "$(hostname): killed, it did not end within {seconds} s"
"""

# `uae-jax train` exits with 0 both when finished and when preempted; its last line then starts with "preempted,".
STATUS = """if is_running; then s=running
elif [ ! -f ~/uae_run/pid ]; then s=none
elif [ ! -f ~/uae_run/exit_code ]; then s=lost
elif [ "$(cat ~/uae_run/exit_code)" != 0 ]; then s="failed $(cat ~/uae_run/exit_code)"
elif tail -n 20 ~/uae_run/log | grep -q '^preempted,'; then s=preempted
else s=finished; fi
echo "uae-run $(hostname) $s"
"""
