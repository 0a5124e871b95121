"""Train and score every explainer, target, seed, share of the data and setting. What is finished is left as it is."""

from ray_explain.launch import launch


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    return launch("run_sweep", __doc__ or "", argv)


if __name__ == "__main__":
    raise SystemExit(main())
