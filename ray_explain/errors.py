"""The two ways a job ends badly."""


class BadInput(ValueError):
    """What the user gave cannot be used; the message names the value, the rule and the way out (exit code 2)."""


class JobFailed(RuntimeError):
    """The input was fine but the work could not be finished (exit code 1); finished artifacts are whole."""
