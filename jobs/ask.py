"""Ask a trained explainer one question, and measure on its target whether the answer is right."""

from ray_explain.ask import main

if __name__ == "__main__":
    raise SystemExit(main())
