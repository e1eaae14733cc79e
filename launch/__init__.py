"""Starting runs on machines that are rented; no logic of training."""
