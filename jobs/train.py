"""Train an explainer for each pairing of the experiment. What is finished is left as it is."""

from ray_explain.launch import launch


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    return launch("train_explainers", __doc__ or "", argv, plan="plan_training")


if __name__ == "__main__":
    raise SystemExit(main())
