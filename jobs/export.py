"""Write the ground truth in the schemas of the data sets released with the paper, for tools that read those."""

from ray_explain.launch import launch


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    return launch("export_ground_truth", __doc__ or "", argv)


if __name__ == "__main__":
    raise SystemExit(main())
