"""Ask every explainer the held-out questions, with controls and baselines. What is finished is left as it is.

With --power: say from the finished scores how many questions and seeds a wanted difference needs.
"""

import sys

from ray_explain.launch import launch

POWER = "--power"


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    given = sys.argv[1:] if argv is None else argv
    step = "say_power" if POWER in given else "evaluate"
    return launch(step, __doc__ or "", [word for word in given if word != POWER])


if __name__ == "__main__":
    raise SystemExit(main())
