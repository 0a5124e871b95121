"""Cases, and the stages that measure what a target really does."""
