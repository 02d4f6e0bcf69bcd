"""Workflows of a real Snakemake, run by a real worker as processes."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from deskgrid.testing.reaper import follow
from deskgrid.testing.tiny_template import tiny_template
from tests.system.harness import System, until

QUICK = ("--executor", "deskgrid", "--jobs", "20", "--seconds-between-status-checks", "1", "--latency-wait", "1", "--nocolor")
SMALL = ("--default-resources", "mem_mb=64", "disk_mb=64")


@pytest.fixture(autouse=True)
def worker(system: System) -> None:
    system.add_worker(DESKGRID_WORKER_DRIVERS="process", DESKGRID_WORKER_CPUS="4")


class User:
    """Somebody with a folder and a Snakefile in it."""

    def __init__(self, system: System, snakefile: str, name: str = "work") -> None:
        self.system = system
        self.folder = system.folder / name
        self.folder.mkdir()
        (self.folder / "Snakefile").write_text(snakefile)
        self.environment = {**system.environment, "XDG_CACHE_HOME": str(system.folder / "cache")}

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "snakemake", *QUICK, *SMALL, *arguments]

    def run(self, *arguments: str, expect: int = 0) -> str:
        """Run Snakemake to its end and return what it said."""
        done = subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == expect, f"{done.stdout}\n{self.system.logs()}"
        return done.stdout

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.folder / "snakemake.log").open("wb") as log:
            process = subprocess.Popen(
                self.command(*arguments), cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        follow(process.pid)
        return process

    def read(self, name: str) -> str:
        return (self.folder / name).read_text()

    def jobs(self) -> list[tuple[str, str]]:
        """Return names and states of the jobs that the server has."""
        return sorted((one["spec"]["name"], one["state"]) for one in self.system.json("job", "list"))


SCATTER = """
SAMPLES, STEPS = ["a", "b"], [1, 2, 3]

rule all:
    input: "report/all.txt", "flag", "kept"

rule count:
    input: "data/{sample}.txt"
    output: temp("counts/{sample}/{step}.txt")
    log: "logs/{sample}.{step}.log"
    benchmark: "times/{sample}.{step}.tsv"
    threads: 2
    params: text="it's"
    shell: "echo {params.text:q} {threads} >{log}; head -n {wildcards.step} {input} | cat - <(echo $OMP_NUM_THREADS) >{output}"

rule gather:
    input: expand("counts/{sample}/{step}.txt", sample=SAMPLES, step=STEPS)
    output: "report/all.txt", directory("report/parts")
    shell:
        \"\"\"
        test ! -e data
        sort -T {resources.tmpdir} {input} >{output[0]}
        mkdir -p {output[1]}/deep && split -l 4 {output[0]} {output[1]}/deep/ && ln -s deep/aa {output[1]}/first
        ln -s . {output[1]}/round
        \"\"\"

rule touched:
    input: "report/parts"
    output: touch("flag"), protected("kept")
    resources: runtime=5, deskgrid_processes=50
    shell: "cat {input}/first >kept; echo over >>{input}/first"
"""


def test_scatter_and_gather_bring_their_files_and_a_second_run_does_nothing(system: System) -> None:
    user = User(system, SCATTER)
    (user.folder / "data").mkdir()
    for sample in ("a", "b"):
        (user.folder / "data" / f"{sample}.txt").write_text("".join(f"{sample}{line}\n" for line in range(5)))
    said = user.run()
    lines = user.read("report/all.txt").splitlines()
    assert lines == ["2"] * 6 + ["a0"] * 3 + ["a1"] * 2 + ["a2"] + ["b0"] * 3 + ["b1"] * 2 + ["b2"]
    assert user.read("report/parts/first") == "2\n" * 4 == user.read("kept"), "a copy of the input was changed, not the input"
    assert user.read("flag") == "" and (user.folder / "kept").stat().st_mode & 0o222 == 0
    assert user.read("logs/b.3.log") == "it's 2\n"
    assert not list((user.folder / "counts").rglob("*.txt")), "temporary files were removed"
    header, values = user.read("times/a.1.tsv").splitlines()
    assert header.startswith("s\th:m:s\t") and 0 <= float(values.split("\t")[0]) < 60
    assert "9 of 9 steps (100%) done" in said
    assert not [path for path in user.folder.rglob("*") if path.name.endswith(".part")]
    assert user.jobs() == [], "what came back is removed at the server"
    assert "Nothing to be done" in user.run()
    system.nothing_left()


FAILING = """
rule all:
    input: "good", "bad", "none", "link", "leads", "file", "timed"

rule good:
    output: "good"
    shell: "echo evil >../out/Snakefile; mkdir ../out/.git; echo fine >{output}"

rule bad:
    output: "bad"
    log: "logs/bad.log"
    retries: 1
    resources: mem_mb=lambda wildcards, attempt: 40 * attempt
    shell: "echo partly >{output}; echo {resources.mem_mb} >{log}; for n in $(seq 30); do printf 'line\\\\033[2J%s\\\\n' $n; done; false | true"

