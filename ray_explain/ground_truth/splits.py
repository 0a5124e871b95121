"""Which split a group belongs to: told by its content alone, so the same in every run, file and order."""

import hashlib

VALIDATION_SHARE, TEST_SHARE = 0.10, 0.25


def split_of(group: str, *, validation: float = VALIDATION_SHARE, test: float = TEST_SHARE, salt: str = "") -> str:
    """The split of all cases of `group`; another `salt` deals the groups anew.

    `validation` and `test` are the expected shares of groups, not of cases.

    Raises:
        ValueError: the shares are negative or leave nothing for training.
    """
    if validation < 0 or test < 0 or validation + test >= 1:
        raise ValueError(f"shares of validation {validation} and test {test}: at least 0, together below 1")
    digest = hashlib.sha256(f"{salt}\n{group}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    if place < test:
        return "test"
    return "validation" if place < test + validation else "train"
