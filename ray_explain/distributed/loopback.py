"""A Ray of our own, for this machine's user alone."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ray._private import services
from ray._private.authentication.authentication_token_generator import generate_new_authentication_token
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

LOOPBACK = "127.0.0.1"


@contextmanager
def on_loopback() -> Iterator[None]:
    """A Ray that the block starts at `LOOPBACK` listens there and nowhere else, and there is a token (`make_token`).

    Ray (2.60) takes 127.0.0.1 for the machine's outward address, and most of its ports are then open to the network. A
    head that others join (`ray start`) cannot be held back so: they take the address they are given in the same way.
    """
    make_token()
    replaced, services.resolve_ip_for_localhost = services.resolve_ip_for_localhost, lambda host: host
    try:
        yield
    finally:
        services.resolve_ip_for_localhost = replaced


def make_token() -> None:
    """The token that this user's clusters ask for, for this user's eyes: one that Ray makes is readable by all users of
    the machine."""
    file, known = Path.home() / ".ray" / "auth_token", AuthenticationTokenLoader.instance()
    if known.has_token(ignore_auth_mode=True):
        if file.exists():
            file.chmod(0o600)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w") as made:
        made.write(generate_new_authentication_token())
    known.reset_cache()