rule none:
    output: "none"
    shell: "true"

rule link:
    output: "link"
    shell: "echo secret >other; mv other ../out/other; ln -s other {output}"

rule leads:
    output: directory("leads")
    shell: "mkdir {output}; echo secret >../out/other; ln -s ../other {output}/inside"

rule file:
    output: directory("file")
    shell: "echo x >{output}"

rule timed:
    output: "timed"
    benchmark: "timed.tsv"
    shell: "echo x >{output}; mkdir ../times/0"
"""


def test_what_failed_is_told_and_nothing_but_what_rules_declare_is_written(system: System) -> None:
    user = User(system, FAILING)
    said = user.run("--keep-going", expect=1)
    assert user.read("good") == "fine\n" and user.read("Snakefile") == FAILING
    assert user.read("logs/bad.log") == "80\n", "the second try had more memory"
    assert "has failed: the command ended with 1" in said and "line\\x1b[2J30" in said and "line\\x1b[2J10\n" not in said
    assert "\033" not in said
    for told in (
        "did not make none",
        "made as link is not a file",
        "in leads, inside is a link that leads out of it",
        "made as file is not a folder",
        "does not tell how long rule timed took",
    ):
        assert told in said
    left = {path.name for path in user.folder.iterdir()} - {".snakemake"}
    assert left == {"Snakefile", "good", "logs"}
    [*logs] = (user.folder / ".snakemake" / "deskgrid_logs").iterdir()
    assert any(log.read_text().startswith("line\\x1b[2J1\nline\\x1b[2J2\n") for log in logs)


FIRST = "rule first:\n output: 'first'\n shell: 'x'\n"
REFUSED = {
    "rule a:\n output: 'a'\n run: open(output[0], 'w')": "rule a is a `run:`",
    "rule a:\n output: 'a'\n script: 'a.py'": "rule a is a `script:`",
    "rule a:\n output: pipe('a')\n shell: 'x'\nrule b:\n input: 'a'\n output: 'b'\n shell: 'x'": "pipe()",
    "rule a:\n output: 'a', '../b'\n shell: 'x'": "'../b', which is not below the folder",
    "rule a:\n input: '/etc/passwd'\n output: 'a'\n shell: 'x'": "'/etc/passwd', which is not below the folder",
    "envvars: 'HOME'\nrule a:\n output: 'a'\n shell: 'x'": "owners of PCs would see HOME",
}


def test_what_cannot_be_is_refused_before_anything_is_sent(system: System) -> None:
    for number, (rules, told) in enumerate(REFUSED.items()):
        user = User(
            system, f"rule all:\n input: 'first', '{'b' if 'pipe' in rules else 'a'}'\n{FIRST}{rules}\n", f"refused{number}"
        )
        (user.folder / "a.py").touch()
        assert told in user.run(expect=1)
    user = User(system, FIRST)
    for option, told in (
        (("--sdm", "conda"), "does not deploy conda"),
        (("--shared-fs-usage", "none"), "leave out --shared-fs-usage"),
        (("--deskgrid-data-from", "much"), "'much' is not a size"),
        (("--set-resources", "first:deskgrid_dsik=tiny"), "deskgrid_dsik is not known"),
        (("--deskgrid-disk", "nowhere"), "nowhere"),
    ):
        assert told in user.run(*option, expect=1)
    assert user.jobs() == []


GROUPED = """
localrules: here

rule all:
    input: "second.txt", "here.txt", "large.txt", "parts.txt"

rule first:
    output: temp("a/first.txt")
    group: "pair"
    shell: "echo 1 >{output}"

rule second:
    input: "a/first.txt", "input.txt"
    output: "second.txt"
    group: "pair"
    threads: 3
    benchmark: "second.tsv"
    shell: "cat {input} >{output}; echo $OMP_NUM_THREADS >>{output}; echo $TOKEN >>{output}"

rule here:
    input: "second.txt"
    output: "here.txt"
    run: open(output[0], "w").write(open(input[0]).read())

rule large:
    input: "deep/large file.txt"
    output: "large.txt"
    shell: "wc -c <{input:q} >{output}; test -L {input:q}"

checkpoint split:
    input: "input.txt"
    output: directory("split")
    shell: "mkdir {output}; for part in x y; do cat {input} >{output}/$part; done"

rule part:
    input: "split/{part}"
    output: "parts/{part}"
    shell: "echo {wildcards.part} $(cat {input}) >{output}"

rule parts:
    input: lambda _: [f"parts/{path.name}" for path in Path(checkpoints.split.get().output[0]).iterdir() if path.name[0] != "."]
    output: "parts.txt"
    shell: "sort {input} >{output}"

