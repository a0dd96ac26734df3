"""What engines share whose model runs in another process, behind HTTP."""
