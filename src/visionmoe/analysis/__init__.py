"""What the router does: recorded routings, statistics and figures."""
