"""Running a model for its users: batched reading and writing. Plain functions and classes, tested without a cluster."""
