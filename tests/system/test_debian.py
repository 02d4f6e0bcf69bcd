"""The Debian disk as a user makes and uses it: built by the command, published, booted in real virtual machines."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deskgrid.testing.tiny_template import template_cache
from tests.system.harness import System

# The disk is built by the command, then each job boots a whole distribution, in software emulation.
pytestmark = [pytest.mark.full, pytest.mark.timeout(1800)]
LIMIT_S = 300.0

SCRIPT = """
. /etc/os-release
echo "hello from $ID $VERSION_ID, $(hostname)"
echo oops >&2
pwd
ls /dev/hda /dev/hdb /dev/hdd
cat /context/input.txt /made-by-user-data 2>/dev/null
cat /etc/of-the-recipe && analyse && id -un physicist
python3 -c 'import cloudinit' && for program in rsync socat wget bc; do command -v "$program"; done
echo '6 * 7' | bc >answer
systemctl --failed --no-legend --plain
"""
PRINTED = """\
hello from debian 12, %s
/scratch
/dev/hda
/dev/hdb
/dev/hdd
from the user
%stext
analysed
physicist
/usr/bin/rsync
/usr/bin/socat
/usr/bin/wget
/usr/bin/bc
"""
OWN_USER_DATA = """\
#cloud-config
write_files:
  - path: /made-by-user-data
    content: "by the user's own user-data\\n"
"""
TALK = """
{ echo "page of job $DESKGRID_JOB"; cat /context/services.json; } >page
until [ -e /scratch/stop ]; do sleep 1; done
cat /scratch/synced/file
"""


RECIPE = """\
size = "3GiB"
packages = ["bc"]
commands = ["useradd --create-home physicist", "systemctl enable like-cernvm"]

[files]
"/usr/local/sbin/like-cernvm" = "like-cernvm.sh"
"/etc/systemd/system/like-cernvm.service" = "like-cernvm.service"
"/usr/local/bin/analyse" = "analyse.sh"
"/etc/of-the-recipe" = { text = "text\\n" }
"""


LIKE_CERNVM = """\
#!/bin/sh
# What CernVM does with volumes (hepix_functions and amiconfig.sh of cernvm/amiconfig), in its order.
for device in /dev/sr0 /dev/sr1 /dev/hdd; do
    [ "$(blkid -o value -s TYPE "$device")" = iso9660 ] || continue
    mkdir -p /mnt/look && mount -o ro "$device" /mnt/look || continue
    if [ -e /mnt/look/prolog.sh ] || [ -e /mnt/look/context.sh ]; then
        echo "would be sourced" >/dev/console
    elif [ -e /mnt/look/ec2/latest/user-data ] && [ -e /mnt/look/ec2/latest/meta-data.json ]; then
        sed -n '/#!.*sh.*after/,/^exit/p' /mnt/look/ec2/latest/user-data >/run/after
    fi
    umount /mnt/look
