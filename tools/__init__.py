"""What a user runs by hand: traffic generator and checker, demo, benchmarks."""
