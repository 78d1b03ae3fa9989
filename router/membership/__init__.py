"""The members of the fleet and their health."""