done
[ ! -s /run/after ] || sh /run/after
"""
UNIT = """\
[Unit]
After=multi-user.target
[Service]
Type=oneshot
ExecStart=/usr/local/sbin/like-cernvm
[Install]
WantedBy=graphical.target multi-user.target
"""


def build(recipe: Path, disk: Path) -> Path:
    """Build a disk by the command, from the packages of our cache."""
    command = [sys.executable, "-m", "deskgrid", "disk", "build", str(recipe), "-o", str(disk)]
    subprocess.run(command, env=dict(os.environ, DESKGRID_CACHE=str(template_cache().parent)), timeout=1500, check=True)
    return disk


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "analyse.sh").write_text("#!/bin/sh\necho analysed\n")
    (folder / "analyse.sh").chmod(0o755)
    (folder / "like-cernvm.sh").write_text(LIKE_CERNVM)
    (folder / "like-cernvm.sh").chmod(0o755)
    (folder / "like-cernvm.service").write_text(UNIT)
    (folder / "debian.toml").write_text(RECIPE)
    return folder / "debian.toml"


@pytest.fixture(scope="module")
def built(recipe: Path) -> Path:
    return build(recipe, recipe.with_suffix(".qcow2"))


def test_same_recipe_gives_the_same_disk_bit_for_bit(recipe: Path, built: Path, tmp_path: Path) -> None:
    again = build(recipe, tmp_path / "again.qcow2")
    subprocess.run(["cmp", built, again], check=True)
    raw, system = tmp_path / "raw", tmp_path / "system"
    subprocess.run(["qemu-img", "convert", "-O", "raw", again, raw], check=True)
    subprocess.run(["dd", f"if={raw}", f"of={system}", "bs=1M", "skip=1", "conv=sparse", "status=none"], check=True)
    subprocess.run(["e2fsck", "-fn", system], check=True, capture_output=True)


@pytest.fixture
def vm_system(system: System, tmp_path: Path) -> Iterator[System]:
    """A grid with one QEMU worker."""
    system.environment["DESKGRID_CACHE"] = str(tmp_path / "cache")
    system.add_worker(DESKGRID_WORKER_DRIVERS="qemu", DESKGRID_WORKER_ACCELERATOR="tcg")
    yield system
    system.nothing_left(limit_s=LIMIT_S)


def publish(system: System, disk: Path, *, agent: bool) -> str:
    """Publish the disk for our agent or for cloud-init; return its name."""
    name = "debian" if agent else "cloud"
    system.cli("disk", "import", disk, "--name", name, *(["--agent"] if agent else []))
    return name


def job_of(system: System, script: str, disk: str, user_data: str = "", **machine: str) -> Path:
    file = system.job_file(**{"disk": f'"{disk}"', "scratch": '"1GiB"', "memory": '"512MiB"', **machine}, limits="attempts = 1")
    context = file.parent / "context"
    (context / "context.sh").write_text(script)
    (context / "input.txt").write_text("from the user\n")
    if user_data:
        (context / "user-data").write_text(user_data)
    return file


def test_job_runs_in_the_debian_disk_and_its_results_come_back(vm_system: System, built: Path) -> None:
    job = job_of(vm_system, SCRIPT, publish(vm_system, built, agent=True))
    vm_system.cli("run", job, "-o", vm_system.folder / "out")
    assert vm_system.cli("job", "logs", "1").stdout == PRINTED % ("debian", "")
    assert vm_system.cli("job", "logs", "1", "--stderr").stdout == "oops\n"
    assert (vm_system.folder / "out" / "answer").read_text() == "42\n"


def test_cloud_init_runs_the_users_own_user_data_which_need_not_run_the_agent(vm_system: System, built: Path) -> None:
    job = job_of(vm_system, SCRIPT, publish(vm_system, built, agent=False), OWN_USER_DATA)
    vm_system.cli("run", job, "-o", vm_system.folder / "out")
    assert vm_system.cli("job", "logs", "1").stdout == PRINTED % ("job-1-attempt-1", "by the user's own user-data\n")


@pytest.mark.parametrize("agent", [True, False], ids=["agent", "cloud-init"])
def test_ssh_scp_and_rsync_reach_the_machine_through_the_overlay(vm_system: System, built: Path, agent: bool) -> None:
    job = job_of(vm_system, TALK, publish(vm_system, built, agent=agent), network='"overlay"', offer='["ssh:22"]')
    vm_system.cli("job", "submit", job)
    assert vm_system.cli("ssh", "job-1", "id -un; cat /scratch/page; exit 7", expect=7).stdout.startswith("root\npage of job 1\n")
    (vm_system.folder / "folder").mkdir()
    (vm_system.folder / "folder" / "file").write_bytes(b"synced by rsync\n")
    (vm_system.folder / "big").write_bytes(os.urandom(1_000_000))
    vm_system.cli("scp", "big", "job-1:/scratch/big")
    vm_system.cli("scp", "job-1:/scratch/big", "back")
    assert (vm_system.folder / "back").read_bytes() == (vm_system.folder / "big").read_bytes()
    rsync = ["rsync", "-e", f"{sys.executable} -m deskgrid ssh", "-a", "folder/", "job-1:/scratch/synced/"]
    subprocess.run(rsync, cwd=vm_system.folder, env=vm_system.environment, timeout=120, check=True)
    vm_system.cli("ssh", "job-1", "touch", "/scratch/stop")
    vm_system.wait_for(1, "completed", limit_s=LIMIT_S)
    vm_system.wait_to_print(1, "synced by rsync")


def test_job_runs_in_a_system_that_is_contextualised_as_cernvm_is(vm_system: System, built: Path) -> None:
    vm_system.cli("disk", "import", built, "--name", "cernvm", "--cernvm")
    job = job_of(vm_system, "ls -A /; cat /context/input.txt; ls -A /context", "cernvm")
    vm_system.cli("run", job, "-o", vm_system.folder / "out")
    said = vm_system.cli("job", "logs", "1").stdout
    assert "from the user\n.deskgrid\ncontext.sh\nfake.toml\ninput.txt\n" in said
    assert "would be sourced" not in vm_system.cli("job", "logs", "1", "--console").stdout
