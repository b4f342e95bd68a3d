"""What refusals of Redis mean, how long they are waited for, and what a person is told of them."""
