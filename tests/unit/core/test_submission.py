"""Bad values of a job are refused with the field and what is allowed."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deskgrid.core.submission import check_spec
from deskgrid.errors import InvalidInput
from deskgrid.model.jobs import JobSpec, Limits, Machine, Results
from deskgrid.model.machines import MachineKind, Network
from deskgrid.model.overlay import API_SERVICE, CACHE_SERVICE, Offer, Reach, ServiceRef, parse_offer, parse_reach

GOOD = JobSpec(machine=Machine(disk="tiny"))
WEB, SSH = Offer("web", 8080), Offer("ssh", 22)
DB = Reach("db", ServiceRef("db", "job-41"), 5432)


def networked(**machine: object) -> JobSpec:
    return JobSpec(machine=Machine(disk="tiny", **({"network": Network.OVERLAY} | machine)))


def test_defaults_are_allowed():
    check_spec(GOOD)


@pytest.mark.parametrize("trust", [("mine",), ("everyone",), ("mine", "group:hep", "user:bob")])
def test_secrets_are_allowed_with_those_who_may_see_them(trust: tuple[str, ...]):
    check_spec(msgspec.structs.replace(GOOD, secrets=("rucio.token", "PASSWORD_2"), trust=trust))
    check_spec(msgspec.structs.replace(GOOD, trust=trust))


@pytest.mark.parametrize("network", [Network.OVERLAY, Network.INTERNET])
def test_services_are_allowed_with_a_network(network: Network):
    reach = (
        DB,
        Reach("other-db", ServiceRef("db", "user-ann"), 5432),
        Reach("grid", API_SERVICE, 8470),
        Reach("cache", CACHE_SERVICE, 1),
    )
    check_spec(
        networked(network=network, offer=(WEB, SSH), reach=reach, share=("everyone", "group:hep"), ssh_keys=("ssh-ed25519 A",))
    )
    check_spec(networked(network=network, reach_wait_s=0.0))


@pytest.mark.parametrize(
    ("spec", "where"),
    [
        (JobSpec(machine=Machine(disk="tiny", cpus=0)), "machine.cpus"),
        (JobSpec(machine=Machine(disk="tiny", memory_bytes=1)), "machine.memory"),
        (JobSpec(machine=Machine(disk="tiny", scratch_bytes=1 << 60)), "machine.scratch"),
        (JobSpec(machine=Machine(disk="")), "machine.disk"),
        (JobSpec(machine=Machine(disk="installed:")), "machine.disk"),
        (JobSpec(machine=Machine(disk="installed:a/b")), "machine.disk"),
        (JobSpec(machine=Machine(disk="installed:a", kind=MachineKind.CONTAINER)), "machine.disk"),
        (networked(network=Network.NONE, offer=(WEB,)), "machine.offer"),
        (networked(network=Network.NONE, reach=(DB,)), "machine.reach"),
        (networked(offer=(WEB, Offer("web", 80))), "machine.offer"),
        (networked(offer=(WEB, Offer("ssh", 8080))), "machine.offer"),
        (networked(offer=(Offer("Web", 8080),)), "machine.offer"),
        (networked(offer=(Offer("web", 0),)), "machine.offer"),
        (networked(offer=(Offer("web", 80_000),)), "machine.offer"),
        (networked(offer=(Offer("web:1", 80),)), "machine.offer"),
        (networked(offer=tuple(Offer(f"web{number}", number) for number in range(1, 66))), "machine.offer"),
        (networked(reach=(DB, DB)), "machine.reach"),
        (networked(reach=tuple(Reach(f"db{number}", DB.service, 1) for number in range(65))), "machine.reach"),
        (networked(reach=(Reach("d b", DB.service, 1),)), "machine.reach"),
        (networked(reach=(Reach("db", ServiceRef("db", "job-0"), 1),)), "machine.reach"),
        (networked(reach=(Reach("db", ServiceRef("db", "job-x"), 1),)), "machine.reach"),
        (networked(reach=(Reach("db", ServiceRef("db.job-1:5", "job-41"), 1),)), "machine.reach"),
        (networked(reach=(Reach("db", ServiceRef("db", "user-"), 1),)), "machine.reach"),
        (networked(reach=(Reach("db", DB.service, -1),)), "machine.reach"),
        (networked(reach=(Reach("db", ServiceRef("db", "server"), 1),)), "machine.reach"),
        (networked(reach=(Reach("db", ServiceRef("api", "worker"), 1),)), "machine.reach"),
        (networked(reach=(Reach("db", ServiceRef("cache", "server"), 1),)), "machine.reach"),
        *((networked(reach=(Reach(name, DB.service, 1),)), "machine.reach") for name in ("localhost", "job", "socks", "services")),
        (networked(offer=(WEB,), share=("hep",)), "machine.share"),
        (networked(offer=(WEB,), share=("everyone",) * 65), "machine.share"),
        (networked(share=("everyone",)), "machine.share"),
        (networked(ssh_keys=("ssh-ed25519 A\nssh-ed25519 B",)), "machine.ssh_keys"),
        (networked(ssh_keys=("k",) * 21), "machine.ssh_keys"),
        (networked(ssh_keys=("\u00e9" * 1025,)), "machine.ssh_keys"),
        (networked(ssh_keys=("\udc80",)), "machine.ssh_keys"),
        (networked(ssh_keys=("",)), "machine.ssh_keys"),
        (networked(reach_wait_s=-1.0), "machine.reach_wait"),
        (networked(driver="xen"), "machine.driver"),
        (networked(reach_wait_s=86401.0), "machine.reach_wait"),
        (msgspec.structs.replace(GOOD, limits=Limits(wall_time_s=float("nan"))), "limits.wall_time"),
        (msgspec.structs.replace(GOOD, limits=Limits(attempts=0)), "limits.attempts"),
        (msgspec.structs.replace(GOOD, name="a\nb"), "name"),
        (msgspec.structs.replace(GOOD, secrets=("a/b",), trust=("mine",)), "secrets.files"),
        (msgspec.structs.replace(GOOD, secrets=("a", "a"), trust=("mine",)), "secrets.files"),
        (msgspec.structs.replace(GOOD, secrets=tuple(f"s{number}" for number in range(101)), trust=("mine",)), "secrets.files"),
        (msgspec.structs.replace(GOOD, secrets=("token",)), "secrets.trust"),
        (msgspec.structs.replace(GOOD, secrets=("token",), trust=("bob",)), "secrets.trust"),
        (msgspec.structs.replace(GOOD, trust=("user:7",)), "secrets.trust"),
        (msgspec.structs.replace(GOOD, trust=("mine",) * 65), "secrets.trust"),
        (
            JobSpec(
                machine=Machine(kind=MachineKind.PROCESS, warm=True),
                command=("/app/x",),
                results=Results(paths=()),
                secrets=("token",),
                trust=("mine",),
            ),
            "secrets.files",
        ),
        (msgspec.structs.replace(GOOD, results=Results(paths=())), "results.paths"),
        (msgspec.structs.replace(GOOD, results=Results(paths=("\u00e9" * 1000,) * 11)), "results.paths"),
    ],
)
def test_value_out_of_bounds_names_its_field(spec: JobSpec, where: str):
    with pytest.raises(InvalidInput) as caught:
        check_spec(spec)
    assert caught.value.where == where


@given(st.integers(), st.integers(), st.floats())
def test_any_numbers_are_allowed_or_refused_clearly(cpus: int, memory: int, wall: float):
    spec = JobSpec(machine=Machine(disk="d", cpus=cpus, memory_bytes=memory), limits=Limits(wall_time_s=wall))
    try:
        check_spec(spec)
    except InvalidInput as error:
        assert error.where


@given(
    st.builds(Offer, st.text(max_size=8), st.integers()),
    st.builds(Reach, st.text(max_size=8), st.builds(ServiceRef, st.text(max_size=8), st.text(max_size=8)), st.integers()),
)
def test_any_services_are_allowed_as_a_job_file_has_them_or_refused(offer: Offer, reach: Reach):
    try:
        check_spec(networked(offer=(offer,), reach=(reach,)))
    except InvalidInput as error:
        assert error.where in ("machine.offer", "machine.reach")
    else:
        assert parse_offer(str(offer)) == offer
        assert parse_reach(reach.name, str(reach)) == reach


def test_a_job_neither_offers_a_console_of_its_own_nor_reaches_one():
    with pytest.raises(InvalidInput, match="console is the machine's screen"):
        check_spec(networked(offer=(Offer("console", 5900),)))
    for service in ("console.job-7", "console.db.set"):
        with pytest.raises(InvalidInput, match="cannot reach the screen"):
            check_spec(networked(reach=(parse_reach("screen", f"{service}:5900"),)), in_set=True)
    check_spec(networked(reach=(parse_reach("screen", "console.user:5900"),)))


@pytest.mark.parametrize("field", ["cpus", "memory_bytes", "scratch_bytes"])
def test_number_of_hundreds_of_digits_is_refused_like_any_other(field: str):
    for value in (10**400, -(10**400), float("nan"), float("inf")):
        with pytest.raises(InvalidInput, match="out of bounds") as refused:
            check_spec(JobSpec(machine=Machine(disk="tiny", **{field: value})))
        assert len(refused.value.message) < 200