envvars: "TOKEN"
"""


def test_groups_are_one_job_and_large_inputs_are_data_and_local_rules_run_here(system: System) -> None:
    system.add_worker("own", owner="admin", DESKGRID_WORKER_DRIVERS="process", DESKGRID_WORKER_CPUS="4")
    user = User(system, GROUPED)
    user.environment["TOKEN"] = "abc"
    (user.folder / "deep").mkdir()
    (user.folder / "input.txt").write_text("2\n")
    (user.folder / "deep" / "large file.txt").write_text("x" * 5000)
    user.run("--deskgrid-trust", "mine", "--deskgrid-data-from", "4KiB")
    assert user.read("second.txt") == "1\n2\n3\nabc\n" == user.read("here.txt")
    assert user.read("large.txt").strip() == "5000"
    assert user.read("parts.txt") == "x 2\ny 2\n"
    assert not (user.folder / "a" / "first.txt").exists() and (user.folder / "second.tsv").exists()
    assert system.json("data", "list") == [], "what was put for the jobs is removed"
    assert "Nothing to be done" in user.run("--deskgrid-trust", "mine")


SLOW = """
rule all:
    input: "a", "b"

rule slow:
    output: "{name}"
    params: word=config.get("word", "")
    shell: "echo {wildcards.name} {params.word} >{output}; sleep {config[sleep]}"
"""


def run_and_kill(user: User, *arguments: str) -> None:
    """Start Snakemake, and kill it when it knows of its two jobs."""
    process = user.start(*arguments, "--seconds-between-status-checks", "60")
    until(lambda: len(list((user.folder / ".snakemake" / "incomplete").glob("*"))) == 2, what="the jobs are submitted")
    process.kill()
    process.wait()


def test_interrupt_cancels_what_is_on_the_grid(system: System) -> None:
    user = User(system, SLOW)
    process = user.start("--config", "sleep=600")
    until(lambda: [state for _, state in user.jobs()] == ["active"] * 2, what="the jobs run")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 1, user.read("snakemake.log")
    assert user.jobs() == [("slow name=a", "cancelled"), ("slow name=b", "cancelled")]
    assert "Traceback" not in user.read("snakemake.log")
    user.run("--config", "sleep=0")
    assert user.read("a") == "a\n"


def test_killed_snakemake_finds_its_jobs_again_though_the_server_was_away(system: System) -> None:
    user = User(system, SLOW)
    run_and_kill(user, "--config", "sleep=8")
    process = user.start("--config", "sleep=8", "--nolock")
    until(lambda: "Execute 2 jobs" in user.read("snakemake.log"), what="it goes on")
    assert system.server is not None
    system.server.kill()
    until(lambda: "trying again until it answers" in user.read("snakemake.log"), what="that is told")
    system.restart_server()
    assert process.wait(100) == 0, user.read("snakemake.log")
    assert "the server is there again" in user.read("snakemake.log")
    assert (user.read("a"), user.read("b")) == ("a\n", "b\n")
    assert user.jobs() == [], "no job was submitted twice"


def test_killed_snakemake_does_not_take_the_results_of_commands_that_were_changed(system: System) -> None:
    user = User(system, SLOW)
    run_and_kill(user, "--config", "sleep=0", "word=old")
    until(lambda: [state for _, state in user.jobs()] == ["completed"] * 2, what="they end")
    user.run("--nolock", "--config", "sleep=0", "word=new")
    assert user.read("a") == "a new\n"


def test_killed_snakemake_does_not_take_jobs_that_were_to_run_elsewhere(system: System) -> None:
    user = User(system, SLOW)
    run_and_kill(user, "--config", "sleep=600")
    process = user.start("--nolock", "--config", "sleep=600", "--default-resources", "mem_mb=100")
    until(lambda: [state for _, state in user.jobs()].count("cancelled") == 2, what="the old jobs are cancelled")
    until(lambda: len(user.jobs()) == 4, what="there are new ones")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 1, user.read("snakemake.log")
    assert {state for _, state in user.jobs()} == {"cancelled"}


IN_MACHINES = """
rule all:
    input: "small.txt", "fails"

rule small:
    input: "a small one", "deep/a large one"
    output: "small.txt", directory("empty")
    log: "small.log"
    threads: 2
    resources: mem_mb=256
    shell: "cat {input:q} >{output[0]}; mkdir {output[1]}; [ -L {input[1]:q} ] && echo $OMP_NUM_THREADS >{log}; chmod 640 {output[0]}"

rule fails:
    output: "fails"
    resources: mem_mb=256
    shell: "(exit 7); echo x >{output}"
"""


def test_rules_run_in_virtual_machines_that_have_no_bash(system: System, vm_worker: dict[str, str]) -> None:
    system.publish_template(tiny_template().qcow2, "tiny")
    system.add_worker("vms", **vm_worker)
    user = User(system, IN_MACHINES)
    (user.folder / "deep").mkdir()
    (user.folder / "a small one").write_text("small\n")
    (user.folder / "deep" / "a large one").write_text("x" * 5000)
    said = user.run("--keep-going", "--deskgrid-disk", "tiny", "--deskgrid-data-from", "4KiB", expect=1)
    assert "ended with 7" in said
    assert user.read("small.txt") == "small\n" + "x" * 5000 and user.read("small.log") == "2\n"
    assert (user.folder / "small.txt").stat().st_mode & 0o777 == 0o640 and (user.folder / "empty").is_dir()
