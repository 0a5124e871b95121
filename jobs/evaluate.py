"""Ask every explainer the held-out questions, with controls and baselines. What is finished is left as it is."""

from ray_explain.launch import launch


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    return launch("evaluate", __doc__ or "", argv)


if __name__ == "__main__":
    raise SystemExit(main())
