"""By which network interface the ranks of several machines find each other."""

import ipaddress
import socket
from collections.abc import Mapping

import psutil

from sfumato.errors import UserError

# gloo takes a name as it is; NCCL and HCCL take it as the beginning of names, unless "=" stands before it.
FORMS = {"GLOO_SOCKET_IFNAME": "{}", "NCCL_SOCKET_IFNAME": "={}", "HCCL_SOCKET_IFNAME": "={}"}

PORT = 29500
"""Where node 0 listens, if nothing else is said."""


def address(master: str) -> tuple[str, int]:
    """HOST, HOST:PORT, IPv6 as [ADDRESS]:PORT. Raises UserError for anything else."""
    host, colon, port = master.rpartition(":")
    if not colon or master.endswith("]") or (":" in host and not host.startswith("[")):
        host, port = master, str(PORT)
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"--master {master}", "that is no HOST[:PORT]", "such as --master node1:29500")
    return host, int(port)


def resolved(host: str, port: int) -> list[str]:
    """The addresses of a host's name; none where it has no known one."""
    try:
        return list(
            dict.fromkeys(str(each[4][0]) for each in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        )
    except (OSError, UnicodeError):
        return []


def toward(host: str) -> str | None:
    """The name of the interface that reaches a host, by the system's routes; nothing is sent.

    On the host itself it is the one that has its address. None where there is no route, or only loopback.
    """
    for address in resolved(host, 9):
        try:
            # Connecting a UDP socket chooses the route and so our own address, and no more.
            with socket.socket(
                socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM
            ) as probe:
                probe.connect((address, 9))
                own = str(probe.getsockname()[0])
        except OSError:
            continue
        for name, addresses in psutil.net_if_addrs().items():
            if own in [each.address.split("%")[0] for each in addresses] and not loopback(own):
                return name
    return None


def loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def variables(env: Mapping[str, str], host: str) -> dict[str, str]:
    """What `env` lacks so that gloo, NCCL and HCCL take that interface; what the user has set stays."""
    wanted = [name for name in FORMS if name not in env]
    found = toward(host) if wanted else None
    return {name: FORMS[name].format(found) for name in wanted} if found else {}
