"""Each job is a page: it reads the config and makes one call."""
