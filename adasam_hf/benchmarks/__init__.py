"""What AdaSAM costs and what it does: time and memory of a step, flatness of what it finds, pictures of the loss."""
