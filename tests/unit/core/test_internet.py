"""What is the public internet, and what is not."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deskgrid.core.internet import is_public, near_networks


@pytest.mark.parametrize("text", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8"])
def test_public_addresses(text: str) -> None:
    assert is_public(ipaddress.ip_address(text))


@pytest.mark.parametrize(
    "text",
    ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1", "240.0.0.1",
     "255.255.255.255", "192.88.99.1", "::", "::1", "fe80::1", "fd12::1", "ff02::1", "::ffff:10.0.0.1", "::ffff:127.0.0.1", "::10.0.0.1",
     "64:ff9b::a00:1", "64:ff9b:1::808:808", "2002:808:808::1", "2002:a00:1::1", "192.0.0.9", "3fff::1", "fec0::1", "2001:db8::1", "2001::f5ff:fffe"],
)  # fmt: skip
def test_addresses_that_are_not_public(text: str) -> None:
    assert not is_public(ipaddress.ip_address(text))


def test_what_is_near_is_not_public() -> None:
    near = near_networks(
        [("9.9.9.9", "255.255.255.0"), ("2600:1:2:300::5%eth0", "ffff:ffff:ffff:ffff::"), ("00:11:22:33:44:55", None)]
    )
    for text in ("9.9.9.1", "2600:1:2:3ff::77", "::ffff:9.9.9.1", "64:ff9b::909:901"):
        assert not is_public(ipaddress.ip_address(text), near)
    assert is_public(ipaddress.ip_address("9.9.8.1"), near)


@given(st.ip_addresses(v=4), st.ip_addresses(v=6))
def test_an_address_that_hides_another_is_no_more_public_than_that(v4: ipaddress.IPv4Address, v6: ipaddress.IPv6Address) -> None:
    for prefix in ("64:ff9b::", "::ffff:0:0", "::"):
        hiding = ipaddress.IPv6Address(int(ipaddress.IPv6Address(prefix)) | int(v4))
        assert is_public(v4) or not is_public(hiding)
    assert not is_public(v6) or v6.is_global


@given(st.lists(st.tuples(st.text(max_size=20), st.none() | st.text(max_size=20))))
def test_whatever_the_system_says_of_its_interfaces_is_taken(interfaces: list[tuple[str, str | None]]) -> None:
    near_networks(interfaces)
