"""What keeps others out of a user's clusters."""

import os
from pathlib import Path

from ray._private.authentication.authentication_token_generator import generate_new_authentication_token
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]


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
