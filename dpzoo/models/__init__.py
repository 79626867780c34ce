"""The families, one file each, and what they share: `base` and the tasks in `heads`."""
