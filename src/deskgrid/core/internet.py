"""Which addresses are the public internet, for machines that may reach nothing else of the outside (docs/decisions/015).

Public is what everybody can reach from everywhere, and what is not near: not this PC, nor a network that it is in, whose devices may
have global addresses, too. Addresses of IPv6 that hide one of IPv4 are judged by both. What Python's own list says differs between its
versions, so what they disagree on is refused here.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

__all__ = ["IpAddress", "IpNetwork", "is_public", "near_networks"]

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IpNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_NEVER = tuple(
    ipaddress.ip_network(text)
    for text in (
        "100.64.0.0/10",  # between a provider's NAT and its customers (RFC 6598)
        "192.0.0.0/24",  # of protocols (RFC 6890)
        "192.88.99.0/24",  # the nearest 6to4 relay (RFC 7526)
        "2002::/16",  # 6to4, given up (RFC 7526)
        "2001::/23",  # of protocols (RFC 2928), with Teredo, which hides an address of IPv4
        "3fff::/20",  # documentation (RFC 9637)
        "64:ff9b:1::/48",  # NAT64 inside of one network (RFC 8215)
        "::/96",  # IPv4 in IPv6, an old form (RFC 4291)
        "fec0::/10",  # of a site (RFC 3879)
        "5f00::/16",  # segment routing (RFC 9602)
    )
)
_SITE_PREFIX = 56
"""What a provider gives one home of IPv6."""


def is_public(address: IpAddress, near: Iterable[IpNetwork] = ()) -> bool:
    """Tell whether an address is of the public internet, and in none of the networks `near`."""
    return all(_is_public(one, tuple(near)) for one in _meant(address))


def near_networks(interfaces: Iterable[tuple[str, str | None]]) -> tuple[IpNetwork, ...]:
    """Return the networks that a PC is in. `interfaces`: its addresses with their netmasks; what cannot be read counts as one address."""
    return tuple(network for address, mask in interfaces if (network := _network(address.partition("%")[0], mask)) is not None)


def _network(address: str, mask: str | None) -> IpNetwork | None:
    try:
        host = ipaddress.ip_address(address)
    except ValueError:
        return None
    if isinstance(host, ipaddress.IPv6Address):
        return ipaddress.IPv6Network((host, _SITE_PREFIX), strict=False)
    try:
        return ipaddress.IPv4Network(f"{host}/{mask or 32}", strict=False)
    except ValueError:
        return ipaddress.IPv4Network((host, 32))


def _is_public(address: IpAddress, near: tuple[IpNetwork, ...]) -> bool:
    if not address.is_global or address.is_multicast:
        return False
    return not any(address in network for network in (*_NEVER, *near) if network.version == address.version)


def _meant(address: IpAddress) -> tuple[IpAddress, ...]:
    """Return the addresses that are reached by dialling one: in IPv6 there are two ways to write one of IPv4."""
    if isinstance(address, ipaddress.IPv4Address):
        return (address,)
    if address.ipv4_mapped is not None:
        return (address.ipv4_mapped,)
    return (address, ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)) if address in _NAT64 else (address,)
