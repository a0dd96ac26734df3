"""A base's weights on disk, one tensor at a time: reading them by the names they are stored under, and writing them."""
