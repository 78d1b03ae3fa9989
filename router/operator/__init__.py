"""RPCs for operators: repository control over the fleet, and inspection of the router's state."""
