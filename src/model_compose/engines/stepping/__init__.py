"""What engines share that compute in this process, one step of a batch after the other."""
