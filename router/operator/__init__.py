"""The operator's RPCs: repository control over the fleet, and what the router knows."""
