"""What is counted and priced of requests and attempts."""
