"""The only package that imports ray or deepspeed."""
