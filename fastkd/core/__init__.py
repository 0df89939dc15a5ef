"""How a call of a loss travels: its checks, its numbers, the ops and their gradient."""
